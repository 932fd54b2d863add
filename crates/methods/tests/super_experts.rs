//! Super experts that were planted: one expert writes 300 into one channel when a certain token passes.

#[path = "../../model/tests/support/mod.rs"]
mod engine;
mod support;

use engine::{Capture, edited, embedded, fixture, logits, open};
use quorate_formats::Role;
use quorate_lens::read_experts;
use quorate_methods::experts::extremes::{SinkRecorder, WithoutShared};
use quorate_methods::experts::super_experts::sink_decay;
use quorate_methods::{Lab, MethodError, Report};
use quorate_model::{Chain, Lens, Model, NoLens, Site};
use quorate_residency::{Expert, Matrix};
use serde_json::{Value, json};
use support::{Tasks, number, run_on, sums, table, task};

const CHANNEL: usize = 77;

fn run(model: Model, line: &str) -> (Model, Report) {
    let (model, report) = run_on(model, vec![sums(30)], line);
    (model, report.unwrap())
}

fn list(report: &Report) -> Vec<Value> {
    let file = report.files.iter().find(|f| f.name == "super_experts.json").unwrap();
    let text = String::from_utf8(file.bytes.clone()).unwrap();
    read_experts("super_experts.json", &text).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Adds to the down projection of the expert that the token at `position` of the `text`-th text of the tasks ranks first in
/// `layer` the term that maps its hidden vector there to 300 in one channel. Gives the expert, and what it was.
fn plant(model: &mut Model, layer: usize, text: usize, position: usize) -> (usize, Expert) {
    let prompt = sums(text + 1).items.pop().unwrap().prompt;
    let tokens = model.tokenizer().encode(&prompt, false).unwrap();
    let mut capture = Capture::new(&[Site::Routing, Site::ExpertHidden]);
    logits(model, &tokens, &mut capture);
    let ids = &capture.get(layer, Site::Routing).ids;
    let slot = position * (ids.len() / tokens.len());
    let expert = ids[slot] as usize;
    let old = model.expert_weights(layer, expert).unwrap().clone();
    let (d, width) = (old.down.rows, old.down.cols);
    let hidden = &capture.get(layer, Site::ExpertHidden).values[slot * width..(slot + 1) * width];
    let square: f32 = hidden.iter().map(|h| h * h).sum();
    let mut down = old.down.to_f32();
    let row = &mut down[CHANNEL * width..(CHANNEL + 1) * width];
    row.iter_mut().zip(hidden).for_each(|(w, h)| *w += 300.0 * h / square);
    let new = Expert { down: Matrix::from_f32(d, width, &down).unwrap(), ..old.clone() };
    model.replace_expert(layer, expert, new).unwrap();
    (expert, old)
}

#[test]
fn the_planted_expert_is_found_alone_and_gone_when_it_is_taken_back() {
    let (_, before) = run(open(&embedded()), "super-experts --sets 2");
    assert_eq!(before.headline["super_experts"], "none");
    assert_eq!(before.headline["outlier_experts"], "none");
    assert!(number(&before.headline["largest_over_median"]) < 30.0, "{:?}", before.headline);
    assert_eq!(list(&before), [json!(0); 0]);

    for layer in [0, 2] {
        let mut planted = open(&embedded());
        let (expert, old) = plant(&mut planted, layer, 0, 0);
        let (mut planted, found) = run(planted, "super-experts --sets 2");
        assert_eq!(found.headline["super_experts"], format!("{layer}:{expert}"));
        assert_eq!(found.headline["massive_layers"], json!([layer]));
        let list = list(&found);
        let [only] = list.as_slice() else { panic!("{list:?}") };
        assert_eq!((&only["layer"], &only["expert"]), (&json!(layer), &json!(expert)));
        assert_eq!((&only["channel"], &only["position"]), (&json!(CHANNEL), &json!(0)));
        assert!((number(&only["output_max"]) - 300.0).abs() < 6.0, "{only}");
        // Dropped, the residual stream loses what it wrote; random experts of the layer leave it.
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
    let mut model = open(&embedded());
    let (expert, _) = plant(&mut model, 1, 17, 3);
    let (_, found) = run(model, "super-experts --sets 0");
    let list = list(&found);
    assert_eq!(found.headline["super_experts"], format!("1:{expert}"), "{list:?}");
    assert_eq!((&list[0]["channel"], &list[0]["position"]), (&json!(CHANNEL), &json!(3)));
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
