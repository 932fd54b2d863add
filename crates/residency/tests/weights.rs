//! What is loaded is what the files hold, and nothing else is read.

use std::collections::HashSet;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quorate_formats::safetensors::{read_tensor_bytes, read_tensor_f32};
use quorate_formats::{Checkpoint, Outline, Quantisation, Role, StoredDType};
use quorate_kernels::DType;
use quorate_residency::{Budget, Matrix, ResidencyError, WeightSizes, Weights, memory_plan, skeleton_bytes};
use tempfile::TempDir;

const FIXTURES: &[&str] = &[
    "olmoe",
    "olmoe_256",
    "olmoe_norm_clip",
    "qwen3_moe",
    "qwen3_moe_nonorm",
    "llama",
    "mixtral",
    "mixtral_swa_bf16",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen2_moe_mixed",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn open(path: &Path) -> Weights {
    Weights::open(Arc::new(Checkpoint::open(path).unwrap()), None)
}

/// A copy of the fixture `olmoe`, to be damaged.
fn copy() -> TempDir {
    let dir = TempDir::new().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixture("olmoe").join(name), dir.path().join(name)).unwrap();
    }
    dir
}

/// Overwrites one f32 of a tensor.
fn poke(dir: &TempDir, role: Role, element: u64, value: f32) {
    let loc = Checkpoint::open(dir.path()).unwrap().tensor(role).unwrap().clone();
    let path = dir.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = (loc.offset + 4 * element) as usize;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

fn all(weights: &Weights) -> Vec<Option<Vec<usize>>> {
    vec![None; weights.checkpoint().spec().moe_layers().len()]
}

fn resident(weights: &Weights) -> HashSet<(usize, usize)> {
    let all = (0..4).flat_map(|l| (0..16).map(move |e| (l, e)));
    all.filter(|&(l, e)| weights.expert(l, e).is_some()).collect()
}

fn message(error: &ResidencyError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

#[test]
fn everything_loaded_is_what_the_files_hold() {
    for name in FIXTURES {
        let mut weights = open(&fixture(name));
        weights.load_skeleton().unwrap();
        weights.load_experts(&all(&weights)).unwrap();
        let c = weights.checkpoint().clone();
        assert_eq!(weights.resident_bytes(), weights.model_bytes(), "{name}");
        assert_eq!(weights.bytes_read(), c.total_bytes(), "{name}: each byte is read once");
        for role in c.roles() {
            let loc = c.tensor(role).unwrap();
            let data = &c.files()[loc.file];
            let check = |matrix: &Matrix| {
                assert_eq!([matrix.rows, matrix.cols], loc.shape[..], "{name}: {role}");
                assert_eq!(matrix.data().as_ptr().addr() % 64, 0);
                assert_eq!(matrix.to_f32(), read_tensor_f32(data, loc).unwrap(), "{name}: {role}");
                if !matches!(role, Role::Router(_)) {
                    assert_eq!(matrix.as_ref().data, read_tensor_bytes(data, loc).unwrap(), "{name}: {role}");
                    assert_eq!(Some(matrix.dtype), loc.dtype.computable());
                }
            };
            match role {
                Role::ExpertGate(l, e) => check(&weights.expert(l, e).unwrap().gate),
                Role::ExpertUp(l, e) => check(&weights.expert(l, e).unwrap().up),
                Role::ExpertDown(l, e) => check(&weights.expert(l, e).unwrap().down),
                _ if role.is_vector() => {
                    assert_eq!(weights.vector(role).unwrap(), read_tensor_f32(data, loc).unwrap());
                    assert!(matches!(weights.matrix(role), Err(ResidencyError::NotResident { .. })));
                }
                _ => check(weights.matrix(role).unwrap()),
            }
        }
        let tied = c.spec().tie_word_embeddings;
        let (head, embed) = (weights.matrix(Role::LmHead).unwrap(), weights.matrix(Role::Embed).unwrap());
        assert_eq!(head.data().as_ptr() == embed.data().as_ptr(), tied, "{name}");
    }
}

#[test]
fn routers_and_vectors_of_bf16_files_are_f32() {
    let mut weights = open(&fixture("mixtral_swa_bf16"));
    weights.load_skeleton().unwrap();
    assert_eq!(weights.matrix(Role::Router(0)).unwrap().dtype, DType::F32);
    assert_eq!(weights.matrix(Role::Q(0)).unwrap().dtype, DType::BF16);
    let c = weights.checkpoint();
    assert_eq!(c.tensor(Role::Router(0)).unwrap().dtype, StoredDType::Bf16);
    let doubled: u64 =
        c.roles().filter(|r| r.is_vector() || matches!(r, Role::Router(_))).map(|r| c.tensor(r).unwrap().len).sum();
    assert_eq!(weights.resident_bytes(), c.non_expert_bytes() + doubled);
    assert_eq!(weights.resident_bytes(), skeleton_bytes(c));
}

#[test]
fn only_the_kept_experts_are_read() {
    let mut weights = open(&fixture("olmoe"));
    weights.load_skeleton().unwrap();
    let (skeleton, one) = (weights.checkpoint().non_expert_bytes(), weights.checkpoint().expert_bytes(0, 0));
    assert_eq!(weights.bytes_read(), skeleton);

    weights.load_experts(&[Some(vec![4, 0, 2]), Some(vec![1])]).unwrap();
    assert_eq!(weights.bytes_read(), skeleton + 4 * one);
    assert_eq!(resident(&weights), HashSet::from([(0, 0), (0, 2), (0, 4), (1, 1)]));
    assert_eq!((weights.experts_resident(), weights.expert_bytes_resident()), (4, 4 * one));
    assert_eq!(weights.resident_bytes(), skeleton + 4 * one);

    // One is new, two stay, one goes.
    let before = weights.expert(0, 2).unwrap().gate.data().as_ptr();
    weights.load_experts(&[Some(vec![2, 4, 5]), Some(vec![])]).unwrap();
    assert_eq!(weights.bytes_read(), skeleton + 5 * one);
    assert_eq!(weights.expert(0, 2).unwrap().gate.data().as_ptr(), before);
    assert_eq!(resident(&weights), HashSet::from([(0, 2), (0, 4), (0, 5)]));

    // The same again, and the skeleton again: nothing to do.
    weights.load_experts(&[Some(vec![2, 4, 5]), Some(vec![])]).unwrap();
    weights.load_skeleton().unwrap();
    assert_eq!(weights.bytes_read(), skeleton + 5 * one);

    weights.load_experts(&[None, Some(vec![3, 3])]).unwrap();
    assert_eq!(weights.bytes_read(), skeleton + 9 * one);
    assert_eq!(weights.experts_resident(), 7);

    let apart = weights.read_expert(1, 5).unwrap();
    assert_eq!(apart.bytes(), one);
    assert!(weights.expert(1, 5).is_none());
    assert!(weights.read_expert(1, 6).is_err());
}

#[test]
fn experts_are_known_by_decoder_layer() {
    let mut weights = open(&fixture("qwen2_moe_mixed"));
    weights.load_experts(&[Some(vec![1]), Some(vec![2, 5])]).unwrap();
    assert_eq!(resident(&weights), HashSet::from([(0, 1), (2, 2), (2, 5)]));
    assert_eq!(weights.bytes_read(), weights.expert_bytes_resident(), "without the skeleton nothing else is read");
    assert!(weights.expert(99, 0).is_none());
    let error = weights.matrix(Role::Embed).unwrap_err();
    assert!(message(&error).contains("the token embedding is not in memory as a matrix; help: load the skeleton"));
    let error = weights.matrix(Role::Router(1)).unwrap_err();
    assert!(message(&error).contains("this model has no weight for layer 1 router"), "{}", message(&error));
}

#[test]
fn unknown_experts_are_refused() {
    let mut weights = open(&fixture("olmoe"));
    let error = weights.load_experts(&[None]).unwrap_err();
    assert!(message(&error).contains("1 lists of experts for 2 MoE layers"));
    let error = weights.load_experts(&[None, Some(vec![6])]).unwrap_err();
    assert!(message(&error).contains("layer 1 has no expert 6, only 6"));
    assert_eq!((weights.experts_resident(), weights.bytes_read()), (0, 0));
    let mut dense = open(&fixture("llama"));
    dense.load_experts(&[]).unwrap();
    assert_eq!(dense.experts_resident(), 0);
}

#[test]
fn values_that_are_no_numbers_are_found_when_they_are_loaded() {
    let dir = copy();
    poke(&dir, Role::AttnNorm(1), 7, f32::NAN);
    let mut weights = open(dir.path());
    let error = message(&weights.load_skeleton().unwrap_err());
    assert!(error.contains("model.layers.1.input_layernorm.weight") && error.contains("(element 7)"), "{error}");
    assert_eq!(weights.resident_bytes(), 0);
    assert!(weights.vector(Role::FinalNorm).is_err());

    let dir = copy();
    poke(&dir, Role::Embed, 0, f32::NEG_INFINITY);
    let error = message(&open(dir.path()).load_skeleton().unwrap_err());
    assert!(error.contains("model.embed_tokens.weight") && error.contains("help: "), "{error}");

    let dir = copy();
    poke(&dir, Role::ExpertUp(0, 3), 100, f32::INFINITY);
    let mut weights = open(dir.path());
    weights.load_skeleton().unwrap();
    weights.load_experts(&[Some(vec![0, 1, 2]), None]).unwrap();
    let before = resident(&weights);
    let error = message(&weights.load_experts(&[None, None]).unwrap_err());
    assert!(error.contains("model.layers.0.mlp.experts.3.up_proj.weight") && error.contains("element 100"), "{error}");
    assert_eq!(resident(&weights), before);
}

#[test]
fn a_file_that_shrinks_leaves_what_was_loaded() {
    let dir = copy();
    let mut weights = open(dir.path());
    weights.load_skeleton().unwrap();
    weights.load_experts(&[Some(vec![0, 1]), Some(vec![0])]).unwrap();
    let (before, bytes) = (resident(&weights), weights.resident_bytes());
    let last = weights.checkpoint().tensor(Role::ExpertDown(1, 0)).unwrap().offset;
    fs::OpenOptions::new().write(true).open(dir.path().join("model.safetensors")).unwrap().set_len(last).unwrap();

    let error = message(&weights.load_experts(&[Some(vec![1, 2]), Some(vec![5])]).unwrap_err());
    assert!(error.contains("model.safetensors is truncated"), "{error}");
    assert_eq!((resident(&weights), weights.resident_bytes()), (before, bytes));
    assert!(weights.matrix(Role::Embed).is_ok());
    // What is still in the file can be loaded.
    weights.load_experts(&[Some(vec![1, 2]), Some(vec![])]).unwrap();
    assert_eq!(resident(&weights), HashSet::from([(0, 1), (0, 2)]));
}

#[test]
fn the_budget_is_kept() {
    let checkpoint = Arc::new(Checkpoint::open(&fixture("olmoe")).unwrap());
    let (skeleton, one) = (skeleton_bytes(&checkpoint), checkpoint.expert_bytes(0, 0));
    let mut weights = Weights::open(checkpoint.clone(), Some(skeleton - 1));
    let error = message(&weights.load_skeleton().unwrap_err());
    assert!(error.contains("of weights in a budget of") && error.contains("with --memory"), "{error}");
    assert_eq!(weights.bytes_read(), 0);

    weights.set_budget(Budget::of(skeleton + 6 * one));
    assert_eq!(weights.budget().limit, Some(skeleton + 6 * one));
    weights.load_skeleton().unwrap();
    weights.load_experts(&[Some(vec![0, 1, 2]), Some(vec![0, 1, 2])]).unwrap();
    let error = weights.load_experts(&[Some(vec![0, 1, 2]), Some(vec![0, 1, 2, 3])]).unwrap_err();
    assert!(matches!(error, ResidencyError::OverBudget { .. }));
    assert_eq!(weights.experts_resident(), 6, "a refused load changes nothing");

    // Old and new together do not fit: the old ones go first.
    weights.load_experts(&[Some(vec![3, 4, 5]), Some(vec![0, 1, 2])]).unwrap();
    assert_eq!(weights.resident_bytes(), skeleton + 6 * one);
    let error = weights.load_experts_with(&[Some(vec![0, 1, 5]), Some(vec![0, 1, 2])], &mut |_, _| false).unwrap_err();
    assert!(matches!(error, ResidencyError::Cancelled));
    assert_eq!(resident(&weights), HashSet::from([(0, 5), (1, 0), (1, 1), (1, 2)]), "the common ones stay");
    weights.load_experts(&[Some(vec![0, 1, 5]), Some(vec![0, 1, 2])]).unwrap();
    assert_eq!(weights.experts_resident(), 6);
    for (l, e) in resident(&weights) {
        // Memory that another expert had holds this one's values.
        let loc = checkpoint.tensor(Role::ExpertDown(l, e)).unwrap();
        let expected = read_tensor_bytes(&checkpoint.files()[loc.file], loc).unwrap();
        assert_eq!(weights.expert(l, e).unwrap().down.as_ref().data, expected);
    }
}

#[test]
fn progress_is_told_and_cancels() {
    let mut weights = open(&fixture("olmoe"));
    let mut calls = Vec::new();
    let skeleton = weights.checkpoint().non_expert_bytes();
    weights
        .load_skeleton_with(&mut |done, total| {
            calls.push((done, total));
            true
        })
        .unwrap();
    assert_eq!((calls[0], *calls.last().unwrap()), ((0, skeleton), (skeleton, skeleton)));
    assert!(calls.windows(2).all(|w| w[0].0 < w[1].0));

    weights.load_experts(&[Some(vec![0]), None]).unwrap();
    let before = resident(&weights);
    let half = weights.checkpoint().expert_bytes(0, 0);
    let error = weights.load_experts_with(&[None, Some(vec![])], &mut |done, _| done < half).unwrap_err();
    assert!(matches!(error, ResidencyError::Cancelled));
    assert_eq!(resident(&weights), before);
}

#[test]
fn plans_fit_to_the_byte() {
    let checkpoint = Checkpoint::open(&fixture("olmoe")).unwrap();
    let (skeleton, one) = (skeleton_bytes(&checkpoint), checkpoint.expert_bytes(0, 0));
    let plan = |budget: u64| memory_plan(&checkpoint, budget, 1000, 234);
    let whole = plan(u64::MAX).unwrap();
    assert_eq!((whole.experts_per_layer, whole.all), (6, true));
    assert_eq!(whole.weight_bytes, skeleton + 12 * one);
    assert_eq!(whole.total_bytes, skeleton + 12 * one + 1234);
    assert_eq!(plan(whole.total_bytes).unwrap(), whole);
    let five = plan(whole.total_bytes - 1).unwrap();
    assert_eq!((five.experts_per_layer, five.all), (5, false));
    let least = skeleton + 6 * one + 1234;
    assert_eq!(plan(least).unwrap().experts_per_layer, 3);
    let error = plan(least - 1).unwrap_err();
    assert!(matches!(error, ResidencyError::DoesNotFit { needed_bytes, experts: 3, .. } if needed_bytes == least));
    let text = message(&error);
    assert!(text.starts_with("cannot hold this model in ") && text.contains("help: --memory "), "{text}");
    assert!(plan(0).is_err());

    // The plan's number is the one that the store then holds.
    let mut weights = Weights::open(Arc::new(Checkpoint::open(&fixture("olmoe")).unwrap()), Some(five.weight_bytes));
    weights.load_skeleton().unwrap();
    let kept = vec![Some((0..five.experts_per_layer).collect()); 2];
    weights.load_experts(&kept).unwrap();
    assert_eq!(weights.resident_bytes(), five.weight_bytes);

    let dense = Checkpoint::open(&fixture("llama")).unwrap();
    let plan = memory_plan(&dense, dense.total_bytes(), 0, 0).unwrap();
    assert_eq!((plan.experts_per_layer, plan.all, plan.weight_bytes), (0, true, dense.total_bytes()));
    assert!(memory_plan(&dense, dense.total_bytes() - 1, 0, 0).is_err());
    assert!(memory_plan(&dense, 1 << 40, u64::MAX, u64::MAX).is_err(), "sums do not overflow");
}

#[test]
fn sizes_from_shapes_are_the_sizes_of_the_files() {
    let others = ["deepseek_v2", "deepseek_v3", "qwen3_next", "granitemoeshared", "gpt_oss", "ernie4_5_moe", "phimoe"];
    let others =
        others.into_iter().chain(["qwen3_5_moe", "deepseek_moe", "pangu_pro_moe", "gemma2"]).collect::<Vec<_>>();
    for name in FIXTURES.iter().chain(&others) {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let spec = Outline::open(&fixture(name)).unwrap().spec;
        assert_eq!(&spec, checkpoint.spec(), "{name}");
        // Vectors are F32 in memory whatever their type.
        let name_in_files = checkpoint.tensor(Role::Embed).unwrap().dtype.name();
        let sizes = WeightSizes::quantised(&spec, Quantisation::find(name_in_files).unwrap());
        assert_eq!(sizes, WeightSizes::stored(&checkpoint), "{name}");
        let counted = quorate_formats::shape::parameter_counts(&spec).total;
        let elements: u64 = checkpoint.roles().map(|role| checkpoint.tensor(role).unwrap().elements()).sum();
        assert_eq!(counted, elements, "{name}");
    }
}

#[test]
fn threads_may_share_a_store() {
    fn shared<T: Send + Sync>() {}
    shared::<Weights>();
    shared::<ResidencyError>();
}
