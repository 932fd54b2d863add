//! Interventions as data: at a site, on chosen layers, units, positions and phases, one operation.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use quorate_formats::spec::{FfnSpec, ModelSpec};
use quorate_model::{At, Flow, Lens, ModelError, NO_EXPERT, Phase, Routing, Site, SiteSet, Units, drop_slots, ops};
use serde::{Deserialize, Serialize};

use crate::{Indices, LensError};

/// One intervention. All selectors must match for a value to change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Intervention {
    /// Where.
    pub site: Site,
    /// Decoder layers.
    pub layers: Indices,
    /// Heads, experts or neurons, as the site has them.
    pub units: Indices,
    /// Absolute positions in the sequence.
    pub positions: Indices,
    /// Part of the text.
    pub phase: PhaseSelector,
    /// What happens.
    pub op: Op,
}

/// An intervention as it stands in a plan, one flat table.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    site: Site,
    op: String,
    #[serde(default)]
    layers: Indices,
    #[serde(default)]
    units: Indices,
    #[serde(default)]
    positions: Indices,
    #[serde(default)]
    phase: PhaseSelector,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    share: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Value>,
}

impl TryFrom<Written> for Intervention {
    type Error = String;
    fn try_from(w: Written) -> Result<Intervention, String> {
        let need = |name: &str| format!("operation `{}` needs `{name}`", w.op);
        let value = || w.value.clone().ok_or_else(|| need("value"));
        let op = match w.op.as_str() {
            "mask" => Op::Mask,
            "drop" => Op::Drop,
            "drop-renormalise" => Op::DropRenormalise,
            "skip" => Op::Skip { by: w.by.ok_or_else(|| need("by"))? },
            "skip-renormalise" => Op::SkipRenormalise { by: w.by.ok_or_else(|| need("by"))? },
            "force" => Op::Force,
            "zero" => Op::Zero,
            "scale" => Op::Scale { by: w.by.ok_or_else(|| need("by"))? },
            "bias" => Op::Bias { by: w.by.ok_or_else(|| need("by"))? },
            "mean" => Op::Mean { value: value()? },
            "patch" => Op::Patch { value: value()? },
            "add" => Op::Add { value: value()?, scale: w.scale.unwrap_or(1.0) },
            "mix" => Op::Mix { value: value()?, share: w.share.ok_or_else(|| need("share"))? },
            other => {
                let near = crate::nearest_name(other, OP_NAMES).map(|n| format!(", did you mean `{n}`?"));
                return Err(format!(
                    "there is no operation `{other}`{}; help: the operations are {}",
                    near.unwrap_or_default(),
                    OP_NAMES.join(", ")
                ));
            }
        };
        let fits = [
            (w.by.is_some(), op.by().is_some(), "by"),
            (w.scale.is_some(), matches!(op, Op::Add { .. }), "scale"),
            (w.share.is_some(), matches!(op, Op::Mix { .. }), "share"),
            (w.value.is_some(), op.value().is_some(), "value"),
        ];
        if let Some((.., name)) = fits.iter().find(|(given, used, _)| *given && !used) {
            return Err(format!("operation `{}` has no `{name}`", w.op));
        }
        let Written { site, layers, units, positions, phase, .. } = w;
        Ok(Intervention { site, layers, units, positions, phase, op })
    }
}

impl From<Intervention> for Written {
    fn from(i: Intervention) -> Written {
        let (by, mut scale, mut share) = (i.op.by(), None, None);
        match i.op {
            Op::Add { scale: s, .. } => scale = Some(s),
            Op::Mix { share: s, .. } => share = Some(s),
            _ => {}
        }
        let (op, value) = (i.op.name().to_string(), i.op.value().cloned());
        let Intervention { site, layers, units, positions, phase, .. } = i;
        Written { site, op, layers, units, positions, phase, by, scale, share, value }
    }
}

/// Which rows by phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PhaseSelector {
    /// All rows.
    #[default]
    All,
    /// Prompt rows.
    Prefill,
    /// The last prompt row only.
    Last,
    /// Rows of the answer, generated or given.
    Decode,
    /// The last prompt row and every answer row: each row that predicts a token of the answer.
    EveryStepLast,
}

