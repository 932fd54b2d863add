//! Adapters of PEFT: what is written is read again, stacked experts come apart as PEFT's formula says, and nothing is
//! passed over in silence. `tools/check_peft.py` compares with PEFT itself.

#[path = "../../model/tests/support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;

use quorate_formats::shape::{expected_shape, roles};
use quorate_formats::{Role, TensorOut, write_safetensors};
use quorate_model::{LowRank, Model, Overlay, Patch, ops};
use quorate_train::peft::{CONFIG, WEIGHTS, encode, read, write};
use serde_json::{Value, json};
use support::{assert_close, assert_same, fixture, noise, open, plain, prompts, relative, values};

fn random(seed: usize, shape: &[usize]) -> candle_core::Tensor {
    ops::tensor(noise(seed as u64, shape.iter().product()), shape).unwrap()
}

/// Terms of several ranks and scales on every matrix but embeddings; the output matrix and a norm in full.
fn overlay(model: &Model) -> Overlay {
    let patch = |(i, role): (usize, Role)| {
        let shape = expected_shape(model.spec(), role).unwrap();
        match role {
            Role::Embed => None,
            Role::LmHead | Role::FinalNorm => Some((role, Patch::Replace(random(i, &shape)))),
            role if role.is_vector() => None,
            _ => {
                let rank = 1 + i % 3;
                let (a, b) = (random(i, &[rank, shape[1]]), random(2 * i, &[shape[0], rank]));
                Some((role, Patch::LowRank(LowRank { a, b, scale: [0.5, 0.1, 2.0][i % 2] })))
            }
        }
    };
    roles(model.spec()).enumerate().filter_map(patch).collect()
}

#[test]
fn what_is_written_is_read_again() {
    for name in ["olmoe", "qwen2_moe_mixed", "mixtral", "llama"] {
        let dir = tempfile::tempdir().unwrap();
        let model = open(&fixture(name));
        let overlay = overlay(&model);
        write(model.checkpoint(), &overlay, dir.path(), "base").unwrap();
        for (file, bytes) in encode(model.checkpoint(), &overlay, "base").unwrap() {
            assert!(fs::read(dir.path().join(file)).unwrap() == bytes, "{name}: {file} in memory differs");
        }
        let found = read(model.checkpoint(), dir.path()).unwrap();
        assert_eq!(found.iter().count(), overlay.iter().count(), "{name}");
        for ((role, patch), (other, expected)) in found.iter().zip(overlay.iter()) {
            assert_eq!(role, other);
            match (patch, expected) {
                (Patch::Replace(a), Patch::Replace(b)) => assert_same(name, &values(a), &values(b)),
                (Patch::LowRank(x), Patch::LowRank(y)) => {
                    assert_eq!(x.scale, y.scale, "{name}, {role}");
                    assert_same(name, &values(&x.a), &values(&y.a));
                    assert_same(name, &values(&x.b), &values(&y.b));
                }
                _ => panic!("{name}, {role}: another kind of patch"),
            }
        }
    }
}

fn put(folder: &Path, config: &Value, tensors: Vec<TensorOut<'static>>) {
    fs::write(folder.join(CONFIG), config.to_string()).unwrap();
    write_safetensors(&folder.join(WEIGHTS), None, tensors).unwrap();
}

fn out(name: &str, tensor: &candle_core::Tensor) -> TensorOut<'static> {
    TensorOut::f32(name, tensor.dims(), values(tensor))
}

/// Factors of all experts in one pair, against the formula for `Delta_e` with plain loops.
#[test]
fn stacked_experts_come_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = open(&fixture("olmoe"));
    let (d, moe) = (model.spec().hidden_size, model.spec().moe(1).unwrap().clone());
    let (e, width, r) = (moe.n_experts, moe.intermediate_size, 2);
    let experts = "base_model.model.model.layers.1.mlp.experts";
    // The rank of gate and up is a pattern, as PEFT writes it when it merges two adapters of rank 2.
    let (up_a, up_b) = (random(1, &[2 * r * e, d]), random(2, &[2 * width, 2 * r * e]));
    let (down_a, down_b) = (random(3, &[r * e, width]), random(4, &[d, r * e]));
    let router = (random(5, &[r, d]), random(6, &[e, r]));
    let config = json!({
        "peft_type": "LORA", "r": r, "lora_alpha": 1, "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"],
        "rank_pattern": {r".*\.gate_up_proj": 2 * r}, "alpha_pattern": {r".*\.gate_up_proj": 6},
    });
    put(
        dir.path(),
        &config,
        vec![
            out(&format!("{experts}.base_layer.lora_A.weight"), &up_a),
            out(&format!("{experts}.base_layer.lora_B.weight"), &up_b),
            out(&format!("{experts}.lora_A.default.weight"), &down_a),
            out(&format!("{experts}.lora_B.default.weight"), &down_b),
            out("base_model.model.model.layers.1.mlp.gate.lora_A.weight", &router.0),
            out("base_model.model.model.layers.1.mlp.gate.lora_B.weight", &router.1),
        ],
    );
    let overlay = read(model.checkpoint(), dir.path()).unwrap();
    assert_eq!(overlay.iter().count(), 3 * e + 1);
    let delta = |role| match overlay.get(role) {
        Some(Patch::LowRank(term)) => values(&(term.b.matmul(&term.a).unwrap() * f64::from(term.scale)).unwrap()),
        other => panic!("{role}: {other:?}"),
    };
    let expected = |a: &[f32], b: &[f32], x: usize, rows: std::ops::Range<usize>, inner: usize, r: usize, s: f32| {
        let mut delta = Vec::new();
        for o in rows {
            for i in 0..inner {
                delta.push(s * (0..r).map(|j| b[o * r * e + j * e + x] * a[(x * r + j) * inner + i]).sum::<f32>());
            }
        }
        delta
    };
    let (up_a, up_b, down_a, down_b) = (values(&up_a), values(&up_b), values(&down_a), values(&down_b));
    for x in 0..e {
        let of_up = |rows| expected(&up_a, &up_b, x, rows, d, 2 * r, 1.5);
        assert_close("gate", &delta(Role::ExpertGate(1, x)), &of_up(0..width), 1e-5);
        assert_close("up", &delta(Role::ExpertUp(1, x)), &of_up(width..2 * width), 1e-5);
        assert_close("down", &delta(Role::ExpertDown(1, x)), &expected(&down_a, &down_b, x, 0..d, width, r, 0.5), 1e-5);
    }
    let tokens = &prompts("olmoe")[0];
    let before = plain(&model, tokens);
    model.set_overlay(overlay).unwrap();
    assert!(support::change(&plain(&model, tokens), &before) > 1e-3);
}

