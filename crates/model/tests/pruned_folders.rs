//! A folder with fewer experts computes what the full model computes when the others are masked: in every family with
//! experts, however they are stored.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use quorate_formats::spec::{GroupRule, GroupSpec};
use quorate_formats::{Checkpoint, Config, TensorOut, families, shape, write_pruned_hf, write_safetensors};
use quorate_model::{Model, RoutingMode, Site};
use serde_json::{Value, json};
use support::{
    Capture, assert_close, chain, change, choose, fixture, keep, largest, logits_of_all, noise, open, prompts,
};
use tempfile::TempDir;

const FIXTURES: [&str; 28] = [
    "deepseek_v2",
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
    "llama4_nested",
    "llama4_text",
    "mixtral",
    "mixtral_swa_bf16",
    "olmoe",
    "olmoe_norm_clip",
    "phimoe",
    "qwen2_moe",
    "qwen2_moe_mixed",
    "qwen3_moe",
    "qwen3_moe_nonorm",
    "qwen3_next",
    "qwen3_5_moe",
    "deepseek_moe",
    "pangu_pro_moe",
];

fn groups(model: &Model) -> Option<GroupSpec> {
    let spec = model.spec();
    spec.moe(spec.moe_layers()[0]).unwrap().router.extra.groups
}

/// Some experts of each layer, equally many of each group.
fn chosen(model: &Model) -> Vec<Vec<usize>> {
    let moe = model.spec().moe(model.spec().moe_layers()[0]).unwrap();
    let Some(groups) = groups(model) else {
        return choose(model, 4, |_| (moe.n_experts + moe.top_k) / 2);
    };
    let (size, each) = (moe.n_experts / groups.n_group, moe.n_experts / groups.n_group - 1);
    let mut order = choose(model, 4, |_| usize::MAX);
    for (l, layer) in order.iter_mut().enumerate() {
        // Another one of each group is left out in each layer.
        layer.retain(|e| e % size != (e / size + l) % size);
        assert_eq!(layer.len(), each * groups.n_group);
    }
    order
}

fn prune_and_compare(name: &str, path: &Path, texts: &[Vec<u32>], kept: &[Vec<usize>]) -> TempDir {
    let mut whole = open(path);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("pruned");
    let written = write_pruned_hf(whole.checkpoint(), kept, &out, 40_000, &mut |_, _| true);
    written.unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
    let pruned = open(&out);
    assert!(pruned.checkpoint().total_bytes() < whole.checkpoint().total_bytes(), "{name}");
    let full = logits_of_all(&whole, texts, &mut quorate_model::NoLens);
    whole.mask_experts(&keep(kept), RoutingMode::Mask).unwrap();
    let (mut by_mask, mut by_file) = (Capture::new(&[Site::Routing]), Capture::new(&[Site::Routing]));
    let masked = logits_of_all(&whole, texts, &mut by_mask);
    let found = logits_of_all(&pruned, texts, &mut by_file);
    assert!(change(&masked, &full) > 1e-4, "{name}: removing experts changes nothing");
    assert_close(name, &found, &masked, 1e-5 * largest(&masked).max(1.0));
    for (&layer, kept) in whole.spec().moe_layers().iter().zip(kept) {
        let old_ids = by_file.get(layer, Site::Routing).ids.iter().map(|&new| kept[new as usize] as u32);
        assert_eq!(old_ids.collect::<Vec<_>>(), by_mask.get(layer, Site::Routing).ids, "{name}, layer {layer}");
    }
    dir
}

#[test]
fn every_family_with_experts() {
    for name in FIXTURES {
        let path = fixture(name);
        let kept = chosen(&support::open_empty(&path));
        let dir = prune_and_compare(name, &path, &prompts(name), &kept);
        // The new number stands where it stood: in a nested configuration inside, the rest around it.
        let config: Value = serde_json::from_slice(&fs::read(dir.path().join("pruned/config.json")).unwrap()).unwrap();
        let source: Value = serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["model_type"], source["model_type"], "{name}");
        assert_eq!(config["architectures"], source["architectures"], "{name}");
        assert_eq!(config.get("quantization_config"), source.get("quantization_config"), "{name}");
    }
}

