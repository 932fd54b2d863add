//! Which hub, which cache and which token: the environment variables of the hub's Python library.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// How the hub is used.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address without a slash at its end.
    pub endpoint: String,
    /// Folder with `models--OWNER--REPO`.
    pub cache: PathBuf,
    /// Sent to the endpoint's host only.
    pub token: Option<String>,
    /// Nothing is asked of the network.
    pub offline: bool,
}

impl Settings {
    /// Reads the environment; `offline` is the flag.
    pub fn read(offline: bool) -> Result<Settings> {
        Settings::of(offline, |name| env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    fn of(offline: bool, var: impl Fn(&str) -> Option<String>) -> Result<Settings> {
        let home = match (var("HF_HOME"), var("XDG_CACHE_HOME"), var("HOME").or_else(|| var("USERPROFILE"))) {
            (Some(home), ..) => PathBuf::from(home),
            (None, Some(cache), _) => PathBuf::from(cache).join("huggingface"),
            (None, None, Some(home)) => PathBuf::from(home).join(".cache/huggingface"),
            (None, None, None) => bail!("there is no home folder for the cache; help: set HF_HOME"),
        };
        let cache = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            bail!("HF_ENDPOINT is `{endpoint}`; help: it must begin with https:// or http://");
        }
        let token = match var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")) {
            Some(token) => Some(token),
            None => {
                let file = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
                let text = file.is_file().then(|| std::fs::read_to_string(&file)).transpose();
                text.with_context(|| format!("cannot read the token in {}", file.display()))?
            }
        };
        let token = token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
        if token.as_ref().is_some_and(|t| t.contains(|c: char| !c.is_ascii_graphic())) {
            bail!(
                "the hub's token has characters that no token has; help: check HF_TOKEN or the file `token` in HF_HOME"
            );
        }
        let on = |name: &str| {
            var(name).is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        Ok(Settings {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: cache.unwrap_or_else(|| home.join("hub")),
            token,
            offline: offline || on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vars: &[(&str, &str)]) -> Result<Settings> {
        Settings::of(false, |name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    #[test]
    fn variables_are_those_of_the_python_library() {
        let plain = of(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.cache, PathBuf::from("/h/.cache/huggingface/hub"));
        assert_eq!((plain.endpoint.as_str(), plain.token, plain.offline), ("https://huggingface.co", None, false));
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x")]).unwrap().cache, PathBuf::from("/x/huggingface/hub"));
        assert_eq!(of(&[("HF_HOME", "/f"), ("HOME", "/h")]).unwrap().cache, PathBuf::from("/f/hub"));
        let all = of(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c"), ("HF_TOKEN", " hf_x\n"), ("HF_HUB_OFFLINE", "true")])
            .unwrap();
        assert_eq!((all.cache, all.token.as_deref(), all.offline), (PathBuf::from("/c"), Some("hf_x"), true));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(of(&[("HF_HOME", folder.path().to_str().unwrap())]).unwrap().token.as_deref(), Some("hf_file"));
        assert!(of(&[]).is_err() && of(&[("HOME", "/h"), ("HF_ENDPOINT", "ftp://x")]).is_err());
        assert!(of(&[("HOME", "/h"), ("HF_TOKEN", "a\nb")]).is_err(), "no header can be smuggled in");
    }
}
