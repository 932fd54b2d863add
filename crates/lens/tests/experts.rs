//! Interventions on experts are what they say: masking and dropping agree with the routing modes, forcing and biasing
//! change the choice alone, and what routers do is counted right.

mod support;

use quorate_formats::spec::MoeSpec;
use quorate_lens::{ExpertMap, Intervention, Op, PhaseStats, Profiler, Recorded, Recorder, RouterStats, Sum};
use quorate_model::{Chain, Flow, KvCache, Lens, Model, NoLens, RoutingMode, Segment, Site, ops};
use support::{
    Seen, Visit, assert_close, assert_same, at, at_site, change, choose, in_layer, inline, keep, largest, logits,
    logits_of_all, logits_with, moe_cases, noise, on_units, open, plain, prepare, record, sizes,
};

/// An operation in every MoE layer on the experts that are not kept there.
fn on_others(model: &Model, kept: &[Vec<usize>], site: Site, op: Op) -> Vec<Intervention> {
    let layer = |(&l, kept): (&usize, &Vec<usize>)| {
        let others: Vec<usize> = (0..moe(model, l).n_experts).filter(|e| !kept.contains(e)).collect();
        on_units(&others, in_layer(l, site, op.clone()))
    };
    model.spec().moe_layers().iter().zip(kept).map(layer).collect()
}

fn moe(model: &Model, layer: usize) -> &MoeSpec {
    model.spec().moe(layer).unwrap()
}

fn ids(recorder: &Recorder, layer: usize) -> &Recorded<i64> {
    &recorder.ids()[&format!("topk_ids.{layer}")]
}

fn gates(recorder: &Recorder, layer: usize) -> &Recorded<f32> {
    &recorder.floats()[&format!("topk_weights.{layer}")]
}

/// Slots whose gate is below a share of the token's largest are emptied, the others stay or are scaled up.
#[test]
fn low_gates_are_skipped() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let layer = model.spec().moe_layers()[0];
        let before = record(&model, &texts[0], &[Site::Routing]);
        let (ids_before, gates_before) = (&ids(&before, layer).values, &gates(&before, layer).values);
        let k = ids(&before, layer).shape[1];
        for (by, renormalise) in [(0.0, false), (0.6, false), (0.6, true), (1.5, false)] {
            let op = if renormalise { Op::SkipRenormalise { by } } else { Op::Skip { by } };
            let run = run_with(&model, &texts[0], &[in_layer(layer, Site::Routing, op)]).0;
            let (found_ids, found) = (&ids(&run, layer).values, &gates(&run, layer).values);
            let mut emptied = 0;
            for row in (0..ids_before.len()).step_by(k) {
                let old = &gates_before[row..row + k];
                let stays: Vec<bool> = (0..k).map(|j| j == 0 || old[j] >= by * old[0]).collect();
                let left: f32 = (0..k).filter(|&j| stays[j]).map(|j| old[j]).sum();
                let factor = if renormalise { old.iter().sum::<f32>() / left } else { 1.0 };
                for j in 0..k {
                    let (id, gate) = if stays[j] { (ids_before[row + j], factor * old[j]) } else { (-1, 0.0) };
                    assert_eq!(found_ids[row + j], id, "{name}, {by}, row {row}, slot {j}");
                    assert!((found[row + j] - gate).abs() < 1e-6, "{name}, {by}, row {row}, slot {j}");
                    emptied += usize::from(!stays[j]);
                }
            }
            assert_eq!(emptied == 0, by == 0.0, "{name}, {by}: {emptied} slots are emptied");
        }
    }
}

/// I2 and I3: interventions on all but the kept experts are the routing modes.
#[test]
fn masking_and_dropping_are_the_routing_modes() {
    let ways = [
        (Site::RouterLogits, Op::Mask, RoutingMode::Mask),
        (Site::Routing, Op::Drop, RoutingMode::Drop),
        (Site::Routing, Op::DropRenormalise, RoutingMode::DropRenormalise),
        (Site::ExpertOut, Op::Zero, RoutingMode::Drop),
    ];
    for (name, path, texts) in moe_cases() {
        let mut model = open(&path);
        let (e, k) = sizes(&model);
        for kept in [choose(&model, 1, |_| (e + k) / 2), choose(&model, 2, |i| k + (3 * i + 1) % (e - k))] {
            for (site, op, mode) in &ways {
                let list = on_others(&model, &kept, *site, op.clone());
                model.load_all_experts().unwrap();
                let found = logits_of_all(&model, &texts, &mut prepare(&model, &list));
                model.mask_experts(&keep(&kept), *mode).unwrap();
                let expected = logits_of_all(&model, &texts, &mut NoLens);
                assert_same(&format!("{name}, {op:?} at {site}"), &found, &expected);
            }
        }
    }
}

