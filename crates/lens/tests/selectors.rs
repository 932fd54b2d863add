//! An intervention changes what its selectors choose and nothing else: layers, units, positions, parts of the text.

mod support;

use quorate_formats::spec::ModelSpec;
use quorate_lens::{Indices, Intervention, Op, PhaseSelector, Recorded, Recorder};
use quorate_model::{Chain, KvCache, Lens, Model, NoLens, Phase, Segment, Site, Units};
use support::{assert_same, at, at_site, fixture, has, in_layer, open, prepare, prompts, sites_of, tensor_sites};

/// A model with dense and MoE layers and all sites, and one with grouped queries and a window.
const MODELS: [&str; 2] = ["qwen2_moe_mixed", "qwen3_moe_nonorm"];

/// One row of the scene: its sequence, position and phase, and whether it has logits.
#[derive(Clone, Copy)]
struct Row {
    sequence: usize,
    position: usize,
    phase: Phase,
    has_logits: bool,
}

/// Two texts under way: a prompt that is answered by two generated tokens, and one with a given answer, which then goes
/// on for one token. The passes, and all their rows.
fn scene(name: &str) -> (Vec<Vec<Segment>>, Vec<Row>) {
    let [a, b] = prompts(name);
    let passes = vec![
        vec![Segment::prompt(0, a[..6].to_vec()), Segment::teacher_forced(1, &b[..4], &b[4..7])],
        vec![Segment::decode(1, b[7]), Segment::decode(0, a[6])],
        vec![Segment::decode(0, a[7])],
    ];
    let row = |sequence, position, phase, has_logits| Row { sequence, position, phase, has_logits };
    let mut rows: Vec<Row> = (0..5).map(|p| row(0, p, Phase::Prompt, false)).collect();
    rows.push(row(0, 5, Phase::PromptLast, true));
    rows.extend((0..3).map(|p| row(1, p, Phase::Prompt, false)));
    rows.push(row(1, 3, Phase::PromptLast, true));
    rows.extend((4..7).map(|p| row(1, p, Phase::Answer, true)));
    rows.extend([row(1, 7, Phase::Decode, true), row(0, 6, Phase::Decode, true), row(0, 7, Phase::Decode, true)]);
    (passes, rows)
}

/// Runs the scene; all logits.
fn play(model: &Model, passes: &[Vec<Segment>], lens: &mut dyn Lens) -> Vec<f32> {
    let mut cache = KvCache::new(model.spec(), 2);
    let pass = |segments: &Vec<Segment>| support::logits_of(model.forward(segments, &mut cache, lens).unwrap());
    passes.iter().flat_map(pass).collect()
}

fn chooses(selector: PhaseSelector, phase: Phase) -> bool {
    let by_hand: &[Phase] = match selector {
        PhaseSelector::All => &[Phase::Prompt, Phase::PromptLast, Phase::Answer, Phase::Decode],
        PhaseSelector::Prefill => &[Phase::Prompt, Phase::PromptLast],
        PhaseSelector::Last => &[Phase::PromptLast],
        PhaseSelector::Decode => &[Phase::Answer, Phase::Decode],
        PhaseSelector::EveryStepLast => &[Phase::PromptLast, Phase::Answer, Phase::Decode],
    };
    by_hand.contains(&phase)
}

const PHASES: [PhaseSelector; 5] = [
    PhaseSelector::All,
    PhaseSelector::Prefill,
    PhaseSelector::Last,
    PhaseSelector::Decode,
    PhaseSelector::EveryStepLast,
];

/// Some units of a site, each of which occurs in the scene.
fn some_units(spec: &ModelSpec, layer: usize, site: Site) -> Indices {
    match site.units() {
        Units::Neuron => "1,4-6,30".parse().unwrap(),
        Units::Head if matches!(site, Site::AttnK | Site::AttnV | Site::AttnKRot) => {
            Indices::of(&[spec.layers[layer].attn.n_kv_heads - 1])
        }
        Units::Head => Indices::of(&[0, 2]),
        Units::Expert => Indices::of(&[0, 3]),
    }
}

/// The unit of each place on axis 1 of each row: the expert of a slot, else the place.
fn unit_at(recorder: &Recorder, site: Site, layer: usize, row: usize, axis: usize) -> Option<usize> {
    if !matches!(site, Site::ExpertHidden | Site::ExpertOut | Site::Routing) {
        return Some(axis);
    }
    let ids = &recorder.ids()[&format!("topk_ids.{layer}")];
    usize::try_from(ids.values[row * ids.shape[1] + axis]).ok()
}

