//! Speed of passes without gradient, with gradient at the router logits, and of training steps:
//!
//! ```sh
//! cargo run --release -p quorate-train --example speed -- MODEL [TOKENS]
//! ```
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use quorate_formats::Role;
use quorate_model::{KvCache, LogitRows, Model, NoLens, Segment, Site, Taps};
use quorate_train::{Form, Parameters, cross_entropy, select};

/// Which weights are trained.
type Choice<'a> = &'a dyn Fn(Role) -> Option<Form>;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or("MODEL is needed")?;
    let n: usize = args.get(1).map_or(Ok(512), |n| n.parse())?;
    let mut model = Model::open(Path::new(path), 2, None)?;
    model.load_all_experts()?;
    let vocab = model.spec().vocab_size;
    let tokens: Vec<u32> = (0..n).map(|i| (i * 7919 % vocab) as u32).collect();
    // Two texts, and logits of the last eighth of each, as of a prompt with its answer.
    let segments: Vec<Segment> = (0..2)
        .map(|slot| {
            let part = tokens[slot * n / 2..(slot + 1) * n / 2].to_vec();
            let logits = LogitRows::From(part.len() - part.len() / 8);
            Segment { logits, ..Segment::prompt(slot, part) }
        })
        .collect();
    let pass = |model: &Model, taps: Option<&mut Taps>| -> Result<candle_core::Tensor, Box<dyn Error>> {
        let mut cache = KvCache::new(model.spec(), 2);
        let forward = match taps {
            Some(taps) => model.forward(&segments, &mut cache, taps)?,
            None => model.forward(&segments, &mut cache, &mut NoLens)?,
        };
        let logits = forward.logits.ok_or("no logits")?;
        let targets: Vec<u32> = forward.rows.logit_rows.iter().map(|&row| tokens[row]).collect();
        Ok(cross_entropy(&logits, &targets)?)
    };
    time("forward", n, || pass(&model, None).map(|_| ()))?;
    let sites: [(&str, &[Site]); 2] = [
        ("forward + backward to all router logits", &[Site::RouterLogits]),
        ("forward + backward to z and resid_pre", &[Site::Z, Site::ResidPre]),
    ];
    for (what, sites) in sites {
        time(what, n, || {
            pass(&model, Some(&mut Taps::new(sites)))?.backward()?;
            Ok(())
        })?;
    }
    let low_rank = Form::LowRank { rank: 8, alpha: 16.0 };
    let forms: [(&str, Choice<'_>); 4] = [
        ("routers", &|role| matches!(role, Role::Router(_)).then_some(Form::Full)),
        ("attention, rank 8", &|role| {
            matches!(role, Role::Q(_) | Role::K(_) | Role::V(_) | Role::O(_)).then(|| low_rank.clone())
        }),
        ("experts, rank 8", &|role| role.is_expert().then(|| low_rank.clone())),
        ("all matrices", &|role| (!role.is_vector()).then_some(Form::Full)),
    ];
    for (what, form) in forms {
        let parameters = Parameters::new(&model, &select(model.spec(), form), 0)?;
        model.set_overlay(parameters.overlay().clone())?;
        let what = format!("forward + backward to {what} ({} values)", parameters.count());
        time(&what, n, || {
            pass(&model, None)?.backward()?;
            Ok(())
        })?;
        model.take_overlay();
    }
    Ok(())
}

/// The median of nine runs, after one to warm up.
fn time(what: &str, n: usize, mut run: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<(), Box<dyn Error>> {
    run()?;
    let mut seconds = Vec::new();
    for _ in 0..9 {
        let start = Instant::now();
        run()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    println!("{:8.0} tokens/s  {:7.1} ms  {what}", n as f64 / seconds[4], 1e3 * seconds[4]);
    Ok(())
}