/// Slots of a row, with the gate that the router's formula gives for the chosen experts.
fn gates_by_hand(moe: &MoeSpec, logits: &[f32], ids: &[i64]) -> Vec<f32> {
    let exp: Vec<f64> = logits.iter().map(|&z| f64::from(z).exp()).collect();
    let all: f64 = if moe.router.norm_topk_prob {
        ids.iter().filter(|&&id| id >= 0).map(|&id| exp[id as usize]).sum()
    } else {
        exp.iter().sum()
    };
    ids.iter().map(|&id| if id < 0 { 0.0 } else { (exp[id as usize] / all) as f32 }).collect()
}

/// Checks the slots of each row by hand, given which experts must be chosen, in rank order.
fn check_rows(what: &str, moe: &MoeSpec, run: &Recorder, layer: usize, expected: impl Fn(&[f32]) -> Vec<i64>) {
    let (ids, gates) = (ids(run, layer), gates(run, layer));
    let k = ids.shape[1];
    for (row, logits) in at_site(run, Site::RouterLogits, layer).values.chunks(moe.n_experts).enumerate() {
        let slots = row * k..(row + 1) * k;
        assert_eq!(ids.values[slots.clone()], expected(logits), "{what}, row {row}");
        let by_hand = gates_by_hand(moe, logits, &expected(logits));
        assert_close(&format!("{what}, row {row}"), &gates.values[slots], &by_hand, 1e-6);
    }
}

/// The best experts of a row that are not in `without`.
fn best(logits: &[f32], without: &[usize], count: usize) -> Vec<i64> {
    let mut order: Vec<usize> = (0..logits.len()).filter(|e| !without.contains(e)).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order.truncate(count);
    order.iter().map(|&e| e as i64).collect()
}

const ROUTER: [Site; 2] = [Site::RouterLogits, Site::Routing];

fn run_with(model: &Model, tokens: &[u32], list: &[Intervention]) -> (Recorder, Vec<f32>) {
    let mut run = Recorder::new(&ROUTER, None);
    let found = logits(model, tokens, &mut Chain(vec![&mut prepare(model, list), &mut run]));
    (run, found)
}

/// A forced expert is chosen by every token, first, and weighted by its own score; the others are the best as before.
#[test]
fn a_forced_expert_keeps_its_own_score() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let layer = model.spec().moe_layers()[1];
        let (moe, k) = (moe(&model, layer).clone(), moe(&model, layer).top_k);
        let expected = plain(&model, &texts[0]);
        for expert in 0..moe.n_experts.min(6) {
            let force = on_units(&[expert], in_layer(layer, Site::Selection, Op::Force));
            let (run, found) = run_with(&model, &texts[0], &[force]);
            let forced = |logits: &[f32]| [vec![expert as i64], best(logits, &[expert], k - 1)].concat();
            check_rows(&format!("{name}, expert {expert}"), &moe, &run, layer, forced);
            assert!(change(&found, &expected) > 1e-4, "{name}, expert {expert}");
            // In some rows only.
            let force = Intervention {
                positions: "2-4".parse().unwrap(),
                ..on_units(&[expert], in_layer(layer, Site::Selection, Op::Force))
            };
            let (some, _) = run_with(&model, &texts[0], &[force]);
            let own = record(&model, &texts[0], &ROUTER);
            let part = |run: &Recorder, rows: std::ops::Range<usize>| {
                ids(run, layer).values[rows.start * k..rows.end * k].to_vec()
            };
            assert_eq!(part(&some, 2..5), part(&run, 2..5));
            assert_eq!((part(&some, 0..2), part(&some, 5..9)), (part(&own, 0..2), part(&own, 5..9)));
        }
        // More are forced than there are places: the best of them win.
        let first: Vec<usize> = (0..=k).collect();
        let force = on_units(&first, in_layer(layer, Site::Selection, Op::Force));
        let (run, _) = run_with(&model, &texts[0], &[force]);
        let others: Vec<usize> = (k + 1..moe.n_experts).collect();
        check_rows(name, &moe, &run, layer, |logits| best(logits, &others, k));
    }
}

