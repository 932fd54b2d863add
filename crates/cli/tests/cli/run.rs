//! `run` and `chat`: the right task is found, its experts and no others are read, and the answer is right.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{f32s, has_fields, home, items, names_in, numbers, read_safetensors, repository, tempdir};
use crate::{quorate, quorate_reads};

const RUN_FIELDS: [&str; 10] = [
    "text",
    "tokens",
    "task",
    "distance",
    "kept_per_layer",
    "resident_bytes",
    "model_bytes",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "time_to_first_token_s",
];

/// Bytes of the embedded model's skeleton in its files and in memory (where vectors and routers are f32).
fn skeleton_bytes() -> (u64, u64) {
    let folder = repository("embedded/model");
    let (mut file, mut memory) = (0, 0);
    for name in names_in(&folder).into_iter().filter(|n| n.ends_with(".safetensors")) {
        for (tensor, entry) in read_safetensors(&folder.join(name)).0 {
            if tensor == "__metadata__" || tensor.contains(".experts.") {
                continue;
            }
            let offsets = numbers(&entry["data_offsets"]);
            let elements: u64 = numbers(&entry["shape"]).iter().product();
            let widened = numbers(&entry["shape"]).len() == 1 || tensor.ends_with("mlp.gate.weight");
            file += offsets[1] - offsets[0];
            memory += if widened { 4 * elements } else { offsets[1] - offsets[0] };
        }
    }
    (file, memory)
}

const EXPERT_BYTES: u64 = 3 * 256 * 128 * 2;

#[test]
fn the_right_task_is_found_and_answers_rightly() {
    for (prompt, task, answer) in [
        ("78+95=", "arithmetic", "173"),
        ("What is the capital of Oman?", "worldfacts", "Muscat"),
        ("Where did Frank Glover study?", "bios", "Castleton University"),
        ("Run:\nx=[7,2,3]\nprint(x[2])", "code", "3"),
        ("swap(g r y)", "strings", "y r g"),
        ("List: 5,4,0,7,1,6\nLast", "listops", "6"),
        ("z=2\nx=3\ne=3\nq=7\nh=9\ns=3\nj=3\nm=0\nz=", "induction", "2"),
        ("beach:beaches\nbottle:bottles\nhotel:hotels\nknife:", "icl", "knives"),
    ] {
        let json = quorate!["run", prompt, "--json"].json();
        has_fields(&json, &RUN_FIELDS);
        assert_eq!((&json["task"], &json["text"]), (&json!(task), &json!(answer)), "{json}");
        assert_eq!((&json["nearest"], &json["familiar"], &json["finish"]), (&json!(task), &json!(true), &json!("eos")));
        assert!(json["distance"].as_f64().is_some_and(|d| d > 0.0 && d < 10.0), "{json}");
        assert!(json["time_to_first_token_s"].as_f64().is_some_and(|s| s > 0.0 && s < 30.0), "{json}");
        assert_eq!(numbers(&json["kept_per_layer"]).iter().sum::<u64>(), 96, "half of the experts: {json}");
    }
}

#[test]
fn plain_text_is_the_answer_and_notes_go_to_stderr() {
    let run = quorate!["run", "78+95="];
    assert_eq!(run.out, "173\n");
    for part in ["nearest task: arithmetic (distance ", "loaded 96 of 192 experts", " read", "decode 3 tokens"] {
        assert!(run.err.contains(part), "{}", run.err);
    }
    let quiet = quorate!["run", "78+95=", "--quiet"];
    assert_eq!((quiet.out.as_str(), quiet.err.as_str()), ("173\n", ""));
}

#[test]
fn unfamiliar_prompts_fall_back_to_the_generalist() {
    let prompt = "zqx 9!!%% ".repeat(12);
    let json = quorate!["run", &prompt, "--json"].json();
    assert_eq!((&json["task"], &json["familiar"]), (&json!("generalist"), &json!(false)), "{json}");
    assert!(json["nearest"].as_str().is_some_and(|n| n != "generalist"), "{json}");
    let run = quorate!["run", &prompt, "--max-tokens", "4"];
    assert!(
        run.err.contains("unfamiliar prompt (nearest task ") && run.err.contains("using generalist"),
        "{}",
        run.err
    );
}

