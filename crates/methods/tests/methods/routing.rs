//! Analyses of routing on models whose answer is known: the same and random routers, copied, permuted and scaled experts,
//! items whose correctness an expert decides.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::engine::{Capture, edited, embedded, fixture, noise, open};
use crate::support::{Tasks, number, run_on, table};
use quorate_eval::encode::EncodedItem;
use quorate_eval::evaluate::ItemScore;
use quorate_eval::statistics::{deviation, mean};
use quorate_eval::tasks::{Task, TaskItem};
use quorate_formats::Role;
use quorate_formats::spec::RouterScore;
use quorate_lens::ExpertMap;
use quorate_methods::routing::similarity::{neurons, places};
use quorate_methods::routing::{distribution, entropy};
use quorate_methods::{Lab, Report};
use quorate_model::sampling::SplitMix64;
use quorate_model::{Model, NoLens, Site, ops};
use quorate_residency::{Expert, Matrix};

fn item(task: &str, prompt: String, answer: &str) -> TaskItem {
    TaskItem { task: task.into(), prompt, answer: answer.into(), choices: None, meta: serde_json::Map::new() }
}

fn task(items: Vec<TaskItem>) -> Task {
    Task { name: items[0].task.clone(), items, files: Vec::new() }
}

/// Texts of random letters.
fn letters(count: usize) -> Vec<Task> {
    let mut random = SplitMix64::new(9);
    let mut word = |n: usize| (0..n).map(|_| char::from(b'a' + random.below(26) as u8)).collect::<String>();
    vec![task((0..count).map(|_| item("letters", word(24), &word(4))).collect())]
}

/// Sums of the embedded model's kind.
fn sums(count: usize) -> Vec<Task> {
    let of = |i: usize| item("sums", format!("<|user|>{}+{}=<|assistant|>", 10 + 7 * i % 89, 11 + 5 * i % 83), "12");
    vec![task((0..count).map(of).collect())]
}

fn run(path: &Path, tasks: Vec<Task>, line: &str) -> Result<Report, String> {
    run_on(open(path), tasks, line).1.map_err(|e| e.to_string())
}

fn map<'a>(report: &'a Report, name: &str) -> &'a [Vec<Option<f64>>] {
    &report.maps.iter().find(|m| m.name == name).unwrap_or_else(|| panic!("no map {name}")).values
}

/// Rows of a CSV file by their first `keys` cells, the other cells as numbers.
fn csv(report: &Report, name: &str, keys: usize) -> BTreeMap<Vec<String>, Vec<f64>> {
    let file = report.files.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no file {name}"));
    let text = String::from_utf8(file.bytes.clone()).unwrap();
    let row = |line: &str| {
        let cells: Vec<&str> = line.split(',').collect();
        let (key, rest) = cells.split_at(keys);
        (key.iter().map(ToString::to_string).collect(), rest.iter().map(|v| v.parse().unwrap()).collect())
    };
    text.lines().skip(1).map(row).collect()
}

fn error(path: &Path, tasks: Vec<Task>, line: &str) -> String {
    run(path, tasks, line).unwrap_err()
}

fn random_router(model: &mut Model, seed: u64) {
    for layer in model.spec().moe_layers() {
        let (rows, cols) = (model.router_weight(layer).unwrap().rows, model.router_weight(layer).unwrap().cols);
        let matrix = Matrix::from_f32(rows, cols, &noise(seed + 31 * layer as u64, rows * cols)).unwrap();
        model.replace_matrix(Role::Router(layer), matrix).unwrap();
    }
}

