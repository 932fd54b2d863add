//! Models of the hub, from a server that speaks its layout over real HTTP: listing, HEAD with etag and commit, redirections of
//! large files to another host, ranges, refusals, and connections that break off.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::http::{Connection, Request, listen};
use crate::quorate;
use crate::support::{Output, bare, finish, fixture, names_in, tempdir};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A repository, how its server behaves, and what it was asked.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Files whose names the listing has, and whose content nobody may ask for.
    unasked: Vec<String>,
    token: Option<String>,
    /// The `X-Error-Code` and status of every answer.
    refuse: Option<(u16, &'static str)>,
    /// Large files' answers break off behind so many bytes.
    break_after: Option<usize>,
    /// So often; then they are whole again.
    breaks: usize,
    no_ranges: bool,
    corrupt: bool,
    etag: Option<String>,
    commit: Option<String>,
    log: Vec<String>,
}

struct Hub {
    url: String,
    state: Arc<Mutex<State>>,
    home: TempDir,
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".gguf")
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

impl Hub {
    /// Serves the files of a folder as `acme/tiny`.
    fn of(folder: &Path) -> Hub {
        let mut state = State { unasked: vec!["README.md".into(), "pytorch_model.bin".into()], ..State::default() };
        for name in names_in(folder) {
            let path = folder.join(&name);
            if path.is_file() && name != "README.md" {
                state.files.insert(name, fs::read(path).unwrap());
            }
        }
        let state = Arc::new(Mutex::new(state));
        let for_cdn = state.clone();
        let cdn = listen(move |stream| cdn(Connection::new(stream), &for_cdn));
        let for_hub = state.clone();
        let url = listen(move |stream| hub(Connection::new(stream), &for_hub, &cdn));
        Hub { url, state, home: tempdir() }
    }

    /// Runs the program with this hub.
    #[track_caller]
    fn run(&self, args: &[&str]) -> Output {
        self.run_with(args, &[])
    }

    #[track_caller]
    fn run_with(&self, args: &[&str], vars: &[(&str, &str)]) -> Output {
        let mut command: Command = bare(self.home.path());
        command.env("HF_ENDPOINT", &self.url).env_remove("HF_HUB_OFFLINE").args(["--threads", "1"]).args(args);
        command.envs(vars.iter().map(|(n, v)| (OsStr::new(*n), OsStr::new(*v))));
        finish(command, b"")
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    /// What was asked since the last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    fn root(&self) -> PathBuf {
        self.home.path().join("hf/hub/models--acme--tiny")
    }
}

/// The hub itself.
fn hub(mut connection: Connection, state: &Mutex<State>, cdn: &str) {
    while let Some(request) = connection.request() {
        let mut state = state.lock().unwrap();
        state.log.push(format!("{} {}", request.method, request.path));
        let bearer = state.token.as_ref().map(|token| format!("Bearer {token}"));
        if let Some((status, code)) = state.refuse {
            connection.answer(status, &[("x-error-code", code)], b"");
            continue;
        }
        if bearer.as_ref() != request.headers.get("authorization") {
            connection.answer(401, &[("x-error-code", "RepoNotFound")], b"{\"error\":\"Repository not found\"}");
            continue;
        }
        let commit = state.commit.clone().unwrap_or_else(|| COMMIT.to_owned());
        if request.path == "/api/models/acme/tiny/revision/main?blobs=true" {
            let sized = state.files.iter().map(|(name, bytes)| json!({ "rfilename": name, "size": bytes.len() }));
            let siblings: Vec<Value> = sized.chain(state.unasked.iter().map(|n| json!({ "rfilename": n }))).collect();
            connection.answer(200, &[], json!({ "sha": commit, "siblings": siblings }).to_string().as_bytes());
            continue;
        }
        let name = request.path.strip_prefix(&format!("/acme/tiny/resolve/{commit}/")).map(str::to_owned);
        let Some((name, bytes)) = name.and_then(|name| Some((name.clone(), state.files.get(&name)?.clone()))) else {
            let code = if request.path.contains("/resolve/") { "EntryNotFound" } else { "RepoNotFound" };
            connection.answer(404, &[("x-error-code", code)], b"");
            continue;
        };
        let etag = state.etag.clone().unwrap_or_else(|| match is_large(&name) {
            true => sha256(&bytes),
            false => format!("{:.40}", sha256(&bytes)),
        });
        let (quoted, size, place) = (format!("\"{etag}\""), bytes.len().to_string(), format!("{cdn}/{name}"));
        let commit = ("x-repo-commit", commit.as_str());
        if is_large(&name) {
            let headers = [commit, ("x-linked-etag", &quoted), ("x-linked-size", &size), ("location", &place)];
            connection.answer(302, &headers, b"");
        } else if request.method == "HEAD" {
            connection.head(200, &[commit, ("etag", &quoted)], bytes.len());
        } else {
            drop(state);
            send(&mut connection, &request, &bytes, None, false);
        }
    }
}

