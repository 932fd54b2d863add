//! Every site is recorded with its shape, costs nothing when nobody looks, and can be edited; recordings patch.

mod support;

use std::collections::BTreeMap;

use quorate_formats::spec::FfnSpec;
use quorate_lens::{Intervention, Interventions, Op, Recorder, Value};
use quorate_model::{Chain, KvCache, Model, NoLens, Segment, Site};
use support::{
    as_generated, assert_close, assert_same, at, at_site, change, embedded, fixture, from_file, has, in_layer, inline,
    largest, logits, logits_in_turn, logits_of, logits_with, noise, on_units, open, plain, prepare, prompts, record,
    rows, saved, sites_of, tensor_sites,
};

/// Dense and MoE layers, a shared expert; with window, grouped queries and biases; all MoE.
const MODELS: [&str; 3] = ["qwen2_moe_mixed", "qwen3_moe_nonorm", "olmoe"];

fn is_attention_score(site: Site) -> bool {
    matches!(site, Site::AttnScores | Site::AttnPattern)
}

/// The documented shape of a site: `n` rows, `m` of them with logits, `s` keys.
fn documented(model: &Model, layer: usize, site: Site, [n, m, s]: [usize; 3]) -> Vec<usize> {
    let spec = model.spec();
    let d = spec.hidden_size;
    if !site.per_layer() {
        return vec![m, if site == Site::Logits { spec.vocab_size } else { d }];
    }
    let attn = &spec.layers[layer].attn;
    let (e, k, i) = spec.moe(layer).map_or((0, 0, 0), |moe| (moe.n_experts, moe.top_k, moe.intermediate_size));
    let mlp = match &spec.layers[layer].ffn {
        FfnSpec::Dense { intermediate_size, .. } => *intermediate_size,
        FfnSpec::Moe(moe) => moe.shared.as_ref().map_or(0, |shared| shared.intermediate_size),
    };
    match site {
        Site::AttnQ | Site::AttnQRot | Site::Z => vec![n, attn.n_heads, attn.head_dim],
        Site::AttnK | Site::AttnKRot | Site::AttnV => vec![n, attn.n_kv_heads, attn.head_dim],
        Site::AttnScores | Site::AttnPattern => vec![n, attn.n_heads, s],
        Site::RouterLogits | Site::Selection => vec![n, e],
        Site::Routing => vec![n, k],
        Site::ExpertHidden => vec![n, k, i],
        Site::ExpertOut => vec![n, k, d],
        Site::MlpHidden => vec![n, mlp],
        _ => vec![n, d],
    }
}

/// All that a recording of `[n, m, s]` rows, rows with logits and keys has, by name.
fn documented_shapes(model: &Model, size: [usize; 3]) -> BTreeMap<String, Vec<usize>> {
    let layers = model.spec().layers.len();
    let mut shapes = BTreeMap::new();
    for &site in Site::ALL {
        for layer in (0..layers).filter(|&l| has(model, l, site)) {
            let shape = documented(model, layer, site, size);
            let names = match site {
                Site::Routing => vec![format!("topk_ids.{layer}"), format!("topk_weights.{layer}")],
                _ if site.per_layer() => vec![format!("{site}.{layer}")],
                _ => vec![site.to_string()],
            };
            shapes.extend(names.into_iter().map(|name| (name, shape.clone())));
        }
    }
    shapes
}

fn recorded_shapes(recorder: &Recorder) -> BTreeMap<String, Vec<usize>> {
    let floats = recorder.floats().iter().map(|(name, r)| (name, &r.shape, r.values.len()));
    let ids = recorder.ids().iter().map(|(name, r)| (name, &r.shape, r.values.len()));
    let one = |(name, shape, len): (&String, &Vec<usize>, usize)| {
        assert_eq!(shape.iter().product::<usize>(), len, "{name}");
        (name.clone(), shape.clone())
    };
    floats.chain(ids).map(one).collect()
}

