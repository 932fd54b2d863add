//! What is written is read as the same model: by this program, and byte for byte as llama.cpp's converter writes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use quorate_convert::{ConvertError, Importance, Mix, Options, write_model};
use quorate_formats::{Checkpoint, FormatError, GgufFile, GgufValue, SafetensorsFile, gguf_bytes};
use quorate_kernels::{DType, Pool, dequantize};
use quorate_model::{Forward, KvCache, LogitRows, Model, NoLens, RoutingMode, Segment, ops};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn options(mix: &str) -> Options<'static> {
    Options { mix: Mix::named(mix), ..Options::default() }
}

fn write(source: &Path, options: &Options<'_>, out: &Path) -> Result<(), ConvertError> {
    let checkpoint = Checkpoint::open(source).unwrap();
    write_model(&checkpoint, options, out, &Pool::new(2), &mut |_, _| true).map(|_| ())
}

/// Writes a fixture; what is wrong is told with its name.
fn written(source: &Path, options: &Options<'_>, dir: &TempDir, name: &str) -> PathBuf {
    let out = dir.path().join(format!("{name}.gguf"));
    write(source, options, &out).unwrap_or_else(|e| panic!("{name}: {e}"));
    out
}

fn open(path: &Path) -> Model {
    let mut model = Model::open(path, 2, None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    model.load_all_experts().unwrap();
    model
}

/// The prompts of a fixture and the logits that transformers computes.
fn reference(name: &str) -> (Vec<Vec<u32>>, Vec<f32>) {
    let file = SafetensorsFile::open(&fixture(name).join("reference.safetensors")).unwrap();
    let ids: Vec<u32> = file.read_i64("input_ids").unwrap().iter().map(|&id| id as u32).collect();
    (ids.chunks(24).map(<[u32]>::to_vec).collect(), file.read_f32("logits").unwrap())
}

fn logits(model: &Model, prompts: &[Vec<u32>]) -> Vec<f32> {
    let of = |tokens: &Vec<u32>| {
        let segment = Segment { logits: LogitRows::All, ..Segment::prompt(0, tokens.clone()) };
        let mut cache = KvCache::new(model.spec(), 1);
        let Forward { logits, .. } = model.forward(&[segment], &mut cache, &mut NoLens).unwrap();
        ops::values(&logits.unwrap()).unwrap().to_vec()
    };
    prompts.iter().flat_map(of).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|v| v.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// All families that have an architecture in GGUF; those with experts first.
const FAMILIES: [&str; 28] = [
    "deepseek_moe",
    "deepseek_v2_greedy",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_flat_mtp",
    "deepseek_v3_fp8",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "mixtral",
    "olmoe",
    "olmoe_norm_clip",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "gemma3_text",
    "gemma2",
    "gpt2",
    "llama",
    "olmo2",
    "phi3_long",
    "qwen2",
    "qwen3",
];

/// Families some of whose numbers are built into the architecture, with those numbers.
fn adapted(dir: &TempDir) -> Vec<(&'static str, PathBuf)> {
    let phimoe: &[(&str, serde_json::Value)] =
        &[("long_mscale", 1.1.into()), ("short_mscale", 1.1.into()), ("router_jitter_noise", 0.01.into())];
    let llama4: &[(&str, serde_json::Value)] = &[
        ("attention_chunk_size", 8192.into()),
        ("floor_scale", 8192.into()),
        ("attn_scale", 0.1.into()),
        ("no_rope_layers", serde_json::json!([])),
    ];
    let adapt = |(name, changes): (&'static str, &[(&str, serde_json::Value)])| {
        let folder = dir.path().join(format!("{name}-adapted"));
        fs::create_dir(&folder).unwrap();
        for file in fs::read_dir(fixture(name)).unwrap().map(Result::unwrap).filter(|f| f.path().is_file()) {
            fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
        let mut config: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        for (key, value) in changes {
            let object = if key.ends_with("mscale") { &mut config["rope_scaling"] } else { &mut config };
            object[*key] = value.clone();
        }
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        (name, folder)
    };
    let mistral: &[(&str, serde_json::Value)] = &[("sliding_window", serde_json::Value::Null)];
    [("phimoe", phimoe), ("llama4_text", llama4), ("mistral", mistral)].map(adapt).to_vec()
}

#[test]
fn what_an_architecture_has_built_in() {
    let dir = TempDir::new().unwrap();
    for (name, folder) in adapted(&dir) {
        let (prompts, _) = reference(name);
        let expected = logits(&open(&folder), &prompts);
        let whole = written(&folder, &options("F32"), &dir, name);
        assert!(largest_difference(&logits(&open(&whole), &prompts), &expected) < 1e-5, "{name}");
        let error = write(&fixture(name), &options("F32"), &dir.path().join("x.gguf")).unwrap_err().to_string();
        assert!(error.contains("layers[0].attn") && error.contains("would be"), "{name}: {error}");
        let mut model = open(&folder);
        if !model.spec().is_moe() {
            continue;
        }
        let kept = half(&model);
        model.mask_experts(&kept.iter().cloned().map(Some).collect::<Vec<_>>(), RoutingMode::Mask).unwrap();
        let expected = logits(&model, &prompts);
        let pruned = Options { kept: Some(&kept), ..Options::default() };
        for source in [&folder, &whole] {
            let pruned = written(source, &pruned, &dir, "pruned");
            assert!(largest_difference(&logits(&open(&pruned), &prompts), &expected) < 1e-5, "{name}");
        }
    }
}

#[test]
fn logits_stay_those_of_the_authors_code() {
    let dir = TempDir::new().unwrap();
    let mut failed = Vec::new();
    for name in FAMILIES {
        let out = dir.path().join(format!("{name}.gguf"));
        if let Err(error) = write(&fixture(name), &options("F32"), &out) {
            failed.push(format!("{name}: {error}"));
            continue;
        }
        let (prompts, expected) = reference(name);
        let off = largest_difference(&logits(&open(&out), &prompts), &expected);
        if off >= 1e-4 {
            failed.push(format!("{name}: off by {off}"));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Keys that only the converter writes, and what it is for.
const CONVERTERS_OWN: [&str; 1] = ["general.size_label"];

/// Against llama.cpp's `convert_hf_to_gguf.py` on the same folders.
#[test]
fn the_converters_files_byte_for_byte() {
    let dir = TempDir::new().unwrap();
    let mut failed = Vec::new();
    let names = [
        "deepseek_v2_greedy",
        "deepseek_v3",
        "ernie4_5_moe",
        "gemma3_text",
        "glm4_moe",
        "gpt2",
        "gpt_oss",
        "granitemoe",
        "llama",
        "mixtral",
        "olmo2",
        "olmoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_5_moe",
        "qwen3_moe",
    ];
    for name in names {
        let kind = if name == "qwen3_5_moe" { "f32" } else { "f16" };
        let ours = written(&fixture(name), &options(&kind.to_uppercase()), &dir, name);
        let ours = GgufFile::open(&ours).unwrap();
        let theirs = GgufFile::open(&fixture(name).join(format!("gguf/{name}-{kind}.gguf"))).unwrap();
        for (key, value) in theirs.metadata() {
            let further = name == "glm4_moe" && (key.ends_with("block_count") || key.ends_with("predict_layers"));
            if CONVERTERS_OWN.contains(&key.as_str()) || key == "general.name" || further {
                continue;
            }
            match ours.metadata().get(key) {
                Some(found) if found == value => {}
                found => failed.push(format!("{name}: {key} is {found:?}, not {value:?}")),
            }
        }
        let names = |file: &GgufFile| file.tensors().map(|t| t.name.clone()).collect::<BTreeSet<_>>();
        // Layers that predict further tokens are left out.
        let theirs_only = |t: &String| !(name == "glm4_moe" && t.starts_with("blk.2."));
        let expected: BTreeSet<String> = names(&theirs).into_iter().filter(theirs_only).collect();
        if names(&ours) != expected {
            failed.push(format!(
                "{name}: tensors {:?}",
                names(&ours).symmetric_difference(&expected).collect::<Vec<_>>()
            ));
            continue;
        }
        for tensor in ours.tensors() {
            let other = theirs.tensor(&tensor.name).unwrap();
            let long = |shape: &[u64]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
            let bytes = |file: &GgufFile, offset: u64, len: u64| {
                let mut bytes = vec![0; len as usize];
                file.data().read_at(offset, &mut bytes).unwrap();
                bytes
            };
            let same = tensor.dtype == other.dtype && long(&tensor.shape) == long(&other.shape);
            let same = same && bytes(&ours, tensor.offset, tensor.len) == bytes(&theirs, other.offset, other.len);
            // Computed from frequencies here, from wavelengths there: equal but for rounding.
            if !same && tensor.name != "rope_freqs.weight" {
                failed.push(format!("{name}: {} {:?} {:?}", tensor.name, tensor, other));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// MXFP4 stays MXFP4, value for value; what is quantised from GGUF gets llama-quantize's types.
#[test]
fn types_are_those_that_were_asked_for() {
    let dir = TempDir::new().unwrap();
    let out = written(&fixture("gpt_oss_mxfp4"), &Options::default(), &dir, "kept");
    let file = GgufFile::open(&out).unwrap();
    assert_eq!(file.tensor("blk.0.ffn_up_exps.weight").unwrap().dtype.name(), "MXFP4");
    assert_eq!(file.tensor("blk.0.attn_q.weight").unwrap().dtype.name(), "BF16");
    let (prompts, expected) = reference("gpt_oss_mxfp4");
    assert!(largest_difference(&logits(&open(&out), &prompts), &expected) < 0.35, "activations are rounded to bytes");

    for (mix, file) in [("Q4_K_M", "olmoe_256-q4_k_m"), ("Q2_K", "olmoe_256-q2_k")] {
        let theirs = GgufFile::open(&fixture("olmoe_256").join(format!("gguf/{file}.gguf"))).unwrap();
        let out = written(&fixture("olmoe_256"), &options(mix), &dir, mix);
        let ours = GgufFile::open(&out).unwrap();
        for tensor in theirs.tensors() {
            let found = ours.tensor(&tensor.name).unwrap();
            assert_eq!(found.dtype, tensor.dtype, "{mix}: {}", tensor.name);
            // No more is lost of the weights than by llama.cpp.
            let exact =
                values(&Checkpoint::open(&written(&fixture("olmoe_256"), &options("F32"), &dir, "f32")).unwrap());
            let loss = |path: &Path| {
                let of = &values(&Checkpoint::open(path).unwrap())[&tensor.name];
                let exact = &exact[&tensor.name];
                of.iter().zip(exact).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
            };
            let theirs = loss(&fixture("olmoe_256").join(format!("gguf/{file}.gguf")));
            assert!(loss(&out) <= 1.03 * theirs + 1e-12, "{mix} {}: {} of {theirs}", tensor.name, loss(&out));
        }
        assert_eq!(ours.metadata()["general.file_type"], theirs.metadata()["general.file_type"]);
        let experts = Options { experts: Some(DType::Q8_0), ..options(mix) };
        let ours = GgufFile::open(&written(&out_of_f16(&dir), &experts, &dir, "experts")).unwrap();
        assert_eq!(ours.tensor("blk.0.ffn_down_exps.weight").unwrap().dtype.name(), "Q8_0");
        assert_eq!(
            ours.tensor("blk.0.attn_q.weight").unwrap().dtype,
            theirs.tensor("blk.0.attn_q.weight").unwrap().dtype
        );
        let keep = ["attn_q.weight".to_owned()];
        let keep = Options { keep_f32: &keep, ..options(mix) };
        let ours = GgufFile::open(&written(&fixture("olmoe_256"), &keep, &dir, "keep")).unwrap();
        assert_eq!(ours.tensor("blk.0.attn_q.weight").unwrap().dtype.name(), "F32");
    }
}

fn out_of_f16(dir: &TempDir) -> PathBuf {
    written(&fixture("olmoe_256"), &options("F16"), dir, "f16")
}

fn values(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<f32>> {
    let read = |loc: &quorate_formats::TensorLoc| {
        let mut bytes = vec![0; loc.len as usize];
        checkpoint.read_into(loc, &mut bytes).unwrap();
        let mut values = vec![0.0; loc.elements() as usize];
        dequantize(loc.dtype.computable().unwrap(), &bytes, &mut values);
        (loc.name.clone(), values)
    };
    checkpoint.tensors().iter().map(read).collect()
}

/// Half of the experts, equally many of each group.
fn half(model: &Model) -> Vec<Vec<usize>> {
    let spec = model.spec();
    let of = |l: &usize| {
        let moe = spec.moe(*l).unwrap();
        let size = moe.n_experts / moe.router.extra.groups.map_or(1, |g| g.n_group);
        let each = (size.div_ceil(2)).max(moe.top_k.min(size)).min(size - 1);
        (0..moe.n_experts).filter(|e| (e % size + e / size + l) % size < each).collect()
    };
    spec.moe_layers().iter().map(of).collect()
}

/// From safetensors and from GGUF, the pruned file is the masked model.
#[test]
fn a_pruned_file_is_the_masked_model() {
    let dir = TempDir::new().unwrap();
    let mut failed = Vec::new();
    let families = FAMILIES.iter().take_while(|name| **name != "gemma3_text");
    for name in families {
        let whole = written(&fixture(name), &options("F32"), &dir, &format!("{name}-whole"));
        let mut model = open(&fixture(name));
        let kept = half(&model);
        let (prompts, _) = reference(name);
        let all = logits(&model, &prompts);
        model.mask_experts(&kept.iter().cloned().map(Some).collect::<Vec<_>>(), RoutingMode::Mask).unwrap();
        let expected = logits(&model, &prompts);
        assert!(largest_difference(&all, &expected) > 1e-3, "{name}: nothing changes");
        for (way, source, mix) in [("safetensors", &fixture(name), Mix::named("F32")), ("gguf", &whole, None)] {
            let out = dir.path().join(format!("{name}-{way}.gguf"));
            let options = Options { kept: Some(&kept), mix, ..Options::default() };
            if let Err(error) = write(source, &options, &out) {
                failed.push(format!("{name} from {way}: {error}"));
                continue;
            }
            let off = largest_difference(&logits(&open(&out), &prompts), &expected);
            if off >= 2e-5 * expected.iter().fold(1.0, |m: f32, v| m.max(v.abs())) {
                failed.push(format!("{name} from {way}: off by {off}"));
            }
            let file = GgufFile::open(&out).unwrap();
            assert!(file.metadata().contains_key("quorate.source_fingerprint"), "{name}");
            assert!(file.metadata().values().any(|v| *v == GgufValue::Unsigned(kept[0].len() as u64)), "{name}");
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Blocks of stacked experts are copied as they are.
#[test]
fn pruning_a_quantised_file_copies_blocks() {
    let dir = TempDir::new().unwrap();
    let source = fixture("olmoe_256").join("gguf/olmoe_256-q4_k_m.gguf");
    let kept = [vec![0, 2]];
    let out = written(&source, &Options { kept: Some(&kept), ..Options::default() }, &dir, "pruned");
    let (ours, theirs) = (GgufFile::open(&out).unwrap(), GgufFile::open(&source).unwrap());
    for tensor in theirs.tensors() {
        let found = ours.tensor(&tensor.name).unwrap();
        assert_eq!(found.dtype, tensor.dtype);
        let read = |file: &GgufFile, offset: u64, len: u64| {
            let mut bytes = vec![0; len as usize];
            file.data().read_at(offset, &mut bytes).unwrap();
            bytes
        };
        let all = read(&theirs, tensor.offset, tensor.len);
        let expected = match tensor.name.contains("_exps") || tensor.name.contains("ffn_gate_inp") {
            true => [&all[..all.len() / 3], &all[all.len() / 3 * 2..]].concat(),
            false => all,
        };
        assert!(read(&ours, found.offset, found.len) == expected, "{}", tensor.name);
    }
    assert_eq!(ours.metadata()["tokenizer.ggml.tokens"], theirs.metadata()["tokenizer.ggml.tokens"]);
}

/// Old files have a tensor for each expert; those of kept ones get other numbers.
#[test]
fn old_files_are_pruned_as_they_are_laid_out() {
    let dir = TempDir::new().unwrap();
    let whole = GgufFile::open(&written(&fixture("mixtral"), &options("F32"), &dir, "whole")).unwrap();
    let of = |t: &quorate_formats::GgufTensor| {
        let values = whole.read_f32(&t.name).unwrap();
        let Some(stem) = t.name.strip_suffix("_exps.weight") else {
            return vec![(t.name.clone(), t.shape.clone(), values)];
        };
        let each = values.chunks(values.len() / t.shape[2] as usize).enumerate();
        each.map(|(e, part)| (format!("{stem}.{e}.weight"), t.shape[..2].to_vec(), part.to_vec())).collect()
    };
    let tensors: Vec<_> = whole.tensors().flat_map(of).collect();
    let metadata: Vec<_> = whole.metadata().clone().into_iter().collect();
    let old = dir.path().join("old.gguf");
    fs::write(&old, gguf_bytes(&metadata, &tensors)).unwrap();

    let (mut model, (prompts, _)) = (open(&old), reference("mixtral"));
    let kept = half(&model);
    model.mask_experts(&kept.iter().cloned().map(Some).collect::<Vec<_>>(), RoutingMode::Mask).unwrap();
    let out = written(&old, &Options { kept: Some(&kept), ..Options::default() }, &dir, "pruned");
    assert_eq!(logits(&open(&out), &prompts), logits(&model, &prompts));
    let pruned = GgufFile::open(&out).unwrap();
    let (last, next) = (kept[0].len() - 1, kept[0].len());
    assert!(pruned.tensor(&format!("blk.0.ffn_gate.{last}.weight")).is_ok());
    assert!(pruned.tensor(&format!("blk.0.ffn_gate.{next}.weight")).is_err());
}

#[test]
fn importance_moves_the_error_to_where_it_matters_less() {
    let dir = TempDir::new().unwrap();
    let (name, cols) = ("blk.0.ffn_up_exps.weight", 256);
    // The first half of the columns matters, of expert 1; the others were never chosen.
    let sums = (0..3 * cols).map(|i| if (cols..cols + 128).contains(&i) { 100.0 } else { 0.01 }).collect();
    let importance: Importance = BTreeMap::from([(name.to_owned(), (sums, vec![0.0, 5.0, 0.0]))]);
    let exact = values(&Checkpoint::open(&written(&fixture("olmoe_256"), &options("F32"), &dir, "exact")).unwrap());
    let losses = |options: &Options<'_>, file: &str| {
        let found = values(&Checkpoint::open(&written(&fixture("olmoe_256"), options, &dir, file)).unwrap());
        let mut losses = [0.0; 2];
        for (i, (a, b)) in found[name].iter().zip(&exact[name]).enumerate().skip(cols * cols).take(cols * cols) {
            losses[i % cols / 128] += f64::from(a - b).powi(2);
        }
        losses
    };
    let plain = losses(&options("Q4_0"), "plain");
    let weighted = losses(&Options { importance: Some(&importance), ..options("Q4_0") }, "weighted");
    assert!(weighted[0] < 0.97 * plain[0], "{weighted:?} {plain:?}");
    let wrong: Importance = BTreeMap::from([(name.to_owned(), (vec![1.0; 7], vec![1.0]))]);
    let wrong = Options { importance: Some(&wrong), ..options("Q4_0") };
    let error = write(&fixture("olmoe_256"), &wrong, &dir.path().join("x.gguf")).unwrap_err().to_string();
    assert!(error.contains("7 numbers for 1 times 256 columns") && error.contains("help: "), "{error}");
}

#[test]
fn what_fails_leaves_nothing_behind() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("out.gguf");
    let none = |dir: &TempDir| fs::read_dir(dir.path()).unwrap().next().is_none();
    let checkpoint = Checkpoint::open(&fixture("olmoe")).unwrap();
    for stop_at in [0, 50_000, 292_096] {
        let error = write_model(&checkpoint, &options("F16"), &out, &Pool::new(1), &mut |done, _| done < stop_at);
        assert!(matches!(error, Err(ConvertError::Format(FormatError::Cancelled { .. }))), "{error:?}");
        assert!(none(&dir));
    }
    let kept = [vec![0, 1, 2], vec![0, 1, 2, 3]];
    let uneven = Options { kept: Some(&kept), ..options("F16") };
    let error = write(&fixture("olmoe"), &uneven, &out).unwrap_err().to_string();
    assert!(error.contains("4 experts kept in layer 1, 3 in layer 0"), "{error}");
    // A layer without experts has no place in this architecture, a factor on cos and sin beside that of scores no name.
    for (name, says) in [
        ("qwen2_moe_mixed", "has blk.1.ffn_gate_inp.weight in every model"),
        ("deepseek_v2", "attention_factor is 1.02"),
    ] {
        let error = write(&fixture(name), &options("F16"), &out).unwrap_err().to_string();
        assert!(error.contains("cannot write the model as GGUF") && error.contains(says), "{name}: {error}");
    }
    assert!(none(&dir));
}
