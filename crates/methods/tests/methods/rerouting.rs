//! Rerouting on models whose answer is known: zero vectors, central differences, and planted damage that is undone.

use crate::engine::{embedded, fixture, open, prompts};
use quorate_eval::encode::{EncodedItem, encode_text};
use quorate_eval::evaluate::{ItemScore, teacher_forced};
use quorate_eval::tasks::load_tasks;
use quorate_lens::ExpertMap;
use quorate_methods::experts::rerouting::{By, FitOptions, Rerouter, Rerouting, Shift, Vectors, gaussian};
use quorate_model::{GenerateOptions, KvCache, Lens, Model, NoLens};

const THOROUGH: FitOptions = FitOptions {
    fit_steps: 25,
    fit_every: 128,
    fit_rate: 0.2,
    fit_by: By::Highest,
    fit_share: 1.0,
    stale_cache: false,
};

fn loss(model: &Model, prompt: &[u32], answer: &[u32], lens: &mut dyn Lens) -> f64 {
    let item = EncodedItem { prompt: prompt.to_vec(), answer: answer.to_vec() };
    match teacher_forced(model, &[item], lens).unwrap()[0] {
        ItemScore::Text { nll, tokens, .. } => nll / tokens as f64,
        ItemScore::Exact { .. } => unreachable!("teacher forcing scores texts"),
    }
}

fn generate(model: &Model, prompt: &[u32], options: &FitOptions) -> (Vec<u32>, usize) {
    let rerouting = Rerouting::new(model.spec(), options).unwrap();
    let mut rerouter = Rerouter::new(model, rerouting).unwrap();
    let limits = GenerateOptions { max_tokens: 24, ignore_eos: true, ..GenerateOptions::default() };
    let mut cache = KvCache::new(model.spec(), 1);
    let answer = model.generate_guided(prompt, 0, &mut cache, &limits, &mut rerouter, &mut |_| true).unwrap();
    // What the cache holds is the text without its last token, however often it was made anew.
    assert_eq!(cache.tokens(0), &[prompt, &answer.tokens[..answer.tokens.len() - 1]].concat());
    (answer.tokens, rerouter.fits.len())
}

#[test]
fn without_steps_it_is_plain_decoding() {
    let model = open(&embedded());
    let prompt = encode_text(&model, "<|user|>78+95=<|assistant|>").unwrap();
    let limits = GenerateOptions { max_tokens: 24, ignore_eos: true, ..GenerateOptions::default() };
    let mut cache = KvCache::new(model.spec(), 1);
    let plain = model.generate(&prompt, 0, &mut cache, &limits, &mut NoLens, &mut |_| true).unwrap();
    let none = FitOptions { fit_steps: 0, fit_every: 4, ..FitOptions::default() };
    assert_eq!(generate(&model, &prompt, &none), (plain.tokens, 0));
    let rerouting = Rerouting::new(model.spec(), &none).unwrap();
    let expected = crate::engine::logits(&model, &prompt, &mut NoLens);
    assert_eq!(crate::engine::logits(&model, &prompt, &mut rerouting.lens().unwrap()), expected);
}

/// Refits at the prompt and after every 10 tokens; each starts from where the last ended.
#[test]
fn refits_come_when_they_are_due() {
    let model = open(&embedded());
    let prompt = encode_text(&model, "<s>It was the first day of").unwrap();
    for stale_cache in [false, true] {
        let options = FitOptions { fit_every: 10, fit_steps: 2, stale_cache, ..FitOptions::default() };
        assert_eq!(generate(&model, &prompt, &options).1, 3);
    }
    let mut rerouting = Rerouting::new(model.spec(), &THOROUGH).unwrap();
    let fits = [rerouting.fit(&model, &prompt).unwrap(), rerouting.fit(&model, &prompt).unwrap()];
    assert!(fits[0].after < fits[0].before && (fits[1].before - fits[0].after).abs() < 1e-6, "{fits:?}");
    let error = rerouting.fit(&model, &prompt[..1]).unwrap_err().to_string();
    assert!(error.contains("longer prompt"), "{error}");
}

