//! Names of repositories.

use std::fmt;

use anyhow::{Result, bail};

/// `OWNER/REPO`, with an optional `@REVISION` and an optional `:FILE` (a file's name, or the type of a GGUF file).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    /// `OWNER/REPO`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Which file, of a repository with several models.
    pub file: Option<String>,
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        if self.revision != MAIN {
            write!(f, "@{}", self.revision)?;
        }
        self.file.as_ref().map_or(Ok(()), |file| write!(f, ":{file}"))
    }
}

const MAIN: &str = "main";

impl Repo {
    /// Reads such a name.
    pub fn parse(text: &str) -> Result<Repo> {
        let (rest, file) = match text.split_once(':') {
            Some((rest, file)) => (rest, Some(file)),
            None => (text, None),
        };
        let (id, revision) = rest.split_once('@').unwrap_or((rest, MAIN));
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            (1..=96).contains(&part.len())
                && part.chars().all(allowed)
                && !part.starts_with(['.', '-'])
                && !part.contains("..")
        };
        let parts: Vec<&str> = id.split('/').collect();
        let good_revision = revision.split('/').all(plain);
        if parts.len() != 2
            || !parts.iter().all(|part| plain(part))
            || !good_revision
            || file.is_some_and(|f| !is_safe(f))
        {
            bail!(
                "`{text}` is no name of a model on the hub; help: write OWNER/REPO, OWNER/REPO@REVISION or OWNER/REPO:Q4_K_M"
            );
        }
        Ok(Repo { id: id.to_owned(), revision: revision.to_owned(), file: file.map(str::to_owned) })
    }

    /// Name of its folder in the cache.
    pub fn folder_name(&self) -> String {
        format!("models--{}", self.id.replace('/', "--"))
    }
}

/// Whether a file's name stays inside its folder, on every system.
pub fn is_safe(name: &str) -> bool {
    let odd = |c: char| c.is_control() || "\\:*?\"<>|".contains(c);
    name.len() <= 1024 && !name.contains(odd) && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_others_refused() {
        let repo = Repo::parse("Qwen/Qwen3-30B-A3B@refs/pr/1:Q4_K_M").unwrap();
        assert_eq!((repo.id.as_str(), repo.revision.as_str()), ("Qwen/Qwen3-30B-A3B", "refs/pr/1"));
        assert_eq!(repo.to_string(), "Qwen/Qwen3-30B-A3B@refs/pr/1:Q4_K_M");
        assert_eq!(Repo::parse("a/b").unwrap().folder_name(), "models--a--b");
        for bad in
            ["a", "a/b/c", "../b", "a/..", "/a/b", "a/b@", "a/b@../x", "a/b:../x", "a/b:", "a b/c", "./a", "", "~/m"]
        {
            assert!(Repo::parse(bad).is_err(), "{bad}");
        }
        assert!(is_safe("sub/model-00001-of-00002.gguf"));
        for bad in ["../x", "/etc/passwd", "a//b", "a/./b", "c:x", "a\\b", "a\0", ""] {
            assert!(!is_safe(bad), "{bad:?}");
        }
    }
}
