//! Generation is the same one by one and together, in one piece and in chunks, with any number of threads; and it ends
//! where it should.

mod support;

use quorate_model::sampling::SamplingParams;
use quorate_model::{
    CacheLayout, Event, Finish, Flow, GenerateOptions, Generation, KvCache, KvType, Lens, Model, ModelError, NoLens,
    OpenOptions, PREFILL_CHUNK, Phase, Segment, Site,
};
use support::{
    Capture, Visit, as_generated, assert_close, assert_same, chain, embedded, fixture, largest, logits_in_turn,
    logits_of, moe_cases, noise, open, plain, prompts, rows,
};

/// Prompts of different lengths; most answers end by themselves.
const QUESTIONS: [&str; 9] = [
    "<|user|>78+95=<|assistant|>",
    "<|user|>z=2\nx=3\ne=3\nq=7\nh=9\ns=3\nj=3\nm=0\nz=<|assistant|>",
    "<s>",
    "<|user|>swap(tail(p l a x m))<|assistant|>",
    "<|user|>What is 25*6?<|assistant|>",
    "<s>They quitted it only with the removal of the tea-things. The card-table was then placed, and Elinor began to \
     wonder at herself for having ever entertained a hope of finding time for conversation at the park. They all rose",
    "<|user|>Where did Frank Glover study?<|assistant|>",
    "<|user|>swap(g r y)<|assistant|>",
    "<|user|>Pamela Corbin works for which company?<|assistant|>",
];

fn questions(model: &Model) -> Vec<Vec<u32>> {
    QUESTIONS.iter().map(|text| model.tokenizer().encode(text, false).unwrap()).collect()
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, keep_special: true, ..GenerateOptions::default() }
}

fn sampled(seed: u64) -> GenerateOptions {
    let sampling = SamplingParams { temperature: 1.1, top_k: 40, top_p: 0.98, seed, ..SamplingParams::default() };
    GenerateOptions { sampling, ..greedy(24) }
}

fn generate(model: &Model, prompt: &[u32], options: &GenerateOptions) -> Generation {
    model.generate(prompt, 0, &mut KvCache::new(model.spec(), 1), options, &mut NoLens, &mut |_| true).unwrap()
}

fn generate_many(model: &Model, prompts: &[Vec<u32>], parallel: usize, options: &GenerateOptions) -> Vec<Generation> {
    let mut answers = vec![None; prompts.len()];
    let mut keep = |i: usize, answer| {
        assert!(answers[i].replace(answer).is_none(), "prompt {i} was answered twice");
        true
    };
    model.generate_many(prompts, parallel, options, &mut NoLens, &mut keep).unwrap();
    answers.into_iter().map(Option::unwrap).collect()
}

#[track_caller]
fn assert_alike(what: &str, found: &Generation, expected: &Generation) {
    assert_eq!(
        (&found.tokens, &found.text, found.finish),
        (&expected.tokens, &expected.text, expected.finish),
        "{what}"
    );
}

#[test]
fn together_as_one_by_one() {
    let model = open(&embedded());
    let prompts = questions(&model);
    let stops = |texts: &[&str]| GenerateOptions { stop: texts.iter().map(|t| t.to_string()).collect(), ..greedy(30) };
    let unending = GenerateOptions { ignore_eos: true, ..greedy(12) };
    let ways =
        [greedy(0), greedy(1), greedy(40), stops(&["e", " of"]), stops(&["1"]), unending, sampled(3), sampled(4)];
    let mut finishes = Vec::new();
    for (w, options) in ways.iter().enumerate() {
        let alone: Vec<Generation> = prompts.iter().map(|prompt| generate(&model, prompt, options)).collect();
        for parallel in [0, 1, 2, 4, 20] {
            for (i, found) in generate_many(&model, &prompts, parallel, options).iter().enumerate() {
                assert_alike(&format!("way {w}, {parallel} at a time, prompt {i}"), found, &alone[i]);
            }
        }
        finishes.extend(alone.iter().map(|answer| answer.finish));
    }
    for finish in [Finish::Eos, Finish::Stop, Finish::Length] {
        assert!(finishes.contains(&finish), "no answer ended by {}", finish.name());
    }
}

