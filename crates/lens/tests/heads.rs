//! What heads are: their outputs sum to the block's, and switching one off is cutting its columns out of the output
//! projection.

mod support;

use quorate_formats::Role;
use quorate_formats::spec::AttnSpec;
use quorate_lens::{Op, Recorder};
use quorate_model::{Model, Site};
use support::{
    assert_close, assert_same, at_site, change, edited, embedded, fixture, in_layer, largest, logits_with, on_units,
    open, plain, prompts, record,
};

/// As many keys as queries; grouped queries, window and biases; a head width of its own; one key head and bfloat16.
const MODELS: [&str; 5] = ["olmoe", "qwen3_moe_nonorm", "llama", "mixtral_swa_bf16", "qwen2_moe_mixed"];

fn cases() -> Vec<(String, Model, Vec<u32>)> {
    let mut cases: Vec<_> =
        MODELS.iter().map(|name| (name.to_string(), open(&fixture(name)), prompts(name)[0].clone())).collect();
    let model = open(&embedded());
    let tokens = model.tokenizer().encode("<|user|>swap(tail(p l a x m))<|assistant|>m a x l", false).unwrap();
    cases.push(("embedded".to_string(), model, tokens));
    cases
}

fn attn(model: &Model, layer: usize) -> &AttnSpec {
    &model.spec().layers[layer].attn
}

#[test]
fn zeroing_a_head_is_cutting_its_columns_of_the_output_projection() {
    for name in MODELS {
        let (model, tokens) = (open(&fixture(name)), &prompts(name)[0]);
        let layer = model.spec().layers.len() - 1;
        let AttnSpec { n_heads, head_dim, .. } = *attn(&model, layer);
        for head in 0..n_heads {
            let cut = edited(&fixture(name), |role, shape, values| {
                if role == Role::O(layer) {
                    assert_eq!(shape[1], n_heads * head_dim);
                    values.chunks_mut(shape[1]).for_each(|row| row[head * head_dim..(head + 1) * head_dim].fill(0.0));
                }
            });
            let found = logits_with(&model, tokens, &[on_units(&[head], in_layer(layer, Site::Z, Op::Zero))]);
            assert_same(&format!("{name}, head {head}"), &found, &plain(&open(cut.path()), tokens));
            assert!(change(&found, &plain(&model, tokens)) > 1e-3, "{name}, head {head}");
        }
    }
}

#[test]
fn a_key_head_serves_its_group_of_query_heads() {
    for (name, model, tokens) in cases() {
        let AttnSpec { n_heads, n_kv_heads, .. } = *attn(&model, 0);
        let group = n_heads / n_kv_heads;
        for kv in 0..n_kv_heads {
            let queries: Vec<usize> = (kv * group..(kv + 1) * group).collect();
            let values = logits_with(&model, &tokens, &[on_units(&[kv], in_layer(0, Site::AttnV, Op::Zero))]);
            let heads = logits_with(&model, &tokens, &[on_units(&queries, in_layer(0, Site::Z, Op::Zero))]);
            assert_same(&format!("{name}, key head {kv}"), &values, &heads);
        }
    }
}

#[test]
fn heads_sum_to_the_block() {
    for (name, model, tokens) in cases() {
        let run = record(&model, &tokens, &[Site::Z, Site::AttnOut]);
        for layer in 0..model.spec().layers.len() {
            let AttnSpec { n_heads, head_dim, o_bias, .. } = *attn(&model, layer);
            let d = model.spec().hidden_size;
            let w = model.weights().matrix(Role::O(layer)).unwrap().to_f32(); // [d, H * head_dim]
            let z = &at_site(&run, Site::Z, layer).values;
            let mut sum: Vec<f64> = match o_bias {
                true => model.weights().vector(Role::OBias(layer)).unwrap().iter().map(|&b| f64::from(b)).collect(),
                false => vec![0.0; d],
            };
            sum = sum.repeat(tokens.len());
            for head in 0..n_heads {
                for (t, sum) in sum.chunks_mut(d).enumerate() {
                    let z = &z[(t * n_heads + head) * head_dim..][..head_dim];
                    for (sum, w) in sum.iter_mut().zip(w.chunks(n_heads * head_dim)) {
                        let w = &w[head * head_dim..][..head_dim];
                        *sum += z.iter().zip(w).map(|(z, w)| f64::from(*z) * f64::from(*w)).sum::<f64>();
                    }
                }
            }
            let sum: Vec<f32> = sum.iter().map(|&v| v as f32).collect();
            let out = &at_site(&run, Site::AttnOut, layer).values;
            assert_close(&format!("{name}, layer {layer}"), &sum, out, 1e-5 * largest(out));
        }
    }
}