#[test]
fn saturation_is_one_with_the_same_checkpoint_and_chance_with_random_routers() {
    let path = embedded();
    let same = run(&path, sums(40), &format!("routing --occurrences 2 --against {}", path.display())).unwrap();
    let saturation = |report: &Report| -> Vec<f64> {
        report.headline["saturation"].as_object().unwrap().values().map(number).collect()
    };
    assert_eq!(saturation(&same), [1.0; 3]);

    // Few kinds of tokens make the agreement with one random router uneven: the mean over several is chance.
    let means: Vec<Vec<f64>> = (0..6)
        .map(|seed| {
            let other = edited(&path, |role, _, values| {
                if let Role::Router(layer) = role {
                    values.copy_from_slice(&noise(7 + seed + 100 * layer as u64, values.len()));
                }
            });
            let line = format!("routing --occurrences 2 --against {}", other.path().display());
            saturation(&run(&path, sums(40), &line).unwrap())
        })
        .collect();
    for (i, chance) in [1.0 / 32.0, 2.0 / 32.0, 4.0 / 32.0].into_iter().enumerate() {
        let found: Vec<f64> = means.iter().map(|m| m[i]).collect();
        let (found, error) = (mean(&found).unwrap(), deviation(&found).unwrap() / 6f64.sqrt());
        assert!((found - chance).abs() < 3.0 * error && found < 3.0 * chance, "{i}: {found} {chance} {error}");
    }
    let own = quorate_formats::Checkpoint::open(&path).unwrap().fingerprint().to_string();
    assert_eq!(same.fingerprint, own);
}

#[test]
fn other_models_are_no_checkpoints_of_this_one() {
    let against =
        |other: &str| error(&fixture("olmoe"), letters(4), &format!("routing --against {}", fixture(other).display()));
    assert!(against("mixtral").contains("other layers, experts or experts per token"), "{}", against("mixtral"));
    let dense = fixture("qwen3");
    for method in ["routing", "closer-look", "contribution"] {
        assert!(error(&dense, letters(4), method).contains("no experts"), "{method}");
    }
}

#[test]
fn routing_obeys_its_identities() {
    for (name, k) in [("olmoe", 3.0), ("mixtral", 2.0)] {
        for rows in ["all", "prompt", "last", "answer"] {
            let line = format!("routing --occurrences 2 --rows {rows}");
            let report = run(&fixture(name), letters(40), &line).unwrap();
            for layer in map(&report, "use") {
                let sum: f64 = layer.iter().flatten().sum();
                assert!((sum - k).abs() < 1e-9, "{name}, {rows}: {sum}");
            }
            let mut sums: BTreeMap<Vec<String>, f64> = BTreeMap::new();
            for (key, value) in csv(&report, "co-activation.csv", 3) {
                *sums.entry(key[..2].to_vec()).or_default() += value[0];
            }
            assert!(sums.values().all(|s| *s == 0.0 || (s - (k - 1.0)).abs() < 1e-9), "{name}, {rows}: {sums:?}");
        }
    }
    // A router of zeros decides nothing: the entropy is that of all experts.
    let mut model = open(&fixture("olmoe"));
    for layer in model.spec().moe_layers() {
        model.replace_matrix(Role::Router(layer), Matrix::from_f32(6, 64, &[0.0; 6 * 64]).unwrap()).unwrap();
    }
    let report = run_on(model, letters(4), "routing --occurrences 1").1.unwrap();
    assert!((number(&report.headline["entropy_over_ln_experts"]) - 1.0).abs() < 1e-12);
    assert_eq!(number(&report.headline["used_share"]), 0.5, "ties go to the first three of six");
    assert!(error(&fixture("olmoe"), letters(2), "routing --occurrences 1000").contains("--occurrences"));
}

/// The trained router knows tokens: what the control with the same load does not.
#[test]
fn a_trained_router_is_special_beside_its_control() {
    let report = run(&embedded(), sums(80), "routing").unwrap();
    let of = |name: &str, part: &str| number(&report.headline[name][part]);
    let pair = |name: &str| (of(name, "own"), of(name, "random"));
    let (own, random) = pair("specialisation");
    assert!(own > 1.5 * random, "{own} {random}");
    let (own, random) = pair("co_activation_row_maximum");
    assert!(own > random && random > of("co_activation_row_maximum", "even"), "{own} {random}");
}

/// The expert with its neurons in another order: the same function.
fn permuted(expert: &Expert, order: &[usize]) -> Expert {
    let (d, inner) = (expert.down.rows, expert.down.cols);
    let rows =
        neurons(expert).map(|m| order.iter().flat_map(|&o| m[o * d..(o + 1) * d].to_vec()).collect::<Vec<f32>>());
    let down: Vec<f32> = (0..d * inner).map(|i| rows[2][(i % inner) * d + i / inner]).collect();
    Expert {
        gate: Matrix::from_f32(inner, d, &rows[0]).unwrap(),
        up: Matrix::from_f32(inner, d, &rows[1]).unwrap(),
        down: Matrix::from_f32(d, inner, &down).unwrap(),
    }
}

