//! How the time of a pass is spent: a lens that only looks at the clock.

use std::time::Instant;

use candle_core::Tensor;
use quorate_model::{At, Flow, Lens, ModelError, Routing, Site, SiteSet};

/// Stages in the order of a pass. Each ends where one of its sites is reached.
const STAGES: [(&str, &[Site]); 14] = [
    ("embedding", &[Site::ResidPre]),
    ("norms", &[Site::AttnIn, Site::FfnIn, Site::FinalNorm]),
    ("attention: q, k, v", &[Site::AttnQ, Site::AttnK, Site::AttnV]),
    ("attention: rope", &[Site::AttnQRot, Site::AttnKRot]),
    ("attention: scores and values", &[Site::Z]),
    ("attention: output", &[Site::AttnOut]),
    ("residual stream", &[Site::ResidMid, Site::ResidPost]),
    ("router", &[Site::RouterLogits]),
    ("choice of experts", &[Site::Routing]),
    ("experts: gate and up", &[Site::ExpertHidden]),
    ("experts: down", &[Site::ExpertOut]),
    ("experts: sum", &[Site::MoeOut]),
    ("dense or shared experts", &[Site::MlpHidden, Site::MlpOut]),
    ("output matrix", &[Site::Logits]),
];

/// Seconds between sites.
pub struct StageClock {
    last: Instant,
    seconds: [f64; STAGES.len()],
    sites: SiteSet,
}

impl StageClock {
    /// A clock of all stages. With experts that are streamed gate, up and down are one stage, as each expert is done with at once. A token
    /// that is decoded is computed step by step then, which takes a little longer than without a clock.
    pub fn new(streamed: bool) -> Self {
        let sites = STAGES.iter().flat_map(|(_, sites)| sites.iter().copied());
        let sites: Vec<Site> = sites.filter(|&s| !(streamed && s == Site::ExpertHidden)).collect();
        Self { last: Instant::now(), seconds: [0.0; STAGES.len()], sites: SiteSet::of(&sites) }
    }

    /// Begins a pass.
    pub fn start(&mut self) {
        self.last = Instant::now();
    }

    fn reach(&mut self, site: Site) {
        let now = Instant::now();
        if let Some(stage) = STAGES.iter().position(|(_, sites)| sites.contains(&site)) {
            self.seconds[stage] += (now - self.last).as_secs_f64();
        }
        self.last = now;
    }

    /// Seconds of each stage that took any, in the order of a pass.
    pub fn stages(&self) -> impl Iterator<Item = (&'static str, f64)> {
        STAGES.iter().map(|(name, _)| *name).zip(self.seconds).filter(|(_, s)| *s > 0.0)
    }
}

impl Lens for StageClock {
    fn sites(&self, _layer: usize) -> SiteSet {
        self.sites
    }
    fn tensor(&mut self, at: &At<'_>, _value: &mut Tensor) -> Result<Flow, ModelError> {
        self.reach(at.site);
        Ok(Flow::Continue)
    }
    fn routing(&mut self, at: &At<'_>, _routing: &mut Routing) -> Result<Flow, ModelError> {
        self.reach(at.site);
        Ok(Flow::Continue)
    }
}