#[test]
fn seeds_reproduce_and_differ() {
    let model = open(&embedded());
    let prompt = &questions(&model)[5];
    let with = |seed| generate(&model, prompt, &sampled(seed)).tokens;
    let answers: Vec<Vec<u32>> = (0..6).map(with).collect();
    assert_eq!((0..6).map(with).collect::<Vec<_>>(), answers);
    for (i, answer) in answers.iter().enumerate() {
        assert!(!answers[..i].contains(answer), "seeds {i} and another give the same");
        assert_ne!(*answer, generate(&model, prompt, &greedy(24)).tokens);
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for path in [embedded(), fixture("qwen2_moe_mixed"), fixture("mixtral")] {
        let with = |threads: usize| {
            let mut model = Model::open(&path, threads, None).unwrap();
            model.load_all_experts().unwrap();
            let vocab = model.spec().vocab_size as f32;
            let prompt: Vec<u32> = noise(9, 70).iter().map(|v| (v.abs() * (vocab - 1.0)) as u32).collect();
            let one = logits_in_turn(&model, &as_generated(&prompt, &prompt[..3]), &mut Capture::new(Site::ALL));
            let options = GenerateOptions { ignore_eos: true, ..sampled(1) };
            let tokens = generate(&model, &prompt, &options).tokens;
            (tokens, logits_in_turn(&model, &as_generated(&prompt, &prompt[..5]), &mut NoLens), one)
        };
        let (tokens, logits, open_logits) = with(1);
        for threads in [2, 3] {
            let found = with(threads);
            assert_eq!(found.0, tokens, "{threads} threads");
            assert_same("logits", &found.1, &logits);
            assert_same("logits with all sites", &found.2, &open_logits);
        }
    }
}

/// A sequence's values in a batch are those alone, bit for bit, wherever it stands in the batch and whatever else is in
/// it, as long as the pass has a segment of several tokens: merging profiles relies on it. Passes of single tokens use
/// another kernel; they agree to 1e-5 of the largest logit.
#[test]
fn a_sequence_does_not_depend_on_its_neighbours() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let mut texts = texts;
        texts.push(texts[0][..2].to_vec());
        texts.push(texts[1].repeat(3));
        let alone: Vec<Vec<f32>> = texts.iter().map(|text| plain(&model, text)).collect();
        let vocab = model.spec().vocab_size as u32;
        for others in [0, 1, 7] {
            let other = |i: usize| -> Vec<u32> {
                noise(i as u64, 5 + 3 * i).iter().map(|v| (v.abs() * (vocab - 1) as f32) as u32).collect()
            };
            let fillers: Vec<Vec<u32>> = (0..others).map(other).collect();
            let all: Vec<&Vec<u32>> = fillers.iter().chain(texts.iter().rev()).chain(&fillers).collect();
            let segments: Vec<Segment> = all.iter().enumerate().map(|(slot, text)| rows(slot, text)).collect();
            let mut cache = KvCache::new(model.spec(), segments.len());
            let found = logits_of(model.forward(&segments, &mut cache, &mut NoLens).unwrap());
            let lengths: usize = fillers.iter().map(Vec::len).sum();
            let mut found = &found[lengths * vocab as usize..];
            for (i, expected) in alone.iter().enumerate().rev() {
                let (own, rest) = found.split_at(expected.len());
                assert_same(&format!("{name}, text {i}, {others} others"), own, expected);
                found = rest;
            }
        }
        // A decoded token beside others, and beside a prompt.
        let text = &texts[0];
        let (last, before) = text.split_last().unwrap();
        let prefix = rows(0, before);
        let step = |neighbours: &[Segment]| {
            let mut cache = KvCache::new(model.spec(), 9);
            model.forward(std::slice::from_ref(&prefix), &mut cache, &mut NoLens).unwrap();
            let segments = [&[Segment::decode(0, *last)], neighbours].concat();
            logits_of(model.forward(&segments, &mut cache, &mut NoLens).unwrap())[..vocab as usize].to_vec()
        };
        let expected = step(&[]);
        let decoding: Vec<Segment> = (1..9).map(|slot| Segment::decode(slot, slot as u32)).collect();
        for neighbours in [&decoding[..1], &decoding, &[rows(3, text)]] {
            assert_close(name, &step(neighbours), &expected, 1e-5 * largest(&expected));
        }
        let (beside_one, beside_many) =
            (step(&[rows(3, text)]), step(&[&decoding[..2], &[rows(7, &texts[1])]].concat()));
        assert_same(name, &beside_one, &beside_many);
        assert_close(name, &expected, &alone[0][alone[0].len() - vocab as usize..], 1e-5 * largest(&expected));
    }
}

