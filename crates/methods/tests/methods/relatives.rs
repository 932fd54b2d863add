//! The relatives on models whose answer is known: reconstruction against the model itself, planted weights, duplicated and
//! renumbered experts.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;

use crate::engine::{Capture, assert_close, assert_same, edited, fixture, keep, largest, logits, open, plain, prompts};
use crate::support::Tasks;
use quorate_eval::encode::EncodedItem;
use quorate_formats::Role;
use quorate_lens::Interventions;
use quorate_methods::Lab;
use quorate_methods::relatives::{Aligner, Bench, Calibration, Compressed, RELATIVES, aimer, best_subset, mone};
use quorate_model::{Model, NoLens, RoutingMode, Site};
use quorate_residency::{Expert, Matrix};

fn texts() -> Vec<EncodedItem> {
    let halves = |text: Vec<u32>| EncodedItem { prompt: text[..14].to_vec(), answer: text[14..].to_vec() };
    prompts("mixtral").into_iter().map(halves).collect()
}

/// Everything recorded of two texts, all of their tokens in full.
fn calibrated(path: &Path) -> (Model, Calibration) {
    let mut world = Tasks(Vec::new());
    let mut lab = Lab::new(open(path), &mut world);
    let calibration = Calibration::record(&mut lab, &texts(), usize::MAX).unwrap();
    (lab.model, calibration)
}

fn compressed(model: &Model, calibration: &Calibration, name: &str, keep: usize) -> Compressed {
    let relative = RELATIVES.iter().find(|r| r.name == name).unwrap();
    let mut aligner = Aligner::default();
    let mode = RoutingMode::MaskFullGates;
    (relative.compress)(&mut Bench { model, calibration, aligner: &mut aligner, mode }, keep).unwrap()
}

/// The logits of a compressed model.
fn logits_of(model: &mut Model, made: &Compressed, text: &[u32]) -> Vec<f32> {
    let mut lens = Interventions::prepare(&made.intervene, model.spec(), Path::new("")).unwrap();
    model.mask_experts(&made.kept, made.mode).unwrap();
    let old: Vec<Expert> = (made.replaced.iter())
        .map(|(id, new)| model.replace_expert(id.layer, id.expert, new.clone()).unwrap())
        .collect();
    let found = logits(model, text, &mut lens);
    for ((id, _), old) in made.replaced.iter().zip(old) {
        model.replace_expert(id.layer, id.expert, old).unwrap();
    }
    model.mask_experts(&vec![None; made.kept.len()], RoutingMode::Mask).unwrap();
    found
}

fn subsets(n: usize, k: usize) -> Vec<Vec<usize>> {
    let of = |bits: usize| (0..n).filter(|i| bits >> i & 1 == 1).collect::<Vec<_>>();
    (0..1 << n).map(of).filter(|s| s.len() == k).collect()
}

/// What inner products say is what the model does: the routed sum of the first MoE layer with and without some experts.
#[test]
fn errors_from_inner_products_are_those_of_the_masked_model() {
    for name in crate::engine::ROUTERS {
        let (mut model, calibration) = calibrated(&fixture(name));
        let layer = calibration.map().layers[0];
        let layers = calibration.map().n_layers();
        let fit = &calibration.fits(&model).unwrap()[0];
        let (experts, top_k) = crate::engine::sizes(&model);
        let run = |model: &Model| {
            let mut capture = Capture::new(&[Site::MoeOut]);
            texts().iter().for_each(|t| drop(logits(model, &[&t.prompt[..], &t.answer].concat(), &mut capture)));
            capture.get(layer, Site::MoeOut).values.clone()
        };
        let full = run(&model);
        for mode in RoutingMode::ALL {
            for kept in [(0..experts).step_by(2).collect::<Vec<_>>(), (experts - top_k..experts).collect()] {
                if kept.len() < top_k {
                    continue;
                }
                let found = fit.error(&model, &kept, mode).unwrap();
                let mut lists = vec![(0..experts).collect(); layers];
                lists[0] = kept.clone();
                model.mask_experts(&keep(&lists), mode).unwrap();
                let masked = run(&model);
                model.mask_experts(&vec![None; layers], RoutingMode::Mask).unwrap();
                let by_hand: f64 = full.iter().zip(&masked).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                let close = (found - by_hand).abs() <= 1e-5 * by_hand;
                assert!(close && by_hand > 0.0, "{name}, {mode:?}, {kept:?}: {found} {by_hand}");
            }
        }
        let all: Vec<usize> = (0..experts).collect();
        assert_eq!(fit.error(&model, &all, RoutingMode::Mask).unwrap(), 0.0);
        let energy: f64 = full.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((fit.energy(&model).unwrap() - energy).abs() <= 1e-5 * energy);
        assert!(fit.error(&model, &[experts], RoutingMode::Mask).is_err());
    }
}

