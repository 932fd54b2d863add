//! A pattern: what is known of a task's experts and how its prompts look to the first router.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::{ExpertMap, Key, LensError, MetricInfo, ProfileData, PromptKey, RouterStats, ScoreTable, uses};

/// Version of the pattern format that this program writes.
pub const PATTERN_VERSION: u32 = 1;

/// What PreMoe stores for a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Pattern {
    /// Where it comes from.
    pub info: PatternInfo,
    /// Which experts.
    pub map: ExpertMap,
    /// Score tables, one per metric.
    pub scores: Vec<ScoreTable>,
    /// Selections of each expert on the held-out texts.
    pub heldout_count: Vec<u64>,
    /// Gate sum of each expert on the held-out texts.
    pub heldout_gate: Vec<f64>,
    /// How its prompts look.
    pub key: Key,
    /// All that was gathered, from which it can be scored again and merged; left out of compact exports.
    pub data: Option<ProfileData>,
}

/// Provenance of a pattern.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PatternInfo {
    /// Version of the format.
    pub version: u32,
    /// Task.
    pub name: String,
    /// Fingerprint of the model.
    pub fingerprint: String,
    /// Files that were profiled.
    pub data: Vec<String>,
    /// Texts profiled.
    pub items: u64,
    /// Tokens profiled: prompt and answer.
    pub tokens: [u64; 2],
    /// Texts held out.
    pub heldout_items: u64,
    /// Which tokens count: `prompt`, `answer`, `both` or `balanced`.
    pub phases: String,
    /// MoE layer at whose router its prompts were seen.
    #[serde(default)]
    pub key_layer: usize,
    /// Tasks that it was merged from, if it is a generalist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merged_from: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    info: PatternInfo,
    layers: Vec<usize>,
    experts: Vec<usize>,
    metrics: Vec<MetricInfo>,
    /// Widths of the two parts of a prompt's key.
    key: [usize; 2],
    radius: f32,
    /// Batches done, in the file of an unfinished profile.
    #[serde(default)]
    done_batches: usize,
}

impl Pattern {
    /// The pattern of what a profile gathered. `score` makes the score tables.
    pub fn build(
        mut info: PatternInfo,
        data: ProfileData,
        score: impl FnOnce(&RouterStats) -> Vec<ScoreTable>,
    ) -> Pattern {
        info.version = PATTERN_VERSION;
        info.items = data.stats.items;
        info.tokens = [data.stats.prompt.tokens, data.stats.answer.tokens];
        info.heldout_items = data.heldout.items;
        let (heldout_count, heldout_gate) = uses(&data.heldout);
        // A generalist is fallen back to, not retrieved.
        let key = if info.merged_from.is_empty() {
            Key::of(&data.keys, &data.heldout_keys, info.key_layer)
        } else {
            Key::default()
        };
        let (map, scores) = (data.stats.map.clone(), score(&data.stats));
        Pattern { info, map, scores, heldout_count, heldout_gate, key, data: Some(data) }
    }

    /// A pattern whose scores are the means of others' scores, weighted by their tokens: what can be had of compact ones.
    ///
    /// # Errors
    /// Patterns without a common metric or of different models.
    pub fn averaged(mut info: PatternInfo, patterns: &[&Pattern]) -> Result<Pattern, LensError> {
        let Some((first, rest)) = patterns.split_first() else {
            return Err(LensError::invalid("patterns", "there are none to average"));
        };
        rest.iter().try_for_each(|p| p.check_model(&first.info.fingerprint))?;
        let tokens = |p: &Pattern| (p.info.tokens[0] + p.info.tokens[1]) as f64;
        let all: f64 = patterns.iter().map(|p| tokens(p)).sum();
        let mut result = Pattern { data: None, key: Key::default(), ..(*first).clone() };
        result.scores.retain(|t| rest.iter().all(|p| p.scores(&t.metric.name).is_ok()));
        for table in &mut result.scores {
            table.values.iter_mut().for_each(|v| *v *= tokens(first) / all.max(1.0));
            for pattern in rest {
                let theirs = pattern.scores(&table.metric.name)?;
                let weighted = theirs.values.iter().map(|v| v * tokens(pattern) / all.max(1.0));
                table.values.iter_mut().zip(weighted).for_each(|(v, w)| *v += w);
                table.counts.iter_mut().zip(&theirs.counts).for_each(|(a, b)| *a += b);
            }
        }
        for pattern in rest {
            result.heldout_count.iter_mut().zip(&pattern.heldout_count).for_each(|(a, b)| *a += b);
            result.heldout_gate.iter_mut().zip(&pattern.heldout_gate).for_each(|(a, b)| *a += b);
        }
        info.version = PATTERN_VERSION;
        info.items = patterns.iter().map(|p| p.info.items).sum();
        info.tokens = [0, 1].map(|i| patterns.iter().map(|p| p.info.tokens[i]).sum());
        info.heldout_items = patterns.iter().map(|p| p.info.heldout_items).sum();
        result.info = info;
        Ok(result)
    }