#[test]
fn only_chosen_values_change() {
    for name in MODELS {
        let model = open(&fixture(name));
        let (passes, rows) = scene(name);
        for site in sites_of(&model) {
            let layer = (0..model.spec().layers.len()).rfind(|&l| has(&model, l, site)).unwrap();
            let all_units = [Indices::All, some_units(model.spec(), layer, site)];
            for (phase, positions, units) in selectors(&all_units) {
                let choice = Intervention { phase, positions, units, ..in_layer(layer, site, Op::Bias { by: 0.37 }) };
                check_choice(&model, &passes, &rows, layer, &choice);
            }
        }
    }
}

fn selectors(all_units: &[Indices]) -> Vec<(PhaseSelector, Indices, Indices)> {
    let positions = [Indices::All, "2-3,6".parse().unwrap(), Indices::of(&[5])];
    let each = PHASES.iter().flat_map(|&phase| {
        let with_positions = positions.iter().map(move |p| (phase, p.clone()));
        with_positions.flat_map(|(phase, p)| all_units.iter().map(move |u| (phase, p.clone(), u.clone())))
    });
    each.collect()
}

/// Compares a site before and after an intervention, value by value, and the logits with those of an untouched run.
fn check_choice(model: &Model, passes: &[Vec<Segment>], rows: &[Row], layer: usize, choice: &Intervention) {
    let site = choice.site;
    let what = format!("{site} {layer} {:?} {} {}", choice.phase, choice.positions, choice.units);
    let recorder = |site| Recorder::new(&[site], Some(vec![layer]));
    let untouched = play(model, passes, &mut recorder(site));
    let (mut ids, mut before, mut after) = (recorder(Site::Routing), recorder(site), recorder(site));
    let mut lens = prepare(model, std::slice::from_ref(choice));
    let found = play(model, passes, &mut Chain(vec![&mut ids, &mut before, &mut lens, &mut after]));

    let row_chosen = |row: &Row| choice.positions.contains(row.position) && chooses(choice.phase, row.phase);
    let here: Vec<Row> = rows.iter().filter(|row| site.per_layer() || row.has_logits).copied().collect();
    let (before, after) = (at_site(&before, site, layer), at_site(&after, site, layer));
    let [units, width] = [before.shape[1], before.shape.get(2).copied().unwrap_or(1)];
    assert_eq!((before.shape[0], &before.shape), (here.len(), &after.shape), "{what}");
    for (i, (was, is)) in before.values.iter().zip(&after.values).enumerate() {
        let (row, axis) = (i / (units * width), i / width % units);
        let unit = unit_at(&ids, site, layer, row, axis);
        let chosen = row_chosen(&here[row]) && unit.is_some_and(|unit| choice.units.contains(unit));
        if matches!(site, Site::AttnScores | Site::AttnPattern) && i % width > here[row].position {
            continue; // an invisible key
        }
        assert_eq!(*is, if chosen { was + 0.37 } else { *was }, "{what}: row {row}, unit {unit:?}, chosen {chosen}");
    }
    check_logits(&what, rows, &row_chosen, &untouched, &found);
}

/// Rows before the first chosen one of their text do not notice.
fn check_logits(what: &str, rows: &[Row], chosen: &dyn Fn(&Row) -> bool, untouched: &[f32], found: &[f32]) {
    let with_logits: Vec<&Row> = rows.iter().filter(|row| row.has_logits).collect();
    let vocab = untouched.len() / with_logits.len();
    for (m, row) in with_logits.iter().enumerate() {
        let reaches = |r: &&Row| r.sequence == row.sequence && r.position <= row.position && chosen(r);
        if !rows.iter().any(|r| reaches(&r)) {
            let range = m * vocab..(m + 1) * vocab;
            assert_same(what, &found[range.clone()], &untouched[range]);
        }
    }
}

/// At `routing` gates are scaled and slots emptied, of the chosen experts in the chosen rows.
#[test]
fn only_chosen_slots_change() {
    for name in MODELS {
        let model = open(&fixture(name));
        let (passes, rows) = scene(name);
        let layer = *model.spec().moe_layers().last().unwrap();
        let units = [Indices::All, Indices::of(&[0, 3])];
        for op in [Op::Scale { by: 0.5 }, Op::Drop, Op::DropRenormalise] {
            for (phase, positions, units) in selectors(&units) {
                let choice = Intervention { phase, positions, units, ..in_layer(layer, Site::Routing, op.clone()) };
                let what = format!("{op:?} {phase:?} {} {}", choice.positions, choice.units);
                let [mut before, mut after] = [(); 2].map(|()| Recorder::new(&[Site::Routing], Some(vec![layer])));
                let mut lens = prepare(&model, std::slice::from_ref(&choice));
                play(&model, &passes, &mut Chain(vec![&mut before, &mut lens, &mut after]));
                let routing = |r: &Recorder| {
                    (
                        r.ids()[&format!("topk_ids.{layer}")].clone(),
                        r.floats()[&format!("topk_weights.{layer}")].clone(),
                    )
                };
                check_slots(&what, &rows, &choice, routing(&before), routing(&after));
            }
        }
    }
}

