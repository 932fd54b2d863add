//! Patterns with the scores of every metric: merging them, and what a profile is never shown without.

use quorate_formats::spec::ModelSpec;
use quorate_lens::{Coverage, Keep, LensError, Pattern, PatternInfo, ProfileData, Scope, Selection, coverage, overlap};
use serde::Serialize;

use crate::experts::unified::FREQUENCY;
use crate::{DEFAULT_METRIC, Phases, all_tables};

/// The phases that patterns were profiled with, if they agree.
///
/// # Errors
/// They do not, or there are no patterns.
pub fn common_phases(patterns: &[&Pattern]) -> Result<Phases, LensError> {
    let Some((first, rest)) = patterns.split_first() else {
        return Err(LensError::invalid("patterns", "there are none to merge"));
    };
    if let Some(other) = rest.iter().find(|p| p.info.phases != first.info.phases) {
        let problem = format!(
            "`{}` and `{}` count different tokens ({} and {}); help: profile them alike",
            first.info.name, other.info.name, first.info.phases, other.info.phases
        );
        return Err(LensError::invalid("patterns", problem));
    }
    let phases = &first.info.phases;
    Phases::of_name(phases).ok_or_else(|| LensError::unknown("phase", phases, Phases::ALL.map(Phases::name)))
}

/// One pattern of several: their tokens pooled. Compact patterns have only scores; then those are averaged by tokens.
/// Patterns of one task are shards of it; patterns of several make a generalist, which is not retrieved.
///
/// # Errors
/// Patterns of different models.
pub fn merged(name: &str, patterns: &[&Pattern], phases: Phases) -> Result<Pattern, LensError> {
    let Some((first, rest)) = patterns.split_first() else {
        return Err(LensError::invalid("patterns", "there are none to merge"));
    };
    rest.iter().try_for_each(|p| p.check_model(&first.info.fingerprint))?;
    let mut files: Vec<String> = patterns.iter().flat_map(|p| p.info.data.iter().cloned()).collect();
    files.dedup();
    let same = rest.iter().all(|p| p.info.name == first.info.name);
    let info = PatternInfo {
        name: name.to_string(),
        fingerprint: first.info.fingerprint.clone(),
        data: files,
        phases: phases.name().to_string(),
        merged_from: if same { Vec::new() } else { patterns.iter().map(|p| p.info.name.clone()).collect() },
        key_layer: first.info.key_layer,
        ..PatternInfo::default()
    };
    let Some(parts) = patterns.iter().map(|p| p.data.as_ref()).collect::<Option<Vec<&ProfileData>>>() else {
        return Pattern::averaged(info, patterns);
    };
    let mut data = ProfileData::new(&first.map);
    parts.iter().for_each(|part| data.merge(part));
    let domains = if same { vec![&data.stats] } else { parts.iter().map(|p| &p.stats).collect() };
    let tables = all_tables(&data.stats, &domains, phases);
    Ok(Pattern::build(info, data, |_| tables))
}

/// The metric to choose a pattern's experts by: [`DEFAULT_METRIC`], or frequency if the recording that the pattern comes from
/// does not know enough for it.
pub fn best_metric(pattern: &Pattern) -> &'static str {
    if pattern.scores(DEFAULT_METRIC).is_ok() { DEFAULT_METRIC } else { FREQUENCY.name }
}

/// How well a pattern's kept experts would serve texts that were not profiled, and what it shares with others.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Task.
    pub name: String,
    /// Texts profiled.
    pub items: u64,
    /// Prompt tokens profiled.
    pub prompt_tokens: u64,
    /// Answer tokens profiled.
    pub answer_tokens: u64,
    /// Texts held out.
    pub heldout_items: u64,
    /// Which tokens count.
    pub phases: String,
    /// Metric that chose the kept experts.
    pub metric: String,
    /// Coverage of the held-out texts at several numbers of experts; `None` if nothing was held out.
    pub heldout_coverage: Vec<KeptCoverage>,
    /// What it shares with the other patterns.
    pub overlap: Overlap,
}

/// Coverage with `keep` experts per layer on average.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct KeptCoverage {
    /// Experts per layer.
    pub keep: usize,
    /// Coverage.
    pub coverage: Option<Coverage>,
}

/// Shares of the kept experts that other patterns keep too.
#[derive(Clone, Debug, Serialize)]
pub struct Overlap {
    /// Experts per layer.
    pub keep: usize,
    /// Mean over the others; `None` without others.
    pub mean: Option<f64>,
    /// What random experts would share.
    pub chance: f64,
    /// The other pattern that shares most.
    pub nearest: Option<Share>,
}

/// The share that one other pattern keeps too.
#[derive(Clone, Debug, Serialize)]
pub struct Share {
    /// The other pattern.
    pub name: String,
    /// The share.
    pub overlap: f64,
}

/// Summarises a pattern beside others of the same model.
///
/// # Errors
/// A pattern without scores.
pub fn summary(spec: &ModelSpec, pattern: &Pattern, others: &[Pattern]) -> Result<Summary, LensError> {
    let map = &pattern.map;
    let floor: Vec<usize> = map.layers.iter().map(|&l| spec.moe(l).map_or(0, |m| m.top_k)).collect();
    let top_k = floor.iter().max().copied().unwrap_or(1);
    let experts = map.experts.iter().min().copied().unwrap_or(0);
    let selection = Selection { scope: Scope::Global, floor, ..Selection::default() };
    let kept = |p: &Pattern, k: usize| selection.select(p.scores(best_metric(p))?, Keep::Total(k * map.n_layers()));

    let numbers = [experts / 2, experts * 3 / 8, experts / 4, experts * 3 / 16, experts / 8];
    let mut heldout_coverage = Vec::new();
    for keep in numbers.into_iter().filter(|&k| k >= top_k) {
        let coverage = coverage(map, &pattern.heldout_count, &pattern.heldout_gate, &kept(pattern, keep)?);
        heldout_coverage.push(KeptCoverage { keep, coverage });
    }
    let quarter = (experts / 4).max(top_k);
    let own = kept(pattern, quarter)?;
    let mut shares = Vec::new();
    for other in others.iter().filter(|o| o.info.name != pattern.info.name && o.info.merged_from.is_empty()) {
        shares.push(Share { name: other.info.name.clone(), overlap: overlap(&own, &kept(other, quarter)?) });
    }
    let mean = (!shares.is_empty()).then(|| shares.iter().map(|s| s.overlap).sum::<f64>() / shares.len() as f64);
    let overlap = Overlap {
        keep: quarter,
        mean,
        chance: quarter as f64 / experts.max(1) as f64,
        nearest: shares.into_iter().max_by(|a, b| a.overlap.total_cmp(&b.overlap)),
    };
    Ok(Summary {
        name: pattern.info.name.clone(),
        items: pattern.info.items,
        prompt_tokens: pattern.info.tokens[0],
        answer_tokens: pattern.info.tokens[1],
        heldout_items: pattern.info.heldout_items,
        phases: pattern.info.phases.clone(),
        metric: best_metric(pattern).to_string(),
        heldout_coverage,
        overlap,
    })
}
