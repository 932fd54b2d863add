//! Streaming experts through little memory computes what the model computes with all of them loaded, bit for bit.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Tensor, Var};
use quorate_formats::FormatError;
use quorate_model::{Flow, GenerateOptions, KvCache, Model, ModelError, NoLens, Segment, Site};
use quorate_residency::{CachePolicy, ResidencyError, StreamIo, StreamOptions, least_stream_bytes, most_stream_bytes};
use support::{
    Capture, Seen, Visit, as_generated, assert_same, chain, embedded, fixture, logits_in_turn, moe_cases, noise, open,
    open_empty, prompts, rows, values,
};

const POLICIES: [CachePolicy; 3] = [CachePolicy::Lru, CachePolicy::Pinned, CachePolicy::Prefetch];

/// A model that streams through the least room, or that share of the room that all experts take.
fn streaming(path: &Path, share: f64, policy: CachePolicy) -> Model {
    streaming_by(path, share, policy, StreamIo::Auto)
}

/// The same with a choice of who reads.
fn streaming_by(path: &Path, share: f64, policy: CachePolicy, io: StreamIo) -> Model {
    let mut model = open_empty(path);
    let (least, most) =
        (least_stream_bytes(model.checkpoint()).unwrap(), most_stream_bytes(model.checkpoint()).unwrap());
    let room_bytes = least.max((most as f64 * share) as u64);
    // Some experts are favourites, which changes nothing.
    let best: Vec<_> = model.spec().moe_layers().iter().flat_map(|&l| [(l, 1), (l, 0)]).collect();
    let options = StreamOptions { room_bytes, policy, io, readers: 3 };
    model.stream_experts(&options, &best, None, &mut |_, _| true).unwrap();
    model
}

/// All fixtures with experts: every way in which weights lie in files, biases, shared experts, gates on inputs.
fn fixtures_with_experts() -> Vec<(String, PathBuf)> {
    let folders = fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().path());
    let named = |path: PathBuf| (path.file_name().unwrap().to_string_lossy().into_owned(), path);
    let models = folders.filter(|path| path.join("reference.safetensors").exists());
    let mut models: Vec<_> = models.filter(|path| open_empty(path).spec().is_moe()).map(named).collect();
    models.sort();
    models
}

#[test]
fn every_family_streams_exactly() {
    let models = fixtures_with_experts();
    assert!(models.len() > 15, "{} fixtures", models.len());
    for (name, path) in models {
        let [prompt, other] = prompts(&name);
        let pieces = as_generated(&prompt, &other[..4]);
        let expected = logits_in_turn(&open(&path), &pieces, &mut NoLens);
        let model = streaming(&path, 0.0, CachePolicy::Prefetch);
        assert_same(&name, &logits_in_turn(&model, &pieces, &mut NoLens), &expected);
    }
}

#[test]
fn room_and_policy_change_nothing_and_room_is_kept() {
    for (name, path, texts) in moe_cases() {
        let pieces = as_generated(&texts[0], &texts[1][..8]);
        let whole = open(&path);
        let expected = logits_in_turn(&whole, &pieces, &mut NoLens);
        let mut seen = Capture::new(Site::ALL);
        let expected_open = logits_in_turn(&whole, &pieces, &mut seen);
        for policy in POLICIES {
            for (share, io) in [
                (0.0, StreamIo::Auto),
                (0.0, StreamIo::Threads),
                (0.3, StreamIo::Auto),
                (0.6, StreamIo::Threads),
                (1.0, StreamIo::Auto),
            ] {
                let what = format!("{name}, {policy:?}, {share}, {io:?}");
                let model = streaming_by(&path, share, policy, io);
                assert_same(&what, &logits_in_turn(&model, &pieces, &mut NoLens), &expected);
                // All sites at once: inner activations are whole before any expert's output is.
                let mut capture = Capture::new(Site::ALL);
                assert_same(&what, &logits_in_turn(&model, &pieces, &mut capture), &expected_open);
                for (key, kept) in &seen.kept {
                    assert_same(&format!("{what}, {key:?}"), &capture.kept[key].values, &kept.values);
                    assert_eq!(capture.kept[key].ids, kept.ids, "{what}, {key:?}");
                }
                let cache = model.weights().stream().unwrap();
                assert!(cache.resident_bytes() <= cache.options().room_bytes, "{what}");
                assert!(cache.stats().wanted > 0 && cache.stats().hits <= cache.stats().wanted, "{what}");
            }
        }
    }
}

