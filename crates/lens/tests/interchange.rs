//! Recordings of other engines: what this engine itself recorded, written in each format and read back, gives the counts of its
//! own profile; files that numpy, torch and SGLang's recorder would write are read; damaged and hostile ones are refused.
#![allow(missing_docs, reason = "tests")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use quorate_formats::spec::{Activation, MoeSpec, RouterScore, RouterSpec};
use quorate_formats::{GgufValue, TensorOut, gguf_bytes, write_safetensors};
use quorate_lens::interchange::{Imatrix, ImatrixEntry, TraceFormat, TraceShape, read_trace};
use quorate_lens::{BinSum, ExpertMap, Profiler, RouterStats, RoutingTrace, Sum, TraceRecorder};
use quorate_model::{Chain, KvCache, Model, Segment};
use support::{moe_cases, open};
use tempfile::TempDir;

const UNSEEN: [Sum; 5] = [Sum::Norm, Sum::NormSq, Sum::GateNorm, Sum::GateNormSq, Sum::Easy];

/// Profile and trace of the same texts, all of them prompt.
fn run(model: &Model, texts: &[Vec<u32>]) -> (RouterStats, RoutingTrace) {
    let map = ExpertMap::of(model.spec());
    let mut profiler = Profiler::new(RouterStats::new(map.clone()));
    let mut recorder = TraceRecorder::new(map, true);
    let segments: Vec<Segment> =
        texts.iter().enumerate().map(|(slot, text)| Segment::prompt(slot, text.clone())).collect();
    let mut cache = KvCache::new(model.spec(), texts.len());
    model.forward(&segments, &mut cache, &mut Chain(vec![&mut recorder, &mut profiler])).unwrap();
    (profiler.into_stats(), recorder.into_trace())
}

/// `[T][L][k]` of one text.
fn nested(trace: &RoutingTrace, item: usize) -> Vec<Vec<Vec<u32>>> {
    let item = &trace.items[item];
    let slots = |t: usize| item.layers.iter().map(|l| l.ids[t * l.k..(t + 1) * l.k].to_vec()).collect();
    (0..item.tokens.len()).map(slots).collect()
}

fn npy(kind: &str, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
    let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
    let mut header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({},), }}", shape.join(", "));
    header.push_str(&" ".repeat((64 - (header.len() + 11) % 64) % 64));
    header.push('\n');
    [b"\x93NUMPY\x01\x00".as_slice(), &(header.len() as u16).to_le_bytes(), header.as_bytes(), bytes].concat()
}

fn write(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn read(path: &Path, shape: &TraceShape) -> RouterStats {
    read_trace(path, None, shape).unwrap_or_else(|e| panic!("{e}"))
}

/// Only counts are known.
fn assert_counts_alone(what: &str, found: &RouterStats, own: &RouterStats) {
    assert_eq!((&found.pooled().count, found.pooled().tokens), (&own.pooled().count, own.pooled().tokens), "{what}");
    let phase = found.pooled();
    assert!(Sum::ALL.iter().all(|&s| phase.sum(s).iter().all(|v| v.is_nan())), "{what}");
    assert!(BinSum::ALL.iter().all(|&s| phase.bins_from(s, 0, 0).is_nan()), "{what}");
    assert!(phase.max_confidence.iter().all(|v| v.is_nan()), "{what}");
}

#[test]
fn our_own_routing_in_every_format_gives_the_counts_of_our_profile() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let shape = TraceShape::of(model.spec());
        let (own, trace) = run(&model, &texts);
        let folder = TempDir::new().unwrap();

        let items: Vec<_> = (0..texts.len()).map(|i| nested(&trace, i)).collect();
        let lines: Vec<String> = items.iter().map(|i| serde_json::to_string(i).unwrap()).collect();
        let found = read(&write(&folder, "a.json", lines.join("\n")), &shape);
        assert_counts_alone(name, &found, &own);
        assert_eq!(found.items, texts.len() as u64);
        if texts.iter().all(|t| t.len() == texts[0].len()) {
            let found = read(&write(&folder, "b.json", serde_json::to_string(&items).unwrap()), &shape);
            assert_counts_alone(name, &found, &own);
        }

        let (flat, mut sum) =
            (|i: usize| items[i].iter().flatten().flatten().copied(), RouterStats::new(shape.map.clone()));
        for (i, text) in texts.iter().enumerate() {
            let dims = [text.len(), shape.map.n_layers(), shape.moe[0].top_k];
            let small = npy("|u1", &dims, &flat(i).map(|id| id as u8).collect::<Vec<_>>());
            let large = npy("<i8", &dims, &flat(i).flat_map(|id| i64::from(id).to_le_bytes()).collect::<Vec<_>>());
            let [small, large] = [("s.npy", small), ("l.npy", large)].map(|(n, b)| read(&write(&folder, n, b), &shape));
            assert_eq!(small.prompt.count, large.prompt.count, "{name}");
            sum.merge(&small);
        }
        assert_counts_alone(name, &sum, &own);

        let mut csv = String::from("layer_id,expert_id,count\n");
        let mut imatrix = Imatrix { datasets: vec!["x".into()], chunk_count: 1, chunk_size: 8, ..Imatrix::default() };
        for (moe, &layer) in shape.map.layers.iter().enumerate() {
            let counts = &own.prompt.count[shape.map.range(moe)];
            counts.iter().enumerate().for_each(|(e, c)| csv += &format!("{layer},{e},{c}\n"));
            for weight in ["gate", "up", "down"] {
                let counts: Vec<f32> = counts.iter().map(|&c| c as f32).collect();
                let entry = ImatrixEntry { in_sum2: vec![0.5; 3 * counts.len()], counts };
                imatrix.entries.insert(format!("blk.{layer}.ffn_{weight}_exps.weight"), entry);
            }
        }
        let path = write(&folder, "i.gguf", imatrix.to_bytes());
        assert_eq!(Imatrix::read(&path).unwrap(), imatrix);
        assert_counts_alone(name, &read(&path, &shape), &own);
        assert_counts_alone(name, &read(&write(&folder, "c.csv", csv), &shape), &own);
    }
}