#[test]
fn events_tell_everything_once_and_in_order() {
    let model = open(&embedded());
    for options in [greedy(40), sampled(2), GenerateOptions { stop: vec!["a".into()], ..greedy(40) }] {
        for prompt in questions(&model) {
            let (mut prefilled, mut tokens, mut text) = (Vec::new(), Vec::new(), String::new());
            let mut cache = KvCache::new(model.spec(), 1);
            let answer = model.generate(&prompt, 0, &mut cache, &options, &mut NoLens, &mut |event| {
                match event {
                    Event::Prefilled(count) => prefilled.push(count),
                    Event::Token(token) => tokens.push(token),
                    Event::Text(piece) => text.push_str(piece),
                }
                true
            });
            let answer = answer.unwrap();
            assert_eq!((prefilled, tokens, text), (vec![prompt.len()], answer.tokens, answer.text));
        }
    }
}

/// The cache's rounding shows, is as small as it should be, and is the same whether attention is computed at once or step by step.
#[test]
fn caches_of_fewer_bits_cost_what_they_should() {
    let model = open(&embedded());
    let tokens = &questions(&model)[5];
    let logits = |kv_type: KvType, lens: &mut dyn Lens| {
        let mut cache = KvCache::of_type(model.spec(), 1, kv_type);
        let (first, last) = tokens.split_at(tokens.len() - 1);
        model.forward(&[Segment::prompt(0, first.to_vec())], &mut cache, &mut NoLens).unwrap();
        let out = model.forward(&[Segment::decode(0, last[0])], &mut cache, lens).unwrap().logits.unwrap();
        out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let exact = logits(KvType::F32, &mut NoLens);
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    for (kv_type, least, most) in [(KvType::F16, 1e-5, 0.02), (KvType::Q8_0, 1e-3, 0.3)] {
        let found = logits(kv_type, &mut NoLens);
        let error = apart(&found, &exact);
        assert!((least..most).contains(&error), "{kv_type:?}: {error}");
        let by_steps = logits(kv_type, &mut Capture::new(&[Site::AttnScores]));
        assert!(apart(&found, &by_steps) < 1e-4, "{kv_type:?}");
    }
    let bytes = |kv_type| CacheLayout::own(model.spec(), kv_type).bytes(64);
    assert_eq!([bytes(KvType::F16) * 2, bytes(KvType::Q8_0) * 128 / 34], [bytes(KvType::F32); 2]);
    // Heads 16 wide are no whole blocks.
    let options = OpenOptions { threads: 1, kv_type: Some(KvType::Q8_0), ..OpenOptions::default() };
    let refused = Model::open_with(&fixture("olmoe"), &options, &mut |_, _| true).err().expect("no whole blocks");
    assert!(refused.to_string().contains("--kv-type f16"), "{refused}");
}

#[test]
fn stop_texts_end_an_answer_wherever_they_lie() {
    let model = open(&embedded());
    let prompt = &questions(&model)[5];
    let whole = generate(&model, prompt, &greedy(30));
    let text = whole.text.as_str();
    assert!(text.len() > 40 && text.is_ascii());
    for (start, len) in (0..text.len() - 12).step_by(3).zip([1, 2, 5, 12].into_iter().cycle()) {
        let stop = &text[start..start + len];
        let options = GenerateOptions { stop: vec!["never".into(), stop.into()], ..greedy(30) };
        let answer = generate(&model, prompt, &options);
        let expected = text.split_once(stop).unwrap().0;
        assert_eq!((answer.text.as_str(), answer.finish), (expected, Finish::Stop), "stop at {stop:?}");
        assert!(whole.tokens.starts_with(&answer.tokens));
    }
    let never = GenerateOptions { stop: vec!["never".into(), String::new()], ..greedy(30) };
    assert_alike("a stop text that does not occur", &generate(&model, prompt, &never), &whole);
}

#[test]
fn the_context_is_filled_and_not_exceeded() {
    let model = open(&fixture("llama"));
    let prompt = &prompts("llama")[0];
    let context = model.spec().max_position_embeddings;
    let endless = GenerateOptions { ignore_eos: true, ..greedy(usize::MAX) };
    let mut cache = KvCache::new(model.spec(), 1);
    let answer = model.generate(prompt, 0, &mut cache, &endless, &mut NoLens, &mut |_| true).unwrap();
    assert_eq!((answer.tokens.len(), answer.finish), (context - prompt.len(), Finish::Length));
    assert_eq!(cache.len(0), context - 1, "the last token is not fed");

    let long: Vec<u32> = prompt.iter().copied().cycle().take(context).collect();
    let one_left = generate(&model, &long[1..], &endless);
    assert_eq!((one_left.tokens.len(), one_left.finish), (1, Finish::Length));
    let message = format!("the prompt has {context} tokens, the model's context is {context}");
    let mut cache = KvCache::new(model.spec(), 1);
    let error = model.generate(&long, 0, &mut cache, &endless, &mut NoLens, &mut |_| true).unwrap_err();
    assert!(chain(&error).contains(&message), "{}", chain(&error));
    let many = model.generate_many(&[prompt.clone(), long.clone()], 2, &greedy(1), &mut NoLens, &mut |_, _| true);
    assert!(chain(&many.unwrap_err()).contains(&message));
    // What the cache holds counts.
    model.forward(&[rows(0, &long[..300])], &mut cache, &mut NoLens).unwrap();
    let error = model.generate(&long[..212], 0, &mut cache, &endless, &mut NoLens, &mut |_| true).unwrap_err();
    assert!(chain(&error).contains(&message), "{}", chain(&error));
    let empty = model.generate(&[], 0, &mut cache, &endless, &mut NoLens, &mut |_| true).unwrap_err();
    assert!(matches!(empty, ModelError::EmptyPrompt));
    assert_eq!(cache.len(0), 300);
}

/// A conversation that goes on in the cache is one whole prompt, for repetition penalties too.
#[test]
fn a_continued_cache_is_the_whole_text() {
    let model = open(&embedded());
    let whole = &questions(&model)[5];
    let penalty = SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() };
    for options in [greedy(20), sampled(5), GenerateOptions { sampling: penalty, ..greedy(20) }] {
        let expected = generate(&model, whole, &options);
        for split in [1, 20, whole.len() - 1] {
            let mut cache = KvCache::new(model.spec(), 1);
            let (first, second) = whole.split_at(split);
            // What was there before and is cut off is forgotten.
            model.forward(&[rows(0, &[first, &whole[3..9]].concat())], &mut cache, &mut NoLens).unwrap();
            cache.truncate(0, split);
            let found = model.generate(second, 0, &mut cache, &options, &mut NoLens, &mut |_| true).unwrap();
            assert_alike(&format!("from token {split}"), &found, &expected);
        }
    }
}

