//! `profile --from-vllm` against a server that answers over real HTTP as vLLM does, with the routing that this program computes.

use std::collections::HashMap;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use quorate_lens::{ExpertMap, TraceRecorder};
use quorate_model::{KvCache, Model, Segment};
use serde_json::{Value, json};

use crate::http::{Connection, listen};
use crate::quorate;
use crate::support::{items, tempdir};

/// How a stub server behaves.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    /// One `.npy` of prompt and generated token per choice, as vLLM does now.
    Npy,
    /// Nested arrays of the prompt, as version 0.21 did.
    Nested,
    /// As a server without the flag.
    WithoutFlag,
    /// A model of fewer layers.
    OtherModel,
    /// Only the last token, as with a prefix cache that keeps no routing.
    Cached,
}

/// A server on a port of its own, and the number of requests that it may still answer with routing.
struct Stub {
    url: String,
    left: Arc<AtomicUsize>,
}

/// The routing of every text asked for, by this program.
struct Router {
    model: Model,
    known: HashMap<Vec<u32>, (usize, Vec<u32>)>,
}

impl Router {
    fn new(path: &std::path::Path) -> Router {
        let mut model = Model::open(path, 1, None).unwrap();
        let all = vec![None; model.spec().moe_layers().len()];
        model.load_experts(&all, quorate_model::RoutingMode::Mask).unwrap();
        Router { model, known: HashMap::new() }
    }

    /// `[T][L][k]` as flat ids, and `k`.
    fn route(&mut self, tokens: &[u32]) -> (usize, Vec<u32>) {
        if let Some(known) = self.known.get(tokens) {
            return known.clone();
        }
        let mut recorder = TraceRecorder::new(ExpertMap::of(self.model.spec()), false);
        let mut cache = KvCache::new(self.model.spec(), 1);
        self.model.forward(&[Segment::prompt(0, tokens.to_vec())], &mut cache, &mut recorder).unwrap();
        let item = recorder.into_trace().items.remove(0);
        let k = item.layers[0].k;
        let ids = (0..tokens.len())
            .flat_map(|t| item.layers.iter().flat_map(move |l| l.ids[t * l.k..(t + 1) * l.k].to_vec()))
            .collect();
        self.known.insert(tokens.to_vec(), (k, ids));
        self.known[tokens].clone()
    }
}

fn serve(router: &Arc<Mutex<Router>>, manner: Manner, left: usize) -> Stub {
    let left = Arc::new(AtomicUsize::new(left));
    let (router, counter) = (router.clone(), left.clone());
    let url = listen(move |stream| talk(stream, &router, manner, &counter));
    Stub { url, left }
}

/// Answers the requests of one connection.
fn talk(stream: TcpStream, router: &Mutex<Router>, manner: Manner, left: &AtomicUsize) {
    let mut connection = Connection::new(stream);
    while let Some(request) = connection.request() {
        let (status, answer) = match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/v1/models") => (200, json!({ "data": [{ "id": "served" }] })),
            ("POST", "/v1/completions") => match left.load(Ordering::SeqCst) {
                0 => (503, json!({ "error": { "message": "the engine is dead" } })),
                n => {
                    left.store(n - 1, Ordering::SeqCst);
                    (200, complete(&serde_json::from_slice(&request.body).unwrap(), router, manner))
                }
            },
            other => panic!("{other:?}"),
        };
        connection.answer(status, &[("content-type", "application/json")], answer.to_string().as_bytes());
    }
}