#[test]
fn every_site_is_recorded_with_its_shape() {
    for path in MODELS.iter().map(|name| fixture(name)).chain([embedded()]) {
        let model = open(&path);
        let tokens: Vec<u32> = (3..25).collect();
        let mut recorder = Recorder::new(Site::ALL, None);
        logits(&model, &tokens, &mut recorder);
        assert_eq!(recorded_shapes(&recorder), documented_shapes(&model, [22, 22, 22]));

        // A prompt whose last row has logits, two generated tokens, and a second sequence beside them.
        let mut recorder = Recorder::new(Site::ALL, None);
        let mut cache = KvCache::new(model.spec(), 2);
        model.forward(&[Segment::prompt(0, tokens.clone())], &mut cache, &mut recorder).unwrap();
        model.forward(&[Segment::decode(0, 5)], &mut cache, &mut recorder).unwrap();
        let both = [Segment::prompt(1, tokens[..4].to_vec()), Segment::decode(0, 6)];
        model.forward(&both, &mut cache, &mut recorder).unwrap();
        assert_eq!(recorded_shapes(&recorder), documented_shapes(&model, [28, 4, 24]));
    }
}

#[test]
fn a_recorder_keeps_the_layers_it_is_asked_for() {
    let model = open(&fixture("qwen2_moe_mixed"));
    let tokens = &prompts("qwen2_moe_mixed")[0];
    let mut some = Recorder::new(&[Site::Z, Site::Routing, Site::Logits], Some(vec![1, 2]));
    logits(&model, tokens, &mut some);
    let names: Vec<&str> = some.floats().keys().chain(some.ids().keys()).map(String::as_str).collect();
    assert_eq!(names, ["logits", "topk_weights.2", "z.1", "z.2", "topk_ids.2"]);
}

/// Attention without scores is another kernel: it agrees to 1e-5 of the largest logit, all else to the bit.
#[test]
fn looking_changes_nothing() {
    for path in MODELS.iter().map(|name| fixture(name)).chain([embedded()]) {
        let model = open(&path);
        let tokens: Vec<u32> = (30..54).collect();
        let pieces = as_generated(&tokens[..20], &tokens[20..]);
        let expected = logits_in_turn(&model, &pieces, &mut NoLens);
        let seen = |sites: &[Site]| logits_in_turn(&model, &pieces, &mut Recorder::new(sites, None));
        for &site in Site::ALL {
            let tolerance = if is_attention_score(site) { 1e-5 * largest(&expected) } else { 0.0 };
            assert_close(site.name(), &seen(&[site]), &expected, tolerance);
        }
        let others: Vec<Site> = Site::ALL.iter().copied().filter(|&site| !is_attention_score(site)).collect();
        assert_same("all but scores", &seen(&others), &expected);
        assert_same("all", &seen(Site::ALL), &seen(&[Site::AttnScores]));
        assert_same("nothing to do", &logits_in_turn(&model, &pieces, &mut prepare(&model, &[])), &expected);
    }
}

/// Scores so far apart that their softmax is 0 for all but the first are still ranked by the logits.
#[test]
fn looking_at_the_selection_changes_no_rank() {
    for name in ["qwen2_moe_mixed", "olmoe"] {
        let model = open(&fixture(name));
        let tokens = &prompts(name)[0];
        let ids = |sites: &[Site]| {
            let mut recorder = Recorder::new(sites, None);
            let mut steep = prepare(&model, &[at(Site::RouterLogits, Op::Scale { by: 1e4 })]);
            logits(&model, tokens, &mut Chain(vec![&mut steep, &mut recorder]));
            recorder.ids().clone()
        };
        assert_eq!(ids(&[Site::Routing, Site::Selection]), ids(&[Site::Routing]), "{name}");
    }
}

/// A run patched with its own recording is itself, in one piece and generated, from files and from plans.
#[test]
fn patching_with_the_own_recording_changes_nothing() {
    for name in MODELS {
        let model = open(&fixture(name));
        let tokens = &prompts(name)[0];
        let ways = [
            vec![rows(0, tokens)],
            vec![rows(0, &tokens[..7]), rows(0, &tokens[7..9]), rows(0, &tokens[9..])],
            as_generated(&tokens[..19], &tokens[19..]),
        ];
        for (way, pieces) in ways.iter().enumerate() {
            let mut recorder = Recorder::new(Site::ALL, None);
            let open_path = logits_in_turn(&model, pieces, &mut recorder);
            let kernel_path = logits_in_turn(&model, pieces, &mut NoLens);
            let folder = saved(&recorder);
            // Each site by itself: with scores, attention is another kernel.
            for site in sites_of(&model) {
                let expected = if is_attention_score(site) { &open_path } else { &kernel_path };
                let mut own = Recorder::new(&[site], None);
                logits_in_turn(&model, pieces, &mut own);
                let own_folder = saved(&own);
                let what = format!("{name}, way {way}, {site}");
                let patch = at(site, Op::Patch { value: from_file(site) });
                let mut lens = Interventions::prepare(&[patch], model.spec(), own_folder.path()).unwrap();
                assert_same(&what, &logits_in_turn(&model, pieces, &mut lens), expected);
                for layer in (0..model.spec().layers.len()).filter(|&l| has(&model, l, site)) {
                    let mut own = Recorder::new(&[site], Some(vec![layer]));
                    let expected = logits_in_turn(&model, pieces, &mut own);
                    let value = inline(at_site(&own, site, layer).values.clone());
                    let mut lens = prepare(&model, &[in_layer(layer, site, Op::Patch { value })]);
                    assert_same(&what, &logits_in_turn(&model, pieces, &mut lens), &expected);
                }
            }
            let all: Vec<Intervention> =
                sites_of(&model).map(|site| at(site, Op::Patch { value: from_file(site) })).collect();
            let mut lens = Interventions::prepare(&all, model.spec(), folder.path()).unwrap();
            let mut again = Recorder::new(Site::ALL, None);
            let found = logits_in_turn(&model, pieces, &mut Chain(vec![&mut lens, &mut again]));
            assert_same(&format!("{name}, way {way}, all sites"), &found, &open_path);
            assert_eq!((again.floats(), again.ids()), (recorder.floats(), recorder.ids()), "{name}, way {way}");
        }
    }
}