#[test]
fn a_copied_expert_with_permuted_neurons_is_unmasked() {
    let mut model = open(&fixture("olmoe"));
    let inner = model.spec().moe(1).unwrap().intermediate_size;
    let mut order: Vec<usize> = (0..inner).collect();
    SplitMix64::new(3).shuffle(&mut order);
    let copy = permuted(model.expert_weights(1, 2).unwrap(), &order);
    model.replace_expert(1, 4, copy).unwrap();
    let report = run_on(model, letters(10), "closer-look --pairs 100 --tokens 64").1.unwrap();
    let weights = csv(&report, "weights.csv", 4);
    assert_eq!(weights.len(), 2 * 15 * 3, "all pairs, all matrices, both layers");
    for (key, v) in &weights {
        let [flattened, averaged, reordered, tau, random] = v[..] else { panic!("{v:?}") };
        if key[..3] == ["1", "4", "2"] {
            assert!(flattened.abs() < 0.1 && averaged > 0.9999 && reordered > 0.9999, "{key:?} {v:?}");
            assert!(tau.abs() < 0.5, "{tau}");
        } else {
            assert!(reordered < 0.6 && (reordered - random).abs() < 0.2 && flattened.abs() < 0.2, "{key:?} {v:?}");
        }
    }
    let outputs = csv(&report, "outputs.csv", 3);
    for (key, v) in &outputs {
        let copied = key == &["1", "4", "2"];
        assert!(if copied { v[0] > 0.999 } else { (v[0] - 0.5).abs() < 0.2 }, "{key:?} {v:?}");
    }
}

/// Norms, places and activity as plain loops find them, on the inputs of a run that nothing disturbs.
#[test]
fn a_scaled_expert_has_the_largest_outputs_and_the_stream_stays_normal() {
    let tasks = letters(3);
    let mut model = open(&fixture("mixtral"));
    let down = model.expert_weights(0, 5).unwrap().clone();
    let scaled: Vec<f32> = down.down.to_f32().iter().map(|v| 3.0 * v).collect();
    let scaled = Matrix::from_f32(down.down.rows, down.down.cols, &scaled).unwrap();
    model.replace_expert(0, 5, Expert { down: scaled, ..down }).unwrap();

    let mut capture = Capture::new(&[Site::FfnIn]);
    let items: Vec<EncodedItem> = tasks[0].items.iter().map(|i| EncodedItem::new(&model, i).unwrap()).collect();
    for item in &items {
        let mut cache = quorate_model::KvCache::new(model.spec(), 1);
        model.forward(&[item.segment(0)], &mut cache, &mut capture).unwrap();
    }
    let (model, report) = run_on(model, tasks, "closer-look --pairs 2 --tokens 100000 --threshold 0.3");
    let report = report.unwrap();
    for layer in 0..2 {
        let kept = capture.get(layer, Site::FfnIn);
        let d = kept.shape[1];
        let n = kept.values.len() / d;
        assert_eq!(number(&report.headline["tokens"]), n as f64);
        let x = ops::tensor(kept.values.clone(), &[n, d]).unwrap();
        let y = crate::engine::values(&model.all_expert_outputs(layer, &x).unwrap());
        let norms: Vec<f32> = y.chunks(d).map(|y| y.iter().map(|v| v * v).sum::<f32>().sqrt()).collect();
        for e in 0..8 {
            let of: Vec<f64> = norms.iter().skip(e).step_by(8).map(|&n| f64::from(n)).collect();
            let (found, wanted) = (map(&report, "output norm")[layer][e].unwrap(), mean(&of).unwrap());
            assert!((found - wanted).abs() < 1e-4 * wanted, "{layer}:{e}: {found} {wanted}");
        }
        let tops = norms.chunks(8).filter(|t| places(t)[5] == 0).count();
        assert!(if layer == 0 { 10 * tops > 9 * n } else { 2 * tops < n }, "layer {layer}: {tops} of {n}");
        let largest = map(&report, "output norm")[layer].iter().flatten().copied().fold(0.0, f64::max);
        assert_eq!(map(&report, "output norm")[layer][5] == Some(largest), layer == 0);

        let gate = model.expert_weights(layer, 1).unwrap().gate.to_f32();
        let active = kept.values.chunks(d).flat_map(|x| gate.chunks(d).map(move |w| (x, w))).filter(|(x, w)| {
            let z: f32 = x.iter().zip(*w).map(|(x, w)| x * w).sum();
            (z / (1.0 + (-z).exp())).abs() >= 0.3
        });
        let wanted = active.count() as f64 / (n * gate.len() / d) as f64;
        let found = map(&report, "active")[layer][1].unwrap();
        assert!((found - wanted).abs() < 1e-3 && found > 0.1 && found < 0.95, "{found} {wanted}");
    }
}

