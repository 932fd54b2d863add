//! The report of A Closer Look.

use quorate_eval::statistics::{mean, quantile, standard_error};
use quorate_lens::ExpertMap;
use quorate_model::sampling::SplitMix64;
use serde_json::{Value, json};

use super::{LayerWeights, Likeness, Outputs, SHUFFLES};
use crate::routing::similarity::{MATRICES, pair_cosines, r_squared};
use crate::{Lab, MethodError, Report};

pub(super) fn norm_tables(outputs: &[(usize, usize, Outputs)], report: &mut Report) {
    let about = "diagonal: share of experts with the same place by norm of output and by score, with its standard error; top k: \
                 share of the chosen that are also the k largest";
    let columns = ["layer", "diagonal", "error", "random", "1/E", "top k", "top k random", "k/E"];
    let table = report.table("norm and score", about, &columns);
    let mut csv = "layer,norm_place,score_place,tokens\n".to_string();
    let mut all: [Vec<f64>; 6] = Default::default();
    for (layer, k, found) in outputs {
        let e = found.norms.len();
        let (own, random) = (&found.ranks, &found.random);
        let numbers = [
            mean(&own.diagonal),
            mean(&random.diagonal),
            Some(1.0 / e as f64),
            mean(&own.top_shared),
            mean(&random.top_shared),
            Some(*k as f64 / e as f64),
        ];
        all.iter_mut().zip(numbers).for_each(|(all, v)| all.extend(v));
        let mut cells = vec![json!(layer), json!(numbers[0]), json!(standard_error(&own.diagonal))];
        cells.extend(numbers[1..].iter().map(|v| json!(v)));
        table.row(cells);
        for (i, count) in own.counts.iter().enumerate() {
            csv += &format!("{layer},{},{},{count}\n", i / e, i % e);
        }
    }
    let [diagonal, random, even, top, top_random, top_even] = all.map(|v| mean(&v));
    report.headline("norm_score_diagonal", json!({ "own": diagonal, "random": random, "even": even }));
    report.headline("norm_score_top_k", json!({ "own": top, "random": top_random, "even": top_even }));
    report.file("norm-score.csv", "tokens by place of the expert's norm and of its score", csv);
}

pub(super) fn output_tables(map: &ExpertMap, outputs: &[(usize, usize, Outputs)], threshold: f32, report: &mut Report) {
    let about = format!(
        "similarity: 1 - arccos(cos)/pi of two experts' outputs, 0.5 is orthogonal; active: act(gate x) of size {threshold} or more"
    );
    let columns = ["layer", "similarity", "smallest pair", "largest pair", "norm", "active"];
    let table = report.table("outputs", &about, &columns);
    let mut csv = "layer,expert,other,similarity\n".to_string();
    let mut maps = [(); 3].map(|()| vec![None; map.total()]);
    let mut all: Vec<f64> = Vec::new();
    for (layer, _, found) in outputs {
        let extreme = |pick: fn(f64, f64) -> f64| found.alike.iter().copied().reduce(pick);
        let means = [mean(&found.norms), mean(&found.active)];
        let [norm, active] = means.map(|m| json!(m));
        let (least, most) = (json!(extreme(f64::min)), json!(extreme(f64::max)));
        table.row([json!(layer), json!(mean(&found.alike)), least, most, norm, active]);
        all.extend(mean(&found.alike));
        let e = found.norms.len();
        let mut sums = vec![0.0; e];
        for ((i, j), v) in (0..e).flat_map(|i| (0..i).map(move |j| (i, j))).zip(&found.alike) {
            sums[i] += v;
            sums[j] += v;
            csv += &format!("{layer},{i},{j},{v}\n");
        }
        let start = map.moe_index(*layer).map_or(0, |moe| map.range(moe).start);
        for expert in 0..e {
            let others = (e > 1).then(|| sums[expert] / (e - 1) as f64);
            let values = [Some(found.norms[expert]), others, Some(found.active[expert])];
            maps.iter_mut().zip(values).for_each(|(map, v)| map[start + expert] = v);
        }
    }
    report.headline("output_similarity", mean(&all));
    report.map("output norm", "mean norm of the expert's output before its gate", map, &maps[0], false);
    report.map("output similarity", "mean angular similarity with the layer's other experts", map, &maps[1], false);
    report.map("active", "share of the expert's activations that are active", map, &maps[2], false);
    report.file("outputs.csv", "angular similarity of the outputs of all pairs of experts", csv);
}