type Slots = (Recorded<i64>, Recorded<f32>);

fn check_slots(what: &str, rows: &[Row], choice: &Intervention, before: Slots, after: Slots) {
    let k = before.0.shape[1];
    for (r, row) in rows.iter().enumerate() {
        let slots = r * k..(r + 1) * k;
        let row_chosen = choice.positions.contains(row.position) && chooses(choice.phase, row.phase);
        let (ids, gates) = (&before.0.values[slots.clone()], &before.1.values[slots.clone()]);
        let hit: Vec<bool> = ids.iter().map(|&id| row_chosen && choice.units.contains(id as usize)).collect();
        let survivors: f32 = gates.iter().zip(&hit).filter(|(_, hit)| !**hit).map(|(g, _)| g).sum();
        let all: f32 = gates.iter().sum();
        for (j, slot) in slots.enumerate() {
            let (id, gate) = match (&choice.op, hit[j]) {
                (Op::Scale { by }, true) => (ids[j], gates[j] * by),
                (_, true) => (-1, 0.0),
                (Op::DropRenormalise, false) if hit.contains(&true) => (ids[j], gates[j] * all / survivors),
                (_, false) => (ids[j], gates[j]),
            };
            assert_eq!(after.0.values[slot], id, "{what}: row {r}");
            assert!((after.1.values[slot] - gate).abs() <= 1e-6 * gate, "{what}: row {r}");
        }
    }
}

#[test]
fn only_chosen_layers_are_visited() {
    let model = open(&fixture("qwen2_moe_mixed"));
    let (passes, _) = scene("qwen2_moe_mixed");
    for site in tensor_sites().filter(|site| site.per_layer()) {
        let lens = prepare(&model, &[Intervention { layers: "0,2".parse().unwrap(), ..at(site, Op::Zero) }]);
        let asked: Vec<usize> = (0..=3).filter(|&l| lens.sites(l).contains(site)).collect();
        assert_eq!(asked, [0, 2], "{site}");
        let (mut before, mut after) = (Recorder::new(&[site], None), Recorder::new(&[site], None));
        play(&model, &passes, &mut Chain(vec![&mut before, &mut lens.clone(), &mut after]));
        for layer in (0..3).filter(|&l| has(&model, l, site)) {
            let (before, after) = (at_site(&before, site, layer), at_site(&after, site, layer));
            if layer == 1 {
                assert_eq!(before, after, "{site}");
            } else {
                assert!(after.values.iter().all(|&v| v == 0.0 || v == f32::NEG_INFINITY), "{site} {layer}");
            }
        }
    }
    assert!(prepare(&model, &[at(Site::Logits, Op::Zero)]).sites(3).contains(Site::Logits));
    assert!(prepare(&model, &[at(Site::Logits, Op::Zero)]).sites(1).is_empty());
}

/// An edit of keys and values stays in the cache: prompts edited once act on all later tokens.
#[test]
fn edits_of_the_cache_stay() {
    for name in MODELS {
        let model = open(&fixture(name));
        let tokens = &prompts(name)[0];
        let step = |segment: Segment, cache: &mut KvCache, lens: &mut dyn Lens| {
            support::logits_of(model.forward(&[segment], cache, lens).unwrap())
        };
        let prompt = || Segment::prompt(0, tokens[..9].to_vec());
        let next = || Segment::decode(0, tokens[9]);
        let mut cache = KvCache::new(model.spec(), 1);
        step(prompt(), &mut cache, &mut NoLens);
        let untouched = step(next(), &mut cache, &mut NoLens);
        for site in [Site::AttnV, Site::AttnKRot, Site::ResidPre] {
            let edit = Intervention { phase: PhaseSelector::Prefill, ..at(site, Op::Zero) };
            let mut lens = prepare(&model, &[edit]);
            cache.truncate(0, 0);
            step(prompt(), &mut cache, &mut lens);
            let off = step(next(), &mut cache, &mut NoLens);
            cache.truncate(0, 9);
            let on = step(next(), &mut cache, &mut lens);
            assert_same(site.name(), &off, &on);
            assert!(support::change(&off, &untouched) > 1e-3, "{site}");
        }
    }
}