#[test]
fn an_adapter_does_what_merged_weights_do() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = open(&fixture("mixtral"));
    let term = |seed, shape: &[usize]| LowRank {
        a: random(seed, &[2, shape[1]]),
        b: random(seed + 1, &[shape[0], 2]),
        scale: 0.1,
    };
    let chosen = |role: &Role| matches!(role, Role::Q(_) | Role::Router(_) | Role::ExpertDown(_, 1));
    let chosen: Vec<Role> = roles(model.spec()).filter(chosen).collect();
    let shape = |role: Role| expected_shape(model.spec(), role).unwrap();
    let overlay: Overlay =
        chosen.iter().enumerate().map(|(i, &r)| (r, Patch::LowRank(term(3 * i, &shape(r))))).collect();
    let merged = overlay.iter().map(|(role, patch)| {
        let Patch::LowRank(term) = patch else { panic!("only terms were put in") };
        let loc = model.checkpoint().tensor(role).unwrap();
        let own = quorate_formats::safetensors::read_tensor_f32(&model.checkpoint().files()[loc.file], loc).unwrap();
        let delta = (term.b.matmul(&term.a).unwrap() * f64::from(term.scale)).unwrap();
        (role, Patch::Replace((ops::tensor(own, &loc.shape).unwrap() + delta).unwrap()))
    });
    let merged: Overlay = merged.collect();
    write(model.checkpoint(), &overlay, dir.path(), "base").unwrap();
    let tokens = &prompts("mixtral")[0];
    model.set_overlay(merged).unwrap();
    let expected = plain(&model, tokens);
    model.set_overlay(read(model.checkpoint(), dir.path()).unwrap()).unwrap();
    assert_close("logits", &plain(&model, tokens), &expected, relative(2e-5, &expected));
}

#[test]
fn what_cannot_be_used_is_named() {
    let model = open(&fixture("olmoe"));
    let d = model.spec().hidden_size;
    let q = "base_model.model.model.layers.0.self_attn.q_proj";
    let lora = |module: &str, a: &[usize], b: &[usize]| {
        vec![
            out(&format!("{module}.lora_A.weight"), &random(1, a)),
            out(&format!("{module}.lora_B.weight"), &random(2, b)),
        ]
    };
    let config = json!({"peft_type": "LORA", "r": 2});
    let refused = |config: &Value, tensors| {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), config, tensors);
        read(model.checkpoint(), dir.path()).unwrap_err().to_string()
    };
    let cases = [
        (lora(&q.replace("0", "9"), &[2, d], &[d, 2]), "the model has no module model.layers.9.self_attn.q_proj"),
        (lora(q, &[3, d], &[d, 3]), "[2, "),
        (lora(q, &[2, d], &[d, 2]).drain(..1).collect(), "has not one A and one B"),
        (vec![out(&format!("{q}.lora_B.bias"), &random(1, &[d]))], "lora_B.bias is not supported"),
        (vec![out("base_model.model.model.embed_tokens.lora_embedding_A", &random(1, &[2, 9]))], "is not supported"),
        (vec![out("base_model.model.lm_head.weight", &random(1, &[3, d]))], "saved in full with the shape [3, "),
        (lora("base_model.model.model.layers.0.mlp.experts", &[2, d + 1], &[d, 2]), "which fit no experts"),
    ];
    for (tensors, message) in cases {
        let error = refused(&config, tensors);
        assert!(error.contains(message), "{error}");
    }
    let error = refused(&json!({"peft_type": "LORA", "use_dora": true}), lora(q, &[2, d], &[d, 2]));
    assert!(error.contains("use_dora is not supported"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = read(model.checkpoint(), empty.path()).unwrap_err().to_string();
    assert!(error.contains("cannot read adapter_config.json"), "{error}");
    let error = write(model.checkpoint(), &Overlay::new(), empty.path(), "base").unwrap_err().to_string();
    assert!(error.contains("the overlay is empty"), "{error}");
    let width = model.spec().moe(0).unwrap().intermediate_size;
    let replaced = [(Role::ExpertUp(0, 0), Patch::Replace(random(1, &[width, d])))].into_iter().collect();
    let error = write(model.checkpoint(), &replaced, empty.path(), "base").unwrap_err().to_string();
    assert!(error.contains("layer 0 expert 0 up is replaced"), "{error}");
}
