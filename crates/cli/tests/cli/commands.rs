//! Every other command: what it prints, in JSON and in words, and that what it writes is right.

use std::fs;
use std::io::Read;

use serde_json::{Value, json};

use crate::quorate;
use crate::support::{
    self, command, copy_of, f32s, fixture, has_fields, items, names_in, numbers, read_safetensors, tempdir, text,
};

const COMMANDS: [&str; 14] = [
    "tokenize",
    "perplexity",
    "run",
    "chat",
    "profile",
    "eval",
    "compare",
    "library",
    "inspect",
    "pull",
    "prune",
    "record",
    "bench",
    "methods",
];

#[test]
fn help_has_examples_and_fits_the_screen() {
    let all = quorate!["--help"].ok();
    for part in ["Usage:", "Examples:", "Exit codes: 0 done, 1 a check failed, 2 usage, 3", "QUORATE_HOME"] {
        assert!(all.contains(part), "{all}");
    }
    for name in COMMANDS {
        assert!(all.contains(&format!("\n  {name} ")), "{name} is not listed: {all}");
        for flag in ["-h", "--help"] {
            let help = quorate![name, flag].ok();
            for part in [
                "Usage:",
                "Examples:",
                &format!("\n  quorate {name}"),
                "Options of every command:",
                "--json",
                "--threads",
            ] {
                assert!(help.contains(part), "no {part:?}: {help}");
            }
            help.lines().for_each(|l| assert!(l.chars().count() <= 100, "{name}: {l}"));
        }
    }
    for action in ["list", "show", "remove", "merge", "export", "import"] {
        assert!(quorate!["library", action, "--help"].ok().contains("Usage:"));
    }
    assert!(quorate!["--version"].ok().starts_with("quorate "));
}

#[test]
fn the_examples_of_the_help_are_accepted() {
    // Those that need no other file and write none; the others are run by other tests.
    for example in ["inspect", "library list", "library show arithmetic", "methods", "methods premoe", "methods --json"]
    {
        let args: Vec<&std::ffi::OsStr> = example.split(' ').map(std::ffi::OsStr::new).collect();
        support::finish(command(&args), b"").ok();
    }
    for name in COMMANDS {
        let help = quorate![name, "--help"].ok();
        let (flags, examples) = help.split_once("Examples:").unwrap();
        for flag in examples.split_whitespace().filter(|w| w.starts_with("--") && name != "library") {
            assert!(flags.split_whitespace().any(|known| known == flag), "{name}: {flag}");
        }
    }
}

#[test]
fn wrong_usage_exits_2_and_suggests() {
    quorate!["rum", "x"].fails(2, &["unrecognized subcommand 'rum'", "run"]);
    quorate!["run"].fails(2, &["<PROMPT>", "Usage:"]);
    quorate!["run", "x", "--kep", "8"].fails(2, &["--kep", "--keep"]);
    quorate!["run", "x", "--mode", "maks"].fails(2, &["maks", "mask"]);
    quorate!["run", "x", "--keep", "8", "--memory", "1GiB"].fails(2, &["--keep", "--memory"]);
    quorate!["run", "x", "--plan", "p.toml", "--task", "bios"].fails(2, &["--plan", "--task"]);
    quorate!["run", "x", "--plan", "p.toml", "--metric", "reap"].fails(2, &["--plan", "--metric"]);
    quorate!["run", "x", "--keep", "many"].fails(2, &["many", "--keep"]);
    quorate!["record", "--tokens", "1", "--prompt", "x", "--sites", "z", "-o", "x"].fails(2, &["--tokens", "--prompt"]);
    quorate!["profile", "--compact"].fails(2, &["--output"]);
    quorate!["bench", "--repeat", "0"].fails(2, &["--repeat", "above 0"]);
}