/// A prompt of three chunks, in a model of long context.
fn long() -> (Model, Vec<u32>) {
    let prompt = prompts("qwen3_moe")[0].iter().copied().cycle().take(2 * PREFILL_CHUNK + 100).collect();
    (open(&fixture("qwen3_moe")), prompt)
}

#[test]
fn long_prompts_are_computed_in_chunks() {
    let (model, prompt) = long();
    let mut phases = Vec::new();
    let mut look = Visit::new(&[Site::FfnIn], |at, _| {
        if at.layer == 0 {
            phases.extend_from_slice(&at.rows.phase);
        }
        Ok(Flow::Continue)
    });
    let mut told = Vec::new();
    let mut cache = KvCache::new(model.spec(), 1);
    let found = model.prefill(&prompt, 0, &mut cache, &mut look, &mut |event| {
        if let Event::Prefilled(count) = event {
            told.push(count);
        }
        true
    });
    assert_eq!(told, [PREFILL_CHUNK, 2 * PREFILL_CHUNK, prompt.len()]);
    let prompt_rows = phases.iter().take_while(|&&p| p == Phase::Prompt).count();
    assert_eq!((prompt_rows, phases.last(), phases.len()), (prompt.len() - 1, Some(&Phase::PromptLast), prompt.len()));
    let mut at_once = KvCache::new(model.spec(), 1);
    let segment = Segment::prompt(0, prompt.clone());
    let expected = logits_of(model.forward(&[segment], &mut at_once, &mut NoLens).unwrap());
    assert_close("chunks", &found.unwrap().unwrap(), &expected, 1e-5 * largest(&expected));
    assert_eq!(cache.lengths(), at_once.lengths());

    let options = GenerateOptions { ignore_eos: true, ..greedy(8) };
    let texts = [prompt.clone(), prompt[..30].to_vec(), prompt[7..].to_vec(), prompt[..2].to_vec()];
    for (i, found) in generate_many(&model, &texts, 3, &options).iter().enumerate() {
        assert_alike(&format!("prompt {i}"), found, &generate(&model, &texts[i], &options));
    }
}

