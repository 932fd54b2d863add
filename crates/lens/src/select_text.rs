//! Index selectors as text: `all`, `3`, `0,2,5-7`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A set of indices (layers, heads, experts, neurons, positions), written as text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Indices {
    /// Every index.
    #[default]
    All,
    /// Inclusive ranges, as given.
    Ranges(Vec<(usize, usize)>),
}

impl Indices {
    /// The given indices; runs of ascending neighbours become ranges.
    pub fn of(indices: &[usize]) -> Indices {
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for &i in indices {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == i => *last = i,
                _ => ranges.push((i, i)),
            }
        }
        Indices::Ranges(ranges)
    }

    /// Whether `index` is selected.
    pub fn contains(&self, index: usize) -> bool {
        match self {
            Indices::All => true,
            Indices::Ranges(ranges) => ranges.iter().any(|&(a, b)| (a..=b).contains(&index)),
        }
    }

    /// The selected indices below `len`, in the order given; `None` if all are.
    pub fn list(&self) -> Option<Vec<usize>> {
        match self {
            Indices::All => None,
            Indices::Ranges(ranges) => Some(ranges.iter().flat_map(|&(a, b)| a..=b).collect()),
        }
    }

    /// The largest index named, if any is.
    pub fn max(&self) -> Option<usize> {
        match self {
            Indices::All => None,
            Indices::Ranges(ranges) => ranges.iter().map(|r| r.1).max(),
        }
    }
}

impl FromStr for Indices {
    type Err = String;
    fn from_str(text: &str) -> Result<Indices, String> {
        if text.trim() == "all" {
            return Ok(Indices::All);
        }
        let bad = || format!("`{text}` is no selection; help: write `all`, `3` or `0,2,5-7`");
        let number = |t: &str| t.trim().parse::<usize>().map_err(|_| bad());
        let ranges = text.split(',').map(|part| match part.split_once('-') {
            Some((a, b)) => Ok((number(a)?, number(b)?)),
            None => number(part).map(|a| (a, a)),
        });
        let ranges = ranges.collect::<Result<Vec<_>, String>>()?;
        if ranges.iter().any(|&(a, b)| a > b || b - a > 1 << 24) {
            return Err(bad());
        }
        Ok(Indices::Ranges(ranges))
    }
}

impl TryFrom<String> for Indices {
    type Error = String;
    fn try_from(text: String) -> Result<Indices, String> {
        text.parse()
    }
}

impl fmt::Display for Indices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Indices::All => f.write_str("all"),
            Indices::Ranges(ranges) => {
                let part = |&(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
                f.write_str(&ranges.iter().map(part).collect::<Vec<_>>().join(","))
            }
        }
    }
}

impl From<Indices> for String {
    fn from(indices: Indices) -> String {
        indices.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip() {
        for text in ["all", "3", "0,2,5-7"] {
            assert_eq!(text.parse::<Indices>().unwrap().to_string(), text);
        }
        for bad in ["", "a", "3-1", "1,,2", "-1", "0-99999999999"] {
            assert!(bad.parse::<Indices>().is_err(), "{bad}");
        }
        let some: Indices = "0,2,5-7".parse().unwrap();
        assert!(some.contains(6) && !some.contains(4));
        assert_eq!(some.list().unwrap(), [0, 2, 5, 6, 7]);
    }
}
