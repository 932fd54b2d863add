//! The largest absolute error of each family against transformers' values, over all fixtures:
//!
//! ```sh
//! cargo run --release -p quorate-model --example fixture_errors
//! ```
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use candle_core::Tensor;
use quorate_formats::SafetensorsFile;
use quorate_model::{
    At, Flow, GenerateOptions, KvCache, Lens, LogitRows, Model, ModelError, NoLens, Segment, Site, SiteSet, ops,
};

/// Keeps what passes by.
#[derive(Default)]
struct Keep(BTreeMap<(Site, usize), Vec<f32>>);

impl Lens for Keep {
    fn sites(&self, _layer: usize) -> SiteSet {
        SiteSet::of(&[Site::ResidPost, Site::MlpOut, Site::RouterLogits, Site::FinalNorm, Site::Logits])
    }
    fn tensor(&mut self, at: &At<'_>, value: &mut Tensor) -> Result<Flow, ModelError> {
        self.0.insert((at.site, at.layer), ops::values(value)?.to_vec());
        Ok(Flow::Continue)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let mut folders: Vec<_> = std::fs::read_dir(&root)?.flatten().map(|e| e.path()).collect();
    folders.retain(|f| f.join("reference.safetensors").exists());
    folders.sort();
    println!(
        "{:20} {:12} {:>9} {:>9} {:>9} {:>9}  greedy",
        "fixture", "family", "logits", "residual", "mlp_out", "router"
    );
    for folder in folders {
        let reference = SafetensorsFile::open(&folder.join("reference.safetensors"))?;
        let ids: Vec<u32> = reference.read_i64("input_ids")?.iter().map(|&id| id as u32).collect();
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut model = match Model::open(&folder, 2, None) {
            Ok(model) => model,
            Err(error) => {
                println!("{name:20} {error}");
                continue;
            }
        };
        model.load_all_experts()?;
        let (mut worst, mut same) = ([0f32; 4], true);
        for (i, prompt) in ids.chunks(ids.len() / 2).enumerate() {
            let mut keep = Keep::default();
            let segment = Segment { logits: LogitRows::All, ..Segment::prompt(0, prompt.to_vec()) };
            model.forward(&[segment], &mut KvCache::new(model.spec(), 1), &mut keep)?;
            for ((site, layer), found) in &keep.0 {
                let (column, name) = match site {
                    Site::Logits => (0, "logits".to_string()),
                    Site::ResidPost => (1, format!("hidden_states.{}", layer + 1)),
                    Site::MlpOut => (2, format!("mlp_out.{layer}")),
                    Site::RouterLogits => (3, format!("router_logits.{layer}")),
                    _ => continue,
                };
                let all = reference.read_f32(&name)?;
                let errors = all[i * found.len()..].iter().zip(found).map(|(a, b)| (a - b).abs());
                worst[column] = errors.fold(worst[column], f32::max);
            }
            let options = GenerateOptions { max_tokens: 16, ignore_eos: true, ..GenerateOptions::default() };
            let mut cache = KvCache::new(model.spec(), 1);
            let answer = model.generate(prompt, 0, &mut cache, &options, &mut NoLens, &mut |_| true)?;
            let wanted = reference.read_i64(&format!("greedy.{i}"))?;
            same &= wanted.iter().map(|&t| t as u32).eq(answer.tokens.iter().copied());
        }
        let [logits, residual, mlp, router] = worst.map(|w| if w == 0.0 { "-".into() } else { format!("{w:.1e}") });
        let greedy = if same { "equal" } else { "DIFFERS" };
        println!("{name:20} {:12} {logits:>9} {residual:>9} {mlp:>9} {router:>9}  {greedy}", model.spec().family);
    }
    Ok(())
}
