//! Super experts that were planted: one expert writes something huge into one channel when a certain token passes.

use crate::engine::{Capture, edited, embedded, fixture, logits, open};
use crate::support::{Tasks, number, run_on, sums, table, task};
use quorate_eval::encode::EncodedItem;
use quorate_formats::Role;
use quorate_lens::read_experts;
use quorate_methods::experts::extremes::{SinkRecorder, WithoutShared};
use quorate_methods::experts::super_experts::sink_decay;
use quorate_methods::{Lab, MethodError, Report};
use quorate_model::{Chain, Lens, Model, NoLens, Site};
use quorate_residency::{Expert, Matrix};
use serde_json::{Value, json};

const CHANNEL: usize = 7;
const TEXTS: usize = 30;

fn run(model: Model, line: &str) -> (Model, Report) {
    let (model, report) = run_on(model, vec![sums(TEXTS)], line);
    (model, report.unwrap())
}

fn list(report: &Report) -> Vec<Value> {
    let file = report.files.iter().find(|f| f.name == "super_experts.json").unwrap();
    let text = String::from_utf8(file.bytes.clone()).unwrap();
    read_experts("super_experts.json", &text).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// One token's hidden vector in one expert.
struct Passage {
    expert: usize,
    position: usize,
    hidden: Vec<f32>,
}

/// Every token of the tasks in every expert of a layer that it chooses.
fn passages(model: &Model, layer: usize) -> Vec<Passage> {
    let mut all = Vec::new();
    for item in sums(TEXTS).items {
        let text = EncodedItem::new(model, &item).unwrap();
        let mut capture = Capture::new(&[Site::Routing, Site::ExpertHidden]);
        let tokens = [&text.prompt[..], &text.answer].concat();
        logits(model, &tokens, &mut capture);
        let ids = &capture.get(layer, Site::Routing).ids;
        let hidden = &capture.get(layer, Site::ExpertHidden).values;
        let (k, width) = (ids.len() / tokens.len(), hidden.len() / ids.len());
        let vectors = ids.iter().zip(hidden.chunks_exact(width)).enumerate();
        all.extend(vectors.map(|(slot, (&expert, hidden))| Passage {
            expert: expert as usize,
            position: slot / k,
            hidden: hidden.to_vec(),
        }));
    }
    all
}

/// Adds to the down projection of one expert the term that maps the hidden vector of one token to `size` in one channel. Of
/// the tokens at the positions wanted it takes the one that the expert tells best from those at other positions. Gives the
/// expert, what it was, and the position.
fn plant(model: &mut Model, layer: usize, size: f32, wanted: impl Fn(usize) -> bool) -> (usize, Expert, usize) {
    let all = passages(model, layer);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let nearest = |p: &Passage| {
        let others = all.iter().filter(|o| o.expert == p.expert && o.position != p.position);
        others.map(|o| dot(&o.hidden, &p.hidden).abs() / dot(&p.hidden, &p.hidden)).fold(0.0, f32::max)
    };
    let best = all.iter().filter(|p| wanted(p.position)).min_by(|a, b| nearest(a).total_cmp(&nearest(b))).unwrap();
    assert!(nearest(best) < 0.9, "no token stands out");
    let old = model.expert_weights(layer, best.expert).unwrap().clone();
    let (d, width) = (old.down.rows, old.down.cols);
    let mut down = old.down.to_f32();
    let row = &mut down[CHANNEL * width..(CHANNEL + 1) * width];
    let square = dot(&best.hidden, &best.hidden);
    row.iter_mut().zip(&best.hidden).for_each(|(w, h)| *w += size * h / square);
    let new = Expert { down: Matrix::from_f32(d, width, &down).unwrap(), ..old.clone() };
    model.replace_expert(layer, best.expert, new).unwrap();
    (best.expert, old, best.position)
}

const CASES: [(&str, usize); 4] = [("olmoe", 0), ("olmoe", 1), ("", 0), ("", 2)];

/// What is planted: a thousand times what the median expert writes at most (the embedded model writes several hundred itself).
fn size(unplanted: &Report) -> f32 {
    let value = |name: &str| number(&unplanted.headline[name]);
    (1000.0 * value("largest_output") / value("largest_over_median")) as f32
}

fn model(name: &str) -> Model {
    open(&if name.is_empty() { embedded() } else { fixture(name) })
}

#[test]
fn the_planted_expert_is_found_alone_and_gone_when_it_is_taken_back() {
    for (name, layer) in CASES {
        let (mut planted, before) = run(model(name), "super-experts --sets 2");
        let size = size(&before);
        assert_eq!(before.headline["super_experts"], "none");
        assert_eq!(before.headline["outlier_experts"], "none");
        assert!(name.is_empty() || number(&before.headline["largest_over_median"]) < 30.0, "{:?}", before.headline);
        assert_eq!(list(&before), Vec::<Value>::new());

        let (expert, old, _) = plant(&mut planted, layer, size, |position| position == 0);
        let (mut planted, found) = run(planted, "super-experts --sets 2");
        let list = list(&found);
        assert_eq!(found.headline["super_experts"], format!("{layer}:{expert}"), "{:?}", found.headline);
        assert_eq!(found.headline["outlier_experts"], "none");
        let massive = found.headline["massive_layers"].as_array().unwrap();
        assert!(massive.contains(&json!(layer)), "{massive:?}");
        let [only] = list.as_slice() else { panic!("{list:?}") };
        assert_eq!((&only["layer"], &only["expert"]), (&json!(layer), &json!(expert)));
        assert_eq!((&only["channel"], &only["position"]), (&json!(CHANNEL), &json!(0)));
        assert!((number(&only["output_max"]) / f64::from(size) - 1.0).abs() < 0.05, "{only}");
        // Dropped, the residual stream loses what it wrote.
        let row = &table(&found, "layers")[layer];
        assert!(number(&row[2]) > 10.0 * number(&row[3]) && row[1] == "yes", "{row:?}");
        // Attention up to the planted layer comes before what is dropped; later layers feel it.
        let decay: Vec<f64> = table(&found, "layers").iter().map(|r| number(&r[6])).collect();
        assert!(decay[..=layer].iter().all(|d| *d == 0.0), "{decay:?}");
        assert!(decay[layer + 1..].iter().all(|d| d.abs() > 1e-3), "{decay:?}");

        planted.replace_expert(layer, expert, old).unwrap();
        let (_, after) = run(planted, "super-experts --sets 2");
        assert_eq!(serde_json::to_value(&after).unwrap(), serde_json::to_value(&before).unwrap());
    }
}

/// The paper's code looks at the first row of each expert's input only, so a token in the middle of a later text escapes it.
#[test]
fn an_expert_that_fires_in_the_middle_of_a_text_is_found() {
    for (name, layer) in CASES {
        let (mut model, before) = run(model(name), "super-experts --sets 0");
        let size = size(&before);
        let (expert, _, position) = plant(&mut model, layer, size, |position| position > 2);
        let (_, found) = run(model, "super-experts --sets 0");
        let list = list(&found);
        assert_eq!(found.headline["super_experts"], format!("{layer}:{expert}"), "{:?}", found.headline);
        assert_eq!((&list[0]["channel"], &list[0]["position"]), (&json!(CHANNEL), &json!(position)));
    }
}

#[test]
fn a_shared_expert_counts_and_is_dropped() {
    let path = fixture("qwen2_moe");
    let first = |model: &Model| {
        let mut capture = Capture::new(&[Site::MlpHidden]);
        logits(model, &model.tokenizer().encode("a b c", true).unwrap(), &mut capture);
        let kept = capture.get(1, Site::MlpHidden);
        kept.values[..*kept.shape.last().unwrap()].to_vec()
    };
    let hidden = first(&open(&path));
    let square: f32 = hidden.iter().map(|h| h * h).sum();
    let planted = edited(&path, |role, shape, down| {
        if role == Role::SharedDown(1) {
            let row = &mut down[3 * shape[1]..4 * shape[1]];
            row.iter_mut().zip(&hidden).for_each(|(w, h)| *w += 3000.0 * h / square);
        }
    });
    let texts = task("letters", (0..6).map(|i| ("a b c".to_string(), format!(" d{i}"))));
    let (_, report) = run_on(open(planted.path()), vec![texts], "super-experts --sets 1");
    let report = report.unwrap();
    assert_eq!(report.headline["super_experts"], "1:shared");
    let list = list(&report);
    assert_eq!((&list[0]["layer"], &list[0]["expert"], &list[0]["channel"]), (&json!(1), &json!(-1), &json!(3)));
    let row = &table(&report, "layers")[1];
    assert!(number(&row[2]) > 10.0 * number(&row[3]), "{row:?}");
}

/// Nothing dropped, nothing lost: exactly.
#[test]
fn without_dropped_experts_no_sink_decays() {
    let mut world = Tasks(vec![sums(12)]);
    let mut lab = Lab::new(open(&embedded()), &mut world);
    let texts = lab.encode(&sums(12).items).unwrap();
    let mut attention = |lens: &mut dyn Lens| {
        let mut sinks = SinkRecorder::new(lab.model.spec());
        lab.losses("", &texts, &mut Chain(vec![lens, &mut sinks])).unwrap();
        sinks.attention()
    };
    let before = attention(&mut NoLens);
    let after = attention(&mut WithoutShared::new(Vec::new()));
    assert!(before.iter().flatten().all(|p| *p > 0.0 && *p < 1.0));
    assert!(before.iter().zip(&after).all(|(p, q)| sink_decay(p, q) == Some(0.0)));
    // By hand, of the first text of the first layer: the mean over the queries after the first.
    let mut capture = Capture::new(&[Site::AttnPattern]);
    let tokens = [&texts[0].prompt[..], &texts[0].answer].concat();
    logits(&lab.model, &tokens, &mut capture);
    let (n, kept) = (tokens.len(), capture.get(0, Site::AttnPattern));
    let by_hand: f32 = (1..n).map(|t| kept.values[t * kept.shape[1] * n]).sum::<f32>() / (n - 1) as f32;
    let mut sinks = SinkRecorder::new(lab.model.spec());
    lab.losses("", &texts[..1], &mut sinks).unwrap();
    assert!((sinks.attention()[0][0] - f64::from(by_hand)).abs() < 1e-6);
}

#[test]
fn wrong_parameters_are_told() {
    let error = |line: &str| run_on(open(&fixture("mixtral")), vec![sums(2)], line).1.unwrap_err().to_string();
    assert!(error("super-experts --layer-fraction 2").contains("a share is 0 to 1"));
    assert!(error("super-experts --percentile 101").contains("0 to 100"));
    assert!(error("super-experts --texts 0").contains("at least 1 text"));
    let dense = run_on(open(&fixture("llama")), vec![sums(2)], "super-experts").1;
    assert!(matches!(dense, Err(MethodError::Needs { .. })));
}