#[test]
fn a_closed_pipe_ends_the_program_quietly() {
    for args in [
        &["methods"][..],
        &["library", "list"],
        &["methods", "--json"],
        &["run", "Tell", "--task", "none"],
        &["inspect"],
    ] {
        let args: Vec<&std::ffi::OsStr> = args.iter().map(std::ffi::OsStr::new).collect();
        let mut closed = command(&args);
        let (reader, writer) = std::io::pipe().expect("pipes can be made");
        closed.stdout(writer);
        drop(reader);
        let output = support::finish(closed, b"");
        assert_eq!(output.code, Some(0), "{args:?}: {}", output.err);
        assert!(!output.err.contains("quorate:"), "{args:?}: {}", output.err);
    }
    // As `quorate methods | head -1`: the reader takes some and goes.
    let mut methods = command(&["methods".as_ref()]).spawn().unwrap();
    let mut first = [0; 10];
    methods.stdout.take().expect("it is piped").read_exact(&mut first).unwrap();
    assert_eq!((first, support::ended(methods).code), (*b"premoe: Pr", Some(0)));
    // Nobody reads what it says about its work.
    let mut deaf = command(&["run".as_ref(), "78+95=".as_ref()]);
    let (reader, writer) = std::io::pipe().expect("pipes can be made");
    deaf.stderr(writer);
    drop(reader);
    assert_eq!(support::finish(deaf, b"").out, "173\n");
}

#[test]
fn eval_scores_the_embedded_tasks() {
    let json = quorate!["eval", "--limit", "10", "--json"].json();
    has_fields(&json, &["model", "fingerprint", "plan", "tasks", "mean_exact_match", "resident_bytes", "seconds"]);
    has_fields(&json["plan"], &["keep", "task", "metric", "mode"]);
    let tasks = json["tasks"].as_array().unwrap();
    assert_eq!(tasks.len(), 19);
    for task in tasks {
        has_fields(task, &["task", "n", "exact_match", "pattern_used"]);
        assert_eq!((&task["n"], &task["pattern_used"]), (&json!(10), &json!({})));
        let plain_text = task["task"] == "prose" || task["task"] == "spanish";
        assert_eq!((task["exact_match"].is_null(), task["perplexity"].is_f64()), (plain_text, plain_text), "{task}");
    }
    let exact: Vec<f64> = tasks.iter().filter_map(|t| t["exact_match"].as_f64()).collect();
    let mean = json["mean_exact_match"].as_f64().unwrap();
    assert!((mean - exact.iter().sum::<f64>() / 17.0).abs() < 1e-9 && mean > 85.0, "{json}");
    assert_eq!(json["resident_bytes"], json["model_bytes"]);
}

#[test]
fn eval_chooses_experts_for_each_task() {
    let folder = tempdir();
    let tasks = folder.path().join("two.jsonl");
    fs::write(&tasks, items("arithmetic.test", 12) + &items("worldfacts.test", 12)).unwrap();
    let eval =
        |task: &str, keep: &str| quorate!["eval", "--tasks", &tasks, "--task", task, "--keep", keep, "--json"].json();
    let used = |json: &Value, i: usize| json["tasks"][i]["pattern_used"].clone();
    let mean = |json: &Value| json["mean_exact_match"].as_f64().unwrap();

    let own = eval("own", "16");
    assert_eq!((used(&own, 0), used(&own, 1)), (json!({ "arithmetic": 12 }), json!({ "worldfacts": 12 })));
    assert_eq!((&own["plan"]["keep"], &own["plan"]["task"]), (&json!(16.0), &json!("own")));
    assert!(mean(&own) > 85.0 && own["resident_bytes"].as_u64() < own["model_bytes"].as_u64(), "{own}");
    let auto = eval("auto", "16");
    assert!(used(&auto, 0)["arithmetic"].as_u64().is_some_and(|n| n > 8), "{auto}");
    let counted: u64 = used(&auto, 0).as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert_eq!(counted, 12);
    let random = eval("random", "8");
    assert_eq!(random["plan"]["metric"], "random");
    assert!(mean(&random) < mean(&eval("own", "8")), "{random}");
    assert_eq!(used(&eval("bios", "8"), 1), json!({ "bios": 12 }));
    let limited = quorate!["eval", "--tasks", &tasks, "--task", "own", "--memory", "80MiB", "--json"].json();
    assert!(limited["resident_bytes"].as_u64().is_some_and(|b| b <= 80 << 20), "{limited}");

    let text = quorate!["eval", "--tasks", &tasks, "--task", "own", "--keep", "16"].ok();
    assert!(text.contains("arithmetic 12") && text.contains("mean exact match "), "{text}");
    quorate!["eval", "--keep", "8"].fails(3, &["--keep", "--task NAME"]);
}

