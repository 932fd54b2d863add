//! Scores of experts from routing statistics. A metric is data: a name and a pure function.

pub mod atlas;
pub mod ceft;
pub mod context;
pub mod controls;
pub mod core_experts;
pub mod easy_ep;
pub mod extremes;
pub mod mote;
pub mod premoe;
pub mod rerouting;
pub mod rice;
pub mod router_lens;
pub mod super_experts;
pub mod unified;

use quorate_lens::{ExpertMap, LensError, MetricInfo, PhaseStats, RouterStats, ScoreTable};
use serde::Serialize;

/// A score per expert.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Metric {
    /// Its name on the command line and in files.
    pub name: &'static str,
    /// One line of what it is.
    pub about: &'static str,
    /// Whether it changes when one constant is added to all router logits of a token.
    pub gauge_dependent: bool,
    /// The score from the statistics of a set of tokens; a mean over tokens, so that phases can be weighed.
    #[serde(skip)]
    pub score: fn(&PhaseStats, &ExpertMap) -> Vec<f64>,
}

/// Which tokens count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phases {
    /// Prompt tokens.
    Prompt,
    /// Answer tokens.
    Answer,
    /// All tokens alike.
    Both,
    /// The mean of the prompt's and of the answer's score, whatever their lengths.
    #[default]
    Balanced,
}

/// The metric that commands use unless told otherwise: the best on the validation split of the embedded tasks.
pub const DEFAULT_METRIC: &str = "peu";

/// Every metric.
pub const METRICS: &[&Metric] = &[
    &premoe::PEU,
    &premoe::PEU_IDENTITY,
    &premoe::PEU_SIGMOID,
    &premoe::PEU_GAUGE_FREE,
    &premoe::PEU_PER_DOMAIN,
    &premoe::TCESS,
    &premoe::TCESS_CODE,
    &unified::FREQUENCY,
    &unified::GATE_SUM,
    &unified::EAN,
    &unified::REAP,
    &unified::MAN,
    &unified::MSAN,
    &unified::GATED_NORM,
    &unified::GATED_ENERGY,
    &easy_ep::EASY_EP,
    &controls::RANDOM,
    &controls::BOTTOM,
];

/// The metric of that name.
///
/// # Errors
/// An unknown name; the nearest one is suggested.
pub fn metric(name: &str) -> Result<&'static Metric, LensError> {
    let found = METRICS.iter().find(|m| m.name == name).copied();
    found.ok_or_else(|| LensError::unknown("metric", name, METRICS.iter().map(|m| m.name)))
}

/// The score tables of all metrics, of texts with statistics `stats` that consist of `domains` (one, unless it is a
/// generalist). Metrics that need what the statistics do not know (NaN) have none.
pub fn all_tables(stats: &RouterStats, domains: &[&RouterStats], phases: Phases) -> Vec<ScoreTable> {
    let mut tables: Vec<ScoreTable> = METRICS.iter().map(|m| m.table(stats, phases)).collect();
    if let Some(table) = tables.iter_mut().find(|t| t.metric.name == premoe::PEU_PER_DOMAIN.name) {
        table.values = premoe::peu_per_domain(domains, phases);
    }
    tables.retain(|t| !t.values.iter().any(|v| v.is_nan()));
    tables
}

impl Phases {
    /// The name on the command line and in patterns.
    pub fn name(self) -> &'static str {
        match self {
            Phases::Prompt => "prompt",
            Phases::Answer => "answer",
            Phases::Both => "both",
            Phases::Balanced => "balanced",
        }
    }

    /// All of them.
    pub const ALL: [Phases; 4] = [Phases::Prompt, Phases::Answer, Phases::Both, Phases::Balanced];

    /// The phases of that name.
    pub fn of_name(name: &str) -> Option<Phases> {
        Phases::ALL.into_iter().find(|p| p.name() == name)
    }
}

impl Metric {
    /// The score table of a set of texts.
    pub fn table(&self, stats: &RouterStats, phases: Phases) -> ScoreTable {
        let map = &stats.map;
        let values = self.values(stats, phases);
        let counts = stats.pooled().count;
        let metric = MetricInfo { name: self.name.to_string(), gauge_dependent: self.gauge_dependent };
        ScoreTable { map: map.clone(), metric, values, counts }
    }

    /// The scores of a set of texts.
    fn values(&self, stats: &RouterStats, phases: Phases) -> Vec<f64> {
        let score = |phase: &PhaseStats| (self.score)(phase, &stats.map);
        match phases {
            Phases::Prompt => score(&stats.prompt),
            Phases::Answer => score(&stats.answer),
            Phases::Both => score(&stats.pooled()),
            Phases::Balanced => {
                let (prompt, answer) = (score(&stats.prompt), score(&stats.answer));
                prompt.iter().zip(&answer).map(|(p, a)| 0.5 * (p + a)).collect()
            }
        }
    }
}

/// `values / tokens`.
fn per_token(values: &[f64], stats: &PhaseStats) -> Vec<f64> {
    values.iter().map(|v| v / stats.tokens.max(1) as f64).collect()
}
