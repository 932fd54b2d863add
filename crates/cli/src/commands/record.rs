//! `quorate record`: values inside the forward pass, to a safetensors file.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use quorate_eval::encode::encode_text;
use quorate_formats::{StoredDType, TensorOut, check_output, write_safetensors};
use quorate_lens::{Indices, Interventions, Recorder};
use quorate_model::{Chain, LogitRows, ModelError, Segment, Site};
use serde_json::json;

use crate::common::{Common, say};
use crate::experts::load_plan;

/// Arguments of `record`.
#[derive(Args)]
#[command(after_help = "\
Sites: resid_pre attn_in attn_q attn_k attn_v attn_q_rot attn_k_rot attn_scores attn_pattern z attn_out resid_mid ffn_in \
router_logits selection routing expert_hidden expert_out moe_out mlp_hidden mlp_out resid_post final_norm logits, or all. \
Tensors are named SITE.LAYER, positions first; the site routing gives topk_ids.LAYER and topk_weights.LAYER.

Examples:
  quorate record --prompt \"<|user|>78+95=<|assistant|>\" --sites logits,router_logits,routing -o out.safetensors
  quorate record --tokens 1,2,3 --sites all --layers 0-1 -o out.safetensors
  quorate record --tokens 1,2,3 --sites resid_post --plan plan.toml -o edited.safetensors")]
pub struct Record {
    /// The text as it is
    #[arg(long, value_name = "TEXT", conflicts_with = "tokens", required_unless_present = "tokens")]
    prompt: Option<String>,
    /// Token ids
    #[arg(long, value_name = "ID,..", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// Sites, comma-separated
    #[arg(long, required = true, value_name = "SITE,..", value_delimiter = ',')]
    sites: Vec<String>,
    /// Decoder layers, e.g. 0,2-4
    #[arg(long, default_value = "all")]
    layers: String,
    /// Plan whose kept experts and interventions apply; sites are recorded after them
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

impl Record {
    pub fn run(&self, common: &Common) -> Result<()> {
        let sites: Vec<Site> = match self.sites.as_slice() {
            [all] if all == "all" => Site::ALL.to_vec(),
            names => names.iter().map(|n| n.parse()).collect::<Result<_, _>>()?,
        };
        let layers: Indices = self.layers.parse().map_err(anyhow::Error::msg)?;
        check_output(&self.output)?;
        let mut model = common.open_model(None)?;
        if let Some(layer) = layers.max().filter(|&l| l >= model.spec().layers.len()) {
            bail!("layer {layer} does not exist; help: the model has {}, from 0", model.spec().layers.len());
        }
        let tokens = match &self.prompt {
            Some(text) => encode_text(&model, text)?,
            None => self.tokens.clone(),
        };
        if tokens.is_empty() {
            return Err(ModelError::EmptyPrompt.into());
        }
        let context = model.spec().max_position_embeddings;
        if tokens.len() > context {
            bail!("{} tokens given, the model's context is {context}; help: record a shorter text", tokens.len());
        }
        let mut interventions = Interventions::default();
        match &self.plan {
            Some(path) => interventions = load_plan(common, &mut model, path, None)?.1,
            None => common.load_all_experts(&mut model)?,
        }
        let mut recorder = Recorder::new(&sites, layers.list());
        let segment = Segment { logits: LogitRows::All, ..Segment::prompt(0, tokens.clone()) };
        let mut cache = model.new_cache(1);
        model.forward(&[segment], &mut cache, &mut Chain(vec![&mut interventions, &mut recorder]))?;

        let floats = recorder.floats().iter().map(|(name, v)| TensorOut::f32(name, &v.shape, v.values.as_slice()));
        let ids = recorder.ids().iter().map(|(name, v)| {
            let bytes: Vec<u8> = v.values.iter().flat_map(|id| id.to_le_bytes()).collect();
            TensorOut::bytes(name, StoredDType::I64, &v.shape, bytes)
        });
        let tensors: Vec<TensorOut<'_>> = floats.chain(ids).collect();
        let names: Vec<(String, Vec<usize>)> = (recorder.floats().iter().map(|(n, v)| (n.clone(), v.shape.clone())))
            .chain(recorder.ids().iter().map(|(n, v)| (n.clone(), v.shape.clone())))
            .collect();
        if names.is_empty() {
            bail!("nothing was recorded: the chosen layers do not have these sites; help: choose others");
        }
        let token_text = tokens.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let metadata =
            [("model".to_string(), model.checkpoint().fingerprint().to_string()), ("tokens".to_string(), token_text)];
        write_safetensors(&self.output, Some(metadata.into()), tensors)?;
        if common.json {
            let shapes: serde_json::Map<_, _> = names.into_iter().map(|(n, s)| (n, json!(s))).collect();
            return common.print_json(&json!({ "file": self.output, "tokens": tokens, "tensors": shapes }));
        }
        say!("{}: {} tensors of {} tokens", self.output.display(), names.len(), tokens.len())?;
        for (name, shape) in names {
            say!("  {name} {shape:?}")?;
        }
        Ok(())
    }
}