/// Several sequences at once, in passes of single tokens too, where kernels choose their way by the number of tokens.
#[test]
fn batches_stream_exactly() {
    let (whole, few) = (open(&embedded()), streaming(&embedded(), 0.0, CachePolicy::Prefetch));
    let text: Vec<u32> = noise(5, 640).iter().map(|v| (v.abs() * 200.0) as u32).collect();
    let run = |model: &Model| {
        let mut cache = KvCache::new(model.spec(), 16);
        let mut all = Vec::new();
        let mut pass = |segments: &[Segment]| {
            all.extend(values(&model.forward(segments, &mut cache, &mut NoLens).unwrap().logits.unwrap()));
        };
        let prompts: Vec<Segment> = (0..16).map(|s| rows(s, &text[s * 40..s * 40 + 3 + s])).collect();
        pass(&prompts);
        for i in 0..4 {
            let next: Vec<Segment> = (0..16).map(|s| Segment::decode(s, text[s * 40 + 30 + i])).collect();
            pass(&next);
        }
        all
    };
    assert_same("16 sequences", &run(&few), &run(&whole));
}

/// Interventions at the experts' sites act alike.
#[test]
fn lenses_change_streamed_experts_as_loaded_ones() {
    for (name, path, texts) in moe_cases() {
        let run = |model: &Model| {
            let mut lens = Visit::new(&[Site::Routing, Site::ExpertHidden, Site::ExpertOut], |at, seen| {
                match seen {
                    Seen::Tensor(value) => *value = value.affine(1.25, 0.01)?,
                    // The last choice of every token becomes another expert.
                    Seen::Routing(routing) => {
                        let k = routing.k;
                        for ids in routing.ids.chunks_exact_mut(k) {
                            let other = (0..).find(|id| !ids.contains(id)).unwrap();
                            ids[k - 1] = if at.layer.is_multiple_of(2) { other } else { quorate_model::NO_EXPERT };
                        }
                    }
                }
                Ok(Flow::Continue)
            });
            logits_in_turn(model, &as_generated(&texts[0], &texts[1][..3]), &mut lens)
        };
        let streamed = run(&streaming(&path, 0.2, CachePolicy::Prefetch));
        assert_same(name, &streamed, &run(&open(&path)));
    }
}

/// A model whose experts fit is read once; hits are counted as what they are.
#[test]
fn statistics_count_what_happens() {
    let model = streaming(&embedded(), 1.0, CachePolicy::Prefetch);
    let cache = model.weights().stream().unwrap();
    let pinned = cache.stats();
    assert_eq!((pinned.reads, pinned.wanted), (cache.pinned() as u64, 0));
    let text = &moe_cases().pop().unwrap().2[0];
    logits_in_turn(&model, &as_generated(text, &text[1..]), &mut NoLens);
    let first = cache.stats();
    logits_in_turn(&model, &as_generated(text, &text[1..]), &mut NoLens);
    let second = cache.stats().since(&first);
    assert_eq!(second.hit_rate(), Some(1.0), "{second:?}");
    assert!(second.reads <= second.predicted - second.predicted_right, "only wrong guesses are read: {second:?}");
    assert!(first.predicted_right > 0 && first.predicted_right <= first.predicted, "{first:?}");
    assert!(first.prediction_rate().unwrap() > 0.3, "{first:?}");
    assert_eq!(model.weights().experts_resident() as u64, cache.stats().reads, "each was read once");
    assert!(first.read_bytes > 0 && first.read_s > 0.0 && first.busy_s <= first.read_s + 1e-3, "{first:?}");
}