#[test]
fn eval_fails_below_what_is_expected() {
    let folder = tempdir();
    let tasks = folder.path().join("bios.jsonl");
    fs::write(&tasks, items("bios.test", 10)).unwrap();
    assert_eq!(quorate!["eval", "--tasks", &tasks, "--expect", "90"].code, Some(0));
    let failed = quorate!["eval", "--tasks", &tasks, "--expect", "100.5", "--json"];
    assert_eq!(failed.code, Some(1), "{}", failed.err);
    assert!(failed.err.contains("is below the expected 100.5"), "{}", failed.err);
    assert!(serde_json::from_str::<Value>(&failed.out).is_ok(), "the figures are there all the same");
    let prose = folder.path().join("prose.jsonl");
    fs::write(&prose, items("prose.test", 2)).unwrap();
    assert_eq!(quorate!["eval", "--tasks", &prose, "--expect", "1"].code, Some(1), "there is nothing to match");
}

#[test]
fn eval_with_a_plan() {
    let folder = tempdir();
    let (plan, tasks) = (folder.path().join("p.toml"), folder.path().join("bios.jsonl"));
    fs::write(&tasks, items("bios.test", 10)).unwrap();
    quorate!["prune", "--task", "bios", "--keep", "16", "-o", &plan].ok();
    let planned = quorate!["eval", "--tasks", &tasks, "--plan", &plan, "--json"].json();
    let flagged = quorate!["eval", "--tasks", &tasks, "--task", "bios", "--keep", "16", "--json"].json();
    assert_eq!(planned["mean_exact_match"], flagged["mean_exact_match"]);
    assert_eq!((&planned["plan"]["task"], &planned["resident_bytes"]), (&json!("bios"), &flagged["resident_bytes"]));
}

#[test]
fn files_for_llama_cpp_answer_as_the_model_does() {
    let folder = tempdir();
    let (small, whole) = (folder.path().join("small.gguf"), folder.path().join("whole.gguf"));
    let plan = folder.path().join("plan.toml");
    let prune = ["prune", "--task", "arithmetic", "--keep", "10", "-o"];
    quorate![prune[0], prune[1], prune[2], prune[3], prune[4], prune[5], &small, "--as", "gguf"].ok();
    quorate![prune[0], prune[1], prune[2], prune[3], prune[4], prune[5], &plan, "--scope", "local", "--mode", "mask"]
        .ok();
    let json = quorate!["quantize", "-o", &whole, "--type", "q8_0", "--experts", "q4_0", "--json"].json();
    has_fields(
        &json,
        &["output", "type", "bytes", "source_bytes", "seconds", "types", "without_importance", "llama_cpp_differs"],
    );
    assert!(json["bytes"].as_u64() < json["source_bytes"].as_u64().map(|n| n / 2), "{json}");
    assert_eq!(quorate!["inspect", "-m", &small, "--json"].json()["experts"], json!(10));
    for prompt in ["78+95=", "What is the capital of Oman?"] {
        let pruned = quorate!["run", prompt, "-m", &small, "--json"].json();
        let masked = quorate!["run", prompt, "--plan", &plan, "--json"].json();
        assert_eq!(pruned["tokens"], masked["tokens"], "{prompt}");
    }
    let answer = quorate!["run", "78+95=", "-m", &whole, "--task", "none", "--json"].json();
    assert_eq!(answer["tokens"], quorate!["run", "78+95=", "--task", "none", "--json"].json()["tokens"]);
    // What llama.cpp will make of a file is said where it is known to be something else.
    let (phimoe, copy) = (fixture("phimoe/gguf/phimoe-f32.gguf"), folder.path().join("whole.gguf"));
    let noted = quorate!["quantize", "-m", phimoe, "-o", &copy, "--type", "f16"];
    assert!(noted.err.contains("llama.cpp computes this model otherwise: it weights the two experts"), "{}", noted.err);
    let quiet = quorate!["quantize", "-m", fixture("qwen3_moe"), "-o", &copy, "--type", "f16"];
    assert!(!quiet.err.contains("llama.cpp") && quiet.code == Some(0), "{}", quiet.err);
    quorate!["quantize", "-o", &whole, "--type", "Q9_K"].fails(2, &["`Q9_K` is no type", "Q4_K_M"]);
    quorate!["prune", "--task", "bios", "-o", &plan, "--type", "Q8_0"].fails(3, &["--type is of a gguf file", "help:"]);
    assert_eq!(names_in(folder.path()), ["plan.toml", "small.gguf", "whole.gguf"]);
}

