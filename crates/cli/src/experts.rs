//! The flags that choose experts, and making the model ready with them; shared by the commands that run a model.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use quorate_formats::spec::ModelSpec;
use quorate_lens::{Choice, Interventions, Keep, KeyMetric, Library, Plan, Scope, read_experts};
use quorate_methods::DEFAULT_METRIC;
use quorate_model::{Model, RoutingMode};

use crate::common::{Common, parse_bytes};
use crate::stream::{CacheArg, Favourites, SLACK_BYTES, StreamIoArg, Streaming, overhead_bytes, stream};

/// How many experts to keep, and which.
#[derive(Args, Clone, Debug)]
pub struct ExpertArgs {
    /// Metric that ranks experts (`quorate methods` lists them)
    #[arg(long, default_value = DEFAULT_METRIC)]
    pub metric: String,
    /// Experts kept per layer (on average, if layers compete); left out, half of them
    #[arg(long, value_name = "K")]
    pub keep: Option<usize>,
    /// Keep in every layer the fewest experts that hold this share of its positive scores, e.g. 0.9
    #[arg(long, value_name = "P", conflicts_with_all = ["keep", "memory", "scope"])]
    pub share: Option<f64>,
    /// Keep (or with --on-miss stream hold) as many experts as fit into this much memory for the whole process, e.g. 4GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, conflicts_with = "keep")]
    pub memory: Option<u64>,
    /// Whether layers keep equal numbers or compete [default: global]
    #[arg(long, value_enum)]
    pub scope: Option<ScopeArg>,
    /// What happens to tokens whose expert is not kept [default: mask-full-gates]
    #[arg(long, value_enum)]
    pub mode: Option<ModeArg>,
    /// Experts kept whatever their score, as LAYER:EXPERT pairs
    #[arg(long, value_name = "L:E,..", value_delimiter = ',', value_parser = parse_pair)]
    pub protect: Vec<(usize, usize)>,
    /// The same from a JSON list of {layer, expert}, such as super_experts.json of `quorate super-experts`
    #[arg(long, value_name = "FILE")]
    pub protect_file: Option<PathBuf>,
    /// How the distance between prompts and tasks is measured
    #[arg(long, value_enum, default_value_t = KeyArg::Hidden)]
    pub key: KeyArg,
    /// What happens when an expert that is not in memory is wanted
    #[arg(long, value_enum, default_value_t = OnMiss::Mask)]
    pub on_miss: OnMiss,
    /// With --on-miss stream: which experts stay in memory
    #[arg(long, value_enum, default_value_t = CacheArg::Prefetch)]
    pub cache: CacheArg,
    /// With --on-miss stream: who reads experts
    #[arg(long, value_enum, default_value_t = StreamIoArg::Auto)]
    pub stream_io: StreamIoArg,
}

impl ExpertArgs {
    fn streaming(&self) -> Streaming {
        Streaming { policy: self.cache.into(), io: self.stream_io.into(), memory: self.memory }
    }
}

/// [`Scope`] on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ScopeArg {
    /// Every layer keeps the same number
    Local,
    /// All layers compete, scores as they are
    #[default]
    Global,
    /// All layers compete with their share of the layer's score
    GlobalShare,
    /// Every layer keeps the same share of its positive scores
    EqualShare,
}

/// [`RoutingMode`] on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Before top-k; the gates come from the kept experts only (what a pruned checkpoint computes)
    Mask,
    /// Before top-k; the gates come from all experts
    #[default]
    MaskFullGates,
    /// After top-k: missing experts contribute nothing
    Drop,
    /// After top-k, the other gates scaled up
    DropRenormalise,
}

/// [`KeyMetric`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KeyArg {
    /// L2 distance of the first router's mean input
    Hidden,
    /// Its cosine distance
    HiddenCosine,
    /// L2 distance of the first router's mean scores (the public method)
    Router,
    /// Its cosine distance
    RouterCosine,
}

/// What to do about missing experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnMiss {
    /// Tokens are routed around it; only the task's experts are loaded
    Mask,
    /// It is read from the disk: results are those of the whole model, whatever --memory
    Stream,
}

