//! What can go wrong with recordings, score tables, plans, patterns and their library.

use std::path::PathBuf;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum LensError {
    /// The model refused.
    #[error(transparent)]
    Model(#[from] quorate_model::ModelError),
    /// A tensor file.
    #[error(transparent)]
    Format(#[from] quorate_formats::FormatError),
    /// Reading or writing a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The pattern library's database.
    #[error("pattern library {}: {source}; help: check that the file is a Quorate library and its disk is writable", path.display())]
    Database {
        /// The database file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// A plan, pattern or interchange file that does not say what it should.
    #[error("{what}: {problem}")]
    Invalid {
        /// The file or thing.
        what: String,
        /// What is wrong, and how to mend it.
        problem: String,
    },
    /// Something made for another model.
    #[error(
        "{what} was made for model {theirs}, this is model {ours}; help: profile this model, or open the other one"
    )]
    OtherModel {
        /// The pattern or plan.
        what: String,
        /// Fingerprint that it carries.
        theirs: String,
        /// Fingerprint of the open model.
        ours: String,
    },
    /// A name that nothing has.
    #[error("there is no {kind} `{name}`; help: {}", hint(nearest.as_deref(), known))]
    Unknown {
        /// What was looked for: `task`, `metric`, ...
        kind: &'static str,
        /// The name given.
        name: String,
        /// The most similar name that exists.
        nearest: Option<String>,
        /// The names that exist.
        known: Vec<String>,
    },
    /// A selection that cannot be made.
    #[error("{0}")]
    Select(String),
}

fn hint(nearest: Option<&str>, known: &[String]) -> String {
    const SHOWN: usize = 24;
    match (nearest, known.len().saturating_sub(SHOWN)) {
        (Some(nearest), _) => format!("did you mean `{nearest}`?"),
        (None, 0) => format!("there is {}", known.join(", ")),
        (None, more) => format!("there is {} and {more} more", known[..SHOWN].join(", ")),
    }
}

impl LensError {
    /// An [`LensError::Invalid`].
    pub fn invalid(what: impl Into<String>, problem: impl Into<String>) -> LensError {
        LensError::Invalid { what: what.into(), problem: problem.into() }
    }

    /// An [`LensError::Unknown`] that suggests the nearest of `names`.
    pub fn unknown<'a>(kind: &'static str, name: &str, names: impl IntoIterator<Item = &'a str>) -> LensError {
        let known: Vec<String> = names.into_iter().map(String::from).collect();
        let nearest = nearest_name(name, known.iter().map(String::as_str));
        LensError::Unknown { kind, name: name.to_string(), nearest, known }
    }
}

/// The candidate with the smallest edit distance to `name`, if it is near enough to be a typing error.
pub fn nearest_name<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let near = candidates.into_iter().map(|c| (edit_distance(name, c), c)).min()?;
    (near.0 <= 2.max(name.chars().count() / 3)).then(|| near.1.to_string())
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let cost = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_names_are_told_with_what_there_is() {
        let text = |name| LensError::unknown("task", name, ["arithmetic", "bios"]).to_string();
        assert_eq!(text("bois"), "there is no task `bois`; help: did you mean `bios`?");
        assert_eq!(text("zzzzzz"), "there is no task `zzzzzz`; help: there is arithmetic, bios");
    }

    #[test]
    fn near_names_are_suggested_and_far_ones_not() {
        assert_eq!(nearest_name("arithmetik", ["arithmetic", "bios"]).as_deref(), Some("arithmetic"));
        assert_eq!(nearest_name("zzzzzz", ["arithmetic", "bios"]), None);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }
}