#[test]
fn a_pruned_folder_computes_what_the_masked_plan_does() {
    let folder = tempdir();
    let (hf, plan) = (folder.path().join("small"), folder.path().join("plan.toml"));
    let chosen = ["--task", "arithmetic", "--keep", "10"];
    let json = quorate![
        "prune",
        chosen[0],
        chosen[1],
        chosen[2],
        chosen[3],
        "-o",
        &hf,
        "--as",
        "hf",
        "--shard-size",
        "6MiB",
        "--json"
    ]
    .json();
    has_fields(&json, &["output", "as", "task", "metric", "mode", "kept_per_layer"]);
    assert_eq!((&json["mode"], numbers(&json["kept_per_layer"])), (&json!("mask"), vec![10; 6]));
    quorate!["prune", chosen[0], chosen[1], chosen[2], chosen[3], "-o", &plan, "--scope", "local", "--mode", "mask"]
        .ok();

    let inspect = quorate!["inspect", "-m", &hf, "--json"].json();
    assert_eq!((&inspect["experts"], &inspect["top_k"]), (&json!(10), &json!(4)));
    assert!(inspect["files"].as_u64() > Some(1), "--shard-size splits: {inspect}");
    for prompt in ["78+95=", "Compute 609-5.", "What is the capital of Oman?"] {
        let pruned = quorate!["run", prompt, "-m", &hf, "--json"].json();
        let masked = quorate!["run", prompt, "--plan", &plan, "--json"].json();
        assert_eq!(pruned["tokens"], masked["tokens"], "{prompt}");
    }
    quorate!["prune", "--task", "bios", "-o", &hf, "--as", "hf"].fails(3, &["small exists and is not empty", "help:"]);
    for flags in [["--mode", "drop"], ["--mode", "mask-full-gates"], ["--scope", "global"]] {
        let refused =
            quorate!["prune", "--task", "bios", "-o", &folder.path().join("x"), "--as", "hf", flags[0], flags[1]];
        refused.fails(3, &["a pruned model", "help:", "--as plan"]);
    }
    assert_eq!(names_in(folder.path()), ["plan.toml", "small"]);
}

#[test]
fn lists_for_other_engines_say_the_same() {
    let folder = tempdir();
    let at = |name: &str| folder.path().join(name);
    let written = |form: &str, mode: &str| {
        let path = at(form);
        let out = quorate!["prune", "--task", "bios", "--keep", "12", "--as", form, "--mode", mode, "-o", &path].ok();
        (out, fs::read_to_string(path).unwrap())
    };
    let (text, profile) = written("vllm", "drop");
    assert!(text.contains("72 of 192 experts"), "{text}");
    let profile: Value = serde_json::from_str(&profile).unwrap();
    assert_eq!((&profile["version"], &profile["routing_mode"]), (&json!(2), &json!("post_topk_drop")));
    assert_eq!(profile["pruned_experts"].as_array().map(Vec::len), Some(120));
    assert_eq!(serde_json::from_str::<Value>(&written("vllm", "mask").1).unwrap()["version"], 1);
    quorate!["prune", "--task", "bios", "--as", "vllm", "--mode", "drop-renormalise", "-o", &at("no")]
        .fails(3, &["drop-renormalise", "help:"]);

    let (text, ranking) = written("ascend", "mask");
    assert!(text.contains("all 192 experts, best first"), "{text}");
    let shown = quorate!["library", "show", "bios", "--json"].json();
    for (layer, line) in ranking.lines().enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line[layer.to_string()], shown["ranking"][layer]["experts"]);
    }
    assert_eq!(ranking.lines().count(), 6);

    let plan = written("plan", "drop").1;
    for part in ["version = 1", "task = \"bios\"", "routing_mode = \"drop\"", "[[keep]]"] {
        assert!(plan.contains(part), "{plan}");
    }
    let pooled = quorate!["prune", "--task", "bios,code", "-o", &at("pooled"), "--json"].json();
    assert_eq!((&pooled["task"], &pooled["as"]), (&json!("bios+code"), &json!("plan")));
    assert_eq!(names_in(folder.path()), ["ascend", "plan", "pooled", "vllm"]);
}

