//! What becomes of each stored tensor when experts are removed: the same for every way of writing a model.

use std::collections::HashMap;

use crate::gguf::single_expert;
use crate::role::Role;
use crate::spec::{FfnSpec, GroupRule, GroupSpec, ModelSpec, MoeSpec};
use crate::{Checkpoint, FormatError, Result, TensorLoc};

/// What becomes of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// It holds something for each expert of the layer, in their order: what belongs to some of them stays.
    Experts {
        /// Experts of the layer.
        of: usize,
        /// Those whose part stays.
        ids: Vec<usize>,
    },
    /// It belongs to one expert, which gets another number: its new name.
    Renamed(String),
    /// It is left out.
    Gone,
}

/// The tensors that do not stay as they are, by name.
pub(crate) fn cuts(checkpoint: &Checkpoint, kept: &[Vec<usize>]) -> HashMap<String, Cut> {
    let spec = checkpoint.spec();
    let kept_of: HashMap<usize, &Vec<usize>> = spec.moe_layers().into_iter().zip(kept).collect();
    let mut cuts = HashMap::new();
    for role in checkpoint.roles() {
        let (Some(of_experts), Some(l)) = (role.of_experts(), role.layer()) else { continue };
        let (Some(ids), Some(moe), Ok(loc)) = (kept_of.get(&l), spec.moe(l), checkpoint.tensor(role)) else { continue };
        let stored = checkpoint.recipe(role).map_or(vec![loc], |recipe| recipe.stored());
        let names = stored.into_iter().map(|loc| loc.name.clone());
        // The name of the one expert's tensor that would hold this.
        let name_of = |role| match checkpoint.gguf() {
            Some(_) => single_expert(role),
            None => Some(checkpoint.name_of(role)),
        };
        let single = of_experts.zip(name_of(role));
        for name in names {
            let of_one = single.as_ref().and_then(|(e, single)| Some((*e, name.strip_prefix(stem(single))?)));
            let cut = match of_one {
                None => Cut::Experts { of: moe.n_experts, ids: ids.to_vec() },
                Some((expert, rest)) => {
                    match ids.binary_search(&expert).ok().map(|new| name_of(role.renumbered(new))) {
                        Some(Some(new)) => Cut::Renamed(format!("{}{rest}", stem(&new))),
                        _ => Cut::Gone,
                    }
                }
            };
            cuts.insert(name, cut);
        }
    }
    let of_no_layer = checkpoint.unused_tensors().iter().filter(|name| predicts_further(checkpoint, name));
    cuts.extend(of_no_layer.map(|name| (name.clone(), Cut::Gone)));
    cuts
}

/// A tensor's name without its last component, such as `weight`; scales of packed weights differ there only.
fn stem(name: &str) -> &str {
    name.rfind('.').map_or(name, |dot| &name[..=dot])
}

/// Whether a tensor that the model does not need belongs to layers that predict further tokens: they have experts too, as
/// many as the other layers.
fn predicts_further(checkpoint: &Checkpoint, name: &str) -> bool {
    let of_layer = match checkpoint.gguf() {
        Some(_) => crate::GGUF_NAMES.of(Role::AttnNorm(0)),
        None => checkpoint.name_of(Role::AttnNorm(0)),
    };
    let before = of_layer.find(".0.").map_or("", |dot| &of_layer[..=dot]);
    let layer = name.strip_prefix(before).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.is_some_and(|l| l >= checkpoint.spec().layers.len())
        || name.split('.').any(|part| part == "mtp" || part.starts_with("mtp_"))
}

/// The bytes of a tensor that has something for each of `experts` experts, of the experts `ids`: ranges in the file, and
/// the shape. The axis of experts is the first that is longer than 1.
pub(crate) fn slices(loc: &TensorLoc, experts: usize, ids: &[usize]) -> (Vec<(u64, u64)>, Vec<usize>) {
    let each = loc.len / experts.max(1) as u64;
    let mut shape = loc.shape.clone();
    if let Some(axis) = shape.iter_mut().find(|n| **n == experts) {
        *axis = ids.len();
    }
    (ids.iter().map(|&e| (loc.offset + e as u64 * each, each)).collect(), shape)
}

/// The kept experts of a decoder layer.
pub(crate) fn slots<'a>(spec: &ModelSpec, kept: &'a [Vec<usize>], layer: usize) -> &'a [usize] {
    let moe = spec.moe_layers().iter().position(|&l| l == layer);
    moe.and_then(|moe| kept.get(moe)).map_or(&[], Vec::as_slice)
}

/// What a pruned model says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pruned {
    /// Experts of each MoE layer.
    pub counts: Vec<usize>,
    /// Groups and how many of them are chosen from, where the router has groups.
    pub groups: Option<(usize, usize)>,
}

impl Pruned {
    /// Experts of each layer, where all have as many.
    pub fn count(&self) -> usize {
        self.counts.first().copied().unwrap_or(0)
    }
}

