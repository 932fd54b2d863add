//! Which files of a repository a model needs.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::client::Listing;

/// Files beside the weights that are read; others are left where they are.
const SIDECARS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "quantize_config.json",
];
pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";

/// How a repository holds its weights.
#[derive(Debug, PartialEq, Eq)]
pub enum Weights {
    /// These files.
    Files(Vec<String>),
    /// The shards that this index names.
    Index(String),
}

/// The files beside the weights that the repository has.
pub fn sidecars(listing: &Listing) -> Vec<String> {
    let wanted = |name: &str| SIDECARS.contains(&name) || (name.ends_with(".tiktoken") && !name.contains('/'));
    listing.files.iter().map(|f| f.name.clone()).filter(|name| wanted(name)).collect()
}

/// The weights: the file asked for, else safetensors, else the only model in GGUF.
pub fn weights(listing: &Listing, wanted: Option<&str>) -> Result<Weights> {
    let names: Vec<&str> = listing.files.iter().map(|f| f.name.as_str()).collect();
    if wanted.is_none() {
        if names.contains(&SINGLE) {
            return Ok(Weights::Files(vec![SINGLE.to_owned()]));
        }
        if names.contains(&INDEX) {
            return Ok(Weights::Index(INDEX.to_owned()));
        }
    }
    gguf(&names, wanted).map(Weights::Files)
}

/// The parts of the model in GGUF that is asked for by the name of a file or of a type; of the only one without.
pub fn gguf(names: &[&str], wanted: Option<&str>) -> Result<Vec<String>> {
    let mut models: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for &name in names {
        let Some(stem) = name.strip_suffix(".gguf") else { continue };
        if !stem.contains("mmproj") && !stem.contains("imatrix") {
            models.entry(without_part(stem).to_owned()).or_default().push(name.to_owned());
        }
    }
    let fits = |stem: &str| match wanted {
        None => true,
        Some(wanted) => {
            let (stem, wanted) = (stem.to_ascii_lowercase(), wanted.to_ascii_lowercase());
            let wanted = without_part(wanted.strip_suffix(".gguf").unwrap_or(&wanted));
            stem.strip_suffix(wanted).is_some_and(|rest| rest.is_empty() || rest.ends_with(['-', '.', '_', '/']))
        }
    };
    let all: Vec<String> = models.keys().cloned().collect();
    models.retain(|stem, _| fits(stem));
    match (models.len(), wanted) {
        (1, _) => Ok(models.into_values().flatten().collect()),
        (0, Some(wanted)) if !all.is_empty() => bail!("no file is `{wanted}`; help: there are {}", all.join(", ")),
        (0, Some(wanted)) => {
            bail!("no file is `{wanted}`, and there is no model in GGUF; help: leave the file's name out")
        }
        (0, None) => bail!(
            "no weights that are read; help: look for the model's safetensors or GGUF form (other forms run code or are older)"
        ),
        _ => bail!(
            "several models: {}; help: choose one by its type, e.g. OWNER/REPO:{}",
            models.keys().cloned().collect::<Vec<_>>().join(", "),
            models.keys().next().and_then(|stem| stem.rsplit(['-', '.']).next()).unwrap_or("Q4_K_M")
        ),
    }
}

/// A file's stem without `-00001-of-00003`.
fn without_part(stem: &str) -> &str {
    let number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let part = stem.rsplit_once("-of-").filter(|(_, count)| number(count)).and_then(|(head, _)| head.rsplit_once('-'));
    part.filter(|(_, no)| number(no)).map_or(stem, |(stem, _)| stem)
}

/// Those names, each of which the repository must have.
pub fn listed(listing: &Listing, names: &[String]) -> Result<Vec<String>> {
    match names.iter().find(|name| !listing.files.iter().any(|file| file.name == **name)) {
        Some(missing) => bail!("the index names {missing}, which the repository does not have; help: ask its authors"),
        None => Ok(names.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::client::RepoFile;

    fn listing(names: &[&str]) -> Listing {
        let file = |name: &&str| RepoFile { name: (*name).to_owned(), size: None };
        Listing { commit: "c".into(), files: names.iter().map(file).collect() }
    }

    #[test]
    fn only_what_is_needed_is_chosen() {
        let folder = listing(&[
            "README.md",
            "config.json",
            "tokenizer.json",
            INDEX,
            "pytorch_model.bin",
            "original/x.pth",
            "m.gguf",
        ]);
        assert_eq!(sidecars(&folder), ["config.json", "tokenizer.json"]);
        assert_eq!(weights(&folder, None).unwrap(), Weights::Index(INDEX.into()));
        assert_eq!(weights(&folder, Some("m.gguf")).unwrap(), Weights::Files(vec!["m.gguf".into()]));
        let parts = ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"];
        let many = listing(&["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", parts[0], parts[1], "mmproj-m-F16.gguf"]);
        assert_eq!(weights(&many, Some("q8_0")).unwrap(), Weights::Files(parts.map(str::to_owned).to_vec()));
        assert_eq!(weights(&many, Some(parts[1])).unwrap(), Weights::Files(parts.map(str::to_owned).to_vec()));
        assert_eq!(weights(&many, Some("m-Q4_K_S.gguf")).unwrap(), Weights::Files(vec!["m-Q4_K_S.gguf".into()]));
        let told = weights(&many, None).unwrap_err().to_string();
        assert!(told.contains("several models") && told.contains("Q4_K_M"), "{told}");
        assert!(
            weights(&many, Some("Q4_K")).unwrap_err().to_string().contains("no file is"),
            "a whole type is asked for"
        );
        assert!(
            weights(&listing(&["pytorch_model.bin"]), None).unwrap_err().to_string().contains("safetensors or GGUF")
        );
        assert!(listed(&folder, &["x.safetensors".into()]).is_err());
    }
}
