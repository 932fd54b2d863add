//! Scores against planted ground truth: routers built by hand (PreMoE's checks T1 and T2), and closed forms.

use candle_core::{Device, Tensor};
use quorate_lens::{ExpertMap, Profiler, RouterStats};
use quorate_methods::{METRICS, Phases, metric};
use quorate_model::{At, Lens, Phase, Routing, Rows, Site, Span};

const EXPERTS: usize = 32;
const TOP_K: usize = 4;

/// Feeds one layer's values to the profiler as a forward pass would: logits and output norms of the selected experts.
fn observe(logits: &[Vec<f32>], norm: impl Fn(usize) -> f32) -> RouterStats {
    let (n, d) = (logits.len(), 2);
    let mut profiler = Profiler::new(RouterStats::new(ExpertMap::new(vec![0], vec![EXPERTS])));
    let rows = Rows {
        segment: vec![0; n],
        position: (0..n).collect(),
        token: vec![0; n],
        phase: vec![Phase::Prompt; n],
        logit_rows: vec![],
        spans: vec![Span { slot: 0, row0: 0, len: n, pos0: 0 }],
    };
    let (mut ids, mut gates, mut slots, mut moe_out) = (vec![], vec![], vec![], vec![0f32; n * d]);
    for (t, z) in logits.iter().enumerate() {
        let sum: f32 = z.iter().map(|v| v.exp()).sum();
        let mut order: Vec<usize> = (0..EXPERTS).collect();
        order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
        for &e in &order[..TOP_K] {
            ids.push(e as u32);
            gates.push(z[e].exp() / sum);
            slots.extend([norm(e), 0.0]);
            moe_out[t * d + 1] += norm(e) * z[e].exp() / sum;
        }
    }
    let tensor = |v: Vec<f32>, shape: &[usize]| Tensor::from_vec(v, shape, &Device::Cpu).unwrap();
    let routing = Routing { k: TOP_K, ids, gates: tensor(gates, &[n, TOP_K]) };
    let mut visit = |site, mut value: Tensor| {
        let at = At { site, layer: 0, rows: &rows, routing: Some(&routing) };
        profiler.tensor(&at, &mut value).unwrap();
    };
    visit(Site::ResidMid, tensor([1.0, 0.0].repeat(n), &[n, d]));
    visit(Site::RouterLogits, tensor(logits.concat(), &[n, EXPERTS]));
    visit(Site::ExpertOut, tensor(slots, &[n, TOP_K, d]));
    visit(Site::MoeOut, tensor(moe_out, &[n, d]));
    profiler.into_stats()
}

/// 400 tokens of a task that needs experts 0..8: seven of them take turns at rank 1 with a margin (but every fifth token
/// is undecided), the eighth (7) is rare but decisive. Expert 8 is always at rank 2, never first; experts 9.. fill ranks 3
/// and 4.
fn planted(shift: f32) -> Vec<Vec<f32>> {
    (0..400usize)
        .map(|t| {
            let mut z = vec![-4.0 + shift; EXPERTS];
            let decisive = t % 100 == 99;
            let top = if decisive {
                9.0
            } else if t % 5 == 2 {
                1.2
            } else {
                4.0
            };
            z[if decisive { 7 } else { t % 7 }] = top + shift;
            z[8] = 1.0 + shift;
            z[9 + t % 23] = 0.5 + shift;
            z[9 + (t + 1) % 23] = 0.4 + shift;
            z
        })
        .collect()
}

fn best_eight(name: &str, stats: &RouterStats) -> Vec<usize> {
    let mut top = metric(name).unwrap().table(stats, Phases::Prompt).ranking(0)[..8].to_vec();
    top.sort_unstable();
    top
}

#[test]
fn peu_finds_the_decisive_and_leaves_the_weak_out() {
    let stats = observe(&planted(0.0), |_| 1.0);
    assert_eq!(best_eight("peu", &stats), (0..8).collect::<Vec<_>>());
    let peu = metric("peu").unwrap().table(&stats, Phases::Prompt);
    assert_eq!(peu.values[8], 0.0, "always second, never confident");
    let frequency = metric("frequency").unwrap().table(&stats, Phases::Prompt).ranking(0);
    assert!(frequency[..8].contains(&8), "the weak expert is among the most used");
    assert!(frequency[24..].contains(&7), "the decisive expert is among the least used");
}

