//! Router Lens and CEFT on the embedded model, with few steps: what is trained, what is left alone, and what is measured.

use std::collections::BTreeMap;
use std::path::Path;

use crate::engine::{Capture, assert_same, embedded, fixture, open};
use clap::{ArgMatches, Command, FromArgMatches};
use quorate_eval::tasks::{Task, TaskItem, load_tasks};
use quorate_formats::Role;
use quorate_methods::experts::context::{Source, insight};
use quorate_methods::experts::router_lens::RouterLens;
use quorate_methods::{Lab, METHODS, MethodError, Report, World};
use quorate_model::{KvCache, LogitRows, Model, NoLens, Segment, Site, ops};
use quorate_train::peft;
use serde_json::Value;

/// The embedded task `context`, a few items of each split, and one file.
struct Outside {
    limit: usize,
    tasks: Option<Vec<Task>>,
    text: String,
}

impl Outside {
    fn new(limit: usize) -> Outside {
        Outside { limit, tasks: None, text: String::new() }
    }
}

impl World for Outside {
    fn tasks(&mut self, split: &str) -> Result<Vec<Task>, MethodError> {
        if let Some(tasks) = &self.tasks {
            return Ok(tasks.clone());
        }
        let path = embedded().join(format!("../tasks/context.{split}.jsonl"));
        let mut tasks = load_tasks(&[path], None)?;
        tasks[0].items.truncate(self.limit);
        Ok(tasks)
    }
    fn open_model(&mut self, _: &Path) -> Result<Model, MethodError> {
        Err(MethodError::needs("no models", "none"))
    }
    fn read_text(&mut self, _: &Path) -> Result<String, MethodError> {
        Ok(self.text.clone())
    }
    fn progress(&mut self, _: &str, _: u64, _: u64) -> bool {
        true
    }
}

fn matches(line: &str) -> (usize, ArgMatches) {
    let mut words = line.split(' ');
    let at = METHODS.iter().position(|m| Some(m.card.id) == words.clone().next()).unwrap();
    let command = (METHODS[at].command.unwrap().augment)(Command::new(METHODS[at].card.id));
    (at, command.get_matches_from(&mut words))
}

fn run(model: Model, world: &mut Outside, line: &str) -> (Model, Result<Report, MethodError>) {
    let (at, matches) = matches(line);
    let mut lab = Lab::new(model, world);
    let report = (METHODS[at].command.unwrap().run)(METHODS[at].card, &matches, &mut lab);
    (lab.model, report)
}

fn file<'r>(report: &'r Report, name: &str) -> &'r [u8] {
    &report.files.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no file {name}")).bytes
}

/// The roles that a report's adapter changes.
fn adapter_roles(model: &Model, report: &Report) -> Vec<Role> {
    let dir = tempfile::tempdir().unwrap();
    for name in [peft::CONFIG, peft::WEIGHTS] {
        std::fs::write(dir.path().join(name), file(report, name)).unwrap();
    }
    peft::read(model.checkpoint(), dir.path()).unwrap().iter().map(|(role, _)| role).collect()
}

fn losses(report: &Report) -> Vec<f64> {
    let table = report.tables.iter().find(|t| t.name == "validation").unwrap();
    table.rows.iter().map(|row| row[1].as_f64().unwrap()).collect()
}

fn logits(model: &Model) -> Vec<f32> {
    crate::engine::logits(model, &(4..40).collect::<Vec<u32>>(), &mut NoLens)
}

fn number(report: &Report, name: &str, field: &str) -> f64 {
    report.headline[name][field].as_f64().unwrap_or_else(|| panic!("{name}.{field}"))
}

#[test]
fn routers_alone_learn_to_follow_the_passage_and_experts_alone_are_tuned_after() {
    let model = open(&embedded());
    let before = logits(&model);
    let mut world = Outside::new(40);
    let line = "router-lens --steps 16 --batch 6 --evaluations 2 --sets 2 --experts 6";
    let (model, report) = run(model, &mut world, line);
    let report = report.unwrap();
    assert_same("the model afterwards", &logits(&model), &before);
    assert!(report.notes.is_empty(), "{:?}", report.notes);

    // Without the cue the base answers from memory; a few steps of the routers turn it.
    let (base, tuned) = (number(&report, "base", "passage"), number(&report, "tuned_routers", "passage"));
    assert!(base < 20.0 && number(&report, "base", "memory") > 80.0, "{:?}", report.headline);
    assert!(tuned >= base + 20.0, "{:?}", report.headline);
    assert!(number(&report, "trained_parameters", "percent") < 1.0);
    let losses = losses(&report);
    assert!(losses.len() == 2 && losses[1] < losses[0], "{losses:?}");
    let routers: Vec<Role> = model.spec().moe_layers().into_iter().map(Role::Router).collect();
    assert_eq!(adapter_roles(&model, &report), routers);

    // The experts are the most used of their layer.
    let experts: BTreeMap<usize, Vec<usize>> = serde_json::from_slice(file(&report, "experts.json")).unwrap();
    let counts = &report.maps.iter().find(|m| m.name == "use").unwrap().values;
    for (moe, (layer, chosen)) in experts.iter().enumerate() {
        assert_eq!((*layer, chosen.len()), (model.spec().moe_layers()[moe], 6));
        let used = |e: usize| counts[moe][e].unwrap();
        let least = chosen.iter().map(|&e| used(e)).fold(f64::INFINITY, f64::min);
        assert!((0..32).all(|e| chosen.contains(&e) || used(e) <= least));
    }

    world.text = String::from_utf8(file(&report, "experts.json").to_vec()).unwrap();
    let line = "ceft --from experts.json --steps 3 --batch 4 --evaluations 1 --random 1 --no-full";
    let (model, report) = run(model, &mut world, line);
    let report = report.unwrap();
    assert_same("the model afterwards", &logits(&model), &before);
    let of_expert = |(&layer, chosen): (&usize, &Vec<usize>)| {
        chosen.iter().flat_map(move |&expert| Role::of_expert(layer, expert)).collect::<Vec<_>>()
    };
    let mut expected: Vec<Role> = experts.iter().flat_map(of_expert).collect();
    expected.sort_unstable();
    assert_eq!(adapter_roles(&model, &report), expected, "these experts and nothing else");
    let rows = &report.tables.iter().find(|t| t.name == "tuned").unwrap().rows;
    let names: Vec<&str> = rows.iter().map(|row| row[0].as_str().unwrap()).collect();
    assert_eq!(names, ["nothing", "context-faithful experts", "random experts 1"]);
    assert_eq!(rows[1][1], rows[2][1], "random experts have as many values");
    assert_ne!(rows[1][5], rows[2][5]);
}