/// Patching the whole residual stream makes one text compute another's logits, to the bit.
#[test]
fn patching_the_whole_stream_is_the_other_run() {
    for name in MODELS {
        let model = open(&fixture(name));
        let [a, b] = prompts(name);
        let stream = [Site::ResidPre, Site::ResidMid, Site::ResidPost, Site::FinalNorm, Site::Logits];
        let (other, expected) = (record(&model, &b, &stream), plain(&model, &b));
        for site in stream {
            for layer in 0..if site.per_layer() { model.spec().layers.len() } else { 1 } {
                let value = inline(at_site(&other, site, layer).values.clone());
                let found = logits_with(&model, &a, &[in_layer(layer, site, Op::Patch { value })]);
                assert_same(&format!("{name}, {site} {layer}"), &found, &expected);
            }
        }
    }
}

/// Rows beyond a recording stay as they are, at every site.
#[test]
fn a_patch_of_a_shorter_run_reaches_as_far_as_it_goes() {
    for name in MODELS {
        let model = open(&fixture(name));
        let [long, other] = prompts(name);
        let short = record(&model, &other[..9], Site::ALL);
        for site in tensor_sites().filter(|site| site.per_layer()) {
            for layer in (0..model.spec().layers.len()).filter(|&l| has(&model, l, site)) {
                let patch = &at_site(&short, site, layer);
                let mut before = Recorder::new(&[site], Some(vec![layer]));
                let mut after = Recorder::new(&[site], Some(vec![layer]));
                let value = inline(patch.values.clone());
                let mut lens = prepare(&model, &[in_layer(layer, site, Op::Patch { value })]);
                logits(&model, &long, &mut Chain(vec![&mut before, &mut lens, &mut after]));
                let (before, after) = (at_site(&before, site, layer), at_site(&after, site, layer));
                let width: usize = before.shape[1..].iter().product();
                let what = format!("{name}, {site} {layer}");
                assert_same(&what, &after.values[9 * width..], &before.values[9 * width..]);
                if is_attention_score(site) {
                    // Keys beyond the recording were invisible to its rows.
                    let keys = |r: &quorate_lens::Recorded<f32>, row: usize| r.values[row * r.shape[2]..][..9].to_vec();
                    for row in 0..9 * before.shape[1] {
                        assert_same(&what, &keys(after, row), &keys(patch, row));
                    }
                } else {
                    assert_same(&what, &after.values[..9 * width], &patch.values);
                }
            }
        }
    }
}

/// Operations that need no selector, with values for a site of `units` units of `width` values.
fn operations(seed: u64, units: usize, width: usize, other: &[f32]) -> Vec<Op> {
    let value = || inline(noise(seed, units * width));
    vec![
        Op::Zero,
        Op::Scale { by: 1.5 },
        Op::Bias { by: 0.3 },
        Op::Mean { value: value() },
        Op::Add { value: value(), scale: 0.7 },
        Op::Mix { value: value(), share: 0.4 },
        Op::Patch { value: inline(other) },
    ]
}