/// Leaving out whole groups changes the number of groups; DeepSeek-V3 sums a group's two best.
#[test]
fn whole_groups_can_be_left_out() {
    for (name, left) in [("deepseek_v2", 3), ("deepseek_v3", 2), ("deepseek_v3", 1)] {
        let path = fixture(name);
        let model = support::open_empty(&path);
        let moe = model.spec().moe(model.spec().moe_layers()[0]).unwrap();
        let (n, size) = (groups(&model).unwrap().n_group, moe.n_experts / groups(&model).unwrap().n_group);
        let of_layer = |l: usize| (0..moe.n_experts).filter(|e| (e / size + l) % n < left).collect();
        let kept: Vec<Vec<usize>> = (0..model.spec().moe_layers().len()).map(of_layer).collect();
        let dir = prune_and_compare(name, &path, &prompts(name), &kept);
        let pruned = Checkpoint::open(&dir.path().join("pruned")).unwrap();
        let moe = pruned.spec().moe(pruned.spec().moe_layers()[0]).unwrap();
        assert_eq!(moe.router.extra.groups.map(|g| g.n_group), (left > 1).then_some(left), "{name}");
    }
}

#[test]
fn groups_that_would_differ_are_refused_with_the_possible_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |name: &str, of_layer: &dyn Fn(usize) -> Vec<usize>| {
        let checkpoint = Checkpoint::open(&fixture(name)).unwrap();
        let kept: Vec<Vec<usize>> = (0..checkpoint.spec().moe_layers().len()).map(of_layer).collect();
        chain(&write_pruned_hf(&checkpoint, &kept, &dir.path().join("x"), 1 << 30, &mut |_, _| true).unwrap_err())
    };
    let all = "help: keep equally many of each of the 4 groups of 4: 8, 12, 16 experts per layer";
    let uneven = refused("deepseek_v3", &|_| (0..10).collect());
    assert!(uneven.contains("its groups keep [4, 4, 2, 0] experts") && uneven.contains(all), "{uneven}");
    let one = refused("deepseek_v3", &|_| vec![0, 4, 8, 12]);
    assert!(one.contains("compared by their two best") && one.contains(all), "{one}");
    let differ = refused("deepseek_v2", &|l| (0..if l == 0 { 6 } else { 9 }).filter(|e| l == 0 || e % 3 < 2).collect());
    assert!(differ.contains("layer 2 keeps experts of 3 groups, other layers of others"), "{differ}");
    let few = refused("glm4_moe", &|_| vec![0, 1, 4, 5]);
    assert!(few.contains("each token needs 3 experts of 1 groups, which keep 2 each"), "{few}");
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
}

/// Writes a model of a family that has no fixture, with weights that look random.
fn made(config: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let read = Config::read(dir.path()).unwrap();
    let family = families::find(&read).unwrap();
    let spec = (family.spec)(&read).unwrap();
    let mut tensors: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for role in shape::roles(&spec) {
        match family.fused.and_then(|fused| fused(&spec, role)) {
            Some(fused) => tensors.insert(fused.tensor, fused.shape),
            None => tensors.insert(family.names.of(role), shape::expected_shape(&spec, role).unwrap()),
        };
    }
    let values = tensors.iter().enumerate().map(|(i, (name, shape))| {
        let values: Vec<f32> = noise(i as u64, shape.iter().product()).iter().map(|v| v * 0.3).collect();
        TensorOut::f32(name.clone(), shape, values)
    });
    write_safetensors(&dir.path().join("model.safetensors"), None, values).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture("olmoe").join(file), dir.path().join(file)).unwrap();
    }
    dir
}

/// Pangu-Pro (one expert of each group, a factor for each expert) and Qwen3.5 (stacks of experts).
#[test]
fn families_without_a_fixture() {
    let pangu = json!({
        "model_type": "PanguProMoE", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "intermediate_size": 48,
        "num_experts": 12, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
    });
    let qwen = json!({
        "model_type": "qwen3_5_moe_text", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "full_attention_interval": 2,
    });
    for config in [pangu, qwen] {
        let name = config["model_type"].as_str().unwrap().to_owned();
        let dir = made(&config);
        let kept = chosen(&support::open_empty(dir.path()));
        prune_and_compare(&name, dir.path(), &[(0..24).map(|i| i * 7 % 64).collect()], &kept);
        if let Some(GroupSpec { rule: GroupRule::OneOfEach, .. }) = groups(&support::open_empty(dir.path())) {
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            let kept = vec![vec![0, 1, 2, 3, 4, 5]; 2];
            let error = write_pruned_hf(&checkpoint, &kept, &dir.path().join("x"), 1 << 30, &mut |_, _| true);
            let message = chain(&error.unwrap_err());
            assert!(message.contains("one of every group") && message.contains("4, 8, 12 experts"), "{message}");
        }
    }
}