fn source() -> Source {
    RouterLens::from_arg_matches(&matches("router-lens").1).unwrap().search.source
}

/// Attention to all prompt tokens is one; behind the last layer the lens shows the model's own probability.
#[test]
fn the_last_token_is_seen_as_it_is() {
    let mut world = Outside::new(12);
    let mut lab = Lab::new(open(&embedded()), &mut world);
    let mut questions = source().questions(&mut lab, "test").unwrap();
    assert!(questions.iter().all(|q| !q.answer.is_empty() && q.answer.iter().all(|t| q.passage.contains(t))));
    let text = |q: &quorate_methods::experts::context::Question| {
        let tokens: Vec<u32> = q.answer.iter().map(|&t| q.text.prompt[t]).collect();
        lab.model.tokenizer().decode(&tokens, true).unwrap()
    };
    assert_eq!(text(&questions[0]).trim(), "Montevideo");
    let seen = insight(&mut lab, &questions).unwrap();
    assert!(seen.to_passage.iter().zip(&seen.to_answer).all(|(p, a)| 0.0 < *a && a < p && *p < 1.0));

    let mut own = 0.0;
    for question in &mut questions {
        let prompt = Segment { logits: LogitRows::Last, ..Segment::prompt(0, question.text.prompt.clone()) };
        let mut cache = KvCache::new(lab.model.spec(), 1);
        let forward = lab.model.forward(&[prompt], &mut cache, &mut NoLens).unwrap();
        let logits: Vec<f64> = crate::engine::logits_of(forward).iter().map(|&v| f64::from(v)).collect();
        let sum: f64 = logits.iter().map(|v| v.exp()).sum();
        own += logits[question.text.answer[0] as usize].exp() / sum / 10.0;
        question.passage = (0..question.text.prompt.len()).collect();
        question.answer.clear();
    }
    let scale = 10.0 / questions.len() as f64;
    assert!((seen.passage.last().unwrap() - own * scale).abs() < 1e-5, "{:?} {own}", seen.passage);
    let all = insight(&mut lab, &questions).unwrap();
    assert!(all.to_passage.iter().all(|p| (p - 1.0).abs() < 1e-5), "{:?}", all.to_passage);
    assert!(all.to_answer.iter().all(|&p| p == 0.0));
}

/// The logit lens at the last layer is the output of the model, with an overlay too.
#[test]
fn the_last_layer_unembedded_is_the_output() {
    for path in [embedded(), fixture("qwen2_moe")] {
        let model = open(&path);
        let mut capture = Capture::new(&[Site::ResidPost, Site::Logits]);
        let tokens: Vec<u32> = (4..20).collect();
        crate::engine::logits(&model, &tokens, &mut capture);
        let layers = model.spec().layers.len();
        let stream = capture.get(layers - 1, Site::ResidPost);
        let read = model.unembed(&ops::tensor(stream.values.clone(), &stream.shape).unwrap()).unwrap();
        assert_same("logits", &crate::engine::values(&read), &capture.get(layers, Site::Logits).values);
        let wide = ops::tensor(vec![0.0; 3], &[1, 3]).unwrap();
        assert!(model.unembed(&wide).unwrap_err().to_string().contains("rows of 3 values"));
    }
}

#[test]
fn what_is_missing_is_said() {
    let item = |prompt: &str, memory: Value| TaskItem {
        task: "context".into(),
        prompt: prompt.into(),
        answer: "a".into(),
        choices: None,
        meta: serde_json::Map::from_iter([("memory_answer".to_string(), memory)]),
    };
    let refused = |path: &Path, items: Vec<TaskItem>, line: &str| {
        let task = Task { name: "context".into(), items, files: Vec::new() };
        let mut world = Outside { tasks: Some(vec![task]), ..Outside::new(1) };
        run(open(path), &mut world, line).1.unwrap_err().to_string()
    };
    let good = || vec![item("Passage: x is a.\nWhat is x?", "b".into())];
    let cases = [
        (vec![item("Passage: x is a.\nWhat is x?", "a".into())], "router-lens", "contradicts what the model knows"),
        (vec![item("Passage: x is a.\nWhat is x?", Value::Null)], "ceft", "contradicts what the model knows"),
        (vec![item("What is x?", "b".into())], "router-lens", "has no passage: What is x?"),
        (good(), "router-lens --experts 17", "17 experts of 32 cannot be compared"),
        (good(), "router-lens --experts 0", "from 1 to half of a layer"),
    ];
    for (items, line, why) in cases {
        let error = refused(&embedded(), items, line);
        assert!(error.contains(why) && error.contains("help: "), "{line}: {error}");
    }
    assert!(refused(&fixture("llama"), good(), "router-lens").contains("no experts"));
}
