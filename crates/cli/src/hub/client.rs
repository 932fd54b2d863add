//! The hub over HTTP.

use std::io::Read;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Body, RequestBuilder};

use super::repo::{Repo, is_safe};
use super::settings::Settings;

/// Longest time to a connection, and to an answer's head.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest time for the bytes of one request, which are at most [`CHUNK_BYTES`].
const CHUNK_PATIENCE: Duration = Duration::from_secs(1200);
/// Bytes asked for at once.
pub const CHUNK_BYTES: u64 = 64 << 20;
/// Longest listing that is read.
const LISTING_BYTES_MAX: u64 = 64 << 20;
const REDIRECTS_MAX: usize = 5;

/// Asks the hub.
pub struct Client {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<String>,
}

/// What a repository has.
#[derive(Clone, Debug, Deserialize)]
pub struct Listing {
    /// The commit that the revision stands for.
    #[serde(rename = "sha")]
    pub commit: String,
    /// Its files.
    #[serde(rename = "siblings", default)]
    pub files: Vec<RepoFile>,
}

/// A file of a repository.
#[derive(Clone, Debug, Deserialize)]
pub struct RepoFile {
    /// Its path.
    #[serde(rename = "rfilename")]
    pub name: String,
    /// Its size, if the hub tells.
    pub size: Option<u64>,
}

/// The hub is busy, or not well.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Busy(String);

/// What the hub says of a file before it sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Name of its content: of large files their SHA-256.
    pub etag: String,
    /// Bytes.
    pub size: u64,
}

impl Client {
    /// For an endpoint.
    pub fn new(settings: &Settings) -> Client {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_recv_body(Some(CHUNK_PATIENCE))
            .http_status_as_error(false)
            .user_agent(concat!("quorate/", env!("CARGO_PKG_VERSION")));
        Client { agent: config.build().into(), endpoint: settings.endpoint.clone(), token: settings.token.clone() }
    }

    /// The files of a repository.
    pub fn list(&self, repo: &Repo) -> Result<Listing> {
        let url =
            format!("{}/api/models/{}/revision/{}?blobs=true", self.endpoint, repo.id, encoded(&repo.revision, false));
        let mut response = self.answer(self.get(&url).call(), repo, None)?;
        let body = response.body_mut().with_config().limit(LISTING_BYTES_MAX).read_to_vec();
        let body = body.with_context(|| format!("the answer of {} broke off", self.endpoint))?;
        let listing: Listing = serde_json::from_slice(&body)
            .with_context(|| format!("{} does not answer as the hub does; help: check HF_ENDPOINT", self.endpoint))?;
        if listing.commit.is_empty() || !listing.commit.bytes().all(|b| b.is_ascii_alphanumeric()) {
            bail!("{} names a commit `{}` that cannot be one", self.endpoint, listing.commit.escape_debug());
        }
        if let Some(file) = listing.files.iter().find(|file| !is_safe(&file.name)) {
            bail!("{repo} lists a file `{}` outside its folder; nothing was fetched", file.name.escape_debug());
        }
        Ok(listing)
    }

    /// Content and size of a file. A redirection to where large files lie is not followed: the hub's own answer says it all.
    pub fn info(&self, repo: &Repo, commit: &str, name: &str) -> Result<FileInfo> {
        let mut url = self.file_url(repo, commit, name);
        for _ in 0..REDIRECTS_MAX {
            let head = self
                .with_token(self.agent.head(&url))
                .config()
                .max_redirects(0)
                .max_redirects_will_error(false)
                .build();
            let response = self.answer(head.call(), repo, Some(name))?;
            let headers = response.headers();
            if response.status().is_redirection()
                && let Some(place) =
                    header(headers, "location").filter(|place| place.starts_with('/') && !place.starts_with("//"))
            {
                url = format!("{}{place}", self.endpoint);
                continue;
            }
            let size = header(headers, "x-linked-size")
                .or_else(|| (!response.status().is_redirection()).then(|| header(headers, "content-length")).flatten());
            let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag")).and_then(plain_etag);
            let (Some(etag), Some(size)) = (etag, size.and_then(|s| s.parse().ok())) else {
                bail!("{} does not tell content and size of {name}; help: is HF_ENDPOINT a hub?", self.endpoint);
            };
            return Ok(FileInfo { etag, size });
        }
        bail!("{} redirects in circles when asked for {name}", self.endpoint)
    }