/// With 8 experts the search is exhaustive: no other subset has a smaller error; greedy removal with swaps comes close.
#[test]
fn no_subset_beats_the_exhaustive_search() {
    let (model, calibration) = calibrated(&fixture("mixtral"));
    for fit in calibration.fits(&model).unwrap() {
        for (keep, mode) in [(4, RoutingMode::Mask), (3, RoutingMode::MaskFullGates), (2, RoutingMode::Drop)] {
            let error = |kept: &[usize]| fit.error(&model, kept, mode).unwrap();
            let best = best_subset(8, keep, 5000, |k| Ok::<_, Infallible>(error(k))).unwrap();
            let all = subsets(8, keep);
            assert!(best.exhaustive && best.tried == all.len() && best.kept.len() == keep);
            for other in &all {
                assert!(error(other) >= best.error, "{other:?} beats {:?}", best.kept);
            }
            let greedy = best_subset(8, keep, 0, |k| Ok::<_, Infallible>(error(k))).unwrap();
            assert!(!greedy.exhaustive && greedy.error <= 1.1 * best.error, "{} {}", greedy.error, best.error);
        }
    }
}

/// `use * sqrt(sum |f - mean|^2 / (N - 1))` from the outputs themselves.
#[test]
fn mone_scores_equal_their_closed_form_and_keeping_all_changes_nothing() {
    let (mut model, calibration) = calibrated(&fixture("mixtral"));
    let (map, d) = (calibration.map().clone(), model.spec().hidden_size);
    let mut capture = Capture::new(&[Site::ExpertOut, Site::Routing]);
    for text in texts() {
        logits(&model, &[&text.prompt[..], &text.answer].concat(), &mut capture);
    }
    let scores = mone::scores(&calibration, "frequency").unwrap().values;
    let frequency = calibration.table("frequency").unwrap().values;
    for unit in 0..map.total() {
        let id = map.id(unit);
        let chosen = &capture.get(id.layer, Site::Routing).ids;
        let outputs = capture.get(id.layer, Site::ExpertOut).values.chunks_exact(d);
        let own: Vec<&[f32]> = outputs.zip(chosen).filter(|(_, e)| **e as usize == id.expert).map(|(o, _)| o).collect();
        let n = own.len() as f64;
        let mean = |c: usize| own.iter().map(|o| f64::from(o[c])).sum::<f64>() / n.max(1.0);
        let spread = |c: usize| own.iter().map(|o| (f64::from(o[c]) - mean(c)).powi(2)).sum::<f64>();
        let sd = if n < 2.0 { 0.0 } else { ((0..d).map(spread).sum::<f64>() / (n - 1.0)).sqrt() };
        assert!((scores[unit] - frequency[unit] * sd).abs() < 1e-10, "{id}: {} {sd}", scores[unit]);
    }
    let text = texts()[0].prompt.clone();
    let before = plain(&model, &text);
    let nothing = compressed(&model, &calibration, "mone", 8);
    assert!(nothing.intervene.is_empty());
    assert_same("all kept", &logits_of(&mut model, &nothing, &text), &before);
    let few = compressed(&model, &calibration, "mone", 2);
    assert_eq!(few.intervene.len(), map.n_layers());
    assert!(crate::engine::change(&logits_of(&mut model, &few, &text), &before) > 1e-4);
}

