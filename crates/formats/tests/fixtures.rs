//! Every family reads its fixtures, and the numbers agree with what transformers computed.

mod support;

use std::collections::HashSet;
use std::fs;

use quorate_formats::spec::{Activation, FfnSpec, ModelSpec, QkNorm, RouterScore};
use quorate_formats::{Checkpoint, FAMILIES, Role, SafetensorsFile};
use serde_json::{Value, json};
use support::{Copy, FIXTURES, fixture};

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&fixture(name)).unwrap_or_else(|e| panic!("{name}: {}", support::chain(&e)))
}

fn windows(spec: &ModelSpec) -> Vec<Option<usize>> {
    spec.layers.iter().map(|l| l.attn.sliding_window).collect()
}

/// Tensors that a model's file has beside the language model: layers that predict further tokens, other senses.
fn beside(checkpoint: &Checkpoint, tensor: &str) -> bool {
    let next = format!("model.layers.{}.", checkpoint.spec().layers.len());
    let others = ["multi_modal_projector.", "vision_model.", "model.visual.", "mtp."];
    tensor.starts_with(&next) || others.iter().any(|other| tensor.starts_with(other))
}

#[test]
fn every_fixture_opens_and_uses_each_tensor() {
    let mut families = HashSet::new();
    for name in FIXTURES {
        let checkpoint = open(name);
        let strange: Vec<_> = checkpoint.unused_tensors().iter().filter(|t| !beside(&checkpoint, t)).collect();
        assert!(strange.is_empty(), "{name}: {strange:?}");
        for role in checkpoint.roles() {
            assert_eq!(checkpoint.expected_shape(role).unwrap(), checkpoint.tensor(role).unwrap().shape, "{name}");
        }
        if checkpoint.roles().all(|role| checkpoint.recipe(role).is_none()) {
            let used = checkpoint.tensors().iter().filter(|t| !checkpoint.unused_tensors().contains(&t.name));
            assert_eq!(checkpoint.total_bytes(), used.map(|t| t.len).sum::<u64>(), "{name}: each byte once");
        }
        families.insert(checkpoint.family().name);
    }
    let without: Vec<_> = FAMILIES.iter().map(|f| f.name).filter(|f| !families.contains(f)).collect();
    assert!(without.is_empty(), "families without a fixture: {without:?}");
}

#[test]
fn rotary_frequencies_agree_with_the_reference() {
    let mut compared = 0;
    for name in FIXTURES {
        let reference = SafetensorsFile::open(&fixture(name).join("reference.safetensors")).unwrap();
        for layer in &open(name).spec().layers {
            let (attn, rope) = (&layer.attn, &layer.attn.rope);
            let kind = if attn.sliding_window.is_some() { ".sliding_attention" } else { ".full_attention" };
            // Some families turn each kind of layer by frequencies of its own.
            let find = |what: &str| {
                reference
                    .read_f32(&format!("rope_{what}"))
                    .or_else(|_| reference.read_f32(&format!("rope_{what}{kind}")))
            };
            let (Ok(expected), true) = (find("inv_freq"), rope.dim > 0) else { continue };
            // The prompts of 24 tokens are long ones here.
            let long = rope.long.as_ref().filter(|long| long.above < 24);
            let (inv_freq, factor) =
                long.map_or((&rope.inv_freq, rope.attention_factor), |l| (&l.inv_freq, l.attention_factor));
            assert_eq!((inv_freq.len(), rope.dim), (expected.len(), 2 * expected.len()), "{name}");
            for (found, expected) in inv_freq.iter().zip(&expected) {
                assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{name}: {found} {expected}");
            }
            assert!((factor - find("attention_scaling").unwrap()[0]).abs() < 1e-6, "{name}");
            compared += 1;
        }
    }
    assert!(compared > 70, "{compared}");
}