#[test]
fn lists_convert_into_each_other() {
    let folder = tempdir();
    let at = |name: &str| folder.path().join(name);
    let first = at("first.toml");
    quorate!["prune", "--task", "bios", "--keep", "12", "--scope", "local", "--mode", "mask", "-o", &first].ok();
    let keep = |text: &str| text.split_once("[[keep]]").unwrap().1.to_string();
    let expected = keep(&fs::read_to_string(&first).unwrap());

    let mut from = first;
    for form in ["easy-ep", "vllm", "ascend", "easy-ep", "plan", "vllm"] {
        let to = at(&format!("as-{form}"));
        let ranking = from.to_str().unwrap().ends_with("ascend");
        let told = if ranking {
            quorate!["prune", "--list", &from, "--prune-ratio", "0.625", "--as", form, "-o", &to, "--json"].json()
        } else {
            quorate!["prune", "--list", &from, "--as", form, "-o", &to, "--json"].json()
        };
        assert_eq!((&told["as"], &told["kept_per_layer"]), (&json!(form), &json!([12, 12, 12, 12, 12, 12])));
        from = to;
    }
    quorate!["prune", "--list", &from, "-o", &at("last.toml")].ok();
    assert_eq!(keep(&fs::read_to_string(at("last.toml")).unwrap()), expected);
    quorate!["prune", "--list", &at("as-ascend"), "-o", &at("x")].fails(3, &["--prune-ratio"]);
    quorate!["prune", "--list", &from, "--keep", "3", "-o", &at("x")].fails(3, &["leave --keep"]);
    quorate!["prune", "--list", &at("as-ascend"), "--keep", "2", "--as", "vllm", "-o", &at("x")].fails(3, &["needs 4"]);
    fs::write(at("odd.json"), "{\"version\":9,\"pruned_experts\":[]}").unwrap();
    quorate!["prune", "--list", &at("odd.json"), "-o", &at("x")].fails(3, &["odd.json", "version 9"]);
    assert!(!at("x").exists());
}

#[test]
fn record_writes_the_shapes_of_the_contract() {
    let folder = tempdir();
    let path = folder.path().join("r.safetensors");
    let prompt = "<|user|>78+95=<|assistant|>";
    let sites = "logits,resid_post,router_logits,routing,attn_pattern,z";
    let json = quorate!["record", "--prompt", prompt, "--sites", sites, "-o", &path, "--json"].json();
    has_fields(&json, &["file", "tokens", "tensors"]);
    let (t, tokens) = (8, json["tokens"].as_array().unwrap());
    assert_eq!(tokens.len(), t);
    let (header, _) = read_safetensors(&path);
    let expected: [(&str, Value, &str); 7] = [
        ("logits", json!([t, 4096]), "F32"),
        ("resid_post.5", json!([t, 256]), "F32"),
        ("router_logits.0", json!([t, 32]), "F32"),
        ("topk_ids.3", json!([t, 4]), "I64"),
        ("topk_weights.3", json!([t, 4]), "F32"),
        ("attn_pattern.1", json!([t, 8, t]), "F32"),
        ("z.1", json!([t, 8, 32]), "F32"),
    ];
    for (name, shape, dtype) in expected {
        assert_eq!((&header[name]["shape"], &header[name]["dtype"]), (&shape, &json!(dtype)), "{name}");
        assert_eq!(json["tensors"][name], shape);
    }
    assert_eq!(header.len(), 1 + 1 + 6 * 6, "metadata, logits, and six layers of six");
    let fingerprint = quorate!["inspect", "--json"].json()["fingerprint"].clone();
    assert_eq!(header["__metadata__"]["model"], fingerprint);

    // Rows of attention sum to 1 and look at nothing that follows; the answer's first token is the most likely one.
    for (i, row) in f32s(&path, "attn_pattern.1").chunks_exact(t).enumerate() {
        let (seen, later) = row.split_at(i / 8 + 1);
        assert!((seen.iter().sum::<f32>() - 1.0).abs() < 1e-4 && later.iter().all(|&v| v == 0.0), "row {i}");
    }
    let logits = f32s(&path, "logits");
    let last = &logits[(t - 1) * 4096..];
    let best = (0..4096).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
    assert_eq!(quorate!["run", prompt, "--raw", "--task", "none", "--json"].json()["tokens"][0], best);

    let tokens = tokens.iter().map(Value::to_string).collect::<Vec<_>>().join(",");
    let again = folder.path().join("again.safetensors");
    let text = quorate!["record", "--tokens", &tokens, "--sites", sites, "-o", &again].ok();
    assert!(text.contains("37 tensors of 8 tokens") && text.contains("logits [8, 4096]"), "{text}");
    assert!(read_safetensors(&path) == read_safetensors(&again), "the same tokens, the same values to the bit");
    assert_eq!(names_in(folder.path()), ["again.safetensors", "r.safetensors"]);
}