/// Where large files are: another host, which must not see the token.
fn cdn(mut connection: Connection, state: &Mutex<State>) {
    while let Some(request) = connection.request() {
        let mut state = state.lock().unwrap();
        assert_eq!(request.headers.get("authorization"), None, "the token belongs to the hub");
        let range = request.headers.get("range").cloned().unwrap_or_default();
        state.log.push(format!("CDN {} {range}", request.path));
        let mut bytes = state.files[&request.path[1..]].clone();
        if state.corrupt {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        let broken = state.break_after.filter(|_| state.breaks > 0);
        state.breaks = state.breaks.saturating_sub(1);
        let no_ranges = state.no_ranges;
        drop(state);
        send(&mut connection, &request, &bytes, broken, no_ranges);
        if broken.is_some() {
            return;
        }
    }
}

fn send(connection: &mut Connection, request: &Request, bytes: &[u8], broken: Option<usize>, no_ranges: bool) {
    let range =
        request.headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.split_once('-')).filter(|_| !no_ranges);
    let Some((first, last)) = range else {
        return connection.answer(200, &[], bytes);
    };
    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
    let part = &bytes[first..=last.min(bytes.len() - 1)];
    let told = format!("bytes {first}-{last}/{}", bytes.len());
    connection.head(206, &[("content-range", &told)], part.len());
    connection.send(&part[..broken.unwrap_or(part.len()).min(part.len())]);
}

#[test]
fn a_model_is_pulled_into_the_shared_cache() {
    let source = fixture("qwen2_moe_mixed"); // two shards and an index
    let hub = Hub::of(&source);
    hub.set(|s| s.token = Some("hf_secret".into()));
    let pulled = hub.run_with(&["pull", "acme/tiny", "--json"], &[("HF_TOKEN", "hf_secret")]).json();
    assert_eq!((&pulled["commit"], &pulled["family"]), (&json!(COMMIT), &json!("qwen2_moe")));
    assert_eq!(pulled["bytes"], pulled["fetched_bytes"]);
    let asked = hub.asked();
    assert!(!asked.iter().any(|line| line.contains("README") || line.contains(".bin")), "{asked:?}");

    // As the Python library lays it out.
    let snapshot = hub.root().join("snapshots").join(COMMIT);
    assert_eq!(pulled["path"].as_str(), snapshot.to_str());
    assert_eq!(fs::read_to_string(hub.root().join("refs/main")).unwrap(), COMMIT);
    for name in pulled["files"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()) {
        let bytes = fs::read(source.join(name)).unwrap();
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), bytes, "{name}");
        let target = fs::read_link(snapshot.join(name)).unwrap();
        let etag = if is_large(name) { sha256(&bytes) } else { format!("{:.40}", sha256(&bytes)) };
        assert_eq!(target, Path::new("../../blobs").join(etag), "{name}");
    }

    // It is there now: no other word with the hub, and none of it twice.
    let whole = quorate!["inspect", "-m", &source, "--json"].json();
    let there = hub.run(&["inspect", "-m", "acme/tiny", "--offline", "--json"]).json();
    assert_eq!(there["fingerprint"], whole["fingerprint"]);
    hub.run(&["inspect", "-m", "acme/tiny"]).ok();
    assert_eq!(hub.asked(), Vec::<String>::new());
    let again = hub.run_with(&["pull", "acme/tiny", "--json"], &[("HF_TOKEN", "hf_secret")]).json();
    assert_eq!((&again["fetched_bytes"], &again["bytes"]), (&json!(0), &pulled["bytes"]));
    assert_eq!(hub.asked().len(), 1, "just the listing");

    // A token file will do as well; a new commit takes over what is the same.
    fs::write(hub.home.path().join("hf/token"), "hf_secret\n").unwrap();
    hub.set(|s| {
        s.commit = Some("f".repeat(40));
        s.files.get_mut("config.json").unwrap().push(b'\n');
    });
    let newer = hub.run(&["pull", "acme/tiny", "--json"]).json();
    assert_eq!(newer["fetched_bytes"], hub.state.lock().unwrap().files["config.json"].len());
}