#[test]
fn specifications_say_what_the_configurations_say() {
    let olmoe = open("olmoe");
    let spec = olmoe.spec();
    assert_eq!((spec.vocab_size, spec.hidden_size, spec.layers.len()), (288, 64, 2));
    assert_eq!((spec.eos_token_ids.as_slice(), spec.bos_token_id), (&[282, 284][..], Some(285)));
    assert_eq!((spec.max_position_embeddings, spec.norm_eps), (512, 1e-5));
    let attn = &spec.layers[0].attn;
    assert_eq!((attn.n_heads, attn.n_kv_heads, attn.head_dim, attn.scale), (4, 4, 16, 0.25));
    assert_eq!((attn.qk_norm, attn.clip_qkv, attn.qkv_bias), (QkNorm::Whole, None, false));
    let moe = spec.moe(1).unwrap();
    assert_eq!((moe.n_experts, moe.top_k, moe.intermediate_size, moe.act), (6, 3, 32, Activation::Silu));
    assert_eq!((moe.router.score, moe.router.norm_topk_prob), (RouterScore::SoftmaxAll, false));

    let spec = open("olmoe_norm_clip").spec().clone();
    assert_eq!(spec.layers[1].attn.clip_qkv, Some(1.5));
    assert!(spec.moe(0).unwrap().router.norm_topk_prob);

    let spec = open("qwen3_moe").spec().clone();
    assert_eq!((spec.layers[0].attn.qk_norm, spec.layers[0].attn.head_dim), (QkNorm::PerHead, 24));
    assert_eq!(windows(&spec), [None, None]);

    let spec = open("qwen3_moe_nonorm").spec().clone();
    assert_eq!((spec.moe_layers(), windows(&spec)), (vec![1], vec![Some(9), Some(9)]));
    assert!(spec.tie_word_embeddings && spec.layers[0].attn.qkv_bias && spec.layers[0].attn.o_bias);
    assert!(matches!(spec.layers[0].ffn, FfnSpec::Dense { intermediate_size: 80, .. }));
    assert!(!spec.moe(1).unwrap().router.norm_topk_prob);

    let spec = open("mixtral").spec().clone();
    assert_eq!((spec.layers[0].attn.head_dim, windows(&spec)), (24, vec![None, None]));
    assert!(spec.moe(0).unwrap().router.norm_topk_prob);
    assert_eq!(windows(open("mixtral_swa_bf16").spec()), [Some(8), Some(8)]);
    assert_eq!(windows(open("mistral").spec()), [Some(8), Some(8)]);
    assert_eq!(windows(open("qwen2").spec()), [None, None]);

    let spec = open("qwen2_moe_mixed").spec().clone();
    assert_eq!(spec.moe_layers(), [0, 2]);
    let shared = spec.moe(2).unwrap().shared.clone().unwrap();
    assert_eq!((shared.intermediate_size, shared.gated), (32, true));
    assert!(spec.layers[1].attn.qkv_bias && !spec.layers[1].attn.o_bias);
    assert!(!open("llama").spec().is_moe());

    // DeepSeek's first model follows its configuration, the second does not.
    for (name, norm) in [("deepseek_moe", true), ("deepseek_v2_lite", false)] {
        let copy = Copy::of(name);
        assert!(!Checkpoint::open(copy.path()).unwrap().spec().moe(1).unwrap().router.norm_topk_prob, "{name}");
        let copy = copy.set("norm_topk_prob", json!(true));
        assert_eq!(Checkpoint::open(copy.path()).unwrap().spec().moe(1).unwrap().router.norm_topk_prob, norm, "{name}");
    }
}

#[test]
fn bytes_and_parameters_are_counted() {
    let c = open("olmoe");
    // Three matrices of 32 x 64 f32.
    assert_eq!((c.expert_bytes(0, 0), c.expert_bytes(0, 6), c.expert_bytes(2, 0)), (24_576, 0, 0));
    let experts = 2 * 6 * 24_576;
    assert_eq!(c.non_expert_bytes(), c.total_bytes() - experts);
    let counts = c.parameter_counts();
    assert_eq!((counts.total, counts.active), (c.total_bytes() / 4, (c.total_bytes() - experts / 2) / 4));
    let c = open("mixtral_swa_bf16");
    assert_eq!(c.parameter_counts().total, c.total_bytes() / 2);
    let c = open("llama");
    assert_eq!((c.parameter_counts().total, c.parameter_counts().active), (c.total_bytes() / 4, c.total_bytes() / 4));
}

#[test]
fn a_single_file_and_a_sharded_folder_open_alike() {
    let folder = open("olmoe");
    let file = Checkpoint::open(&fixture("olmoe").join("model.safetensors")).unwrap();
    assert_eq!(folder.fingerprint(), file.fingerprint());
    assert_eq!(folder.sidecar("tokenizer.json"), file.sidecar("tokenizer.json"));
    assert!(folder.sidecar("tokenizer.json").is_some());
    assert_eq!(folder.sidecar("chat_template.jinja"), None);
    assert_eq!(folder.sidecar("../olmoe/tokenizer.json"), None);
    assert_eq!(folder.sidecar(".."), None);
    let sharded = open("qwen2_moe_mixed");
    assert_eq!(sharded.files().len(), 2);
    let last = sharded.tensor(Role::FinalNorm).unwrap();
    assert!(sharded.files()[last.file].path().ends_with("model-00002-of-00002.safetensors"));
}