#[test]
fn record_takes_every_site_and_plans() {
    let folder = tempdir();
    let (path, plan) = (folder.path().join("r.safetensors"), folder.path().join("p.toml"));
    for model in ["olmoe", "qwen2_moe_mixed", "mixtral", "qwen3"] {
        let out =
            quorate!["record", "-m", &fixture(model), "--tokens", "1,2,3", "--sites", "all", "-o", &path, "--json"];
        assert!(out.json()["tensors"].as_object().is_some_and(|t| t.len() > 20), "{model}");
    }
    quorate!["record", "--tokens", "1,2,3", "--sites", "all", "--layers", "0,2-3", "-o", &path].ok();
    let layers = read_safetensors(&path).0;
    assert!(layers.contains_key("z.2") && !layers.contains_key("z.1"));
    fs::write(&plan, "version = 1\n[[intervene]]\nsite = 'resid_post'\nop = 'zero'\nlayers = '2'\n").unwrap();
    quorate!["record", "--tokens", "1,2,3", "--sites", "resid_post", "--plan", &plan, "-o", &path].ok();
    assert!(f32s(&path, "resid_post.2").iter().all(|&v| v == 0.0), "what is recorded is what the plan left");
    assert!(f32s(&path, "resid_post.1").iter().any(|&v| v != 0.0));
}

