//! The largest absolute error of each family against the reference values, over all fixtures and their exact GGUF files, as the
//! table of `docs/families.md`:
//!
//! ```sh
//! cargo run --release -p quorate-model --example fixture_errors
//! ```
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use quorate_formats::SafetensorsFile;
use quorate_model::{
    At, Flow, GenerateOptions, KvCache, Lens, LogitRows, Model, ModelError, NoLens, Segment, Site, SiteSet, ops,
};

/// Types that hold the fixtures' weights exactly.
const EXACT: [&str; 3] = ["f32", "f16", "bf16"];
/// Fixtures whose configuration says what a file of their architecture cannot say: it means another model.
const UNSAID: [&str; 3] = ["hunyuan_v1_moe", "llama4_text", "phimoe"];

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

/// Errors of logits, residual stream, MLP outputs and router logits; whether the greedy tokens are the same.
struct Errors {
    worst: [f32; 4],
    same: bool,
}

impl Errors {
    fn of(model: &Model, reference: &SafetensorsFile) -> Result<Self, Box<dyn Error>> {
        let ids: Vec<u32> = reference.read_i64("input_ids")?.iter().map(|&id| id as u32).collect();
        let mut errors = Self { worst: [0.0; 4], same: true };
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
                let gaps = all[i * found.len()..].iter().zip(found).map(|(a, b)| (a - b).abs());
                // `max` would pass over what is no number.
                let largest = |most: f32, gap: f32| if gap.is_nan() { f32::INFINITY } else { most.max(gap) };
                errors.worst[column] = gaps.fold(errors.worst[column], largest);
            }
            let options = GenerateOptions { max_tokens: 16, ignore_eos: true, ..GenerateOptions::default() };
            let mut cache = KvCache::new(model.spec(), 1);
            let answer = model.generate(prompt, 0, &mut cache, &options, &mut NoLens, &mut |_| true)?;
            let wanted = reference.read_i64(&format!("greedy.{i}"))?;
            errors.same &= wanted.iter().map(|&t| t as u32).eq(answer.tokens.iter().copied());
        }
        Ok(errors)
    }

    fn greedy(&self) -> &'static str {
        if self.same { "equal" } else { "DIFFERS" }
    }
}

/// Folders or files inside a folder, in order.
fn inside(folder: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut paths = fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn name(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn open(path: &Path) -> Result<Model, Box<dyn Error>> {
    let mut model = Model::open(path, 2, None)?;
    model.load_all_experts()?;
    Ok(model)
}

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let mut lines = Vec::new();
    for folder in inside(&root)?.into_iter().filter(|f| f.join("reference.safetensors").exists()) {
        let (fixture, model) = (name(&folder), open(&folder)?);
        let reference = SafetensorsFile::open(&folder.join("reference.safetensors"))?;
        let errors = Errors::of(&model, &reference)?;
        let [logits, residual, mlp, router] =
            errors.worst.map(|w| if w == 0.0 { String::new() } else { format!("{w:.1e}") });
        let mut files = Vec::new();
        let gguf = folder.join("gguf");
        for file in if gguf.exists() { inside(&gguf)? } else { Vec::new() } {
            let name = name(&file);
            let Some(kind) = EXACT.iter().find(|kind| name == format!("{fixture}-{kind}")) else { continue };
            if UNSAID.contains(&fixture.as_str()) {
                files.push(format!("{kind}: see below"));
                continue;
            }
            let errors = Errors::of(&open(&file)?, &reference)?;
            files.push(format!("{kind}: {:.1e}, {}", errors.worst[0], errors.greedy()));
        }
        let family = &model.spec().family;
        let cells = [family, &fixture, &logits, &residual, &mlp, &router, errors.greedy(), &files.join("; ")];
        lines.push((family.clone(), format!("| {} |", cells.join(" | "))));
    }
    lines.sort();
    println!("| family | fixture | logits | residual | mlp_out | router | greedy | from GGUF: logits, greedy |");
    println!("|---|---|---|---|---|---|---|---|");
    lines.iter().for_each(|(_, line)| println!("{line}"));
    Ok(())
}