/// Forcing `k` experts and masking all others choose alike; the gates agree where they are renormalised.
#[test]
fn forcing_k_and_masking_the_others_choose_alike() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let (_, k) = sizes(&model);
        let kept = choose(&model, 8, |_| k);
        let layers = model.spec().moe_layers();
        let force: Vec<_> = layers
            .iter()
            .zip(&kept)
            .map(|(&l, kept)| on_units(kept, in_layer(l, Site::Selection, Op::Force)))
            .collect();
        let (forced, by_force) = run_with(&model, &texts[0], &force);
        let (masked, by_mask) = run_with(&model, &texts[0], &on_others(&model, &kept, Site::RouterLogits, Op::Mask));
        for (&layer, kept) in layers.iter().zip(&kept) {
            for run in [&forced, &masked] {
                for row in ids(run, layer).values.chunks(k) {
                    let mut row: Vec<usize> = row.iter().map(|&id| id as usize).collect();
                    row.sort_unstable();
                    assert_eq!(row, *kept, "{name}, layer {layer}");
                }
            }
        }
        if moe(&model, layers[0]).router.norm_topk_prob {
            assert_close(name, &by_force, &by_mask, 1e-5 * largest(&by_mask));
        } else {
            assert!(change(&by_force, &by_mask) > 1e-3, "{name}");
        }
    }
}

/// With fewer experts left than a token uses, places stay empty; with none left, the layer's experts write nothing.
#[test]
fn too_few_experts_leave_places_empty() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let (e, k) = sizes(&model);
        let layer = model.spec().moe_layers()[0];
        for left in 0..k {
            let others: Vec<usize> = (left..e).collect();
            let mask = on_units(&others, in_layer(layer, Site::RouterLogits, Op::Mask));
            let (run, found) = run_with(&model, &texts[0], &[mask]);
            let expected = |logits: &[f32]| [best(logits, &others, left), vec![-1; k - left]].concat();
            check_rows(&format!("{name}, {left} left"), moe(&model, layer), &run, layer, expected);
            assert!(found.iter().all(|v| v.is_finite()), "{name}");
            if left == 0 {
                let nothing = logits_with(&model, &texts[0], &[in_layer(layer, Site::MoeOut, Op::Zero)]);
                assert_same(name, &found, &nothing);
            }
        }
    }
}

/// A bias at `selection` moves the choice and leaves the gates to the scores; the same bias on the logits moves both.
#[test]
fn a_selection_bias_does_not_touch_the_gates() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let layer = model.spec().moe_layers()[0];
        let moe = moe(&model, layer);
        let bias: Vec<f32> = noise(3, moe.n_experts).iter().map(|v| 0.2 * v).collect();
        let add = |site| in_layer(layer, site, Op::Add { value: inline(bias.clone()), scale: 1.0 });
        let (run, _) = run_with(&model, &texts[0], &[add(Site::Selection)]);
        check_rows(name, moe, &run, layer, |logits| {
            // Added to the scores: the probabilities, as the router has them.
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let all: f32 = logits.iter().map(|z| (z - max).exp()).sum();
            let by_score: Vec<f32> = logits.iter().zip(&bias).map(|(z, b)| (z - max).exp() / all + b).collect();
            let by_logit: Vec<f32> = logits.iter().zip(&bias).map(|(z, b)| z + b).collect();
            let choice = if moe.router.score == quorate_formats::spec::RouterScore::TopkThenSoftmax {
                by_logit
            } else {
                by_score
            };
            best(&choice, &[], moe.top_k)
        });
        let own = record(&model, &texts[0], &ROUTER);
        assert_ne!(ids(&run, layer), ids(&own, layer), "{name}: the bias moves nothing");
        // On the logits: recorded after the bias, all follows from them.
        let (biased, _) = run_with(&model, &texts[0], &[add(Site::RouterLogits)]);
        check_rows(name, moe, &biased, layer, |logits| best(logits, &[], moe.top_k));
    }
}