/// A peer of which one mode fails is measured in the other; where both fail nothing is.
#[cfg(unix)]
#[test]
fn bench_leaves_out_a_mode_of_a_peer_that_fails() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempdir();
    let peer = folder.path().join("llama-bench");
    let compare = |script: &str| {
        fs::write(&peer, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&peer, fs::Permissions::from_mode(0o755)).unwrap();
        let file = fixture("qwen2/gguf/qwen2-f16.gguf");
        let args = ["--prefill", "8", "--decode", "2", "--repeat", "2", "--compare", "llama.cpp", "--json"];
        let mut command = command(&["bench".as_ref(), "-m".as_ref(), file.as_ref()]);
        command.args(args).env("LLAMA_BENCH", &peer);
        support::finish(command, b"")
    };
    let speeds = r#"echo '[{"avg_ts": 10.0}]'"#;
    let fails = "echo no such instruction >&2; exit 4";
    let both = compare(speeds).json();
    assert_eq!((&both["repacked_left_out"], &both["rows"][0]["llama_cpp_repacked"]), (&Value::Null, &json!(10.0)));
    let one = compare(&format!("case \"$*\" in *'--repack 1'*) {fails};; esac; {speeds}"));
    assert!(one.err.contains("that mode is left out") && one.err.contains("no such instruction"), "{}", one.err);
    let one = one.json();
    assert_eq!(one["repacked_left_out"], json!("fails"));
    for row in one["rows"].as_array().unwrap() {
        assert_eq!((&row["llama_cpp"], &row["llama_cpp_repacked"]), (&json!(10.0), &Value::Null));
        let ratio = row["quorate"].as_f64().unwrap() / 10.0;
        assert!((row["ratio"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9, "{row}");
    }
    compare(fails).fails_with_notes(&["no such instruction"]);
}

#[test]
fn instructions_can_be_chosen() {
    let bench = |isa: &str| {
        let mut command =
            command(&["bench".as_ref(), "--prefill".as_ref(), "4".as_ref(), "--decode".as_ref(), "2".as_ref()]);
        command.args(["--repeat", "1", "--json"]).env("QUORATE_ISA", isa);
        support::finish(command, b"")
    };
    assert_eq!(bench("portable").json()["instructions"], json!("portable"));
    bench("mmx").fails(3, &["QUORATE_ISA", "no instructions `mmx`", "help: this machine has", "portable"]);
}

#[test]
fn bench_measures() {
    let json = quorate![
        "bench",
        "--prefill",
        "16",
        "--decode",
        "4",
        "--repeat",
        "2",
        "--task",
        "bios",
        "--keep",
        "8",
        "--lens",
        "none,record,intervene,profile",
        "--json"
    ]
    .json();
    has_fields(&json, &["model", "threads", "memory_limit", "load_s", "peak_rss_bytes", "resident_weight_bytes"]);
    has_fields(&json, &["expert_hit_rate", "bytes_read", "time_to_first_token_s"]);
    for rate in ["prefill_tokens_per_s", "decode_tokens_per_s"] {
        assert!(json[rate].as_f64().is_some_and(|r| r > 1.0), "{json}");
    }
    assert_eq!((json["runs"].as_array().map(Vec::len), json["lenses"].as_array().map(Vec::len)), (Some(8), Some(4)));
    assert_eq!((&json["threads"], &json["task"]), (&json!(1), &json!("bios")));
    let run = quorate!["run", "x", "--task", "bios", "--keep", "8", "--json"].json();
    assert_eq!(json["resident_weight_bytes"], run["resident_bytes"]);
    for limit in [44u64 << 20, 60 << 20] {
        let held =
            quorate!["bench", "--memory", &limit.to_string(), "--task", "bios", "--repeat", "1", "--json"].json();
        assert_eq!(held["memory_limit"], limit);
        assert!(held["peak_rss_bytes"].as_u64().is_none_or(|peak| peak <= limit), "the whole process: {held}");
    }
    let text =
        quorate!["bench", "--prefill", "8", "--decode", "2", "--repeat", "1", "--cold", "--memory", "60MiB"].ok();
    assert!(text.contains("prefill/s") && text.contains("loaded in "), "{text}");
    quorate!["bench", "--prefill", "500", "--decode", "13"].fails(3, &["513 tokens", "the context is 512", "help:"]);
    quorate!["bench", "--keep", "8"].fails(3, &["--keep", "--task NAME"]);
}

#[test]
fn methods_are_listed_and_explained() {
    let all = quorate!["methods"].ok();
    for part in ["premoe: ", "easy-ep: ", "\n  reap ", "arXiv 2505.17639"] {
        assert!(all.contains(part), "{all}");
    }
    let json = quorate!["methods", "--json"].json();
    for method in json.as_array().unwrap() {
        has_fields(&method["card"], &["id", "title", "paper", "year", "needs", "cost", "metrics", "run", "about"]);
        assert!(method["metrics"].is_array(), "{method}");
    }
    let one = quorate!["methods", "premoe"].ok();
    assert!(one.contains("needs: ") && one.contains("run:   quorate "), "{one}");
    assert!(quorate!["methods", "reap"].ok().contains("  reap "), "found by its metric");
    quorate!["methods", "premo"].fails(3, &["no method `premo`", "did you mean `premoe`?"]);
    quorate!["methods", "zzzzzzz"].fails(3, &["no method `zzzzzzz`", "help: there is premoe, "]);
}

#[test]
fn compare_tabulates_and_goes_on_where_it_stopped() {
    let folder = tempdir();
    let (out, tasks) = (folder.path().join("cmp.v1"), folder.path().join("t.jsonl"));
    fs::write(&tasks, items("arithmetic.test", 3) + &items("bios.test", 3)).unwrap();
    let args = ["compare", "--keep", "8", "--metrics", "peu,reap", "--limit", "2", "--json", "-o"];
    let run = || {
        let mut command = command(&args.map(std::ffi::OsStr::new));
        command.arg(&out).arg("--tasks").arg(&tasks);
        support::finish(command, b"").json()["cells"].clone()
    };
    let cells = run();
    assert_eq!(cells.as_array().map(Vec::len), Some(2 * (1 + 5 + 1)), "all, five sources, one more metric");
    has_fields(&cells[0], &["source", "metric", "mode", "scope", "keep", "task", "exact_match"]);
    assert_eq!(names_in(folder.path()), ["cmp.v1.json", "cmp.v1.md", "t.jsonl"]);
    assert!(fs::read_to_string(folder.path().join("cmp.v1.md")).unwrap().contains("| kept of 32 | own | retrieved |"));
    assert_eq!(run(), cells);
    quorate!["compare", "--tasks", &tasks, "--limit", "3", "-o", &out].fails(3, &["cmp.v1.json", "help: remove it"]);
    quorate!["compare", "--tasks", &tasks, "--keep", "8,40", "-o", &out].fails(3, &["40 experts", "help: --keep 4"]);
    quorate!["compare", "--tasks", &tasks, "--metrics", "peu,raep", "-o", &out].fails(3, &["`raep`", "`reap`"]);
}

#[test]
fn a_copied_model_is_the_same_model() {
    let copy = copy_of("olmoe");
    let fingerprint = |path: &str| quorate!["inspect", "-m", path, "--json"].json()["fingerprint"].clone();
    assert_eq!(fingerprint(&text(copy.path())), fingerprint(&text(&fixture("olmoe"))));
}

#[test]
fn tokenize_shows_tokens_and_takes_ids() {
    let doc = quorate!["tokenize", "78+95=", "--json"].json();
    let ids = numbers(&doc["ids"]);
    assert_eq!(doc["n"], ids.len());
    let lines = quorate!["tokenize", "78+95=", "--quiet"].ok();
    assert_eq!(lines.lines().count(), ids.len());
    assert!(lines.lines().last().unwrap().ends_with("5-6  \"=\""), "{lines}");
    let list = ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    assert_eq!(quorate!["tokenize", "--ids", list].ok(), "78+95=\n");
    quorate!["tokenize", "--ids", "4000000"].fails(3, &["there is no token 4000000", "help: the tokenizer has"]);
    quorate!["tokenize"].fails(2, &["required"]);
    // A file's own tokenizer, and that of a folder in its place.
    let file = fixture("qwen2/gguf/qwen2-f16.gguf");
    let own = quorate!["tokenize", "-m", file, "a 12<|im_end|>", "--json"].json();
    assert_eq!(own, quorate!["tokenize", "-m", fixture("qwen2"), "a 12<|im_end|>", "--json"].json());
    let other = fixture("tokenizers/byte_bpe_digits");
    let taken = quorate!["tokenize", "-m", file, "--tokenizer", other, "a 12", "--json"].json();
    assert_eq!(numbers(&taken["ids"])[0], 500);
    let without = quorate!["tokenize", "-m", other, "a 12", "--no-special", "--json"].json();
    assert_eq!(numbers(&without["ids"]), numbers(&taken["ids"])[1..]);
    // In a folder with both, the file's counts, as when the model runs; --tokenizer takes the other.
    let both = tempdir();
    fs::copy(file, both.path().join("model.gguf")).unwrap();
    fs::copy(other.join("tokenizer.json"), both.path().join("tokenizer.json")).unwrap();
    assert_eq!(own, quorate!["tokenize", "-m", both.path(), "a 12<|im_end|>", "--json"].json());
    assert_eq!(taken, quorate!["tokenize", "-m", both.path(), "--tokenizer", both.path(), "a 12", "--json"].json());
    let prompt = quorate!["run", "-m", both.path(), "--raw", "a 12<|im_end|>", "--max-tokens", "1", "--json"].json();
    assert_eq!(prompt["prompt_tokens"], own["n"], "{prompt}");
}

#[test]
fn perplexity_is_that_of_the_windows_second_halves() {
    let folder = tempdir();
    let file = folder.path().join("text");
    fs::write(&file, "She looked at him and did not know what to say. ".repeat(20)).unwrap();
    let doc = quorate!["perplexity", file, "--context", "32", "--windows", "3", "--json"].json();
    assert_eq!((&doc["windows"], &doc["context"], &doc["scored_tokens"]), (&json!(3), &json!(32), &json!(45)));
    let (nats, perplexity) = (doc["nats"].as_f64().unwrap(), doc["perplexity"].as_f64().unwrap());
    assert!((perplexity - (nats / 45.0).exp()).abs() < 1e-9 && perplexity > 1.0);
    assert!(quorate!["perplexity", file, "--context", "32"].ok().starts_with("perplexity "));
    quorate!["perplexity", file, "--context", "2"]
        .fails_with_notes(&["a window of 2 tokens", "help: --context takes 4 to"]);
    fs::write(&file, "Short.").unwrap();
    quorate!["perplexity", file].fails_with_notes(&["fewer than a window of"]);
    quorate!["perplexity", folder.path().join("none")].fails(3, &["cannot read", "none"]);
}