#[test]
fn the_fingerprint_stands_for_specification_index_and_weights() {
    let original = open("olmoe").fingerprint().to_owned();
    assert_eq!(original.len(), 16);
    assert!(original.bytes().all(|b| b.is_ascii_hexdigit()));
    let of = |copy: &Copy| Checkpoint::open(copy.path()).unwrap().fingerprint().to_owned();
    assert_eq!(of(&Copy::of("olmoe")), original);
    assert_eq!(of(&Copy::of("olmoe").set("transformers_version", json!("9"))), original);
    assert_ne!(of(&Copy::of("olmoe").set("norm_topk_prob", json!(true))), original);

    // One byte in the middle of a weight that is no expert.
    let copy = Copy::of("olmoe");
    let loc = open("olmoe").tensor(Role::Q(1)).unwrap().clone();
    let mut bytes = fs::read(copy.file("model.safetensors")).unwrap();
    bytes[(loc.offset + loc.len / 2) as usize] ^= 1;
    assert_ne!(of(&copy.write("model.safetensors", bytes)), original);
}

#[test]
fn opening_reads_the_header_and_samples_only() {
    let c = open("olmoe_256");
    let header = c.tensors()[0].offset;
    let sampled = c.roles().filter(|r| !r.is_expert()).count() as u64 * 64;
    assert!(c.bytes_read() <= header + sampled, "{} bytes read", c.bytes_read());
}

#[test]
fn old_and_new_forms_of_rope_settings_agree() {
    let spec = |copy: &Copy| Checkpoint::open(copy.path()).unwrap().spec().clone();
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096});
    let old_key = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096});
    let mut new = yarn.clone();
    new["rope_theta"] = json!(100_000.0);
    let original = spec(&Copy::of("qwen3_moe"));
    assert_eq!(spec(&Copy::of("qwen3_moe").set("rope_scaling", old_key)), original);
    let copy = Copy::of("qwen3_moe").set("rope_scaling", Value::Null).set("rope_theta", Value::Null);
    assert_ne!(spec(&copy), original);
    assert_eq!(spec(&copy.set("rope_parameters", new)), original);
    // `4096.0` is a whole number too.
    assert_eq!(spec(&Copy::of("qwen3_moe").set("hidden_size", json!(32.0))), original);
}

#[test]
fn windows_follow_each_familys_rule() {
    let of = |copy: Copy| windows(Checkpoint::open(copy.path()).unwrap().spec());
    let qwen2 = || Copy::of("qwen2").set("use_sliding_window", json!(true)).set("sliding_window", json!(5));
    assert_eq!(of(qwen2()), [None, None], "layer_types decide");
    assert_eq!(of(qwen2().set("layer_types", json!(["full_attention", "sliding_attention"]))), [None, Some(5)]);
    assert_eq!(of(qwen2().set("layer_types", Value::Null)), [None, None], "both below max_window_layers");
    let upper = qwen2().set("layer_types", Value::Null).set("max_window_layers", json!(1));
    assert_eq!(of(upper), [None, Some(5)]);
    let off = qwen2().set("layer_types", json!(["sliding_attention", "sliding_attention"]));
    assert_eq!(of(off.set("use_sliding_window", json!(false))), [None, None]);

    let moe = || Copy::of("qwen2_moe").set("use_sliding_window", json!(true)).set("layer_types", Value::Null);
    assert_eq!(of(moe()), [None, None], "0 is none");
    assert_eq!(of(moe().set("sliding_window", json!(6))), [Some(6), None], "every other layer");
    assert_eq!(of(Copy::of("qwen3_moe_nonorm").set("use_sliding_window", json!(false))), [None, None]);
    assert_eq!(of(Copy::of("mistral").set("sliding_window", Value::Null)), [Some(4096), Some(4096)]);
    let copy = Copy::of("mistral");
    let config = fs::read_to_string(copy.file("config.json")).unwrap();
    let config = config.replace("\"sliding_window\": 8", "\"sliding_window\": null");
    assert_eq!(of(copy.write("config.json", config)), [None, None]);
}

#[test]
fn extra_tensors_are_told() {
    let copy = Copy::of("olmoe").edit_header(|header| {
        let end = header.as_object().unwrap().values().filter_map(|t| t["data_offsets"][1].as_u64()).max().unwrap();
        header["model.layers.0.rotary_emb.inv_freq"] = support::entry(&[0], end, end);
    });
    let checkpoint = Checkpoint::open(copy.path()).unwrap();
    assert_eq!(checkpoint.unused_tensors(), ["model.layers.0.rotary_emb.inv_freq"]);
    // A head that is there in spite of tied embeddings is not used either.
    let copy = Copy::of("olmoe").set("tie_word_embeddings", json!(true));
    assert_eq!(Checkpoint::open(copy.path()).unwrap().unused_tensors(), ["lm_head.weight"]);
}