#[test]
fn a_caller_can_cancel_at_every_event() {
    let (model, prompt) = long();
    let options = GenerateOptions { ignore_eos: true, ..greedy(8) };
    let whole = generate(&model, &prompt, &options);
    let cancelled_at = |event: usize| {
        let mut cache = KvCache::new(model.spec(), 1);
        let (mut seen, mut text) = (0, String::new());
        let answer = model.generate(&prompt, 0, &mut cache, &options, &mut NoLens, &mut |e| {
            if let Event::Text(piece) = e {
                text.push_str(piece);
            }
            seen += 1;
            seen <= event
        });
        let answer = answer.unwrap();
        assert_eq!(text, answer.text);
        (answer, cache.len(0))
    };
    for (event, computed) in [PREFILL_CHUNK, 2 * PREFILL_CHUNK, prompt.len()].into_iter().enumerate() {
        let (answer, held) = cancelled_at(event);
        assert_eq!((answer.finish, answer.tokens.len(), held), (Finish::Cancelled, 0, computed), "after chunk {event}");
    }
    for event in 3..6 {
        let (answer, _) = cancelled_at(event);
        assert_eq!(answer.finish, Finish::Cancelled);
        assert!(!answer.tokens.is_empty() && answer.tokens.len() < 8 && whole.tokens.starts_with(&answer.tokens));
        assert!(whole.text.starts_with(answer.text.trim_end_matches('\u{fffd}')), "{:?} {:?}", answer.text, whole.text);
    }
    // Together: the first answer is the last.
    let mut answers = 0;
    let mut once = |_: usize, _: Generation| {
        answers += 1;
        false
    };
    let texts = vec![prompt[..9].to_vec(); 5];
    model.generate_many(&texts, 2, &options, &mut NoLens, &mut once).unwrap();
    assert_eq!(answers, 1);
}

#[test]
fn a_lens_that_stops_ends_a_generation() {
    let (model, prompt) = long();
    let options = GenerateOptions { ignore_eos: true, ..greedy(8) };
    let whole = generate(&model, &prompt, &options);
    for (pass, tokens, held) in
        [(0, 0, 0), (1, 0, PREFILL_CHUNK), (2, 0, 2 * PREFILL_CHUNK), (3, 1, prompt.len()), (6, 4, prompt.len() + 3)]
    {
        let mut passes = 0;
        let mut stop = Visit::new(&[Site::ResidPre], |at, _| {
            // Once only: a pass after it would compute on a text with a hole.
            let now = at.layer == 0 && passes == pass;
            passes += usize::from(at.layer == 0);
            Ok(if now { Flow::Stop } else { Flow::Continue })
        });
        let mut cache = KvCache::new(model.spec(), 1);
        let mut text = String::new();
        let lens: &mut dyn Lens = &mut stop;
        let answer = model.generate(&prompt, 0, &mut cache, &options, lens, &mut |event| {
            if let Event::Text(piece) = event {
                text.push_str(piece);
            }
            true
        });
        let answer = answer.unwrap();
        assert_eq!(answer.finish, Finish::Cancelled, "pass {pass}");
        assert_eq!((answer.tokens.as_slice(), cache.len(0)), (&whole.tokens[..tokens], held), "pass {pass}");
        assert_eq!(model.tokenizer().decode(&answer.tokens, false).unwrap(), answer.text, "pass {pass}");
        assert_eq!(text, answer.text);
    }
    // Together: what had ended before is told, the others get no answer.
    let texts = [prompt[..9].to_vec(), prompt[..5].to_vec(), prompt[..7].to_vec()];
    let stop = generate(&model, &texts[1], &GenerateOptions { ignore_eos: true, ..greedy(2) }).text;
    let options = GenerateOptions { stop: vec![stop], ..options };
    let alone = texts.each_ref().map(|text| generate(&model, text, &options).tokens.len());
    assert!(alone[1] <= 3 && alone[0] > 3, "{alone:?}");
    let (mut passes, mut answered) = (0, Vec::new());
    let mut stop = Visit::new(&[Site::Logits], |_, _| {
        passes += 1;
        Ok(if passes == 4 { Flow::Stop } else { Flow::Continue })
    });
    let mut note = |i: usize, _: Generation| {
        answered.push(i);
        true
    };
    model.generate_many(&texts, 2, &options, &mut stop, &mut note).unwrap();
    assert_eq!(answered, [1]);
}