#[test]
fn inspect_fetches_the_configuration_alone() {
    let hub = Hub::of(&fixture("qwen3_next"));
    let told = hub.run(&["inspect", "-m", "acme/tiny", "--json"]).json();
    assert_eq!((&told["family"], &told["fingerprint"]), (&json!("qwen3_next"), &Value::Null));
    assert!(!hub.asked().iter().any(|line| line.contains("safetensors")));
    // Run fetches the rest.
    let told = hub.run(&["bench", "-m", "acme/tiny", "--prefill", "1", "--decode", "1", "--json"]);
    told.ok();
    assert!(hub.asked().iter().any(|line| line.contains("model.safetensors")));
}

#[test]
fn a_download_goes_on_where_it_broke_off() {
    let source = fixture("olmoe");
    let size = fs::metadata(source.join("model.safetensors")).unwrap().len() as usize;
    let hub = Hub::of(&source);
    // Three times cut after a sixth: four requests, each from where the last one ended.
    hub.set(|s| (s.break_after, s.breaks) = (Some(size / 6), 3));
    hub.run(&["pull", "acme/tiny"]).ok();
    let cdn = |log: Vec<String>| {
        log.into_iter().filter_map(|l| l.strip_prefix("CDN ").map(str::to_owned)).collect::<Vec<_>>()
    };
    let asked: Vec<String> =
        (0..4).map(|i| format!("/model.safetensors bytes={}-{}", i * (size / 6), size - 1)).collect();
    assert_eq!(cdn(hub.asked()), asked);

    // A server that never gets beyond the first bytes: given up, and what came is kept for the next time.
    let hub = Hub::of(&source);
    hub.set(|s| (s.break_after, s.breaks) = (Some(0), usize::MAX));
    hub.run(&["pull", "acme/tiny"]).fails(3, &["model.safetensors", "gave up", "goes on"]);
    let incomplete = |hub: &Hub| {
        let blobs = hub.root().join("blobs");
        names_in(&blobs).into_iter().find(|n| n.ends_with(".incomplete")).map(|n| blobs.join(n))
    };
    let partial = incomplete(&hub).expect("a partial download is kept");
    assert!(!hub.root().join("refs/main").exists());
    let whole = fs::read(source.join("model.safetensors")).unwrap();
    fs::write(&partial, &whole[..12345]).unwrap();
    hub.set(|s| s.breaks = 0);
    hub.asked();
    let pulled = hub.run(&["pull", "acme/tiny", "--json"]).json();
    assert_eq!(cdn(hub.asked()), [format!("/model.safetensors bytes=12345-{}", size - 1)]);
    assert_eq!(pulled["fetched_bytes"], size - 12345);
    assert!(incomplete(&hub).is_none());

    // Bytes that are not what was promised are thrown away, those of a partial download too.
    let hub = Hub::of(&source);
    hub.set(|s| s.corrupt = true);
    hub.run(&["pull", "acme/tiny"]).fails(3, &["model.safetensors", "not those that the hub promises"]);
    assert!(
        incomplete(&hub).is_none() && !hub.root().join("snapshots").join(COMMIT).join("model.safetensors").exists()
    );
    // A server that ignores ranges is read from the beginning.
    hub.set(|s| (s.corrupt, s.no_ranges) = (false, true));
    fs::write(hub.root().join("blobs").join(sha256(&whole) + ".incomplete"), b"rubbish").unwrap();
    hub.run(&["pull", "acme/tiny"]).ok();
}