/// What is likely is pinned and stays; after a change of favourites others are.
#[test]
fn favourites_are_pinned_best_first() {
    let mut model = open_empty(&embedded());
    let one = least_stream_bytes(model.checkpoint()).unwrap() / 4;
    let options = StreamOptions { room_bytes: 8 * one, policy: CachePolicy::Pinned, io: StreamIo::Auto, readers: 2 };
    let best = |layer: usize| -> Vec<_> { (0..32).map(|e| (layer, e)).collect() };
    model.stream_experts(&options, &best(3), None, &mut |_, _| true).unwrap();
    let text = moe_cases().pop().unwrap().2.remove(0);
    let cache = model.weights().stream().unwrap();
    assert_eq!((cache.pinned(), cache.resident_in(3)), (6, 6));
    logits_in_turn(&model, &[rows(0, &text)], &mut NoLens);
    assert!(cache.resident_in(3) >= 6);
    let reads = cache.stats().reads;
    model.stream_experts(&options, &best(2), None, &mut |_, _| true).unwrap();
    let cache = model.weights().stream().unwrap();
    assert!(cache.resident_in(2) >= 6 && cache.stats().reads > reads);
    let error = model.stream_experts(&options, &[(3, 32)], None, &mut |_, _| true).unwrap_err();
    assert!(error.to_string().contains("layer 3 has no expert 32"), "{error}");
    // Loading experts ends the streaming.
    model.load_all_experts().unwrap();
    assert!(model.weights().stream().is_none());
}

#[test]
fn too_little_room_says_how_much_is_needed() {
    let mut model = open_empty(&embedded());
    let needed_bytes = least_stream_bytes(model.checkpoint()).unwrap();
    let options =
        StreamOptions { room_bytes: needed_bytes - 1, policy: CachePolicy::Lru, io: StreamIo::Auto, readers: 1 };
    let error = model.stream_experts(&options, &[], None, &mut |_, _| true).unwrap_err();
    let ModelError::Residency(ResidencyError::NoRoomToStream { needed_bytes: needed, .. }) = error else {
        panic!("{error}");
    };
    assert_eq!(needed, needed_bytes);
}

#[test]
fn gradients_through_streamed_experts_are_refused() {
    let model = streaming(&embedded(), 0.5, CachePolicy::Prefetch);
    let mut lens = Visit::new(&[Site::FfnIn], |_, seen| {
        if let Seen::Tensor(value) = seen {
            let delta = Var::from_tensor(&Tensor::zeros_like(value)?)?;
            *value = (&*value + delta.as_tensor())?;
        }
        Ok(Flow::Continue)
    });
    let mut cache = KvCache::new(model.spec(), 1);
    let error = model.forward(&[rows(0, &[1, 2, 3])], &mut cache, &mut lens).unwrap_err();
    assert!(matches!(error, ModelError::NoGradient { layer: 0, .. }), "{error}");
}

/// The embedded model in a folder of one's own, in one file.
#[cfg(unix)]
fn copy_of_embedded() -> tempfile::TempDir {
    support::edited(&embedded(), |_, _, _| {})
}

/// A file that is cut while a text is generated ends that generation, and the next one works when the file is whole
/// again; one that was changed is noticed.
#[cfg(unix)]
#[test]
fn damage_on_the_way_ends_one_request() {
    for io in [StreamIo::Auto, StreamIo::Threads] {
        damage_ends_one_request(io);
    }
}

