//! `quorate pull`: a model from the Hugging Face hub.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::common::{Common, human_bytes, parse_bytes, say};
use crate::hub::{Hub, Repo, check, pull_kept};

/// Arguments of `pull`.
#[derive(Args)]
#[command(after_help = "\
Only what is read is fetched: configuration, tokenizer, and weights in safetensors or one model in GGUF. The files are kept where the hub's
Python library keeps them ($HF_HUB_CACHE, or hub/ in $HF_HOME, or ~/.cache/huggingface/hub), so that both share them. A download that was
interrupted goes on. $HF_TOKEN, or the file `token` in $HF_HOME, opens private and gated models; $HF_ENDPOINT is another hub;
$HF_HUB_OFFLINE=1 is --offline.

Examples:
  quorate pull allenai/OLMoE-1B-7B-0924-Instruct
  quorate pull Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M           one of several files
  quorate run -m allenai/OLMoE-1B-7B-0924-Instruct hi   fetches it the first time
  quorate pull Qwen/Qwen3-30B-A3B --plan arithmetic.toml -o qwen-arithmetic    just the kept experts' bytes")]
pub struct Pull {
    /// OWNER/REPO, OWNER/REPO@REVISION, OWNER/REPO:FILE (a name, or the type of a GGUF file)
    #[arg(value_name = "REPO", value_parser = parse_repo)]
    repo: Repo,
    /// Branch, tag or commit
    #[arg(long, value_name = "REV")]
    revision: Option<String>,
    /// Which file of several: its name, or a type such as Q4_K_M
    #[arg(long, value_name = "FILE")]
    file: Option<String>,
    /// Leave the weights: enough for `inspect`
    #[arg(long, conflicts_with = "plan")]
    config_only: bool,
    /// Fetch only what the kept experts of this plan need, and write the pruned folder to -o
    #[arg(long, value_name = "FILE", requires = "output")]
    plan: Option<PathBuf>,
    /// Folder to write with --plan
    #[arg(short, long, value_name = "DIR", requires = "plan")]
    output: Option<PathBuf>,
    /// Largest file of that folder
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "4GiB", requires = "plan")]
    shard_size: u64,
}

fn parse_repo(text: &str) -> Result<Repo, String> {
    Repo::parse(text).map_err(|e| e.to_string())
}

impl Pull {
    pub fn run(&self, common: &Common) -> Result<()> {
        let mut text = self.repo.id.clone();
        let revision = self.revision.as_ref().unwrap_or(&self.repo.revision);
        text += &format!("@{revision}");
        if let Some(file) = self.file.as_ref().or(self.repo.file.as_ref()) {
            text += &format!(":{file}");
        }
        let repo = Repo::parse(&text)?;
        let hub = Hub::new(common)?;
        match (&self.plan, &self.output) {
            (Some(plan), Some(output)) => {
                let done = pull_kept(&hub, common, &repo, plan, output, self.shard_size)?;
                if common.json {
                    return common.print_json(&json!({ "repo": repo.to_string(), "output": output, "bytes": done.bytes,
                        "fetched_bytes": done.fetched_bytes, "model_bytes": done.model_bytes, "kept_per_layer": done.kept }));
                }
                let (bytes, model) = (human_bytes(done.bytes), human_bytes(done.model_bytes));
                say!("{}: {bytes} of {model}, kept per layer {:?}", output.display(), done.kept)?;
            }
            _ => self.whole(common, &hub, &repo)?,
        }
        Ok(())
    }

    fn whole(&self, common: &Common, hub: &Hub, repo: &Repo) -> Result<()> {
        let fetched = hub.pull(common, repo, self.config_only)?;
        let path = if self.config_only { fetched.folder.clone() } else { hub.model(common, repo)? };
        let family = if self.config_only { None } else { Some(check(&path)?.family().name) };
        if common.json {
            return common.print_json(&json!({ "repo": repo.to_string(), "commit": fetched.commit, "path": path,
                "files": fetched.files, "bytes": fetched.bytes, "fetched_bytes": fetched.fetched_bytes, "family": family }));
        }
        let (files, bytes, new) = (fetched.files.len(), human_bytes(fetched.bytes), human_bytes(fetched.fetched_bytes));
        common.note(&format!("{repo}: {files} files, {bytes}, {new} of them fetched"));
        say!("{}", path.display())?;
        Ok(())
    }
}