/// Experts are named by their number at the sites of slots.
#[test]
fn an_expert_is_found_in_whatever_slot_it_is() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let layer = *model.spec().moe_layers().last().unwrap();
        let used = record(&model, &texts[0], &[Site::Routing]);
        for expert in (0..moe(&model, layer).n_experts).filter(|&e| ids(&used, layer).values.contains(&(e as i64))) {
            let on = |site, op| logits_with(&model, &texts[0], &[on_units(&[expert], in_layer(layer, site, op))]);
            let what = format!("{name}, expert {expert}");
            let dropped = on(Site::Routing, Op::Drop);
            assert_same(&what, &on(Site::ExpertOut, Op::Zero), &dropped);
            assert_same(&what, &on(Site::ExpertHidden, Op::Zero), &dropped);
            assert_same(&what, &on(Site::Routing, Op::Scale { by: 0.0 }), &dropped);
            assert!(change(&dropped, &plain(&model, &texts[0])) > 1e-4, "{what}");
            let [out, gate, hidden] =
                [Site::ExpertOut, Site::Routing, Site::ExpertHidden].map(|s| on(s, Op::Scale { by: -2.0 }));
            assert_close(&what, &out, &gate, 1e-5 * largest(&gate));
            assert_close(&what, &hidden, &gate, 1e-5 * largest(&gate));
        }
    }
}

/// Values by expert reach each expert in its slots: the same for one and for all.
#[test]
fn values_are_given_by_expert() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let layer = model.spec().moe_layers()[0];
        let (e, d) = (moe(&model, layer).n_experts, model.spec().hidden_size);
        let values = noise(5, e * d);
        let mean = |units: &[usize], values: &[f32]| {
            on_units(units, in_layer(layer, Site::ExpertOut, Op::Mean { value: inline(values) }))
        };
        let all = in_layer(layer, Site::ExpertOut, Op::Mean { value: inline(values.clone()) });
        let each: Vec<Intervention> = values.chunks(d).enumerate().map(|(i, v)| mean(&[i], v)).collect();
        let numbers: Vec<usize> = (0..e).collect();
        let expected = logits_with(&model, &texts[0], &each);
        assert_same(name, &logits_with(&model, &texts[0], &[all]), &expected);
        assert_same(name, &logits_with(&model, &texts[0], &[mean(&numbers, &values)]), &expected);
        let halves = [mean(&numbers[..2], &values[..2 * d]), mean(&numbers[2..], &values[2 * d..])];
        assert_same(name, &logits_with(&model, &texts[0], &halves), &expected);
        // What the block gives is then known.
        let mut run = Recorder::new(&[Site::Routing, Site::MoeOut], Some(vec![layer]));
        logits(&model, &texts[0], &mut Chain(vec![&mut prepare(&model, &each), &mut run]));
        let slots = ids(&run, layer).values.iter().zip(&gates(&run, layer).values).collect::<Vec<_>>();
        let sum = |row: &[(&i64, &f32)]| {
            let slot = |&(&id, &g): &(&i64, &f32)| {
                values[id as usize * d..][..d].iter().map(move |v| g * v).collect::<Vec<_>>()
            };
            row.iter().map(slot).reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap()
        };
        let by_hand: Vec<f32> = slots.chunks(moe(&model, layer).top_k).flat_map(sum).collect();
        assert_close(name, &at_site(&run, Site::MoeOut, layer).values, &by_hand, 1e-5);
    }
}

/// Texts as prompts with given answers, in one batch, under a [`Profiler`].
fn profile(model: &Model, texts: &[Vec<u32>], prompt: usize, also: &mut dyn Lens) -> RouterStats {
    let mut profiler = Profiler::new(RouterStats::new(ExpertMap::of(model.spec())));
    let segments: Vec<Segment> = (texts.iter().enumerate())
        .map(|(slot, text)| Segment::teacher_forced(slot, &text[..prompt], &text[prompt..]))
        .collect();
    let mut cache = KvCache::new(model.spec(), texts.len());
    model.forward(&segments, &mut cache, &mut Chain(vec![also, &mut profiler])).unwrap();
    profiler.into_stats()
}