impl From<ScopeArg> for Scope {
    fn from(scope: ScopeArg) -> Scope {
        match scope {
            ScopeArg::Local => Scope::Local,
            ScopeArg::Global => Scope::Global,
            ScopeArg::GlobalShare => Scope::GlobalShare,
            ScopeArg::EqualShare => Scope::EqualShare,
        }
    }
}

impl From<ModeArg> for RoutingMode {
    fn from(mode: ModeArg) -> RoutingMode {
        match mode {
            ModeArg::Mask => RoutingMode::Mask,
            ModeArg::MaskFullGates => RoutingMode::MaskFullGates,
            ModeArg::Drop => RoutingMode::Drop,
            ModeArg::DropRenormalise => RoutingMode::DropRenormalise,
        }
    }
}

impl From<KeyArg> for KeyMetric {
    fn from(key: KeyArg) -> KeyMetric {
        match key {
            KeyArg::Hidden => KeyMetric::Hidden,
            KeyArg::HiddenCosine => KeyMetric::HiddenCosine,
            KeyArg::Router => KeyMetric::Router,
            KeyArg::RouterCosine => KeyMetric::RouterCosine,
        }
    }
}

fn parse_pair(text: &str) -> Result<(usize, usize), String> {
    let bad = || format!("`{text}` is no LAYER:EXPERT pair");
    let (layer, expert) = text.split_once(':').ok_or_else(bad)?;
    Ok((layer.parse().map_err(|_| bad())?, expert.parse().map_err(|_| bad())?))
}

/// What takes memory besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct Beside {
    /// Tokens in KV caches.
    pub cache_tokens: usize,
    /// Rows of logits computed at once.
    pub logit_rows: usize,
}

impl Beside {
    /// One sequence of up to `tokens` tokens, as far as the model's context goes.
    pub fn sequence(spec: &ModelSpec, tokens: usize) -> Beside {
        Beside { cache_tokens: tokens.min(spec.max_position_embeddings), logit_rows: 1 }
    }
}

impl ExpertArgs {
    /// The choice for a model; with `--memory`, what fits beside the rest.
    pub fn choice(&self, model: &Model, beside: Beside) -> Result<Choice> {
        let scope: Scope = self.scope.unwrap_or_default().into();
        let keep = match (self.keep, self.memory) {
            _ if self.share.is_some() => self.share.map(Keep::Share),
            (Some(k), _) => Some(Keep::per_layer(model.spec(), scope, k)?),
            (None, Some(bytes)) => {
                let kv = model.cache_layout().bytes(beside.cache_tokens);
                let overhead = overhead_bytes(model, beside);
                let plan = |overhead| model.weights().memory_plan(bytes, kv, overhead);
                // What an error suggests should be enough the next time too, when a little more is measured.
                let plan = plan(overhead).or_else(|_| plan(overhead + SLACK_BYTES))?;
                Some(Keep::per_layer(model.spec(), scope, plan.experts_per_layer)?)
            }
            (None, None) => None,
        };
        let mode = self.mode.unwrap_or_default().into();
        Ok(Choice { metric: self.metric.clone(), keep, scope, mode, protect: self.protected()?, even_groups: false })
    }

    /// Whether the model's experts are streamed.
    pub fn streams(&self, model: &Model) -> bool {
        self.on_miss == OnMiss::Stream && model.spec().is_moe()
    }

    /// Refuses flags that say which experts are left out together with the one that leaves out none.
    fn check_streaming(&self) -> Result<()> {
        let chooses = self.keep.is_some() || self.share.is_some() || self.scope.is_some() || self.mode.is_some();
        if self.on_miss == OnMiss::Stream && (chooses || self.protects()) {
            bail!(
                "--keep, --share, --scope, --mode and --protect leave experts out, but --on-miss stream uses all; help: give --memory SIZE in place of them"
            );
        }
        Ok(())
    }