#[test]
fn router_logits_give_all_that_does_not_need_outputs() {
    for (name, path, texts) in moe_cases() {
        let model = open(&path);
        let shape = TraceShape::of(model.spec());
        let (own, trace) = run(&model, &texts);
        let folder = TempDir::new().unwrap();
        let logits =
            |moe: usize| -> Vec<f32> { trace.items.iter().flat_map(|i| i.layers[moe].logits.clone()).collect() };
        let tokens: usize = texts.iter().map(Vec::len).sum();
        let e = shape.map.experts[0];
        let probabilities = |moe: usize| {
            let mut values = logits(moe);
            values.chunks_exact_mut(e).for_each(quorate_model::softmax);
            values
        };
        let file = |name: &str, tensors: Vec<TensorOut<'static>>| {
            let path = folder.path().join(name);
            write_safetensors(&path, None, tensors).unwrap();
            read(&path, &shape)
        };
        let per_layer = |values: &dyn Fn(usize) -> Vec<f32>, number: &dyn Fn(usize) -> usize| {
            (0..shape.map.n_layers())
                .map(|m| TensorOut::f32(format!("router_logits.{}", number(m)), &[tokens, e], values(m)))
                .collect::<Vec<_>>()
        };
        let decoder = |m: usize| shape.map.layers[m];
        let stacked: Vec<f32> = (0..shape.map.n_layers()).flat_map(logits).collect();
        let dims = [shape.map.n_layers(), tokens, e];
        for found in [
            file("d", per_layer(&logits, &decoder)),
            file("m", per_layer(&logits, &|m| m)),
            file("s", vec![TensorOut::f32("router_logits", &dims, stacked)]),
        ] {
            assert_eq!((&found.prompt.count, &found.prompt.top_count), (&own.prompt.count, &own.prompt.top_count));
            assert_eq!(found.prompt.tokens, own.prompt.tokens, "{name}");
            assert_eq!(found.prompt.max_confidence, own.prompt.max_confidence, "{name}");
            for &sum in Sum::ALL {
                match UNSEEN.contains(&sum) {
                    true => assert!(found.prompt.sum(sum).iter().all(|v| v.is_nan()), "{name}"),
                    false => assert_eq!(found.prompt.sum(sum), own.prompt.sum(sum), "{name} {sum:?}"),
                }
            }
            for unit in 0..shape.map.total() {
                for sum in BinSum::ALL {
                    assert_eq!(found.prompt.bins_from(sum, unit, 9), own.prompt.bins_from(sum, unit, 9), "{name}");
                }
            }
        }

        // After softmax: what a constant would change is unknown, the rest the same.
        let found = file("p", per_layer(&probabilities, &decoder));
        assert_eq!(found.prompt.count, own.prompt.count, "{name}");
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4 * (1.0 + b.abs()));
        assert!(close(found.prompt.sum(Sum::Gate), own.prompt.sum(Sum::Gate)), "{name}");
        assert!(close(&found.prompt.max_confidence, &own.prompt.max_confidence), "{name}");
        assert!(found.prompt.sum(Sum::TopLogit)[0].is_nan() && found.prompt.bins_from(BinSum::Logit, 0, 0).is_nan());
        let confidence =
            |s: &RouterStats| (0..shape.map.total()).map(|u| s.prompt.bins_from(BinSum::Confidence, u, 0)).sum();
        let (a, b): (f64, f64) = (confidence(&found), confidence(&own));
        assert!((a - b).abs() < 1e-3, "{name}: {a} {b}");

        // Padding is left out.
        let mut mask = vec![1i64; tokens];
        mask[texts[0].len()..].fill(0);
        let mut tensors = per_layer(&logits, &decoder);
        tensors.push(TensorOut::i64("attention_mask", &[tokens], mask));
        let (first, _) = run(&model, &texts[..1]);
        assert_eq!(file("k", tensors).prompt.count, first.prompt.count, "{name}");
        let mut tensors = per_layer(&logits, &decoder);
        tensors.push(TensorOut::i64("attention_mask", &[tokens], vec![0; tokens]));
        let path = folder.path().join("none");
        write_safetensors(&path, None, tensors).unwrap();
        assert!(read_trace(&path, None, &shape).unwrap_err().to_string().contains("no tokens"));
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/interchange").join(name)
}