/// A weight matrix filled by a rule.
fn filled(rows: usize, cols: usize, value: impl Fn(usize) -> f32) -> Matrix {
    Matrix::from_f32(rows, cols, &(0..rows * cols).map(value).collect::<Vec<_>>()).unwrap()
}

/// One size: 1. A share q of the weights of one size, the others 0: sqrt(q). 1, 2, .., 4 in turns: 2.5 / sqrt(7.5).
#[test]
fn aimer_equals_its_closed_form_on_planted_weights() {
    type Rule = fn(usize) -> f32;
    let planted: [(Rule, f64); 3] = [
        (|i| if i % 3 == 0 { -0.25 } else { 0.25 }, 1.0),
        (|i| if i % 4 == 0 { 1.5 } else { 0.0 }, 0.5),
        (|i| (1 + i % 4) as f32, 2.5 / 7.5f64.sqrt()),
    ];
    for (value, wanted) in planted {
        let expert = Expert { gate: filled(8, 12, value), up: filled(8, 12, value), down: filled(12, 8, value) };
        assert!((aimer::ratio(&expert) - wanted).abs() < 1e-10, "{} {wanted}", aimer::ratio(&expert));
    }
    let zero = || filled(8, 12, |_| 0.0);
    assert_eq!(aimer::ratio(&Expert { gate: zero(), up: zero(), down: filled(12, 8, |_| 0.0) }), 0.0);
    // The paper removes the experts with the largest ratio.
    let (mut model, calibration) = calibrated(&fixture("mixtral"));
    let layer = calibration.map().layers[0];
    let old = model.expert_weights(layer, 5).unwrap();
    let alike = |m: &Matrix| filled(m.rows, m.cols, |i| if i % 2 == 0 { 0.1 } else { -0.1 });
    let alike = Expert { gate: alike(&old.gate), up: alike(&old.up), down: alike(&old.down) };
    model.replace_expert(layer, 5, alike).unwrap();
    let kept = compressed(&model, &calibration, "aimer", 7).kept[0].clone().unwrap();
    assert_eq!(kept, [0, 1, 2, 3, 4, 6, 7]);
}

/// The values of all weights of a fixture.
fn weights(path: &Path) -> BTreeMap<Role, Vec<f32>> {
    let mut all = BTreeMap::new();
    edited(path, |role, _, values| drop(all.insert(role, values.to_vec())));
    all
}

/// A role of another expert of the same layer.
fn of_expert(role: Role, other: impl Fn(usize, usize) -> usize) -> Role {
    match role {
        Role::ExpertGate(l, e) => Role::ExpertGate(l, other(l, e)),
        Role::ExpertUp(l, e) => Role::ExpertUp(l, other(l, e)),
        Role::ExpertDown(l, e) => Role::ExpertDown(l, other(l, e)),
        role => role,
    }
}

/// Each odd expert is its even neighbour with neurons in another order. Merging finds the pairs by their outputs, aligns
/// them, and changes nothing; without alignment it does.
#[test]
fn merging_equal_experts_gives_the_function_back() {
    let source = weights(&fixture("mixtral"));
    let path = edited(&fixture("mixtral"), |role, shape, values| {
        let even = of_expert(role, |_, e| e - e % 2);
        if even == role {
            return;
        }
        let (rows, cols) = (shape[0], shape[1]);
        let neuron = |i: usize, n: usize| (5 * i + 3) % n;
        for (i, value) in values.iter_mut().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let from = match role {
                Role::ExpertDown(..) => row * cols + neuron(col, cols),
                _ => neuron(row, rows) * cols + col,
            };
            *value = source[&even][from];
        }
    });
    let (mut model, calibration) = calibrated(path.path());
    let text = texts()[1].prompt.clone();
    let before = plain(&model, &text);
    let made = compressed(&model, &calibration, "hc-smoe", 4);
    assert_eq!(made.replaced.len(), model.spec().moe_layers().len() * 8);
    for (id, expert) in &made.replaced {
        let even = model.expert_weights(id.layer, id.expert - id.expert % 2).unwrap();
        let odd = model.expert_weights(id.layer, id.expert - id.expert % 2 + 1).unwrap();
        let same =
            |other: &Expert| expert.up.to_f32() == other.up.to_f32() && expert.down.to_f32() == other.down.to_f32();
        assert!(same(even) || same(odd), "{id}: the merge of a pair is its leader, bit for bit");
    }
    let after = logits_of(&mut model, &made, &text);
    assert_close("merged pairs", &after, &before, 1e-5 * largest(&before));
    let few = compressed(&model, &calibration, "hc-smoe", 2);
    assert!(crate::engine::change(&logits_of(&mut model, &few, &text), &before) > 1e-3);
    assert_same("undone", &logits(&model, &text, &mut NoLens), &before);
}

