//! Which experts a labelled class of texts uses more than the others, tested against shuffled labels.

use std::fmt;
use std::str::FromStr;

use quorate_eval::statistics::{mean, quantile};
use quorate_eval::tasks::TaskItem;
use quorate_model::sampling::SplitMix64;
use serde::{Serialize, Serializer};

use crate::contrast::{CLASS_ITEMS_MIN, difference};

/// A class of texts, by a field of the tasks' `meta`. Written `NAME:FIELD=IN` or `NAME:FIELD=IN/OUT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Name of the contrast and of its flag.
    pub name: String,
    field: String,
    inside: String,
    outside: Option<String>,
}

impl FromStr for Label {
    type Err = String;
    fn from_str(text: &str) -> Result<Label, String> {
        let parts = || {
            let (name, rest) = text.split_once(':')?;
            let (field, values) = rest.split_once('=')?;
            let (inside, outside) = values.split_once('/').map_or((values, None), |(i, o)| (i, Some(o)));
            let full = [name, field, inside, outside.unwrap_or("-")].iter().all(|part| !part.is_empty());
            full.then(|| (name.to_string(), field.to_string(), inside.to_string(), outside.map(str::to_string)))
        };
        let (name, field, inside, outside) =
            parts().ok_or_else(|| format!("`{text}` is not NAME:FIELD=IN or NAME:FIELD=IN/OUT"))?;
        Ok(Label { name, field, inside, outside })
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outside = self.outside.as_ref().map_or_else(String::new, |o| format!("/{o}"));
        write!(f, "{}:{}={}{outside}", self.name, self.field, self.inside)
    }
}

impl Serialize for Label {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl Label {
    /// Whether the item is of the class; `None` if it is on neither side.
    pub fn of(&self, item: &TaskItem) -> Option<bool> {
        let value = item.meta.get(&self.field)?;
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        let outside = || self.outside.as_ref().is_none_or(|o| text.starts_with(o));
        if text.starts_with(&self.inside) { Some(true) } else { outside().then_some(false) }
    }
}

/// The labelled texts of one task.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Group {
    /// For each text the share of its tokens that chose each expert.
    pub shares: Vec<Vec<f64>>,
    /// Whether it is of the class.
    pub labels: Vec<bool>,
}

impl Group {
    /// Texts of the class, and others.
    pub fn sizes(&self) -> (usize, usize) {
        let inside = self.labels.iter().filter(|l| **l).count();
        (inside, self.labels.len() - inside)
    }

    /// Whether a contrast can be made.
    pub fn suffices(&self) -> bool {
        self.sizes().0.min(self.sizes().1) >= CLASS_ITEMS_MIN
    }
}

/// Mean over the groups of the difference within each (class minus others), per expert; `None` if no group suffices.
pub fn contrast(groups: &[Group]) -> Option<Vec<f64>> {
    let of = |group: &Group| difference(&group.shares, &group.labels).ok();
    let all: Vec<Vec<f64>> = groups.iter().filter_map(of).collect();
    let experts = all.first()?.len();
    Some((0..experts).map(|e| all.iter().map(|d| d[e]).sum::<f64>() / all.len() as f64).collect())
}

/// The 95th percentile, over `times` shuffles of the labels within each group, of the largest contrast of all experts: a
/// value that experts of random classes exceed, any of them, one time in twenty. `None` without shuffles or groups.
pub fn shuffled_p95(groups: &[Group], times: usize, seed: u64) -> Option<f64> {
    let (mut groups, mut random) = (groups.to_vec(), SplitMix64::new(seed));
    let mut largest = Vec::with_capacity(times);
    for _ in 0..times {
        groups.iter_mut().for_each(|group| random.shuffle(&mut group.labels));
        largest.push(contrast(&groups)?.into_iter().fold(f64::MIN, f64::max));
    }
    mean(&largest).and(quantile(&largest, 0.95))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn item(meta: serde_json::Value) -> TaskItem {
        let meta = meta.as_object().unwrap().clone();
        TaskItem { task: "t".into(), prompt: String::new(), answer: String::new(), choices: None, meta }
    }

    #[test]
    fn labels_are_read_from_fields() {
        let label: Label = "refusal:refuse=true".parse().unwrap();
        let of = |meta| label.of(&item(meta));
        assert_eq!(
            [of(json!({"refuse": true})), of(json!({"refuse": false})), of(json!({}))],
            [Some(true), Some(false), None]
        );
        let label: Label = "thinking:variant=think/direct".parse().unwrap();
        let of = |v| label.of(&item(json!({ "variant": v })));
        assert_eq!([of("think_seen"), of("direct"), of("other")], [Some(true), Some(false), None]);
        assert_eq!(label.to_string(), "thinking:variant=think/direct");
        for bad in ["a", "a:b", "a:b=", ":b=c", "a:=c", "a:b=c/"] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
    }

    /// 200 experts used at random; one of them more by the class, in two tasks that use all experts differently.
    #[test]
    fn the_planted_expert_stands_above_shuffled_labels_and_no_other() {
        let mut random = SplitMix64::new(3);
        let mut group = |base: f64, gain: f64| {
            let labels: Vec<bool> = (0..60).map(|i| i % 3 == 0).collect();
            let share = |&class: &bool| {
                let mut row: Vec<f64> = (0..200).map(|_| base + 0.2 * random.unit()).collect();
                row[17] += if class { gain } else { 0.0 };
                row
            };
            Group { shares: labels.iter().map(share).collect(), labels }
        };
        let groups = [group(0.1, 0.3), group(0.5, 0.3)];
        let (found, bar) = (contrast(&groups).unwrap(), shuffled_p95(&groups, 200, 1).unwrap());
        let above: Vec<usize> = (0..200).filter(|&e| found[e] > bar).collect();
        assert_eq!(above, [17], "bar {bar}");
        assert!((found[17] - 0.3).abs() < 0.05);
        // Labels that mean nothing: the largest of 200 contrasts stays at what shuffled labels give.
        let groups = [group(0.1, 0.0), group(0.5, 0.0)];
        let largest = contrast(&groups).unwrap().into_iter().fold(f64::MIN, f64::max);
        let bar = shuffled_p95(&groups, 200, 1).unwrap();
        assert!(largest < 1.5 * bar && largest > 0.3 * bar, "{largest} {bar}");
        assert_eq!(contrast(&[Group { shares: vec![vec![0.5]; 9], labels: vec![true; 9] }]), None);
    }
}