#[cfg(unix)]
fn damage_ends_one_request(io: StreamIo) {
    let folder = copy_of_embedded();
    let path = folder.path().join("model.safetensors");
    let model = streaming_by(folder.path(), 0.0, CachePolicy::Prefetch, io);
    let prompt = moe_cases().pop().unwrap().2.remove(0);
    let options = GenerateOptions { max_tokens: 12, ignore_eos: true, ..GenerateOptions::default() };
    let generate = |on: &mut dyn FnMut(usize)| {
        let (mut cache, mut tokens) = (KvCache::new(model.spec(), 1), 0);
        let answer = model.generate(&prompt, 0, &mut cache, &options, &mut NoLens, &mut |event| {
            if let quorate_model::Event::Token(_) = event {
                tokens += 1;
                on(tokens);
            }
            true
        });
        (answer.map(|a| a.tokens), tokens)
    };
    let expected = generate(&mut |_| {}).0.unwrap();

    let (bytes, times) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let (failed, tokens) = generate(&mut |n| {
        if n == 4 {
            file.set_len(bytes.len() as u64 / 8).unwrap();
        }
    });
    let error = failed.unwrap_err();
    assert!(chain(&error).contains("model.safetensors is truncated"), "{}", chain(&error));
    assert_eq!(tokens, 4);

    // Mended, with its old times.
    let mend = || {
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
        file.set_modified(times).unwrap();
    };
    mend();
    assert_eq!(generate(&mut |_| {}).0.unwrap(), expected, "after the file was whole again");

    let (failed, _) = generate(&mut |n| {
        if n == 4 {
            file.set_modified(times + std::time::Duration::from_secs(1)).unwrap();
        }
    });
    let error = failed.unwrap_err();
    let changed = matches!(&error, ModelError::Residency(ResidencyError::Format(FormatError::Changed { .. })));
    assert!(changed, "{}", chain(&error));
    mend();
    assert_eq!(generate(&mut |_| {}).0.unwrap(), expected);
}

/// Passes on several threads share one cache.
#[test]
fn threads_stream_at_once() {
    for io in [StreamIo::Auto, StreamIo::Threads] {
        stream_on_four_threads(io);
    }
}

fn stream_on_four_threads(io: StreamIo) {
    let model = streaming_by(&embedded(), 0.1, CachePolicy::Prefetch, io);
    let whole = open(&embedded());
    let texts: Vec<Vec<u32>> =
        (0..4).map(|i| noise(i, 20).iter().map(|v| (v.abs() * 200.0) as u32).collect()).collect();
    std::thread::scope(|scope| {
        for text in &texts {
            let (model, whole) = (&model, &whole);
            scope.spawn(move || {
                let pieces = as_generated(text, &text[..10]);
                let expected = logits_in_turn(whole, &pieces, &mut NoLens);
                assert_same("one of four threads", &logits_in_turn(model, &pieces, &mut NoLens), &expected);
            });
        }
    });
}

/// The experts of a GGUF file, slices of stacked tensors in blocks, at any place in a sector.
#[test]
fn quantised_experts_stream_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("olmoe_256-q4_k_m.gguf");
    fs::copy(fixture("olmoe_256").join("gguf/olmoe_256-q4_k_m.gguf"), &path).unwrap();
    fs::copy(fixture("olmoe_256").join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let [prompt, other] = prompts("olmoe_256");
    let pieces = as_generated(&prompt, &other[..6]);
    let expected = logits_in_turn(&open(&path), &pieces, &mut NoLens);
    for share in [0.0, 0.5] {
        let model = streaming(&path, share, CachePolicy::Prefetch);
        assert_same("olmoe_256-q4_k_m", &logits_in_turn(&model, &pieces, &mut NoLens), &expected);
    }
}

/// A cache that is dropped while experts are on their way waits for them.
#[test]
fn a_cache_may_go_while_experts_come() {
    for io in [StreamIo::Auto, StreamIo::Threads] {
        for _ in 0..20 {
            let model = streaming_by(&embedded(), 0.5, CachePolicy::Prefetch, io);
            model.weights().stream().unwrap().expect(2, &(0..32).collect::<Vec<_>>());
        }
    }
}