    /// Bytes `start..end` of a file, or of a server that does not do ranges, all of it; tells where the bytes begin.
    pub fn read(
        &self,
        repo: &Repo,
        commit: &str,
        name: &str,
        start: u64,
        end: u64,
    ) -> Result<(u64, impl Read + use<>)> {
        let request = self.get(&self.file_url(repo, commit, name));
        let request = request.header("range", format!("bytes={start}-{}", end.saturating_sub(1)));
        let response = self.answer(request.call(), repo, Some(name))?;
        let first = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = header(response.headers(), "content-range").unwrap_or_default();
                let first = range.strip_prefix("bytes ").and_then(|r| r.split('-').next()?.parse().ok());
                first
                    .filter(|&first: &u64| first == start)
                    .ok_or_else(|| anyhow!("asked for byte {start} of {name}, got {range}"))?
            }
            _ => 0,
        };
        Ok((first, response.into_body().into_with_config().limit(u64::MAX).reader()))
    }

    fn file_url(&self, repo: &Repo, commit: &str, name: &str) -> String {
        format!("{}/{}/resolve/{commit}/{}", self.endpoint, repo.id, encoded(name, true))
    }

    fn get(&self, url: &str) -> RequestBuilder<ureq::typestate::WithoutBody> {
        self.with_token(self.agent.get(url))
    }

    /// On redirections to other hosts the token is not sent along.
    fn with_token<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.token {
            Some(token) => request.header("authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    /// An answer that is one, or what is wrong and how to mend it.
    fn answer(
        &self,
        response: Result<Response<Body>, ureq::Error>,
        repo: &Repo,
        name: Option<&str>,
    ) -> Result<Response<Body>> {
        let endpoint = &self.endpoint;
        let response = response.with_context(|| {
            format!(
                "cannot reach the hub at {endpoint}; help: check the network, or use --offline for what is in the cache"
            )
        })?;
        let (status, code) = (response.status(), header(response.headers(), "x-error-code").unwrap_or_default());
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        let (id, revision) = (&repo.id, &repo.revision);
        let token =
            if self.token.is_some() { "the token may not read it" } else { "set HF_TOKEN if it is private or gated" };
        match (status.as_u16(), code) {
            (_, "GatedRepo") => bail!(
                "{id} is gated; help: accept its terms at {endpoint}/{id} and set HF_TOKEN to a token of that account"
            ),
            (_, "RevisionNotFound") => {
                bail!("{id} has no revision `{revision}`; help: leave out @{revision}, or check it")
            }
            (404, "EntryNotFound") => bail!("{id} has no file {}", name.unwrap_or_default()),
            (401 | 403, _) => bail!("the hub refuses to show {id} ({status}); help: check the name; {token}"),
            (404, _) => bail!(
                "there is no {} at {endpoint}; help: check the name; {token}",
                match name {
                    Some(name) => format!("{name} in {id}"),
                    None => id.clone(),
                }
            ),
            (429, _) => {
                Err(Busy("the hub asks to wait (429); help: try again later, or set HF_TOKEN".to_owned()).into())
            }
            (500.., _) => Err(Busy(format!("the hub at {endpoint} answers {status}; help: try again later")).into()),
            _ => bail!("the hub at {endpoint} answers {status}; help: check HF_ENDPOINT"),
        }
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// An etag as the cache names its files; `None` if it could lead out of the folder.
fn plain_etag(etag: &str) -> Option<String> {
    let plain = etag.trim_start_matches("W/").trim_matches('"');
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    ((1..=256).contains(&plain.len()) && plain.chars().all(allowed)).then(|| plain.to_owned())
}

/// A text in a URL's path.
fn encoded(text: &str, keep_slash: bool) -> String {
    let byte = |b: u8| match b {
        b'/' if keep_slash => "/".to_owned(),
        b if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) => char::from(b).to_string(),
        b => format!("%{b:02X}"),
    };
    text.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_etags() {
        assert_eq!(encoded("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(encoded("a b/ü?.json", true), "a%20b/%C3%BC%3F.json");
        assert_eq!(plain_etag("W/\"abc-1\"").as_deref(), Some("abc-1"));
        assert_eq!(plain_etag("\"../x\""), None);
    }
}