#[test]
fn the_task_can_be_named_or_none() {
    let all = quorate!["run", "78+95=", "--task", "none", "--json"].json();
    assert_eq!((&all["task"], &all["distance"], &all["text"]), (&Value::Null, &Value::Null, &json!("173")));
    assert_eq!(numbers(&all["kept_per_layer"]), [32; 6]);
    let named = quorate!["run", "78+95=", "--task", "bios", "--json"].json();
    assert_eq!((&named["task"], &named["distance"]), (&json!("bios"), &Value::Null));
    assert!(quorate!["run", "78+95=", "--task", "bios"].err.contains("task: bios; loaded 96 of 192"));
}

#[test]
fn just_the_kept_experts_are_read_and_held() {
    let (file, memory) = skeleton_bytes();
    for args in [
        ["--keep", "8", "--scope", "global"],
        ["--keep", "8", "--scope", "local"],
        ["--keep", "32", "--scope", "local"],
    ] {
        let json = quorate!["run", "78+95=", "--json", args[0], args[1], args[2], args[3]].json();
        let kept = numbers(&json["kept_per_layer"]);
        let each: u64 = args[1].parse().unwrap();
        assert_eq!(kept.iter().sum::<u64>(), 6 * each, "{json}");
        assert!(args[3] == "global" || kept == [each; 6], "{json}");
        assert!(kept.iter().all(|&k| (4..=32).contains(&k)), "a token uses 4: {json}");
        assert_eq!(json["bytes_read"], json!(file + 6 * each * EXPERT_BYTES));
        assert_eq!(json["resident_bytes"], json!(memory + 6 * each * EXPERT_BYTES));
        assert_eq!(json["model_bytes"], json!(memory + 192 * EXPERT_BYTES));
    }
}

/// Through little memory the answers are those of all experts, and the process keeps to what it may use.
#[test]
fn streaming_is_exact_and_inside_its_memory() {
    let prompt = "Where did Frank Glover study?";
    let whole = quorate!["run", prompt, "--task", "none", "--json"].json();
    for (limit, cache) in [("44MiB", "lru"), ("50MiB", "pinned"), ("50MiB", "prefetch"), ("200MiB", "prefetch")] {
        for task in ["auto", "none"] {
            let run = quorate![
                "run",
                prompt,
                "--task",
                task,
                "--json",
                "--on-miss",
                "stream",
                "--memory",
                limit,
                "--cache",
                cache
            ];
            let json = run.json();
            assert_eq!((&json["text"], &json["tokens"]), (&whole["text"], &whole["tokens"]), "{limit} {cache}: {json}");
            let bytes: u64 = limit.trim_end_matches("MiB").parse::<u64>().unwrap() << 20;
            assert!(json["peak_rss_bytes"].as_u64().is_none_or(|peak| peak * 100 <= bytes * 102), "{json}");
            let stream = &json["stream"];
            assert_eq!(stream["policy"], json!(cache));
            assert_eq!(stream["pinned"] == json!(0), task == "none" || cache == "lru", "{json}");
            assert!(stream["reads"].as_u64().unwrap() > 0 && stream["hit_rate"].as_f64().is_some(), "{json}");
        }
    }
    let run = quorate!["run", "78+95=", "--on-miss", "stream"];
    assert_eq!(run.out, "173\n");
    for part in
        ["nearest task: arithmetic", "streaming all experts through ", " pinned", "experts in memory when wanted "]
    {
        assert!(run.err.contains(part), "{}", run.err);
    }

    let message = quorate!["run", "78+95=", "--memory", "12MiB", "--on-miss", "stream"]
        .fails(3, &["cannot stream experts in 12.0 MiB", "needed at least", "help:"]);
    let needed = message.split("--memory ").nth(1).expect("a size is suggested").trim();
    quorate!["run", "78+95=", "--memory", needed, "--on-miss", "stream"].ok();
    quorate!["run", "78+95=", "--keep", "8", "--on-miss", "stream"].fails(3, &["--keep", "--on-miss stream uses all"]);
    quorate!["run", "78+95=", "--reroute", "--on-miss", "stream"].fails(3, &["--reroute needs gradients"]);
}