/// Changes that a model cannot feel, and why.
fn is_inert(site: Site, op: &Op, is_last_layer: bool) -> bool {
    match (site, op) {
        // The final norm takes the length away.
        (Site::ResidPost, Op::Scale { .. }) => is_last_layer,
        // A softmax does not feel a constant.
        (Site::AttnScores | Site::RouterLogits, Op::Bias { .. }) => true,
        // One vector for all keys adds one number to all scores of a query.
        (Site::AttnKRot, Op::Bias { .. } | Op::Add { .. }) => true,
        // It is zero already; a constant for all experts changes no choice.
        (Site::Selection, Op::Zero | Op::Patch { .. } | Op::Bias { .. }) => true,
        _ => false,
    }
}

#[test]
fn every_site_can_be_edited_by_every_operation() {
    for name in MODELS {
        let model = open(&fixture(name));
        let [tokens, other] = prompts(name);
        let expected = plain(&model, &tokens);
        let (own, other) = (record(&model, &tokens, Site::ALL), record(&model, &other, Site::ALL));
        for site in tensor_sites() {
            for layer in (0..model.spec().layers.len()).filter(|&l| has(&model, l, site)) {
                let mut shape = at_site(&own, site, layer).shape.clone();
                if matches!(site, Site::ExpertHidden | Site::ExpertOut) {
                    shape[1] = model.spec().moe(layer).unwrap().n_experts; // values are by expert, not by slot
                }
                let width = shape.get(2).copied().unwrap_or(1);
                let ops = operations(layer as u64, shape[1], width, &at_site(&other, site, layer).values);
                for op in ops {
                    let what = format!("{name}, {site} {layer}, {op:?}").chars().take(80).collect::<String>();
                    if matches!((site, &op), (Site::Selection, Op::Scale { .. })) {
                        assert!(Interventions::prepare(&[at(site, op)], model.spec(), "".as_ref()).is_err(), "{what}");
                        continue;
                    }
                    let change = change(&logits_with(&model, &tokens, &[in_layer(layer, site, op.clone())]), &expected);
                    if is_inert(site, &op, layer + 1 == model.spec().layers.len()) {
                        assert!(change < 1e-5, "{what}: changes the logits by {change}");
                    } else {
                        assert!(change > 1e-3, "{what}: changes the logits by {change} only");
                    }
                }
            }
        }
    }
}

/// One change, said in different ways.
#[test]
fn equal_edits_are_equal() {
    for name in MODELS {
        let model = open(&fixture(name));
        let tokens = &prompts(name)[0];
        let zero = |site: Site| vec![at(site, Op::Zero)];
        let scale = |site: Site| vec![at(site, Op::Scale { by: 0.6 })];
        let last = model.spec().layers.len() - 1;
        let mut groups = vec![
            // No head writes anything.
            vec![zero(Site::AttnPattern), zero(Site::Z), zero(Site::AttnV)],
            // Each visible key counts the same; the invisible ones stay invisible.
            vec![
                zero(Site::AttnScores),
                zero(Site::AttnQRot),
                zero(Site::AttnQ),
                zero(Site::AttnKRot),
                zero(Site::AttnK),
            ],
            vec![scale(Site::AttnScores), scale(Site::AttnQRot), scale(Site::AttnQ), scale(Site::AttnK)],
            vec![scale(Site::AttnPattern), scale(Site::Z), scale(Site::AttnV)],
            // No routed expert writes anything.
            vec![
                zero(Site::ExpertHidden),
                zero(Site::ExpertOut),
                zero(Site::MoeOut),
                vec![at(Site::Routing, Op::Drop)],
                vec![at(Site::Routing, Op::DropRenormalise)],
                vec![at(Site::Routing, Op::Scale { by: 0.0 })],
                vec![at(Site::RouterLogits, Op::Mask)],
            ],
            vec![scale(Site::ExpertHidden), scale(Site::ExpertOut), scale(Site::MoeOut), scale(Site::Routing)],
            // The last residual stream, before and after the norm.
            vec![zero(Site::FinalNorm), vec![in_layer(last, Site::ResidPost, Op::Zero)]],
            vec![
                vec![at(Site::Logits, Op::Scale { by: 2.0 })],
                vec![at(Site::FinalNorm, Op::Scale { by: 4.0 }), at(Site::Logits, Op::Scale { by: 0.5 })],
                vec![at(Site::FinalNorm, Op::Scale { by: 2.0 })],
            ],
        ];
        if name != "olmoe" {
            let dense = (0..=last).find(|&l| model.spec().moe(l).is_none()).unwrap();
            let zero_in = |site: Site| vec![in_layer(dense, site, Op::Zero)];
            groups.push(vec![zero_in(Site::MlpHidden), zero_in(Site::MlpOut), zero_in(Site::FfnIn)]);
        }
        for group in groups {
            let logits: Vec<Vec<f32>> = group.iter().map(|list| logits_with(&model, tokens, list)).collect();
            assert!(change(&logits[0], &plain(&model, tokens)) > 1e-3, "{name}: {:?}", group[0]);
            for (list, found) in group.iter().zip(&logits) {
                let (one, other) = (&list[0], &group[0][0]);
                let what = format!("{name}: {:?} at {} and {:?} at {}", one.op, one.site, other.op, other.site);
                assert_close(&what, found, &logits[0], 1e-5 * largest(&logits[0]));
            }
        }
    }
}