impl PhaseSelector {
    fn contains(self, phase: Phase) -> bool {
        match self {
            PhaseSelector::All => true,
            PhaseSelector::Prefill => phase.is_prompt(),
            PhaseSelector::Last => phase == Phase::PromptLast,
            PhaseSelector::Decode => !phase.is_prompt(),
            PhaseSelector::EveryStepLast => phase != Phase::Prompt,
        }
    }
}

const OP_NAMES: [&str; 13] = [
    "mask",
    "drop",
    "drop-renormalise",
    "skip",
    "skip-renormalise",
    "force",
    "scale",
    "bias",
    "zero",
    "mean",
    "patch",
    "add",
    "mix",
];

/// The operations. `u` is the value given, `x` the value found.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Experts cannot be chosen: `router_logits := -inf`. A lower-ranked expert fills the slot.
    Mask,
    /// At `routing`: the slot of the expert contributes nothing; nobody fills it.
    Drop,
    /// As `drop`, the surviving gates scaled up to the sum before.
    DropRenormalise,
    /// At `routing`: slots whose gate is below `by` times the row's largest gate contribute nothing. The largest stays.
    Skip {
        /// Share of the largest gate.
        by: f32,
    },
    /// As `skip`, the surviving gates scaled up to the sum before.
    SkipRenormalise {
        /// Share of the largest gate.
        by: f32,
    },
    /// Experts are always chosen (site `selection`); their gate is their own score.
    Force,
    /// `x * by`; at `routing` the gates of the experts.
    Scale {
        /// Factor.
        by: f32,
    },
    /// `x + by`: a constant on logits, scores or any other value.
    Bias {
        /// Summand.
        by: f32,
    },
    /// `0`.
    Zero,
    /// `u`: a stored mean.
    Mean {
        /// The mean.
        value: Value,
    },
    /// The value that another run had at the same position; rows beyond it stay.
    Patch {
        /// A recording of this site, rows = positions.
        value: Value,
    },
    /// `x + scale * u`.
    Add {
        /// The vector.
        value: Value,
        /// Its factor.
        scale: f32,
    },
    /// `(1 - share) x + share u`.
    Mix {
        /// The vector.
        value: Value,
        /// Share of the vector.
        share: f32,
    },
}

/// Numbers in a plan: written out, or in a safetensors file beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// Written out.
    Inline(Vec<f32>),
    /// A tensor of a safetensors file; a relative path is relative to the plan. With `{layer}` in the name, one tensor
    /// per layer.
    File {
        /// The file.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
}

impl Op {
    fn name(&self) -> &'static str {
        match self {
            Op::Mask => "mask",
            Op::Drop => "drop",
            Op::DropRenormalise => "drop-renormalise",
            Op::Skip { .. } => "skip",
            Op::SkipRenormalise { .. } => "skip-renormalise",
            Op::Force => "force",
            Op::Scale { .. } => "scale",
            Op::Bias { .. } => "bias",
            Op::Zero => "zero",
            Op::Mean { .. } => "mean",
            Op::Patch { .. } => "patch",
            Op::Add { .. } => "add",
            Op::Mix { .. } => "mix",
        }
    }

    fn value(&self) -> Option<&Value> {
        match self {
            Op::Mean { value } | Op::Patch { value } | Op::Add { value, .. } | Op::Mix { value, .. } => Some(value),
            _ => None,
        }
    }

    fn by(&self) -> Option<f32> {
        match *self {
            Op::Scale { by } | Op::Bias { by } | Op::Skip { by } | Op::SkipRenormalise { by } => Some(by),
            _ => None,
        }
    }

    /// Sites at which the operation makes sense.
    fn allowed_at(&self, site: Site) -> bool {
        match self {
            Op::Mask => site == Site::RouterLogits,
            Op::Drop | Op::DropRenormalise | Op::Skip { .. } | Op::SkipRenormalise { .. } => site == Site::Routing,
            Op::Force => site == Site::Selection,
            Op::Scale { .. } => site != Site::Selection,
            _ => site != Site::Routing,
        }
    }

    /// Applies the operation to the values of one unit in one row; `u` is as long as `x`, if the operation needs it.
    fn apply(&self, x: &mut [f32], u: &[f32]) {
        match self {
            Op::Mask => x.fill(f32::NEG_INFINITY),
            Op::Force => x.fill(f32::INFINITY),
            Op::Scale { by } => x.iter_mut().for_each(|x| *x *= by),
            Op::Bias { by } => x.iter_mut().for_each(|x| *x += by),
            Op::Zero => x.fill(0.0),
            Op::Mean { .. } => x.copy_from_slice(u),
            Op::Patch { .. } => {
                let both = x.len().min(u.len()); // keys that one of the texts does not have are invisible
                x[..both].copy_from_slice(&u[..both]);
            }
            Op::Add { scale, .. } => x.iter_mut().zip(u).for_each(|(x, u)| *x += scale * u),
            Op::Mix { share, .. } => x.iter_mut().zip(u).for_each(|(x, u)| *x = (1.0 - share) * *x + share * u),
            Op::Drop | Op::DropRenormalise | Op::Skip { .. } | Op::SkipRenormalise { .. } => {}
        }
    }
}

