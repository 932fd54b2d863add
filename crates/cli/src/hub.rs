//! Models from the Hugging Face hub, kept in the cache folder that its Python library uses, so that both share the files.
//!
//! `settings`: which hub, which folder, which token. `repo`: names. `client`: HTTP. `cache`: the folder's layout and downloads.
//! `select`: which files of a repository are needed. `part`: just the bytes of kept experts.

mod cache;
mod client;
mod part;
mod repo;
mod select;
mod settings;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use quorate_formats::Checkpoint;

pub use cache::Fetched;
use client::Client;
pub use part::pull_kept;
pub use repo::Repo;
use settings::Settings;

use crate::common::Common;

/// The hub as this user sees it.
pub struct Hub {
    settings: Settings,
    client: Client,
}

impl Hub {
    /// With the usual environment variables.
    pub fn new(common: &Common) -> Result<Hub> {
        let settings = Settings::read(common.offline)?;
        let client = Client::new(&settings);
        Ok(Hub { settings, client })
    }

    /// The files of a repository that make up a model, from the cache where it has them. `config_only` leaves out weights.
    pub fn pull(&self, common: &Common, repo: &Repo, config_only: bool) -> Result<Fetched> {
        if self.settings.offline {
            return cache::present(&self.settings.cache, repo).with_context(|| self.offline_help(repo));
        }
        let listing = self.client.list(repo)?;
        let mut downloads = cache::Downloads::new(common, &self.settings, &self.client, repo, &listing);
        let names = select::sidecars(&listing);
        downloads.fetch(&names)?;
        if !config_only {
            match select::weights(&listing, repo.file.as_deref())? {
                select::Weights::Files(files) => downloads.fetch(&files)?,
                select::Weights::Index(index) => {
                    downloads.fetch(std::slice::from_ref(&index))?;
                    let shards = quorate_formats::checkpoint::shard_names(&downloads.path_of(&index)?)?;
                    downloads.fetch(&select::listed(&listing, &shards)?)?;
                }
            }
        }
        downloads.finish()
    }

    /// The model of that name: a path to open. What is in the cache and whole is taken as it is, without asking the hub.
    pub fn model(&self, common: &Common, repo: &Repo) -> Result<PathBuf> {
        if let Some(path) = cache::whole(&self.settings.cache, repo) {
            return Ok(path);
        }
        let fetched = self.pull(common, repo, false)?;
        cache::whole(&self.settings.cache, repo).with_context(|| {
            format!("{repo} is not whole in {}; help: quorate pull {repo}, with network", fetched.folder.display())
        })
    }

    /// What can be looked at: the model if the cache has it, else the configuration.
    pub fn outline(&self, common: &Common, repo: &Repo) -> Result<PathBuf> {
        if let Some(path) = cache::whole(&self.settings.cache, repo) {
            return Ok(path);
        }
        let config = self.pull(common, repo, true)?.folder.join("config.json");
        if !config.is_file() {
            bail!("{repo} has no config.json; help: quorate pull {repo} gets the model itself");
        }
        Ok(config)
    }

    fn offline_help(&self, repo: &Repo) -> String {
        format!(
            "{repo} is not in the cache {} and offline mode is on; help: quorate pull {repo} without --offline and HF_HUB_OFFLINE",
            self.settings.cache.display()
        )
    }
}

/// The repository that `-m` names, if it is no path: `OWNER/REPO` whose first part is no folder here.
pub fn named(model: &Path) -> Option<Repo> {
    let text = model.to_str()?;
    let owner = Path::new(text.split('/').next()?);
    (!model.exists() && !owner.exists()).then(|| Repo::parse(text).ok())?
}

/// Checks that what was fetched opens as a model.
pub fn check(folder: &Path) -> Result<Checkpoint> {
    Checkpoint::open(folder)
        .with_context(|| format!("{} was fetched, but it is no model that is read", folder.display()))
}