/// Interventions are applied in the order given, each on what the one before left.
#[test]
fn the_order_of_interventions_counts() {
    let model = open(&fixture("olmoe"));
    let tokens = &prompts("olmoe")[0];
    let double = || at(Site::Logits, Op::Scale { by: 2.0 });
    let more = || at(Site::Logits, Op::Bias { by: 1.0 });
    let expected = plain(&model, tokens);
    let by = |edit: fn(&f32) -> f32| expected.iter().map(edit).collect::<Vec<_>>();
    assert_same("2x + 1", &logits_with(&model, tokens, &[double(), more()]), &by(|x| 2.0 * x + 1.0));
    assert_same("2 (x + 1)", &logits_with(&model, tokens, &[more(), double()]), &by(|x| 2.0 * (x + 1.0)));
    assert_same("twice", &logits_with(&model, tokens, &[double(), double()]), &by(|x| 4.0 * x));
}

#[test]
fn interventions_that_cannot_be_are_refused() {
    let model = open(&fixture("qwen2_moe_mixed"));
    let tokens = &prompts("qwen2_moe_mixed")[0];
    let file = |file: &str, tensor: &str| Value::File { file: file.into(), tensor: tensor.into() };
    let folder = saved(&record(&model, tokens, &[Site::Z]));
    let cases = [
        (at(Site::Z, Op::Mask), "intervention `mask` at z: not possible there; help: use it at router_logits"),
        (at(Site::RouterLogits, Op::Drop), "help: use it at routing"),
        (at(Site::RouterLogits, Op::Force), "help: use it at selection"),
        (at(Site::Routing, Op::Zero), "not possible there"),
        (in_layer(3, Site::Z, Op::Zero), "layer 3 does not exist, the model has 3"),
        (in_layer(1, Site::RouterLogits, Op::Mask), "none of the chosen layers has this site"),
        (on_units(&[4], at(Site::Z, Op::Zero)), "unit 4 does not exist, there are 4"),
        (on_units(&[6], at(Site::Routing, Op::Drop)), "unit 6 does not exist, there are 6"),
        (on_units(&[32], at(Site::ResidPre, Op::Zero)), "unit 32 does not exist, there are 32"),
        (at(Site::Z, Op::Mean { value: file("none.safetensors", "z") }), "none.safetensors"),
        (at(Site::Z, Op::Mean { value: file("run.safetensors", "y.{layer}") }), "y.0"),
    ];
    for (intervention, message) in cases {
        let error = Interventions::prepare(&[intervention], model.spec(), folder.path()).unwrap_err();
        assert!(support::chain(&error).contains(message), "{}", support::chain(&error));
    }
    // Values of a wrong length show when they are used; the cache stays as it was.
    let head_dim = model.spec().layers[0].attn.head_dim;
    let n_kv = model.spec().layers[0].attn.n_kv_heads;
    for (site, len) in
        [(Site::AttnV, head_dim * n_kv + 1), (Site::AttnV, 0), (Site::ResidMid, 31), (Site::ExpertOut, 64)]
    {
        let mut lens = prepare(&model, &[at(site, Op::Add { value: inline(vec![0.5; len]), scale: 1.0 })]);
        let mut cache = KvCache::new(model.spec(), 1);
        let error = model.forward(&[rows(0, tokens)], &mut cache, &mut lens).unwrap_err();
        let message = format!("intervention `add` at {site} layer 0: {len} values given; help: give ");
        assert!(support::chain(&error).contains(&message), "{}", support::chain(&error));
        assert_eq!(cache.len(0), 0);
        assert_same(
            "next",
            &logits_of(model.forward(&[rows(0, tokens)], &mut cache, &mut NoLens).unwrap()),
            &plain(&model, tokens),
        );
    }
}