#[test]
fn refusals_are_told_with_their_remedy() {
    let hub = Hub::of(&fixture("olmoe"));
    hub.set(|s| s.token = Some("hf_secret".into()));
    hub.run(&["pull", "acme/tiny"]).fails(3, &["acme/tiny", "401", "help: check the name", "HF_TOKEN"]);
    let told =
        hub.run_with(&["pull", "acme/tiny"], &[("HF_TOKEN", "hf_wrong")]).fails(3, &["the token may not read it"]);
    assert!(!told.contains("hf_wrong"), "the token is told to nobody: {told}");
    hub.run_with(&["pull", "acme/other"], &[("HF_TOKEN", "hf_secret")])
        .fails(3, &["no acme/other", "help: check the name"]);
    for (refusal, parts) in [
        ((403, "GatedRepo"), ["gated", "accept its terms"]),
        ((404, "RevisionNotFound"), ["no revision `main`", "help:"]),
        ((503, ""), ["503", "try again later"]),
        ((429, ""), ["429", "wait"]),
    ] {
        hub.set(|s| s.refuse = Some(refusal));
        hub.run(&["pull", "acme/tiny"]).fails(3, &parts);
    }
    hub.run(&["pull", "acme/tiny", "--offline"]).fails(3, &["not in the cache", "offline", "help:"]);
    hub.run_with(&["run", "hi", "-m", "acme/tiny"], &[("HF_HUB_OFFLINE", "1")])
        .fails(3, &["no folder acme/tiny", "offline"]);
    hub.run(&["pull", "acme"]).fails(2, &["`acme` is no name"]);
    hub.run_with(&["pull", "acme/tiny"], &[("HF_ENDPOINT", "http://127.0.0.1:9")])
        .fails(3, &["cannot reach", "--offline"]);
    hub.run_with(&["pull", "acme/tiny"], &[("HF_ENDPOINT", "gopher://x")]).fails(3, &["HF_ENDPOINT", "https://"]);
    // What looks like a path is one.
    fs::create_dir(hub.home.path().join("acme")).unwrap();
    let mut command = bare(hub.home.path());
    command.env("HF_ENDPOINT", &hub.url).env_remove("HF_HUB_OFFLINE").current_dir(hub.home.path());
    command.args(["run", "hi", "-m", "acme/tiny"]);
    hub.asked();
    finish(command, b"").fails(3, &["there is no model at acme/tiny"]);
    assert_eq!(hub.asked(), Vec::<String>::new());
}