/// The model that the fixtures mean: a dense layer, then two with 4 experts, 2 per token.
fn small() -> TraceShape {
    let score = RouterScore::SoftmaxAll;
    let router = RouterSpec { score, norm_topk_prob: true, routed_scaling_factor: 1.0, extra: Default::default() };
    let (intermediate_size, act) = (8, Activation::Silu);
    let moe = MoeSpec { n_experts: 4, top_k: 2, intermediate_size, act, router, shared: None, expert_bias: false };
    TraceShape { map: ExpertMap::new(vec![1, 2], vec![4, 4]), moe: vec![moe.clone(), moe], decoder_layers: 3 }
}

/// Counts of some tokens of `routed.json`, without the readers.
fn counted(tokens: std::ops::Range<usize>) -> Vec<u64> {
    let text = fs::read_to_string(fixture("routed.json")).unwrap();
    let all: Vec<Vec<Vec<usize>>> = serde_json::from_str(&text).unwrap();
    let mut counts = vec![0; 8];
    for (moe, experts) in all[tokens].iter().flat_map(|token| token.iter().enumerate()) {
        experts.iter().for_each(|e| counts[moe * 4 + e] += 1);
    }
    counts
}

#[test]
fn files_of_numpy_and_of_sglangs_recorder() {
    let (shape, all) = (small(), counted(0..5));
    let twice: Vec<u64> = all.iter().map(|c| 2 * c).collect();
    for (name, counts, tokens, items) in [
        ("routed.json", &all, 5, 1),
        ("routed_u8.npy", &all, 5, 1),
        ("routed_i32_batch.npy", &twice, 10, 2),
        ("sglang_stat.pt", &all, 5, 0),
        ("sglang_strided.pt", &all, 5, 0),
        ("sglang_per_pass.pt", &all, 5, 0),
        ("sglang_per_token.pt", &all, 5, 1),
    ] {
        let found = read(&fixture(name), &shape);
        let pooled = found.pooled();
        assert_eq!((&pooled.count, pooled.tokens, found.items), (counts, tokens, items), "{name}");
    }
    let found = read(&fixture("sglang_per_token.pt"), &shape);
    assert_eq!((found.prompt.tokens, found.answer.tokens), (3, 2));
    assert_eq!((&found.prompt.count, &found.answer.count), (&counted(0..3), &counted(3..5)));
}