/// The specification of a pruned model, as its files will say it.
pub(crate) fn pruned_spec(spec: &ModelSpec, pruned: &Pruned) -> ModelSpec {
    let mut spec = spec.clone();
    for (layer, &count) in spec.moe_layers().into_iter().zip(&pruned.counts) {
        if let FfnSpec::Moe(moe) = &mut spec.layers[layer].ffn {
            moe.n_experts = count;
            let groups = moe.router.extra.groups.zip(pruned.groups);
            // To choose among all groups is to have none.
            moe.router.extra.groups = groups
                .filter(|(of, (n, chosen))| chosen < n || of.rule == GroupRule::OneOfEach)
                .map(|(of, (n_group, topk_group))| GroupSpec { n_group, topk_group, ..of });
        }
    }
    spec
}

fn refuse<T>(problem: String, help: impl Into<std::borrow::Cow<'static, str>>) -> Result<T> {
    Err(FormatError::Kept { problem, help: help.into() })
}

/// Checks that the experts `kept` (one ascending list per MoE layer) make a model of the same family; with `same`, one that
/// has equally many in every layer.
pub(crate) fn check_kept(checkpoint: &Checkpoint, kept: &[Vec<usize>], same: bool) -> Result<Pruned> {
    let spec = checkpoint.spec();
    let layers = spec.moe_layers();
    if layers.is_empty() {
        return refuse("the model has no experts".to_owned(), "only mixtures of experts are pruned this way");
    }
    if kept.len() != layers.len() {
        let problem = format!("{} lists of experts for {} MoE layers", kept.len(), layers.len());
        return refuse(problem, "give one list for each MoE layer");
    }
    let mut groups = None;
    for (&layer, ids) in layers.iter().zip(kept) {
        let moe = spec.moe(layer).expect("`moe_layers` lists MoE layers");
        let ascending = ids.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || ids.last().is_some_and(|&e| e >= moe.n_experts) {
            let problem = format!("layer {layer}: the expert ids {ids:?} are not ascending below {}", moe.n_experts);
            return refuse(problem, "give each expert once, in ascending order");
        }
        if ids.len() < moe.top_k {
            let problem = format!("layer {layer}: {} experts kept, each token needs {}", ids.len(), moe.top_k);
            return refuse(problem, "keep at least as many experts as each token uses");
        }
        if same && ids.len() != kept[0].len() {
            let problem =
                format!("{} experts kept in layer {layer}, {} in layer {}", ids.len(), kept[0].len(), layers[0]);
            return refuse(problem, "keep equally many in every layer, or write a plan instead of a checkpoint");
        }
        if let Some(of) = &moe.router.extra.groups {
            let of_layer = check_groups(layer, moe, of, ids)?;
            if groups.is_some_and(|(n, _)| n != of_layer.0) {
                let problem = format!("layer {layer} keeps experts of {} groups, other layers of others", of_layer.0);
                return refuse(problem, groups_help(moe, of));
            }
            groups = Some(of_layer);
        }
    }
    Ok(Pruned { counts: kept.iter().map(Vec::len).collect(), groups })
}

/// Groups that are left and how many are chosen from. All that are left must have equally many experts, since groups are
/// consecutive experts, and a router that sums a group's two best must find two.
fn check_groups(layer: usize, moe: &MoeSpec, of: &GroupSpec, ids: &[usize]) -> Result<(usize, usize)> {
    let size = moe.n_experts / of.n_group;
    let mut left = vec![0usize; of.n_group];
    ids.iter().for_each(|e| left[e / size] += 1);
    let counts: Vec<usize> = left.iter().copied().filter(|&n| n > 0).collect();
    let (groups, each) = (counts.len(), counts[0]);
    let problem = if counts.iter().any(|&n| n != each) {
        format!("its groups keep {left:?} experts, not equally many")
    } else if of.rule == GroupRule::OneOfEach && groups < of.n_group {
        format!("its groups keep {left:?} experts, and each token takes one of every group")
    } else if of.rule == GroupRule::Top2Sum && each < 2 && groups > 1 {
        "its groups keep 1 expert each, and are compared by their two best".to_owned()
    } else if of.topk_group.min(groups) * each < moe.top_k {
        let chosen = of.topk_group.min(groups);
        format!("each token needs {} experts of {chosen} groups, which keep {each} each", moe.top_k)
    } else {
        return Ok((groups, of.topk_group.min(groups)));
    };
    refuse(format!("layer {layer}: {problem}"), groups_help(moe, of))
}

fn groups_help(moe: &MoeSpec, of: &GroupSpec) -> String {
    let size = moe.n_experts / of.n_group;
    let least = if of.rule == GroupRule::Top2Sum { 2 } else { 1 }.max(moe.top_k.div_ceil(of.topk_group));
    let counts: Vec<String> = (least..=size).map(|each| (each * of.n_group).to_string()).collect();
    let counts = match counts.len() {
        0..=6 => counts.join(", "),
        n => format!("{}, .., {}", counts[..3].join(", "), counts[n - 1]),
    };
    let whole = match of.rule {
        GroupRule::OneOfEach => "",
        GroupRule::Max | GroupRule::Top2Sum => "; or leave out whole groups, the same number in every layer",
    };
    format!("keep equally many of each of the {} groups of {size}: {counts} experts per layer{whole}", of.n_group)
}