#[test]
fn memory_is_kept_and_too_little_says_how_much_is_needed() {
    let mut before = 0;
    for limit in ["44MiB", "50MiB", "60MiB", "200MiB"] {
        let json = quorate!["run", "78+95=", "--memory", limit, "--json"].json();
        let bytes: u64 = limit.trim_end_matches("MiB").parse::<u64>().unwrap() << 20;
        let kept: u64 = numbers(&json["kept_per_layer"]).iter().sum();
        assert!(json["resident_bytes"].as_u64().unwrap() <= bytes && kept >= before, "{json}");
        before = kept;
    }
    assert_eq!(before, 192, "200 MiB hold all");

    let message =
        quorate!["run", "78+95=", "--memory", "10MiB"].fails(3, &["cannot hold this model in 10.0 MiB", "help:"]);
    let needed = message.split("--memory ").nth(1).expect("a size is suggested").trim();
    quorate!["run", "78+95=", "--memory", needed].ok();
    quorate!["run", "78+95=", "--memory", "20MiB", "--task", "none"].fails(3, &["20.0 MiB", "--memory"]);
    quorate!["run", "78+95=", "--memory", "6parsecs"].fails(2, &["6parsecs", "write 6GiB"]);
}

#[test]
fn a_seed_gives_the_same_tokens_and_threads_change_nothing() {
    let sampled = |seed: &str| {
        quorate!["run", "Tell", "--temperature", "2", "--max-tokens", "12", "--seed", seed, "--json"].json()
    };
    let tokens = ["1", "2", "3", "1"].map(|seed| sampled(seed)["tokens"].clone());
    assert_eq!(tokens[0], tokens[3]);
    assert!(tokens[0] != tokens[1] || tokens[1] != tokens[2], "{tokens:?}");
    let greedy = |threads: &str| {
        let mut command = crate::support::bare(home());
        command.args(["run", "Tell me more", "--task", "none", "--max-tokens", "30", "--json", "--threads", threads]);
        crate::support::finish(command, b"").json()["tokens"].clone()
    };
    assert_eq!(greedy("1"), greedy("3"));
    assert!(greedy("1").as_array().is_some_and(|t| !t.is_empty() && t.len() <= 30));
}

#[test]
fn answers_stop_where_they_are_told_to() {
    let json = quorate!["run", "78+95=", "--stop", "zz", "--stop", "3", "--json"].json();
    assert_eq!((&json["text"], &json["finish"]), (&json!("17"), &json!("stop")));
    let json = quorate!["run", "78+95=", "--max-tokens", "2", "--json"].json();
    assert_eq!((&json["text"], &json["finish"]), (&json!("17"), &json!("length")));
    assert_eq!(json["tokens"].as_array().map(Vec::len), Some(2));
    let json = quorate!["run", "78+95=", "--max-tokens", "0", "--json"].json();
    assert_eq!((&json["text"], &json["decode_tokens_per_s"]), (&json!(""), &Value::Null));
}

#[test]
fn raw_text_gets_no_template() {
    let raw = quorate!["run", "<|user|>78+95=<|assistant|>", "--raw", "--json"].json();
    let chat = quorate!["run", "78+95=", "--json"].json();
    for field in ["text", "tokens", "task", "distance", "prompt_tokens"] {
        assert_eq!(raw[field], chat[field]);
    }
    let prose: Value = serde_json::from_str(items("prose.test", 1).trim()).unwrap();
    let json = quorate!["run", prose["prompt"].as_str().unwrap(), "--raw", "--max-tokens", "8", "--json"].json();
    assert_eq!(json["task"], "prose");
}

#[test]
fn thinking_is_shown_apart_from_the_answer() {
    let asked = fs::read_to_string(repository("embedded/tasks/wordproblem.test.jsonl")).unwrap();
    let item = asked.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    let item = item.into_iter().find(|i| i["meta"].get("completion").is_some()).expect("an item with thinking");
    let json = quorate!["run", item["prompt"].as_str().unwrap(), "--raw", "--task", "none", "--json"].json();
    let (thought, answer) = json["text"].as_str().unwrap().rsplit_once("</think>").expect("the end of thinking shows");
    assert!(thought.starts_with("<think>") && answer.trim() == item["answer"], "{json}");
}

#[test]
fn the_prompt_can_come_from_standard_input() {
    for input in ["78+95=", "78+95=\n", "78+95=\r\n"] {
        assert_eq!(quorate_reads![input; "run", "-", "-q"].ok(), "173\n");
    }
    let raw = |input: &str| quorate_reads![input; "run", "-", "--raw", "--json"].json()["prompt_tokens"].clone();
    assert_ne!(raw("78+95="), raw("78+95=\n"), "with --raw every byte counts");
    quorate_reads![b"78+\xff95="; "run", "-"].fails(3, &["standard input", "UTF-8", "byte 4", "help:"]);
    quorate_reads!["\n"; "run", "-"].fails(3, &["the prompt is empty", "help:"]);
    quorate!["run", ""].fails(3, &["the prompt is empty", "help:"]);
}