    /// The score table of a metric.
    ///
    /// # Errors
    /// A metric that the pattern does not have.
    pub fn scores(&self, metric: &str) -> Result<&ScoreTable, LensError> {
        let found = self.scores.iter().find(|s| s.metric.name == metric);
        found.ok_or_else(|| LensError::unknown("metric", metric, self.scores.iter().map(|s| s.metric.name.as_str())))
    }

    /// An error unless the pattern was made with this model.
    ///
    /// # Errors
    /// [`LensError::OtherModel`].
    pub fn check_model(&self, fingerprint: &str) -> Result<(), LensError> {
        if self.info.fingerprint == fingerprint {
            return Ok(());
        }
        Err(LensError::OtherModel {
            what: format!("pattern `{}`", self.info.name),
            theirs: self.info.fingerprint.clone(),
            ours: fingerprint.to_string(),
        })
    }

    /// The pattern as a safetensors file with a JSON header in its metadata (key `quorate`).
    ///
    /// # Errors
    /// Sizes that do not fit together.
    pub fn to_bytes(&self) -> Result<Vec<u8>, LensError> {
        let mut tensors = Tensors::default();
        for table in &self.scores {
            tensors.f64(format!("scores.{}", table.metric.name), &table.values);
        }
        let counts = self.scores.first().map_or(&[][..], |t| &t.counts);
        tensors.u64("counts".into(), counts);
        tensors.u64("heldout.count".into(), &self.heldout_count);
        tensors.f64("heldout.gate".into(), &self.heldout_gate);
        tensors.f32("key.hidden".into(), &self.key.mean.hidden);
        tensors.f32("key.router".into(), &self.key.mean.router);
        tensors.f32("key.prototypes".into(), &self.key.prototypes.concat());
        let mut key = [self.key.mean.hidden.len(), self.key.mean.router.len()];
        if let Some(data) = &self.data {
            for (part, stats) in [("stats", &data.stats), ("heldout_stats", &data.heldout)] {
                let (floats, counts) = stats.to_tensors();
                floats.iter().for_each(|(name, v)| tensors.f64(format!("{part}.{name}"), v));
                counts.iter().for_each(|(name, v)| tensors.u64(format!("{part}.{name}"), v));
            }
            for (part, keys) in [("keys", &data.keys), ("heldout_keys", &data.heldout_keys)] {
                key = keys.first().map_or(key, |k| [k.hidden.len(), k.router.len()]);
                let flat: Vec<f32> = keys.iter().flat_map(|k| k.hidden.iter().chain(&k.router)).copied().collect();
                tensors.f32(part.into(), &flat);
            }
        }
        let header = Header {
            info: PatternInfo { version: PATTERN_VERSION, ..self.info.clone() },
            layers: self.map.layers.clone(),
            experts: self.map.experts.clone(),
            metrics: self.scores.iter().map(|s| s.metric.clone()).collect(),
            key,
            radius: self.key.radius,
            done_batches: self.data.as_ref().map_or(0, |d| d.done_batches),
        };
        tensors.finish(&header).map_err(|e| self.broken(e))
    }

    fn broken(&self, problem: impl ToString) -> LensError {
        LensError::invalid(format!("pattern `{}`", self.info.name), problem.to_string())
    }

    /// Writes the pattern's file into a folder, which is made if there is none; `part` (`""`, `.0-of-2`) follows the name.
    ///
    /// # Errors
    /// A folder that cannot be made, a full disk.
    pub fn write(&self, folder: &Path, part: &str) -> Result<(), LensError> {
        std::fs::create_dir_all(folder).map_err(|source| LensError::Io { path: folder.into(), source })?;
        let path = folder.join(safe_file_name(&format!("{}{part}.pattern", self.info.name)));
        Ok(quorate_formats::write_file(&path, &self.to_bytes()?)?)
    }