pub(super) fn weight_tables(weights: &[LayerWeights], report: &mut Report) {
    let about = "mean cosine of two experts' matrices: flattened, neuron averages, neurons reordered; tau of the order";
    let columns = ["layer", "matrix", "flattened", "averaged", "reordered", "reordered random", "tau"];
    let table = report.table("weights", about, &columns);
    let mut csv = "layer,expert,other,matrix,flattened,averaged,reordered,tau,reordered_random\n".to_string();
    let number = |v: Option<f64>| v.map_or_else(String::new, |v| v.to_string());
    let parts: [fn(&Likeness) -> Option<f64>; 5] = [
        |l| Some(l.flattened),
        |l| Some(l.averaged),
        |l| l.reordered.map(|r| r.0),
        |l| l.reordered.map(|r| r.2),
        |l| l.reordered.map(|r| r.1),
    ];
    let means = |of: &[&Likeness]| parts.map(|part| mean(&of.iter().filter_map(|l| part(l)).collect::<Vec<_>>()));
    for (layer, _, compared) in weights {
        for (matrix, name) in MATRICES.iter().enumerate() {
            let of: Vec<&Likeness> = compared.iter().filter(|l| l.matrix == matrix).collect();
            let mut cells: Vec<Value> = vec![json!(layer), json!(name)];
            cells.extend(means(&of).map(|v| json!(v)));
            table.row(cells);
        }
        for l in compared {
            let (i, j) = l.pair;
            let [flattened, averaged, reordered, random, tau] = parts.map(|part| number(part(l)));
            let name = MATRICES[l.matrix];
            csv += &format!("{layer},{i},{j},{name},{flattened},{averaged},{reordered},{tau},{random}\n");
        }
    }
    let all: Vec<&Likeness> = weights.iter().flat_map(|w| &w.2).collect();
    let [flattened, averaged, reordered, random, tau] = means(&all);
    report.headline(
        "weight_similarity",
        json!({ "flattened": flattened, "averaged": averaged, "reordered": reordered, "reordered_random": random, "tau": tau }),
    );
    report.file("weights.csv", "cosines of the weights of pairs of experts", csv);
}

/// `r^2` of router rows with neuron averages, pair by pair, beside router rows in random order.
pub(super) fn gate_rows(lab: &Lab<'_>, weights: &[LayerWeights], report: &mut Report) -> Result<(), MethodError> {
    let about = format!(
        "r^2 of the cosines of pairs of router rows with those of neuron averages; random: {SHUFFLES} orders of the rows"
    );
    let columns = ["layer", "matrix", "r^2", "random mean", "random p95"];
    let table = report.table("router rows", &about, &columns);
    let mut all: [(Vec<f64>, Vec<f64>); 3] = Default::default();
    for (layer, averages, _) in weights {
        let router = lab.model.router_weight(*layer)?;
        let (rows, d) = (router.to_f32(), router.cols);
        let own = pair_cosines(&rows, d);
        let mut random = SplitMix64::new(lab.seed ^ *layer as u64);
        let mut order: Vec<usize> = (0..router.rows).collect();
        let shuffled: Vec<Vec<f64>> = (0..SHUFFLES)
            .map(|_| {
                random.shuffle(&mut order);
                let at = |i: usize, j: usize| own[i.max(j) * (i.max(j) - 1) / 2 + i.min(j)];
                (0..order.len())
                    .flat_map(|i| (0..i).map(move |j| (i, j)))
                    .map(|(i, j)| at(order[i], order[j]))
                    .collect()
            })
            .collect();
        for (matrix, name) in MATRICES.iter().enumerate() {
            let theirs = pair_cosines(&averages[matrix], d);
            let found = r_squared(&own, &theirs);
            let chance: Vec<f64> = shuffled.iter().filter_map(|s| r_squared(s, &theirs)).collect();
            table.row([json!(layer), json!(name), json!(found), json!(mean(&chance)), json!(quantile(&chance, 0.95))]);
            all[matrix].0.extend(found);
            all[matrix].1.extend(mean(&chance));
        }
    }
    let means = MATRICES
        .iter()
        .zip(&all)
        .map(|(name, (own, random))| (name.to_string(), json!({ "own": mean(own), "random": mean(random) })));
    report.headline("router_rows_r_squared", means.collect::<serde_json::Map<_, _>>());
    Ok(())
}