/// The answer to `78+95=` with a plan, beside which the recording `r.safetensors` lies.
fn planned(folder: &Path, plan: &str, prompt: &str) -> Value {
    let path = folder.join("plan.toml");
    fs::write(&path, format!("version = 1\n{plan}")).unwrap();
    quorate!["run", prompt, "--plan", &path, "--json"].json()
}

#[test]
fn plans_keep_experts_as_the_flags_do() {
    let folder = tempdir();
    let path = folder.path().join("a.toml");
    for mode in ["mask", "mask-full-gates", "drop", "drop-renormalise"] {
        quorate!["prune", "--task", "arithmetic", "--keep", "6", "--mode", mode, "-o", &path].ok();
        let plan = quorate!["run", "Compute 609-5.", "--plan", &path, "--json"].json();
        let flags =
            quorate!["run", "Compute 609-5.", "--task", "arithmetic", "--keep", "6", "--mode", mode, "--json"].json();
        for field in ["text", "tokens", "task", "kept_per_layer", "resident_bytes", "bytes_read"] {
            assert_eq!(plan[field], flags[field], "{mode}");
        }
    }
    // Masking the logits of the others is what the routing mode `mask` does.
    let keep = planned(folder.path(), "routing_mode = 'mask'\n[[keep]]\nlayer = 2\nexperts = '0-9'", "Compute 609-5.");
    let mask = "[[intervene]]\nsite = 'router_logits'\nop = 'mask'\nlayers = '2'\nunits = '10-31'";
    let mask = planned(folder.path(), mask, "Compute 609-5.");
    assert_eq!(numbers(&keep["kept_per_layer"]), [32, 32, 10, 32, 32, 32]);
    assert_eq!((numbers(&mask["kept_per_layer"]), &mask["tokens"]), (vec![32; 6], &keep["tokens"]));
}

#[test]
fn plans_intervene() {
    let folder = tempdir();
    let asked = "<|user|>78+95=<|assistant|>";
    let recording = folder.path().join("r.safetensors");
    quorate!["record", "--prompt", asked, "--sites", "resid_post", "-o", &recording].ok();
    quorate!["record", "--tokens", "9", "--sites", "resid_post", "-o", folder.path().join("one.safetensors")].ok();

    let answer =
        |op: &str, prompt: &str| planned(folder.path(), &format!("[[intervene]]\n{op}"), prompt)["text"].clone();
    let one = "value = {file = 'one.safetensors', tensor = 'resid_post.{layer}'}";
    for nothing in [
        "site = 'resid_mid'\nop = 'scale'\nby = 1.0".to_string(),
        "site = 'routing'\nop = 'scale'\nby = 1.0\nunits = '3-9'".to_string(),
        format!("site = 'resid_post'\nop = 'add'\nscale = 0.0\n{one}"),
        "site = 'resid_post'\nop = 'zero'\npositions = '100-200'".to_string(),
        "site = 'z'\nop = 'patch'\nvalue = []".to_string(),
    ] {
        assert_eq!(answer(&nothing, "78+95="), "173", "{nothing}");
    }
    for something in [
        "site = 'resid_post'\nop = 'zero'\nlayers = '5'".to_string(),
        format!("site = 'resid_post'\nop = 'add'\nlayers = '3-5'\nscale = 40.0\n{one}"),
        "site = 'attn_out'\nop = 'scale'\nby = -3.0".to_string(),
    ] {
        assert_ne!(answer(&something, "78+95="), "173", "{something}");
    }
    let gone = |op: &str| answer(&format!("site = 'routing'\n{op}\nlayers = '2'"), "78+95=");
    assert_eq!(gone("op = 'scale'\nby = 0.0"), gone("op = 'drop'"), "a gate of 0 and no expert are the same");

    // The last layer's values of another prompt: its answer begins as that of the other does.
    assert_eq!(answer("site = 'resid_mid'\nop = 'scale'\nby = 1.0", "20+31="), "51");
    let patch = "site = 'resid_post'\nop = 'patch'\nlayers = '5'\n\
                 value = {file = 'r.safetensors', tensor = 'resid_post.{layer}'}";
    let patched = answer(patch, "20+31=");
    assert!(patched.as_str().is_some_and(|t| t.starts_with('1')), "{patched}");
    assert_eq!(f32s(&recording, "resid_post.5").len(), 8 * 256);
}