/// I4: what is counted is what was chosen, `k` experts for each token of each layer, prompt and answer apart.
#[test]
fn selections_are_counted_once_each() {
    for (name, path, texts) in moe_cases() {
        let mut model = open(&path);
        let (e, k) = sizes(&model);
        let mut run = Recorder::new(&ROUTER, None);
        let stats = profile(&model, &texts, 7, &mut run);
        let pooled = stats.pooled();
        let tokens: usize = texts.iter().map(Vec::len).sum();
        assert_eq!([stats.prompt.tokens, stats.answer.tokens], [14, tokens as u64 - 14], "{name}");
        assert_eq!(pooled.tokens, tokens as u64, "{name}");
        for phase in [&stats.prompt, &stats.answer, &pooled] {
            for moe in 0..stats.map.n_layers() {
                let units = stats.map.range(moe);
                assert_eq!(phase.count[units.clone()].iter().sum::<u64>(), k as u64 * phase.tokens, "{name}");
                assert_eq!(phase.top_count[units].iter().sum::<u64>(), phase.tokens, "{name}");
            }
        }
        check_counts(name, &stats, &run, &texts);
        let mut sum = stats.prompt.clone();
        sum.merge(&stats.answer);
        assert_eq!(sum, pooled, "{name}");

        // Empty places are not counted.
        model.mask_experts(&keep(&choose(&model, 2, |_| e / 2)), RoutingMode::Drop).unwrap();
        let mut run = Recorder::new(&ROUTER, None);
        let stats = profile(&model, &texts, 7, &mut run);
        for (moe, &layer) in stats.map.layers.iter().enumerate() {
            let chosen = ids(&run, layer).values.iter().filter(|&&id| id >= 0).count();
            assert_eq!(stats.pooled().count[stats.map.range(moe)].iter().sum::<u64>(), chosen as u64, "{name}");
            assert!(chosen < k * tokens);
        }
    }
}

/// Compares counts and sums with those of the recorded choices.
fn check_counts(name: &str, stats: &RouterStats, run: &Recorder, texts: &[Vec<u32>]) {
    let is_prompt: Vec<bool> = texts.iter().flat_map(|text| (0..text.len()).map(|p| p < 7)).collect();
    for (moe, &layer) in stats.map.layers.iter().enumerate() {
        let k = ids(run, layer).shape[1];
        for (phase, of_prompt) in [(&stats.prompt, true), (&stats.answer, false)] {
            let units = stats.map.range(moe);
            let (mut count, mut first, mut gate) = (vec![0; units.len()], vec![0; units.len()], vec![0.0; units.len()]);
            for (slot, &id) in ids(run, layer).values.iter().enumerate().filter(|(s, _)| is_prompt[s / k] == of_prompt)
            {
                count[id as usize] += 1;
                first[id as usize] += u64::from(slot % k == 0);
                gate[id as usize] += f64::from(gates(run, layer).values[slot]);
            }
            let PhaseStats { count: counted, top_count, .. } = phase;
            assert_eq!((&counted[units.clone()], &top_count[units.clone()]), (&count[..], &first[..]), "{name}");
            assert_eq!(phase.sum(Sum::Gate)[units], gate, "{name}");
        }
    }
}

/// I5: a softmax router does not feel one constant on all logits of a token, another for each token.
#[test]
fn a_constant_on_all_router_logits_changes_nothing() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let own = record(&model, &texts[0], &ROUTER);
        let expected = plain(&model, &texts[0]);
        let mut by_token = Visit::new(&[Site::RouterLogits], |_, seen| {
            if let Seen::Tensor(tensor) = seen {
                let (e, mut z) = (tensor.dims()[1], support::values(tensor));
                let shift = |row: usize| [0.0, 1.5, -3.0, 4.25][row % 4];
                z.chunks_mut(e).enumerate().for_each(|(row, z)| z.iter_mut().for_each(|z| *z += shift(row)));
                *tensor = ops::tensor(z, tensor.dims())?;
            }
            Ok(Flow::Continue)
        });
        let mut constant = prepare(&model, &[at(Site::RouterLogits, Op::Bias { by: 2.75 })]);
        for lens in [&mut by_token as &mut dyn Lens, &mut constant] {
            let mut run = Recorder::new(&ROUTER, None);
            let found = logits(&model, &texts[0], &mut Chain(vec![lens, &mut run]));
            for layer in model.spec().moe_layers() {
                assert_eq!(ids(&run, layer), ids(&own, layer), "{name}, layer {layer}");
                assert_close(name, &gates(&run, layer).values, &gates(&own, layer).values, 1e-6);
                assert_ne!(at_site(&run, Site::RouterLogits, layer), at_site(&own, Site::RouterLogits, layer));
            }
            assert_close(name, &found, &expected, 1e-5 * largest(&expected));
        }
    }
}