/// Interventions made ready for one model: selectors checked, files read. Applied in the order given.
#[derive(Clone, Debug, Default)]
pub struct Interventions {
    list: Vec<Ready>,
    n_layers: usize,
}

#[derive(Clone, Debug)]
struct Ready {
    intervention: Intervention,
    /// Values per decoder layer; one entry under `usize::MAX` if all layers share it.
    values: HashMap<usize, Vec<f32>>,
    /// Units of the site per decoder layer, 0 where a layer does not have it.
    units: Vec<usize>,
}

impl Interventions {
    /// Checks interventions against a model and reads their files; relative paths start at `folder`.
    ///
    /// # Errors
    /// A layer or unit that the model does not have, an operation that the site does not allow, a missing or unreadable
    /// file.
    pub fn prepare(list: &[Intervention], spec: &ModelSpec, folder: &Path) -> Result<Interventions, LensError> {
        let ready = |i: &Intervention| -> Result<Ready, LensError> {
            check(i, spec)?;
            let units = (0..spec.layers.len()).map(|l| unit_count(i.site, spec, l).unwrap_or(0)).collect();
            Ok(Ready { values: read_values(i, spec, folder)?, intervention: i.clone(), units })
        };
        let list = list.iter().map(ready).collect::<Result<Vec<_>, _>>()?;
        Ok(Interventions { list, n_layers: spec.layers.len() })
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

fn check(i: &Intervention, spec: &ModelSpec) -> Result<(), LensError> {
    let what = format!("intervention `{}` at {}", i.op.name(), i.site);
    if !i.op.allowed_at(i.site) {
        let fitting: Vec<&str> = Site::ALL.iter().filter(|&&s| i.op.allowed_at(s)).map(|s| s.name()).collect();
        return Err(LensError::invalid(what, format!("not possible there; help: use it at {}", fitting.join(", "))));
    }
    if let Some(layer) = i.layers.max().filter(|&l| i.site.per_layer() && l >= spec.layers.len()) {
        return Err(LensError::invalid(
            what,
            format!("layer {layer} does not exist, the model has {}", spec.layers.len()),
        ));
    }
    let units = (0..spec.layers.len()).filter(|&l| i.layers.contains(l)).filter_map(|l| unit_count(i.site, spec, l));
    let Some(most) = units.max() else {
        return Err(LensError::invalid(what, "none of the chosen layers has this site; help: choose other layers"));
    };
    if let Some(unit) = i.units.max().filter(|&u| u >= most) {
        return Err(LensError::invalid(what, format!("unit {unit} does not exist, there are {most}")));
    }
    Ok(())
}

/// Number of units that a site has in a layer; `None` if the layer does not have the site.
fn unit_count(site: Site, spec: &ModelSpec, layer: usize) -> Option<usize> {
    let layer = &spec.layers[layer];
    let moe = match &layer.ffn {
        FfnSpec::Moe(moe) => Some(moe),
        FfnSpec::Dense { .. } => None,
    };
    match (site, site.units()) {
        (Site::Z, _) if layer.delta.is_some() => layer.delta.as_ref().map(|d| d.n_value_heads),
        (_, Units::Head) if layer.delta.is_some() => None,
        (Site::AttnK | Site::AttnV | Site::AttnKRot, _) => Some(layer.attn.n_kv_heads),
        (_, Units::Head) => Some(layer.attn.n_heads),
        (_, Units::Expert) => moe.map(|m| m.n_experts),
        (Site::MoeOut, _) => moe.map(|_| spec.hidden_size),
        (Site::MlpHidden, _) => match (&layer.ffn, moe) {
            (FfnSpec::Dense { intermediate_size, .. }, _) => Some(*intermediate_size),
            (_, Some(moe)) => moe.shared.as_ref().map(|s| s.intermediate_size),
            _ => None,
        },
        (Site::Logits, _) => Some(spec.vocab_size),
        _ => Some(spec.hidden_size),
    }
}

fn read_values(i: &Intervention, spec: &ModelSpec, folder: &Path) -> Result<HashMap<usize, Vec<f32>>, LensError> {
    let mut values = HashMap::new();
    match i.op.value() {
        None => {}
        Some(Value::Inline(inline)) => {
            values.insert(usize::MAX, inline.clone());
        }
        Some(Value::File { file, tensor }) => {
            let path = folder.join(file);
            let tensors = quorate_formats::SafetensorsFile::open(&path)?;
            if tensor.contains("{layer}") {
                let has_site = |l: &usize| i.layers.contains(*l) && unit_count(i.site, spec, *l).is_some();
                for layer in (0..spec.layers.len()).filter(has_site) {
                    values.insert(layer, tensors.read_f32(&tensor.replace("{layer}", &layer.to_string()))?);
                }
            } else {
                values.insert(usize::MAX, tensors.read_f32(tensor)?);
            }
        }
    }
    Ok(values)
}

impl Ready {
    fn applies(&self, at: &At<'_>) -> bool {
        self.intervention.site == at.site && (!at.site.per_layer() || self.intervention.layers.contains(at.layer))
    }

    fn row_chosen(&self, at: &At<'_>, row: usize) -> bool {
        self.intervention.positions.contains(at.rows.position[row])
            && self.intervention.phase.contains(at.rows.phase[row])
    }

    /// Edits a tensor `[rows, units, width]`; at experts' sites axis 1 are the slots, and the routing names the units.
    fn edit(&self, at: &At<'_>, x: &mut [f32], dims: [usize; 3]) -> Result<(), ModelError> {
        let [_, count, width] = dims;
        if x.is_empty() {
            return Ok(());
        }
        let i = &self.intervention;
        let given = Given::of(self, at, dims)?;
        for (r, row) in x.chunks_exact_mut(count * width).enumerate() {
            let token_row = if at.site.per_layer() { r } else { at.rows.logit_rows[r] };
            if !self.row_chosen(at, token_row) {
                continue;
            }
            for (axis, block) in row.chunks_exact_mut(width).enumerate() {
                let unit = match at.routing.filter(|_| at.site.units() == Units::Expert) {
                    Some(routing) => routing.ids[r * routing.k + axis] as usize,
                    None => axis,
                };
                if unit == NO_EXPERT as usize || !i.units.contains(unit) {
                    continue;
                }
                if let Some(u) = given.find(at.rows.position[token_row] * count + axis, unit) {
                    i.op.apply(block, u);
                }
            }
        }
        Ok(())
    }
}

/// How the numbers that an intervention was given lie.
enum Given<'a> {
    /// There are none.
    Nothing,
    /// One vector for every unit.
    Shared(&'a [f32]),
    /// A vector of `width` for each chosen unit, in the order of `listed` (`None`: all).
    ByUnit { values: &'a [f32], width: usize, listed: Option<Vec<usize>> },
    /// A recording: a vector of `width` for each unit of each position.
    Recording { values: &'a [f32], width: usize },
}

impl<'a> Given<'a> {
    fn of(ready: &'a Ready, at: &At<'_>, [_, count, width]: [usize; 3]) -> Result<Given<'a>, ModelError> {
        let Some(values) = ready.values.get(&at.layer).or_else(|| ready.values.get(&usize::MAX)) else {
            return Ok(Given::Nothing);
        };
        let op = &ready.intervention.op;
        let fail = |help: String| {
            let (site, layer, found) = (at.site, at.layer, values.len());
            let what = format!("intervention `{}` at {site} layer {layer}: {found} values given", op.name());
            Err(ModelError::Lens(format!("{what}; help: give {help}")))
        };
        if matches!(op, Op::Patch { .. }) {
            // A recorded text of T tokens has T keys, whatever the number of keys here.
            let keys = matches!(at.site, Site::AttnScores | Site::AttnPattern);
            let width = if keys { (values.len() / count).isqrt() } else { width };
            let row = count * width;
            let whole = if keys { values.len() == width * row } else { values.len().is_multiple_of(row) };
            if whole {
                return Ok(Given::Recording { values, width });
            }
            return fail(format!("a recording of this site in a whole text, {count} units for each position"));
        }
        if values.len() == width {
            return Ok(Given::Shared(values));
        }
        let listed = ready.intervention.units.list();
        let all = ready.units.get(at.layer).copied().unwrap_or(count);
        if values.len() != width * listed.as_ref().map_or(all, Vec::len) {
            return fail(format!("{width} for every chosen unit, or {width} in all"));
        }
        Ok(Given::ByUnit { values, width, listed })
    }

    /// The vector for a unit, whose place in a recording is `place`; `None` beyond a recording's end.
    fn find(&self, place: usize, unit: usize) -> Option<&'a [f32]> {
        let at = |values: &'a [f32], index: usize, width: usize| values.get(index * width..(index + 1) * width);
        match self {
            Given::Nothing => Some(&[]),
            Given::Shared(values) => Some(values),
            Given::ByUnit { values, width, listed: None } => at(values, unit, *width),
            Given::ByUnit { values, width, listed: Some(listed) } => {
                at(values, listed.iter().position(|&u| u == unit)?, *width)
            }
            Given::Recording { values, width } => at(values, place, *width),
        }
    }
}

/// Empties the slots of one row whose gate is below `by` times the largest.
fn skip_slots(ids: &mut [u32], gates: &mut [f32], chosen: impl Fn(u32) -> bool, by: f32, renormalise: bool) {
    let Some(first) = (0..gates.len()).max_by(|&a, &b| gates[a].total_cmp(&gates[b]).then(b.cmp(&a))) else { return };
    let least = by * gates[first];
    let low = |slot: usize| slot != first && gates[slot] < least && chosen(ids[slot]);
    let gone: Vec<u32> = (0..ids.len()).filter(|&slot| low(slot)).map(|slot| ids[slot]).collect();
    drop_slots(ids, gates, |id| gone.contains(&id), renormalise);
}

impl Lens for Interventions {
    fn sites(&self, layer: usize) -> SiteSet {
        let here = self.list.iter().map(|r| &r.intervention).filter(|i| {
            if layer == self.n_layers { !i.site.per_layer() } else { i.site.per_layer() && i.layers.contains(layer) }
        });
        SiteSet::of(&here.map(|i| i.site).collect::<Vec<_>>())
    }

    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        let dims = match *value.dims() {
            [n, units, width] => [n, units, width],
            [n, units] => [n, units, 1],
            _ => return Ok(Flow::Continue),
        };
        let mut x = ops::values(value)?.to_vec();
        for ready in self.list.iter().filter(|r| r.applies(at)) {
            ready.edit(at, &mut x, dims)?;
        }
        *value = ops::tensor(x, value.dims())?;
        Ok(Flow::Continue)
    }

    fn routing(&mut self, at: &At<'_>, routing: &mut Routing) -> Result<Flow, ModelError> {
        let mut gates = ops::values(&routing.gates)?.to_vec();
        let k = routing.k;
        for ready in self.list.iter().filter(|r| r.applies(at)) {
            let i = &ready.intervention;
            for row in (0..at.rows.len()).filter(|&row| ready.row_chosen(at, row)) {
                let (ids, gates) = (&mut routing.ids[row * k..(row + 1) * k], &mut gates[row * k..(row + 1) * k]);
                let chosen = |id: u32| i.units.contains(id as usize);
                match i.op {
                    Op::Drop => drop_slots(ids, gates, chosen, false),
                    Op::DropRenormalise => drop_slots(ids, gates, chosen, true),
                    Op::Skip { by } => skip_slots(ids, gates, chosen, by, false),
                    Op::SkipRenormalise { by } => skip_slots(ids, gates, chosen, by, true),
                    Op::Scale { by } => {
                        let slots = gates.iter_mut().zip(ids.iter()).filter(|(_, id)| chosen(**id));
                        slots.for_each(|(g, _)| *g *= by);
                    }
                    _ => {}
                }
            }
        }
        routing.gates = ops::tensor(gates, routing.gates.dims())?;
        Ok(Flow::Continue)
    }
}