#[test]
fn a_shift_of_all_logits_breaks_tcess_but_not_peu() {
    let (plain, shifted) = (observe(&planted(0.0), |_| 1.0), observe(&planted(-20.0), |_| 1.0));
    let truth: Vec<usize> = (0..8).collect();
    for name in ["tcess", "tcess-code"] {
        assert_ne!(best_eight(name, &shifted), truth, "{name}: a negative sum ranks below never selected");
    }
    let recall = best_eight("peu", &shifted).iter().filter(|e| truth.contains(e)).count();
    assert_eq!(recall, 8, "sigmoid stays positive");
    for m in METRICS.iter().filter(|m| !m.gauge_dependent && m.name != "easy-ep") {
        let (a, b) = (m.table(&plain, Phases::Prompt).values, m.table(&shifted, Phases::Prompt).values);
        let close = a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs().max(1.0));
        assert!(close, "{} is declared free of the gauge", m.name);
    }
}

/// Every member of the unified family equals its closed form.
#[test]
fn scores_equal_their_closed_forms() {
    let norm = |e: usize| 0.5 + e as f32 / 8.0;
    let logits = planted(0.0);
    let stats = observe(&logits, norm);
    let (mut count, mut sums) = (vec![0f64; EXPERTS], vec![[0f64; 8]; EXPERTS]);
    for z in &logits {
        let all: f32 = z.iter().map(|v| v.exp()).sum();
        let mut order: Vec<usize> = (0..EXPERTS).collect();
        order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
        for &e in &order[..TOP_K] {
            let (g, n) = (f64::from(z[e].exp() / all), f64::from(norm(e)));
            count[e] += 1.0;
            for (s, v) in sums[e].iter_mut().zip([1.0, g, n, g * n, n, n * n, g * n, g * g * n * n]) {
                *s += v;
            }
        }
    }
    let tokens = logits.len() as f64;
    let names = ["frequency", "gate-sum", "ean", "reap", "man", "msan", "gated-norm", "gated-energy"];
    for (i, name) in names.iter().enumerate() {
        let per_use = matches!(*name, "reap" | "man" | "msan");
        let got = metric(name).unwrap().table(&stats, Phases::Prompt).values;
        for e in 0..EXPERTS {
            let wanted = if !per_use {
                sums[e][i] / tokens
            } else if count[e] > 0.0 {
                sums[e][i] / count[e]
            } else {
                0.0
            };
            assert!((got[e] - wanted).abs() <= 1e-6 * wanted.max(1.0), "{name} expert {e}: {} {wanted}", got[e]);
        }
    }
}

/// EASY-EP by hand: the residual is (1, 0), the routed sum (0, y), so a token turns by `1 - 1 / sqrt(1 + y^2)`.
#[test]
fn easy_ep_weighs_tokens_by_their_turn() {
    let logits = planted(0.0);
    let stats = observe(&logits, |_| 2.0);
    let mut wanted = vec![0f64; EXPERTS];
    for z in &logits {
        let all: f32 = z.iter().map(|v| v.exp()).sum();
        let mut order: Vec<usize> = (0..EXPERTS).collect();
        order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
        let y: f64 = order[..TOP_K].iter().map(|&e| 2.0 * f64::from(z[e].exp() / all)).sum();
        for &e in &order[..TOP_K] {
            wanted[e] += 2.0 * f64::from(z[e].exp() / all) * (1.0 - 1.0 / (1.0 + y * y).sqrt()) / logits.len() as f64;
        }
    }
    let got = metric("easy-ep").unwrap().table(&stats, Phases::Prompt).values;
    assert!(got.iter().zip(&wanted).all(|(g, w)| (g - w).abs() < 1e-6), "{got:?} {wanted:?}");
}

#[test]
fn the_worst_are_the_best_upside_down_and_random_differs_by_data() {
    let stats = observe(&planted(0.0), |_| 1.0);
    let best = metric("peu").unwrap().table(&stats, Phases::Prompt).values;
    let worst = metric("bottom").unwrap().table(&stats, Phases::Prompt).values;
    assert!(best.iter().zip(&worst).all(|(b, w)| *b == -*w));
    let other = observe(&planted(0.0)[..100], |_| 1.0);
    let random = |s: &RouterStats| metric("random").unwrap().table(s, Phases::Prompt).values;
    assert_eq!(random(&stats), random(&stats));
    assert_ne!(random(&stats), random(&other));
}

#[test]
fn a_mistyped_metric_is_corrected() {
    let error = metric("reep").unwrap_err().to_string();
    assert!(error.contains("`reap`"), "{error}");
}