#[test]
fn what_does_not_fit_is_named() {
    let (shape, folder) = (small(), TempDir::new().unwrap());
    let token = "[[0,1],[2,3]]";
    let legacy = [&1i32.to_le_bytes()[..], &3i32.to_le_bytes(), b"abc"].concat();
    let other_gguf = gguf_bytes(&[("general.type".into(), GgufValue::Text("model".into()))], &[]);
    let csv = |body: &str| format!("layer_id,expert_id,count\n{body}").into_bytes();
    for (bytes, format, part) in [
        (format!("[{token},[[0,4],[2,3]]]").into_bytes(), None, "token 1: layer 1 has no expert 4"),
        (format!("[{token},[[0,0],[2,3]]]").into_bytes(), None, "padding must be -1"),
        (format!("[{token},[[0,1]]]").into_bytes(), None, "rows differ"),
        (format!("[{token},[[0,1],[-1,-1]]]").into_bytes(), None, "some layers only"),
        (b"[[[0,1],[1,2],[1,2],[1,2]]]".to_vec(), None, "4 layers, the model has 3, 2 of them"),
        (b"[[[0,1,2],[1,2,3]]]".to_vec(), None, "the model chooses 2"),
        (b"[[[0.5,1],[1,2]]]".to_vec(), None, "`0.5` is no expert"),
        (b"[]".to_vec(), None, "no [tokens]"),
        (b"[[[-1,-1],[-1,-1]]]".to_vec(), None, "no tokens"),
        (b"[[[0,1],".to_vec(), None, "EOF"),
        (npy("<f4", &[1, 2, 2], &[0; 16]), None, "type <f4"),
        (npy("|u1", &[1, 2, 3], &[0; 4]), None, "does not fit"),
        (npy("|u1", &[usize::MAX, 2, 3], &[0; 4]), None, "does not fit"),
        (npy("|u1", &[4], &[0; 4]), None, "[tokens, layers, experts]"),
        (npy("|u1", &[0, 2, 2], &[]), None, "empty"),
        (csv("1,0,3\n1,0,4\n"), None, "counted twice"),
        (csv("0,0,3\n"), None, "layer 0 has no experts"),
        (csv("1,0,3\n"), None, "layer 2 is missing"),
        (csv("1,9,3\n"), None, "no expert 9"),
        (csv("1,x,3\n"), None, "three numbers"),
        (csv("1,0,18446744073709551615\n1,1,5\n2,0,1\n"), None, "too large"),
        (legacy, Some(TraceFormat::Imatrix), "does not have the counts"),
        (other_gguf, None, "Some(\"model\")"),
        (fs::read(fixture("refused.pt")).unwrap(), None, "pathlib"),
        (b"\x80\x02\x8a\x0a".to_vec(), Some(TraceFormat::SglangRecorder), "older than 1.6"),
        (b"hello".to_vec(), None, "--format"),
    ] {
        let error = read_trace(&write(&folder, "x", &bytes), format, &shape).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = read_trace(&write(&folder, "old.dat", "x"), None, &shape).unwrap_err().to_string();
    assert!(error.contains("llama-imatrix"), "{error}");

    let entry = |counts: &[f32]| ImatrixEntry { in_sum2: vec![0.0; counts.len()], counts: counts.to_vec() };
    let imatrix = |entries: Vec<(&str, ImatrixEntry)>| {
        let entries = entries.into_iter().map(|(n, e)| (n.to_string(), e)).collect();
        Imatrix { entries, ..Imatrix::default() }.stats(&shape).unwrap_err()
    };
    let up = "blk.1.ffn_up_exps.weight";
    for (error, part) in [
        (imatrix(vec![]), "layer 1"),
        (imatrix(vec![(up, entry(&[1.0, 2.0, 3.0, 4.0]))]), "layer 2"),
        (imatrix(vec![(up, entry(&[1.5, 2.0, 3.0, 4.0]))]), "whole numbers"),
        (imatrix(vec![(up, entry(&[f32::NAN; 4]))]), "whole numbers"),
        (imatrix(vec![(up, entry(&[1.0; 3])), ("blk.2.ffn_up_exps.weight", entry(&[1.0; 4]))]), "3 experts"),
        (imatrix(vec![(up, entry(&[1.0; 4])), ("blk.1.ffn_down_exps.weight", entry(&[2.0; 4]))]), "different counts"),
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

/// No cut and no changed byte of a file makes a panic or a large allocation; cuts of archives are refused.
#[test]
fn damaged_files_are_refused_without_a_panic() {
    let (shape, folder) = (small(), TempDir::new().unwrap());
    for name in ["routed_u8.npy", "sglang_stat.pt", "sglang_per_token.pt", "refused.pt"] {
        let bytes = fs::read(fixture(name)).unwrap();
        let path = folder.path().join("x");
        let step = 1 + bytes.len() / 150;
        for cut in (0..bytes.len()).step_by(step) {
            fs::write(&path, &bytes[..cut]).unwrap();
            assert!(read_trace(&path, None, &shape).is_err(), "{name} cut at {cut}");
        }
        for at in (0..bytes.len()).step_by(step) {
            for value in [0, bytes[at] ^ 1, 0x7f, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                fs::write(&path, &changed).unwrap();
                drop(read_trace(&path, None, &shape));
            }
        }
    }
}