#[test]
fn nothing_is_written_outside_the_cache() {
    let evil = |change: fn(&mut State)| {
        let hub = Hub::of(&fixture("olmoe"));
        hub.set(change);
        let told = hub.run(&["pull", "acme/tiny"]).fails(3, &[]);
        assert!(names_in(hub.home.path()).iter().all(|n| n == "hf" || n == "library.sqlite"), "{told}");
        assert!(!hub.root().join("evil").exists() && !hub.home.path().join("hf/evil").exists(), "{told}");
        told
    };
    assert!(evil(|s| s.unasked.push("../../../evil".into())).contains("outside its folder"));
    assert!(evil(|s| s.commit = Some("../../evil".into())).contains("cannot be one"));
    assert!(evil(|s| s.etag = Some("../../../evil".into())).contains("does not tell content"));
    let told = evil(|s| {
        s.files.remove("model.safetensors");
        let index = json!({ "weight_map": { "a": "../../../../evil.safetensors" } });
        s.files.insert("model.safetensors.index.json".into(), index.to_string().into_bytes());
    });
    assert!(told.contains("shard name") && told.contains("same folder"), "{told}");
    let told = evil(|s| {
        s.files.remove("model.safetensors");
        let index = json!({ "weight_map": { "a": "absent.safetensors" } });
        s.files.insert("model.safetensors.index.json".into(), index.to_string().into_bytes());
    });
    assert!(told.contains("absent.safetensors"), "{told}");
}

#[test]
fn a_plan_fetches_only_the_kept_experts() {
    for name in ["qwen2_moe_mixed", "granitemoe", "olmoe"] {
        let source = fixture(name);
        let hub = Hub::of(&source);
        let at = |name: &str| hub.home.path().join(name).to_str().unwrap().to_owned();
        let inspect = quorate!["inspect", "-m", &source, "--json"].json();
        let (experts, top_k) = (inspect["experts"].as_u64().unwrap(), inspect["top_k"].as_u64().unwrap());
        let keep: Vec<String> = (experts - top_k..experts).map(|e| e.to_string()).collect();
        let layers: String = (0..inspect["layers"].as_u64().unwrap())
            .filter(|l| name != "qwen2_moe_mixed" || l % 2 == 0)
            .map(|l| format!("[[keep]]\nlayer = {l}\nexperts = \"{}\"\n", keep.join(",")))
            .collect();
        let model = inspect["fingerprint"].as_str().unwrap();
        let plan = format!("version = 1\nmodel = \"{model}\"\nrouting_mode = \"mask\"\n{layers}");
        fs::write(at("plan.toml"), &plan).unwrap();
        quorate!["prune", "-m", &source, "--list", &at("plan.toml"), "--as", "hf", "-o", &at("local")].ok();

        hub.set(|s| (s.break_after, s.breaks) = (Some(100), 2)); // and the line is bad
        let pulled = hub.run(&["pull", "acme/tiny", "--plan", &at("plan.toml"), "-o", &at("remote"), "--json"]).json();
        for file in names_in(Path::new(&at("local"))) {
            let (local, remote) =
                (fs::read(Path::new(&at("local")).join(&file)), fs::read(Path::new(&at("remote")).join(&file)));
            assert!(local.unwrap() == remote.unwrap(), "{name}: {file}");
        }
        assert_eq!(names_in(Path::new(&at("local"))), names_in(Path::new(&at("remote"))), "{name}");
        assert!(!names_in(hub.home.path()).iter().any(|n| n.ends_with(".part")), "{name}");
        let dropped =
            inspect["expert_bytes"].as_u64().unwrap() * (experts - top_k) * inspect["moe_layers"].as_u64().unwrap();
        let bytes = pulled["bytes"].as_u64().unwrap();
        assert_eq!(bytes + dropped, inspect["model_bytes"].as_u64().unwrap(), "{name}: no byte of the others");
        // Files that are there already stop it, and so does a plan of another model, before experts are fetched.
        hub.run(&["pull", "acme/tiny", "--plan", &at("plan.toml"), "-o", &at("remote")]).fails(3, &["not empty"]);
        fs::write(at("plan.toml"), plan.replace(model, "0123456789abcdef")).unwrap();
        hub.run(&["pull", "acme/tiny", "--plan", &at("plan.toml"), "-o", &at("x")]).fails(3, &["0123456789abcdef"]);
        assert!(!Path::new(&at("x")).exists());
    }
}
