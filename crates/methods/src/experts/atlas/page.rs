//! The cards of the atlas.

use std::collections::HashMap;

use quorate_lens::ExpertMap;
use quorate_model::ModelError;
use serde_json::{Value, json};

use super::measure::{Numbers, Recorded};
use super::{Atlas, Found, flags as flags_of, round};
use crate::contrast::top;
use crate::experts::super_experts::{GUARD, PERCENTILE};
use crate::routing::choices::{Choices, Speciality};
use crate::{CardList, Cards, ExpertCard, Flag, Lab, MethodError};

/// Flag of an expert that no token chose.
pub const NEVER: &str = "never used";
/// Flag of a super expert.
pub const SUPER: &str = "super expert";
/// Tokens before and after an example's token.
const BEFORE: usize = 10;
const AFTER: usize = 6;

/// Where tokens chose experts, by expert and token: text and position.
type Places = HashMap<(usize, u32), Vec<(usize, usize)>>;

/// The flags that there are.
pub fn flags(atlas: &Atlas, found: &[Found]) -> Vec<Flag> {
    let flag = |name: &str, about: String| Flag { name: name.to_string(), about };
    let mut flags = vec![flag(NEVER, "no token of the texts chose it".to_string())];
    for f in found {
        let about = format!(
            "contrast of {:.3} or more: the larger of {} and the 95th percentile of the largest with shuffled labels",
            f.bar, atlas.effect
        );
        flags.push(flag(&f.name, about));
    }
    let about =
        format!("peak output above percentile {PERCENTILE}, a tenth of the largest, and {GUARD} times the median");
    flags.push(flag(SUPER, about));
    flags
}

/// A card for every expert.
#[expect(clippy::too_many_arguments, reason = "all that is known comes together here")]
pub fn cards(
    atlas: &Atlas,
    lab: &Lab<'_>,
    map: &ExpertMap,
    all: &Recorded,
    choices: &Choices,
    numbers: &Numbers,
    found: &[Found],
    names: &[String],
) -> Result<Cards, MethodError> {
    let special: Vec<Speciality> =
        choices.layers.iter().flat_map(|l| l.specialities(&choices.tokens, atlas.occurrences, atlas.tokens)).collect();
    let places = places(map, all, &special, atlas.examples);
    let mut cards = Vec::with_capacity(map.total());
    for (moe, layer) in choices.layers.iter().enumerate() {
        let together = layer.co_activation();
        for unit in map.range(moe) {
            let id = map.id(unit);
            let partners = partners(id.layer, &together[id.expert], &numbers.usage[map.range(moe)], atlas.rows);
            let tokens = tokens(lab, all, unit, &special[unit], &places)?;
            let lists = vec![tasks(numbers, unit, names, atlas.rows), tokens, partners];
            cards.push(ExpertCard { layer: id.layer, expert: id.expert, flags: flags_of(unit, numbers, found), lists });
        }
    }
    let list = |name: &str, about: &str, columns: &[&str]| CardList {
        name: name.to_string(),
        about: about.to_string(),
        columns: columns.iter().map(ToString::to_string).collect(),
    };
    let of_all = "share of the token's occurrences that chose the expert";
    let lists = vec![
        list(
            "tasks",
            "share of the expert's tokens; lift: use in the task over use in all",
            &["task", "share", "lift"],
        ),
        list("typical tokens", of_all, &["token", "share", "examples"]),
        list(
            "partners",
            "share of its tokens that choose the other too; lift: over the other's use",
            &["expert", "share", "lift"],
        ),
    ];
    let about =
        "What each expert does, measured on the tasks' texts. A cell of a map opens its expert's card.".to_string();
    Ok(Cards { about, lists, flags: flags(atlas, found), cards })
}

fn tasks(numbers: &Numbers, unit: usize, names: &[String], most: usize) -> Vec<Vec<Value>> {
    let lifts: Vec<f64> = (0..names.len()).map(|t| numbers.lift(unit, t).unwrap_or(0.0)).collect();
    let row = |t: usize| {
        let share = numbers.of_task[t][unit] as f64 / numbers.count[unit].max(1) as f64;
        (lifts[t] > 0.0).then(|| vec![json!(names[t]), json!(round(share)), json!(round(lifts[t]))])
    };
    top(&lifts, most).into_iter().filter_map(row).collect()
}

fn partners(layer: usize, shares: &[f64], usage: &[Option<f64>], most: usize) -> Vec<Vec<Value>> {
    let row = |e: usize| {
        let lift = usage[e].filter(|u| *u > 0.0).map(|u| round(shares[e] / u));
        (shares[e] > 0.0).then(|| vec![json!(format!("{layer}:{e}")), json!(round(shares[e])), json!(lift)])
    };
    top(shares, most).into_iter().filter_map(row).collect()
}

/// For each expert and typical token the first places, in different texts, where the token chose the expert.
fn places(map: &ExpertMap, all: &Recorded, special: &[Speciality], most: usize) -> Places {
    let wanted = special.iter().enumerate().flat_map(|(unit, s)| s.top.iter().map(move |t| ((unit, t.0), Vec::new())));
    let mut places: Places = wanted.collect();
    for (i, item) in all.trace.items.iter().enumerate() {
        for (moe, layer) in item.layers.iter().enumerate() {
            let start = map.range(moe).start;
            for (t, &token) in item.tokens.iter().enumerate() {
                for e in layer.chosen(t) {
                    let Some(list) = places.get_mut(&(start + e, token)) else { continue };
                    if list.len() < most && list.last().is_none_or(|last| last.0 != i) {
                        list.push((i, t));
                    }
                }
            }
        }
    }
    places
}

fn tokens(
    lab: &Lab<'_>,
    all: &Recorded,
    unit: usize,
    special: &Speciality,
    places: &Places,
) -> Result<Vec<Vec<Value>>, MethodError> {
    let text = |ids: &[u32]| lab.model.tokenizer().decode(ids, false).map_err(ModelError::from);
    let passage = |&(i, t): &(usize, usize)| {
        let tokens = &all.trace.items[i].tokens;
        let after = &tokens[t + 1..tokens.len().min(t + 1 + AFTER)];
        Ok(json!([text(&tokens[t.saturating_sub(BEFORE)..t])?, text(&tokens[t..=t])?, text(after)?]))
    };
    let row = |&(token, share): &(u32, f64)| {
        let examples = places.get(&(unit, token)).into_iter().flatten().map(passage);
        let examples = examples.collect::<Result<Vec<Value>, MethodError>>()?;
        Ok(vec![json!(format!("{:?}", text(&[token])?)), json!(round(share)), json!(examples)])
    };
    special.top.iter().map(row).collect()
}