/// One step of Adam goes against the sign of the gradient by the learning rate; the signs are those of central differences
/// wherever these are clear, and the choice of experts is the same on both sides.
#[test]
fn steps_follow_central_differences() {
    let model = open(&fixture("olmoe"));
    let text = &prompts("olmoe")[0][..20];
    let map = ExpertMap::of(model.spec());
    let (layer, experts) = (map.layers[map.layers.len() - 1], map.experts[map.layers.len() - 1]);
    let options = FitOptions { fit_steps: 1, fit_rate: 1e-3, fit_share: 1.0, ..FitOptions::default() };
    let mut rerouting = Rerouting::new(model.spec(), &options).unwrap();
    rerouting.fit(&model, text).unwrap();
    let moved = &rerouting.values().unwrap()[&layer];
    let at = |e: usize, step: f32| {
        let mut delta = vec![0.0; experts];
        delta[e] = step;
        loss(&model, &text[..1], &text[1..], &mut Shift::new(&Vectors::from([(layer, delta)])).unwrap())
    };
    let slopes: Vec<f64> = (0..experts).map(|e| (at(e, 2e-3) - at(e, -2e-3)) / 4e-3).collect();
    let most = slopes.iter().fold(0.0, |m: f64, s| m.max(s.abs()));
    let clear: Vec<usize> = (0..experts).filter(|&e| slopes[e].abs() > 0.2 * most).collect();
    assert!(clear.len() > 2, "{slopes:?}");
    for e in clear {
        let expected = -1e-3 * slopes[e].signum();
        assert!((f64::from(moved[e]) - expected).abs() < 1e-5, "expert {e}: {} {slopes:?}", moved[e]);
    }
}

/// The examples of a task, one after the other, and an unseen text.
fn texts(model: &Model, task: &str, shots: usize) -> (Vec<u32>, EncodedItem) {
    let folder = embedded().join("../tasks");
    let of = |split: &str, n: usize| {
        let tasks = load_tasks(&[folder.join(format!("{task}.{split}.jsonl"))], Some(split)).unwrap();
        tasks[0].items.iter().take(n).map(|i| EncodedItem::new(model, i).unwrap()).collect::<Vec<_>>()
    };
    let eos = model.spec().eos_token_ids[0];
    let context =
        of("train-sample", shots).into_iter().flat_map(|e| [e.prompt, e.answer, vec![eos]].concat()).collect();
    (context, of("test", 1).remove(0))
}

#[test]
fn planted_damage_is_undone_from_examples() {
    let model = open(&embedded());
    let map = ExpertMap::of(model.spec());
    let damage = gaussian(1, &map, 2.0);
    let mut sums = [0.0; 8];
    for task in ["prose", "spanish"] {
        let (context, text) = texts(&model, task, 2);
        let mut of = |at: usize, lens: &mut dyn Lens| {
            sums[at] += loss(&model, &context[..1], &context[1..], lens);
            let prompt = [&context[..], &text.prompt].concat();
            sums[at + 4] += loss(&model, &prompt, &text.answer, lens);
        };
        let mut rerouting = Rerouting::new(model.spec(), &THOROUGH).unwrap().damaged(damage.clone());
        of(0, &mut NoLens);
        of(1, &mut rerouting.lens().unwrap());
        let fit = rerouting.fit(&model, &context).unwrap();
        of(2, &mut rerouting.lens().unwrap());
        let mut chance = gaussian(2, &map, 1.0);
        for ((layer, vector), norm) in chance.iter_mut().zip(&fit.norms) {
            let own = vector.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let damage = &damage[layer];
            vector.iter_mut().zip(damage).for_each(|(v, d)| *v = (f64::from(*v) * norm / own) as f32 + d);
        }
        of(3, &mut Shift::new(&chance).unwrap());
    }
    let recovered = |at: usize, to: usize| (sums[at + 1] - sums[at + to]) / (sums[at + 1] - sums[at]);
    let found = [recovered(0, 2), recovered(4, 2), recovered(0, 3), recovered(4, 3)];
    assert!(found[0] >= 0.5 && found[1] >= 0.25, "context and continuation: {found:?}");
    assert!(found[2] <= 0.02 && found[3] <= 0.02, "random vectors: {found:?}");
}