    /// Reads what [`Pattern::to_bytes`] wrote; `what` names the source in errors.
    ///
    /// # Errors
    /// Bytes that are no pattern, or one of an unknown version.
    pub fn from_bytes(bytes: &[u8], what: &str) -> Result<Pattern, LensError> {
        let help = "`quorate profile -o` and `quorate library export` write patterns";
        let bad =
            |problem: String| LensError::invalid(what, format!("this is no whole pattern: {problem}; help: {help}"));
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| bad(e.to_string()))?;
        let text = metadata.metadata().as_ref().and_then(|m| m.get("quorate"));
        let text = text.ok_or_else(|| bad("its metadata has no key `quorate`".into()))?;
        let header: Header = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        if header.info.version != PATTERN_VERSION {
            let problem = format!("pattern version {} is unknown; help: profile the task again", header.info.version);
            return Err(LensError::invalid(what, problem));
        }
        if header.layers.len() != header.experts.len() || header.experts.iter().any(|&e| e > 1 << 20) {
            return Err(bad("layers and expert counts do not fit".into()));
        }
        let file = SafeTensors::deserialize(bytes).map_err(|e| bad(e.to_string()))?;
        let map = ExpertMap::new(header.layers, header.experts);
        let total = map.total();
        let sized = |name: &str, v: Vec<f64>| {
            if v.len() == total { Ok(v) } else { Err(bad(format!("`{name}` has {} values, not {total}", v.len()))) }
        };
        let f64s = |name: &str| read(&file, name, Dtype::F64, f64::from_le_bytes).map_err(bad);
        let u64s = |name: &str| read(&file, name, Dtype::U64, u64::from_le_bytes).map_err(bad);
        let f32s = |name: &str| read(&file, name, Dtype::F32, f32::from_le_bytes).map_err(bad);
        let counts = u64s("counts")?;
        let mut scores = Vec::with_capacity(header.metrics.len());
        for metric in header.metrics {
            let name = format!("scores.{}", metric.name);
            let values = sized(&name, f64s(&name)?)?;
            if counts.len() != total {
                return Err(bad(format!("`counts` has {} values, not {total}", counts.len())));
            }
            scores.push(ScoreTable { map: map.clone(), metric, values, counts: counts.clone() });
        }
        let mean = PromptKey { hidden: f32s("key.hidden")?, router: f32s("key.router")? };
        let prototypes = f32s("key.prototypes")?.chunks(mean.hidden.len().max(1)).map(<[f32]>::to_vec).collect();
        let key = Key { mean, prototypes, radius: header.radius, moe_layer: header.info.key_layer };
        key.check().map_err(bad)?;
        let heldout_count = u64s("heldout.count")?;
        let heldout_gate = sized("heldout.gate", f64s("heldout.gate")?)?;
        if heldout_count.len() != total {
            return Err(bad("`heldout.count` has another length".into()));
        }
        let mut pattern = Pattern { info: header.info, map, scores, heldout_count, heldout_gate, key, data: None };
        if file.tensor("stats.items").is_ok() {
            let stats = |part: &str| {
                RouterStats::from_tensors(
                    pattern.map.clone(),
                    |name| f64s(&format!("{part}.{name}")),
                    |name| u64s(&format!("{part}.{name}")),
                )
            };
            let [hidden, router] = header.key;
            let keys = |name: &str| -> Result<Vec<PromptKey>, LensError> {
                let flat = f32s(name)?;
                let width = hidden.checked_add(router).filter(|&w| flat.len().is_multiple_of(w.max(1)));
                let width = width.ok_or_else(|| bad(format!("`{name}` has the wrong length")))?;
                let key = |k: &[f32]| PromptKey { hidden: k[..hidden].to_vec(), router: k[hidden..].to_vec() };
                Ok(flat.chunks(width.max(1)).map(key).collect())
            };
            let done_batches = header.done_batches;
            let (stats, heldout) = (stats("stats")?, stats("heldout_stats")?);
            let (keys, heldout_keys) = (keys("keys")?, keys("heldout_keys")?);
            pattern.data = Some(ProfileData { stats, heldout, keys, heldout_keys, done_batches });
        }
        Ok(pattern)
    }
}

/// A task's name as the name of a file, which lies in no other folder whatever the task is called.
pub fn safe_file_name(name: &str) -> String {
    let plain = |(i, c): (usize, char)| {
        let strange = c.is_control() || "/\\:%".contains(c) || (i == 0 && c == '.');
        if strange { format!("%{:02X}", u32::from(c)) } else { c.to_string() }
    };
    name.chars().enumerate().map(plain).collect()
}

#[derive(Default)]
struct Tensors(BTreeMap<String, (Dtype, usize, Vec<u8>)>);

impl Tensors {
    fn f64(&mut self, name: String, v: &[f64]) {
        self.0.insert(name, (Dtype::F64, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }
    fn u64(&mut self, name: String, v: &[u64]) {
        self.0.insert(name, (Dtype::U64, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }
    fn f32(&mut self, name: String, v: &[f32]) {
        self.0.insert(name, (Dtype::F32, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect()));
    }
    fn finish(&self, header: &Header) -> Result<Vec<u8>, String> {
        let views = self.0.iter().map(|(name, (dtype, len, bytes))| {
            TensorView::new(*dtype, vec![*len], bytes).map(|view| (name.as_str(), view)).map_err(|e| e.to_string())
        });
        let views = views.collect::<Result<Vec<_>, _>>()?;
        let header = serde_json::to_string(header).map_err(|e| e.to_string())?;
        let metadata = [("quorate".to_string(), header)].into();
        safetensors::serialize(views, Some(metadata)).map_err(|e| e.to_string())
    }
}

fn read<T, const N: usize>(
    file: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
    from: fn([u8; N]) -> T,
) -> Result<Vec<T>, String> {
    let tensor = file.tensor(name).map_err(|_| format!("tensor `{name}` is missing"))?;
    if tensor.dtype() != dtype {
        return Err(format!("tensor `{name}` is {:?}, not {dtype:?}", tensor.dtype()));
    }
    let number = |b: &[u8]| from(<[u8; N]>::try_from(b).unwrap_or([0; N]));
    Ok(tensor.data().chunks_exact(N).map(number).collect())
}