/// Random routers rank experts without regard to their outputs: over many of them the diagonal has 1/E. So do the controls.
#[test]
fn random_routers_do_not_look_at_norms() {
    let (mut diagonal, mut control) = (Vec::new(), Vec::new());
    let mut model = open(&fixture("mixtral"));
    for seed in 0..24 {
        random_router(&mut model, 1000 * seed);
        let (back, report) = run_on(model, letters(4), "closer-look --pairs 0");
        model = back;
        let report = report.unwrap();
        let of = |part: &str| number(&report.headline["norm_score_diagonal"][part]);
        diagonal.push(of("own"));
        control.push(of("random"));
    }
    for values in [&diagonal, &control] {
        let (found, error) = (mean(values).unwrap(), deviation(values).unwrap() / 24f64.sqrt());
        assert!((found - 0.125).abs() < 3.0 * error, "{found} {error}");
    }
}

#[test]
fn closer_look_says_what_it_leaves_out() {
    let path = fixture("olmoe");
    assert!(error(&path, letters(2), "closer-look --layers 5").contains("layer 5 has no experts"));
    assert!(error(&path, letters(2), "closer-look --tokens 1").contains("2 tokens"));
    let report = run(&path, letters(2), "closer-look --layers 1 --pairs 3 --reorder-width 8").unwrap();
    assert!(report.notes.iter().any(|n| n.contains("not reordered")), "{:?}", report.notes);
    assert!(report.notes.iter().any(|n| n.contains("3 of 15 pairs")), "{:?}", report.notes);
    assert!(map(&report, "output norm")[0].iter().all(Option::is_none), "layer 0 was not asked for");
    assert!(table(&report, "weights").iter().all(|row| row[4].is_null() && row[2].is_number()));
}

/// Choices, and which of them the model prefers.
fn quiz(path: &Path, count: usize) -> (Vec<TaskItem>, Vec<usize>, quorate_lens::RoutingTrace) {
    let choices = ["A", "B", "C", "D"].map(String::from);
    let mut items = letters(count).remove(0).items;
    items.iter_mut().for_each(|i| i.choices = Some(choices.to_vec()));
    let mut world = Tasks(Vec::new());
    let mut lab = Lab::new(open(path), &mut world);
    let options: Vec<TaskItem> =
        items.iter().flat_map(|i| choices.iter().map(move |c| TaskItem { answer: c.clone(), ..i.clone() })).collect();
    let encoded = lab.encode(&options).unwrap();
    let scores = lab.losses("", &encoded, &mut NoLens).unwrap();
    let nll = |s: &ItemScore| if let ItemScore::Text { nll, .. } = s { *nll } else { f64::NAN };
    let best = |s: &[ItemScore]| (0..4).min_by(|&a, &b| nll(&s[a]).total_cmp(&nll(&s[b]))).unwrap();
    let best = scores.chunks(4).map(best).collect();
    let mut prompts = lab.encode(&items).unwrap();
    prompts.iter_mut().for_each(|p| p.answer.clear());
    let trace = lab.trace(&prompts, true).unwrap();
    (items, best, trace)
}