/// Scores are scaled products of the rotated queries and keys, the pattern is their softmax over the visible keys, a
/// head's output is the mean of the values under it.
#[test]
fn scores_pattern_and_outputs_agree() {
    for (name, model, tokens) in cases() {
        let run = record(&model, &tokens, Site::ALL);
        let n = tokens.len();
        for layer in 0..model.spec().layers.len() {
            let AttnSpec { n_heads, n_kv_heads, head_dim, scale, sliding_window, .. } = *attn(&model, layer);
            let site = |site| at_site(&run, site, layer).values.as_slice();
            let (q, k, v) = (site(Site::AttnQRot), site(Site::AttnKRot), site(Site::AttnV));
            for row in 0..n * n_heads {
                let (t, h) = (row / n_heads, row % n_heads);
                let kv = |s: usize| (s * n_kv_heads + h * n_kv_heads / n_heads) * head_dim;
                let visible = sliding_window.map_or(0, |w| (t + 1).saturating_sub(w))..t + 1;
                let (scores, pattern) =
                    (&site(Site::AttnScores)[row * n..][..n], &site(Site::AttnPattern)[row * n..][..n]);
                let (mut expected, mut mean) = (vec![0f32; n], vec![0f32; head_dim]);
                for s in 0..n {
                    if !visible.contains(&s) {
                        assert_eq!((scores[s], pattern[s]), (f32::NEG_INFINITY, 0.0), "{name}: {t} sees {s}");
                        continue;
                    }
                    expected[s] =
                        q[row * head_dim..][..head_dim].iter().zip(&k[kv(s)..]).map(|(q, k)| scale * q * k).sum();
                    assert!((scores[s] - expected[s]).abs() < 1e-4, "{name}: {} {}", scores[s], expected[s]);
                    mean.iter_mut().zip(&v[kv(s)..]).for_each(|(m, v)| *m += pattern[s] * v);
                }
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = scores.iter().map(|s| (s - most).exp()).sum();
                let softmax: Vec<f32> = scores.iter().map(|s| (s - most).exp() / total).collect();
                assert_close(&name, pattern, &softmax, 1e-6);
                assert_close(&name, &site(Site::Z)[row * head_dim..][..head_dim], &mean, 1e-5);
            }
        }
    }
}

/// The residual stream is the sum of what was written to it.
#[test]
fn the_stream_adds_up() {
    for (name, model, tokens) in cases() {
        let run: Recorder = record(&model, &tokens, Site::ALL);
        let layers = model.spec().layers.len();
        for layer in 0..layers {
            let site = |site| at_site(&run, site, layer).values.as_slice();
            let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
            let what = format!("{name}, layer {layer}");
            assert_same(&what, site(Site::ResidMid), &sum(site(Site::ResidPre), site(Site::AttnOut)));
            assert_same(&what, site(Site::ResidPost), &sum(site(Site::ResidMid), site(Site::MlpOut)));
            if layer + 1 < layers {
                assert_same(&what, &at_site(&run, Site::ResidPre, layer + 1).values, site(Site::ResidPost));
            }
            if let Some(moe) = model.spec().moe(layer) {
                assert_eq!(site(Site::MoeOut) == site(Site::MlpOut), moe.shared.is_none(), "{what}");
            }
        }
    }
}