/// Renumbering the experts renumbers what every relative keeps or merges.
#[test]
fn renumbered_experts_are_kept_and_merged_alike() {
    let source = weights(&fixture("mixtral"));
    let new_to_old = |_: usize, e: usize| (3 * e + 5) % 8;
    let path = edited(&fixture("mixtral"), |role, shape, values| match role {
        Role::Router(l) => {
            for (e, row) in values.chunks_exact_mut(shape[1]).enumerate() {
                row.copy_from_slice(&source[&role][new_to_old(l, e) * shape[1]..][..shape[1]]);
            }
        }
        role => values.copy_from_slice(&source[&of_expert(role, new_to_old)]),
    });
    let (mut model, calibration) = calibrated(&fixture("mixtral"));
    let (mut other, renumbered) = calibrated(path.path());
    let map = calibration.map().clone();
    let scores = |c: &Calibration| mone::scores(c, "gate-sum").unwrap().values;
    let (a, b) = (scores(&calibration), scores(&renumbered));
    let (wa, wb) = (aimer::scores(&model).unwrap().values, aimer::scores(&other).unwrap().values);
    for moe in 0..map.n_layers() {
        let start = map.range(moe).start;
        for e in 0..8 {
            let (new, old) = (start + e, start + new_to_old(0, e));
            assert!((b[new] - a[old]).abs() <= 1e-6 * a[old].abs(), "mone {new} {old}: {} {}", b[new], a[old]);
            assert!((wb[new] - wa[old]).abs() < 1e-12);
        }
    }
    let text = texts()[0].prompt.clone();
    for relative in RELATIVES.iter().filter(|r| r.name != "random") {
        let (first, second) =
            (compressed(&model, &calibration, relative.name, 3), compressed(&other, &renumbered, relative.name, 3));
        let (x, y) = (logits_of(&mut model, &first, &text), logits_of(&mut other, &second, &text));
        assert_close(relative.name, &y, &x, 1e-4 * largest(&x));
    }
}

/// The sample is spread over the tokens, and as it was when all are asked for.
#[test]
fn sampled_tokens_are_those_of_the_model() {
    let (model, whole) = calibrated(&fixture("mixtral"));
    let mut capture = Capture::new(&[Site::FfnIn]);
    for text in texts() {
        logits(&model, &[&text.prompt[..], &text.answer].concat(), &mut capture);
    }
    let d = model.spec().hidden_size;
    let mut world = Tasks(Vec::new());
    let mut lab = Lab::new(model, &mut world);
    let some = Calibration::sample(&mut lab, &texts(), 10).unwrap();
    for (whole, some) in whole.sample.iter().zip(&some) {
        let inputs = &capture.get(whole.layer, Site::FfnIn).values;
        assert_same("all tokens", &whole.inputs, inputs);
        let every_fifth: Vec<f32> = inputs.chunks_exact(d).step_by(5).flatten().copied().collect();
        assert_same("every fifth", &some.inputs, &every_fifth);
    }
    assert!(Calibration::record(&mut lab, &[], 10).is_err());
}