/// The right answer of each item is what the model prefers if expert 3 of layer 1 fired at the last token, else another.
#[test]
fn the_expert_that_decides_is_always_right() {
    let path: PathBuf = fixture("mixtral");
    let (mut items, best, trace) = quiz(&path, 120);
    let last = |i: usize| trace.items[i].layers[1].chosen(trace.items[i].tokens.len() - 1).any(|e| e == 3);
    let mut deciding = 0;
    for (i, item) in items.iter_mut().enumerate() {
        deciding += usize::from(last(i));
        let answer = if last(i) { best[i] } else { (best[i] + 1) % 4 };
        item.answer = item.choices.as_ref().unwrap()[answer].clone();
        item.meta.insert("half".into(), (i % 2).into());
    }
    assert!(deciding > 10 && deciding < 110, "{deciding}");
    let report = run(&path, vec![task(items.clone())], "contribution --least 10 --group half").unwrap();
    assert!((number(&report.headline["accuracy"]) - deciding as f64 / 120.0).abs() < 1e-12);
    let accuracy = map(&report, "accuracy");
    assert_eq!(accuracy[1][3], Some(1.0));
    assert_eq!(map(&report, "items")[1][3], Some(deciding as f64));
    assert!(accuracy.iter().flatten().filter(|a| **a == Some(1.0)).count() == 1, "{accuracy:?}");
    for name in ["spread", "spread_within_groups"] {
        let line = &report.headline[name];
        assert!(number(&line["own"]) > number(&line["random_p95"]), "{name}: {line}");
    }
    assert_eq!(table(&report, "groups").len(), 2);
    // One position uses no more experts than all of them do, and the entropy is that of the last tokens' logits.
    for (layer, row) in table(&report, "use").iter().enumerate() {
        assert!(number(&row[1]) <= number(&row[2]), "{row:?}");
        let of = |item: &quorate_lens::ItemTrace| {
            let logits = item.layers[layer].logits_of(item.tokens.len() - 1, 8);
            entropy(&distribution(RouterScore::TopkThenSoftmax, logits))
        };
        let wanted = mean(&trace.items.iter().map(of).collect::<Vec<_>>()).unwrap();
        assert!((number(&row[3]) - wanted).abs() < 1e-6 && wanted < 8f64.ln(), "{row:?} {wanted}");
    }
    assert!(map(&report, "items").iter().all(|l| l.iter().flatten().sum::<f64>() == 240.0));
    let all = run(&path, vec![task(items)], "contribution --least 10 --all-tokens").unwrap();
    assert!(map(&all, "items").iter().all(|l| l.iter().flatten().sum::<f64>() > 480.0));
}

#[test]
fn quizzes_that_cannot_be_judged_are_refused() {
    let path = fixture("mixtral");
    let (mut items, best, _) = quiz(&path, 30);
    let answer = |items: &mut [TaskItem], shift: usize| {
        for (item, best) in items.iter_mut().zip(&best) {
            item.answer = item.choices.as_ref().unwrap()[(best + shift) % 4].clone();
        }
    };
    answer(&mut items, 0);
    assert!(error(&path, vec![task(items.clone())], "contribution").contains("30 of 30 items were answered rightly"));
    answer(&mut items, 1);
    assert!(error(&path, vec![task(items.clone())], "contribution").contains("0 of 30 items"));
    answer(&mut items[..15], 0);
    assert!(run(&path, vec![task(items.clone())], "contribution").is_ok());
    assert!(error(&path, vec![task(items[10..20].to_vec())], "contribution").contains("20 items are needed"));
    assert!(error(&path, vec![task(items.clone())], "contribution --group subject").contains("no `subject`"));
    assert!(error(&path, vec![task(items.clone())], "contribution --task quiz").contains("no task `quiz`"));
    items[3].answer = "E".into();
    assert!(error(&path, vec![task(items)], "contribution").contains("none of its choices"));
    let mut texts = letters(30);
    texts[0].items.iter_mut().for_each(|i| drop(i.meta.insert("lm".into(), true.into())));
    assert!(error(&path, texts, "contribution").contains("no right answer"));
}

#[test]
fn maps_hold_every_expert() {
    let report = run(&fixture("olmoe"), letters(10), "closer-look --pairs 1").unwrap();
    let experts = ExpertMap::of(open(&fixture("olmoe")).spec()).experts;
    for heat in &report.maps {
        assert_eq!(heat.values.iter().map(Vec::len).collect::<Vec<_>>(), experts, "{}", heat.name);
        assert!(heat.values.iter().flatten().flatten().all(|v| v.is_finite()), "{}", heat.name);
    }
}