fn complete(request: &Value, router: &Mutex<Router>, manner: Manner) -> Value {
    assert_eq!((&request["model"], &request["add_special_tokens"]), (&json!("served"), &json!(false)));
    let tokens: Vec<u32> = serde_json::from_value(request["prompt"].clone()).unwrap();
    let (k, ids) = router.lock().unwrap().route(&tokens);
    let (count, layers) = (tokens.len(), ids.len() / k / tokens.len());
    let choice = |value: Value| json!({ "model": "served", "choices": [{ "text": "x", "routed_experts": value }] });
    let npy = |shape: [usize; 3], ids: &[u32]| {
        let [t, l, k] = shape;
        let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({t}, {l}, {k}), }}\n");
        let ids: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
        let bytes = [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), &ids].concat();
        json!(base64::engine::general_purpose::STANDARD.encode(bytes))
    };
    match manner {
        Manner::Npy => choice(npy([count, layers, k], &ids)),
        Manner::Nested => {
            let nested: Vec<Vec<&[u32]>> = ids.chunks(layers * k).map(|t| t.chunks(k).collect()).collect();
            let mut answer = choice(Value::Null);
            answer["prompt_routed_experts"] = json!(nested);
            answer
        }
        Manner::WithoutFlag => choice(Value::Null),
        Manner::OtherModel => choice(npy([count, 2, k], &ids[..count * 2 * k])),
        Manner::Cached => choice(npy([1, layers, k], &ids[..layers * k])),
    }
}

#[test]
fn a_server_routes_the_tasks() {
    let folder = tempdir();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("sums.jsonl"), items("arithmetic.test", 10).replace("\"arithmetic\"", "\"sums\"")).unwrap();
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../embedded/model");
    let router = Arc::new(Mutex::new(Router::new(&model)));
    let tasks = at("sums.jsonl");
    let rankings = |library: &std::path::Path| {
        let shown = quorate!["library", "show", "sums", "--metric", "frequency", "--library", library, "--json"].json();
        (shown["ranking"].clone(), shown["info"]["tokens"].clone(), shown["info"]["heldout_items"].clone())
    };
    let local = at("local.sqlite");
    quorate!["profile", "--tasks", &tasks, "--library", &local].ok();
    for (manner, name) in [(Manner::Npy, "npy.sqlite"), (Manner::Nested, "nested.sqlite")] {
        let (stub, library) = (serve(&router, manner, 1000), at(name));
        let told =
            quorate!["profile", "--from-vllm", &stub.url, "--tasks", &tasks, "--library", &library, "--restart"].ok();
        assert!(told.contains("metric frequency") && told.contains("/? %"), "{told}");
        assert_eq!(rankings(&library), rankings(&local));
        // Keys are computed here, so that prompts find the pattern.
        let nearest =
            quorate!["run", "<|user|>78+95=<|assistant|>", "--metric", "frequency", "--library", &library, "--json"]
                .json();
        assert!(nearest.to_string().contains("sums") || nearest.to_string().contains("arithmetic"), "{nearest}");
    }

    // A server that dies: what is done is kept, and the same command goes on.
    let (stub, library) = (serve(&router, Manner::Npy, 4), at("resumed.sqlite"));
    quorate!["profile", "--from-vllm", &stub.url, "--tasks", &tasks, "--library", &library, "--restart", "-q"]
        .fails(3, &["sums: stopped at item 4 of 10", "503", "the engine is dead", "help:"]);
    stub.left.store(6, Ordering::SeqCst);
    let again = quorate!["profile", "--from-vllm", &(stub.url + "/v1/"), "--tasks", &tasks, "--library", &library];
    assert!(again.err.contains("going on at 4 of 10"), "{}", again.err);
    again.ok();
    assert_eq!(rankings(&library), rankings(&local));

    for (manner, parts) in [
        (Manner::WithoutFlag, ["no routed experts", "--enable-return-routed-experts"]),
        (Manner::OtherModel, ["2 layers, the model has 6", "-m must be"]),
        (Manner::Cached, ["experts of 1 tokens", "prefix cache"]),
    ] {
        let stub = serve(&router, manner, 1000);
        quorate!["profile", "--from-vllm", &stub.url, "--tasks", &tasks, "--library", &library, "--restart", "-q"]
            .fails(3, &parts);
    }
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    quorate!["profile", "--from-vllm", &format!("http://{port}"), "--tasks", &tasks, "--library", &library, "-q"]
        .fails(3, &["cannot reach", "help: is `vllm serve"]);
    quorate!["profile", "--from-vllm", "https://x", "--tasks", &tasks, "--library", &library, "-q"]
        .fails(3, &["tunnel"]);
}