fn chat(lines: &str, args: &[&str]) -> Vec<Value> {
    let mut command = crate::support::command(&["chat".as_ref(), "--json".as_ref()]);
    command.args(args);
    let out = crate::support::finish(command, lines.as_bytes()).ok();
    out.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn a_conversation_keeps_the_first_messages_pattern() {
    let lines = "What is the capital of Oman?\n78+95=\n";
    let kept = chat(lines, &[]);
    assert_eq!((&kept[0]["task"], &kept[0]["text"]), (&json!("worldfacts"), &json!("Muscat")));
    assert_eq!((kept.len(), &kept[1]["task"]), (2, &json!("worldfacts")));
    assert!(kept[1]["cached_tokens"].as_u64().unwrap() > 5, "the first exchange is not computed again: {kept:?}");
    kept.iter().for_each(|j| has_fields(j, &["tokens", "finish", "decode_tokens_per_s", "time_to_first_token_s"]));

    let each = chat(lines, &["--each-message"]);
    assert_eq!((&each[1]["task"], &each[1]["text"]), (&json!("arithmetic"), &json!("173")));
    assert_eq!(each[1]["cached_tokens"], 0, "other experts, other keys and values");
    assert_eq!(chat(lines, &["--task", "none"])[1]["task"], Value::Null);
    assert_eq!(chat(lines, &["--task", "bios", "--keep", "8"])[1]["task"], "bios");
}

#[test]
fn a_conversation_in_plain_text() {
    let run = quorate_reads!["78+95=\n\nnever read\n"; "chat"];
    assert_eq!((run.code, run.out.as_str()), (Some(0), "173\n"), "an empty line ends it: {}", run.err);
    assert!(run.err.contains("nearest task: arithmetic"), "{}", run.err);
    assert_eq!(quorate!["chat"].ok(), "", "nothing to answer");
    let system = chat("78+95=\n", &["--system", "Answer.", "--task", "none"]);
    assert_ne!(system[0]["text"], "", "{system:?}");
    let bad = quorate_reads![b"78+95=\n\xff\n"; "chat", "-q"];
    assert_eq!((bad.code, bad.out.as_str()), (Some(3), "173\n"));
    assert!(bad.err.contains("the message is no UTF-8 text") && bad.err.contains("help:"), "{}", bad.err);
}

#[test]
fn a_conversation_may_outgrow_the_context() {
    let lines = "What is the capital of Oman?\n".repeat(60);
    let answers = chat(&lines, &["--max-tokens", "8"]);
    assert_eq!(answers.len(), 60);
    let run = quorate_reads![lines; "chat", "--max-tokens", "8"];
    assert!(run.err.contains("the oldest messages are left out: the model's context has 512 tokens"));
    let long = "1 ".repeat(600);
    quorate_reads![&long; "chat", "-q"].fails(3, &["the prompt has ", "the model's context is 512", "help: shorten"]);
    quorate!["run", &long].fails(3, &["the prompt has ", "the model's context is 512", "help: shorten"]);
}

#[test]
fn models_without_patterns_or_experts_run_whole() {
    let olmoe = crate::support::fixture("olmoe");
    let run = quorate!["run", "hello", "-m", &olmoe, "--max-tokens", "3"];
    assert!(
        run.err.contains("no patterns of this model yet") && run.err.contains("quorate profile --tasks"),
        "{}",
        run.err
    );
    let json = quorate!["run", "hello", "-m", &olmoe, "--max-tokens", "3", "--json"].json();
    assert_eq!((&json["task"], &json["resident_bytes"]), (&Value::Null, &json["model_bytes"]));
    let dense = quorate!["run", "hello", "-m", crate::support::fixture("qwen3"), "--max-tokens", "3", "--json"].json();
    assert_eq!((&dense["task"], dense["kept_per_layer"].as_array().map(Vec::len)), (&Value::Null, Some(0)));
    // What asks for fewer experts is not passed over.
    quorate!["run", "x", "-m", &olmoe, "--keep", "3"].fails(3, &["no patterns of this model yet", "help:"]);
    quorate!["run", "x", "-m", crate::support::fixture("qwen3"), "--keep", "3"].fails(3, &["has no experts", "help:"]);
    quorate!["run", "x", "--task", "none", "--keep", "8"].fails(3, &["--keep", "--task NAME"]);
}