    /// Whether some experts are kept whatever their score.
    fn protects(&self) -> bool {
        !self.protect.is_empty() || self.protect_file.is_some()
    }

    /// The experts of `--protect` and of `--protect-file`.
    fn protected(&self) -> Result<Vec<(usize, usize)>> {
        let mut protect = self.protect.clone();
        if let Some(path) = &self.protect_file {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            let experts = read_experts(&path.display().to_string(), &text)?;
            protect.extend(experts.into_iter().map(|id| (id.layer, id.expert)));
        }
        Ok(protect)
    }

    /// Loads the experts of a task's pattern, or all of them if `task` is `None`; returns the plan. With `--on-miss stream`
    /// none is left out, and there is no plan.
    pub fn load(
        &self,
        common: &Common,
        model: &mut Model,
        library: &Library,
        task: Option<&str>,
        beside: Beside,
    ) -> Result<Option<Plan>> {
        let fingerprint = model.checkpoint().fingerprint().to_string();
        if self.streams(model) {
            let favourites = match task {
                Some(task) => Favourites::of_pattern(&library.get(&fingerprint, task)?, model)?,
                None => Favourites::default(),
            };
            stream(common, model, &favourites, self.streaming(), beside)?;
            return Ok(None);
        }
        let Some(task) = task else {
            common.load_all_experts(model)?;
            return Ok(None);
        };
        let pattern = library.get(&fingerprint, task)?;
        let plan = self.choice(model, beside)?.plan(&pattern, model.spec(), &fingerprint)?;
        let kept = plan.kept(model.spec(), &fingerprint)?;
        common.load_experts(model, &kept, plan.routing_mode)?;
        Ok(Some(plan))
    }
}

/// Reads a plan file and makes the model ready: its experts loaded (or, if experts are streamed, pinned), its
/// interventions prepared.
pub fn load_plan(
    common: &Common,
    model: &mut Model,
    path: &Path,
    streaming: Option<(&ExpertArgs, Beside)>,
) -> Result<(Plan, Interventions)> {
    let plan = Plan::read(path)?;
    let fingerprint = model.checkpoint().fingerprint().to_string();
    let kept = plan.kept(model.spec(), &fingerprint).with_context(|| path.display().to_string())?;
    match streaming.filter(|(experts, _)| experts.streams(model)) {
        Some((experts, beside)) => {
            stream(common, model, &Favourites::of_plan(&kept, model), experts.streaming(), beside)?;
        }
        None => common.load_experts(model, &kept, plan.routing_mode).with_context(|| path.display().to_string())?,
    }
    let folder = path.parent().map(PathBuf::from).unwrap_or_default();
    let interventions = Interventions::prepare(&plan.intervene, model.spec(), &folder);
    let interventions = interventions.with_context(|| path.display().to_string())?;
    Ok((plan, interventions))
}

/// Number of experts in memory per MoE layer.
pub fn kept_per_layer(model: &Model) -> Vec<usize> {
    model.spec().moe_layers().iter().map(|&layer| model.weights().experts_resident_in(layer)).collect()
}

/// Refuses what a dense model cannot do.
pub fn need_experts(model: &Model) -> Result<()> {
    if !model.spec().is_moe() {
        bail!("the model has no experts to choose from; help: leave --task and --keep out");
    }
    Ok(())
}

/// Common to commands that take `--task`: opens the model with the memory limit of `--memory`. What chooses among a
/// task's experts is refused if there is no task.
pub fn open(common: &Common, experts: &ExpertArgs, task: &str) -> Result<(Model, Library)> {
    quorate_methods::metric(&experts.metric)?;
    experts.check_streaming()?;
    let chooses = experts.keep.is_some() || experts.share.is_some() || experts.protects();
    if task == "none" && chooses {
        bail!(
            "--keep, --share, --protect and --protect-file choose among the experts of a task, but --task is `none`; help: give --task NAME"
        );
    }
    let model = common.open_model(experts.memory)?;
    if experts.keep.is_some() || experts.share.is_some() {
        need_experts(&model)?;
    }
    Ok((model, common.open_library()?))
}
