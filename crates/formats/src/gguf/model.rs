//! From a GGUF file to a model: its metadata as a configuration, then the specification by the family's mapping.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Number, Value, json};

use super::arch::{ARCHS, Arch};
use super::ends;
use super::files::{self, Files};
use super::layout::Layout;
use super::names::GGUF_NAMES;
use super::{GgufFile, GgufValue};
use crate::bind::{Bound, Naming, bind};
use crate::checkpoint::check_layers;
use crate::config::{HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, POSITIONS_MAX, Section};
use crate::families::{self, Family};
use crate::packed::Scheme;
use crate::role::Role;
use crate::spec::{DeltaLayout, FfnSpec, ModelSpec, NormKind, RouterScore};
use crate::{Config, DataFile, FormatError, Result, TensorLoc};

/// A model in GGUF, opened and found.
pub(crate) struct GgufModel {
    pub config: Config,
    pub spec: ModelSpec,
    pub family: &'static Family,
    pub files: Vec<DataFile>,
    pub tensors: Vec<TensorLoc>,
    pub bound: Bound,
    pub metadata: BTreeMap<String, GgufValue>,
}

/// Opens a model of one file or several. Only headers are read, and factors of the rotation; unless it is `whole`, there need
/// be no more.
///
/// # Errors
/// Anything missing, malformed, inconsistent or not supported, by name.
pub(crate) fn open(path: &Path, whole: bool) -> Result<GgufModel> {
    let Files { metadata, files, tensors } = files::open(path, whole)?;
    let name = metadata.get("general.architecture").and_then(GgufValue::as_str).unwrap_or_default();
    let arch = Arch::named(name).ok_or_else(|| FormatError::UnknownArch {
        path: path.to_owned(),
        arch: name.chars().take(64).collect(),
        known: ARCHS.iter().map(|arch| arch.name).collect(),
    })?;
    let layout = Layout { arch, by_name: tensors.iter().map(|t| (t.name.as_str(), t)).collect() };
    let reader = Reader { path, arch, meta: section(path, arch, &metadata)?, layout, files: &files };
    let config = reader.config(&metadata)?;
    let family = families::find(&config)?;
    if whole {
        check_layers(&config, &files, &tensors)?;
    }
    let spec = reader.spec(&config, family)?;
    let naming = Naming { names: &GGUF_NAMES, fused: &|role| reader.layout.fused(&spec, role), scheme: Scheme::Plain };
    let bound = bind(path, &spec, &naming, &files, &tensors)?;
    reader.refuse_unknown(&spec, &bound.unused)?;
    Ok(GgufModel { config, spec, family, files, tensors, bound, metadata })
}

/// The keys of the architecture, without its name before them.
fn section(path: &Path, arch: &Arch, metadata: &BTreeMap<String, GgufValue>) -> Result<Section> {
    let (mut map, mut called) = (Map::new(), BTreeMap::new());
    for (key, value) in metadata {
        let Some(short) = key.strip_prefix(arch.name).and_then(|rest| rest.strip_prefix('.')) else { continue };
        let fits = !matches!(value, GgufValue::Array(values) if values.len() > LAYERS_MAX);
        let value = Some(value).filter(|_| fits).and_then(json_of).ok_or_else(|| FormatError::Gguf {
            path: path.to_owned(),
            problem: format!("key `{key}` is infinite, not a number, or longer than a model has layers"),
        })?;
        called.insert(short.to_owned(), key.clone());
        map.insert(short.to_owned(), value);
    }
    Ok(Section::translated(path, map, called))
}

/// `None` of infinities and NaN. A list of equal numbers, one for each layer, is that number.
fn json_of(value: &GgufValue) -> Option<Value> {
    Some(match value {
        GgufValue::Unsigned(n) => Value::from(*n),
        GgufValue::Signed(n) => Value::from(*n),
        GgufValue::Float(x) => Value::Number(Number::from_f64(*x)?),
        GgufValue::Bool(b) => Value::from(*b),
        GgufValue::Text(text) => Value::from(text.as_str()),
        GgufValue::Array(values) => match values.iter().next() {
            Some(first @ (GgufValue::Unsigned(_) | GgufValue::Signed(_))) if values.iter().all(|v| v == first) => {
                json_of(&first)?
            }
            _ => Value::Array(values.iter().map(|v| json_of(&v)).collect::<Option<_>>()?),
        },
    })
}

struct Reader<'a> {
    path: &'a Path,
    arch: &'static Arch,
    meta: Section,
    layout: Layout<'a>,
    files: &'a [DataFile],
}

impl Reader<'_> {
    /// The configuration that the family would have read from a `config.json`.
    fn config(&self, metadata: &BTreeMap<String, GgufValue>) -> Result<Config> {
        let (mut map, mut called) = (Map::new(), BTreeMap::new());
        let model_type = self.arch.model_types[(self.arch.choose)(&self.meta)];
        map.insert("model_type".to_owned(), Value::from(model_type));
        for (key, short) in self.arch.pairs() {
            called.insert(key.to_owned(), format!("{}.{short}", self.arch.name));
            if let Some(value) = self.meta.get(short) {
                map.insert(key.to_owned(), value.clone());
            }
        }
        // Some converters write 0 for no window.
        if map.get("sliding_window").is_some_and(|window| *window == json!(0)) {
            map.insert("sliding_window".to_owned(), Value::Null);
        }
        for (key, json) in self.arch.given {
            let value = || serde_json::from_str(json).expect("the table holds JSON");
            map.entry(*key).or_insert_with(value);
        }
        let mut set = |key: &str, value: Value| drop(map.insert(key.to_owned(), value));
        set("vocab_size", Value::from(self.embedding()?.shape[0]));
        set("tie_word_embeddings", Value::from(!self.layout.has("output.weight")));
        set("lm_head_bias", Value::from(self.layout.has("output.bias")));
        set("use_qk_norm", Value::from(self.layout.has("blk.0.attn_q_norm.weight")));
        for (key, value) in self.layers()?.into_iter().chain(self.rotation()?).chain(self.particular(model_type)?) {
            set(key, value);
        }
        let (bos, eos) = ends::tokens(metadata);
        set("bos_token_id", bos.map_or(Value::Null, Value::from));
        set("eos_token_id", Value::from(eos));
        Ok(Config::new(Section::translated(self.path, map, called)))
    }

    fn embedding(&self) -> Result<&TensorLoc> {
        let (path, tensor) = (self.path.to_owned(), GGUF_NAMES.of(Role::Embed));
        let width = self.meta.opt_index("embedding_length", usize::MAX)?.unwrap_or(0);
        let found = self.layout.by_name.get(tensor.as_str()).filter(|t| t.shape.len() == 2);
        found.copied().ok_or(FormatError::MissingTensor { path, tensor, expected: vec![0, width] })
    }

    /// The number of layers, without those that predict further tokens.
    fn layers(&self) -> Result<Vec<(&'static str, Value)>> {
        let all = self.meta.count("block_count", LAYERS_MAX)?;
        let further = self.meta.opt_index("nextn_predict_layers", LAYERS_MAX)?.unwrap_or(0);
        if further >= all {
            return Err(self.meta.refuse("nextn_predict_layers", format!("there are only {all} layers")));
        }
        Ok(vec![("num_hidden_layers", Value::from(all - further))])
    }

    /// Width of a head, which need not be written.
    fn head_dim(&self) -> Result<usize> {
        if let Some(dim) = self.meta.opt_count("attention.key_length", HEAD_DIM_MAX)? {
            return Ok(dim);
        }
        let heads = self.meta.count("attention.head_count", HEADS_MAX)?;
        Ok(self.embedding()?.shape[1] / heads)
    }

    /// RoPE: base, rotated part, scaling.
    fn rotation(&self) -> Result<Vec<(&'static str, Value)>> {
        let mut set = Vec::new();
        if self.meta.get("rope.freq_base").is_none() {
            set.push(("rope_theta", json!(10_000.0)));
        }
        let latent = self.meta.get("attention.kv_lora_rank").is_some();
        if let (false, Some(dim)) = (latent, self.meta.opt_count("rope.dimension_count", HEAD_DIM_MAX)?) {
            let head_dim = self.head_dim()?;
            if dim > head_dim {
                return Err(self.meta.refuse("rope.dimension_count", format!("a head has only {head_dim}")));
            }
            // A quarter more, so that what is rounded down later is this number in spite of the division's rounding.
            let share = if dim == head_dim { 1.0 } else { (dim as f64 + 0.25) / head_dim as f64 };
            set.push(("partial_rotary_factor", json!(share)));
        }
        if let Some(scaling) = self.scaling()? {
            set.push(("rope_scaling", Value::Object(scaling)));
        }
        Ok(set)
    }

    fn scaling(&self) -> Result<Option<Map<String, Value>>> {
        let number = |key: &str| self.meta.opt_positive(key);
        let factor = match number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => number("rope.scale_linear")?,
        };
        let original = self.meta.opt_count("rope.scaling.original_context_length", POSITIONS_MAX)?;
        let mut scaling = Map::new();
        let mut set = |key: &str, value: Option<Value>| scaling.extend(value.map(|value| (key.to_owned(), value)));
        set("original_max_position_embeddings", original.map(Value::from));
        if self.layout.has("rope_factors_short.weight") {
            set("rope_type", Some(json!("longrope")));
            set("short_factor", Some(json!(self.factors("rope_factors_short.weight")?)));
            set("long_factor", Some(json!(self.factors("rope_factors_long.weight")?)));
            set("attention_factor", number("rope.scaling.attn_factor")?.map(Value::from));
            return Ok(Some(scaling));
        }
        match (self.meta.opt_text("rope.scaling.type")?.unwrap_or("linear"), factor) {
            ("none", _) | ("linear", None) => return Ok(None),
            ("linear", Some(factor)) => {
                set("rope_type", Some(json!("linear")));
                set("factor", Some(json!(factor)));
            }
            ("yarn", Some(factor)) => {
                set("rope_type", Some(json!("yarn")));
                set("factor", Some(json!(factor)));
                set("beta_fast", number("rope.scaling.yarn_beta_fast")?.map(Value::from));
                set("beta_slow", number("rope.scaling.yarn_beta_slow")?.map(Value::from));
                set("attention_factor", number("rope.scaling.yarn_attn_factor")?.map(Value::from));
                // gpt-oss was trained so; files have no key for it.
                set("truncate", Some(json!(self.arch.name != "gpt-oss")));
                if let Some(multiplier) = number("rope.scaling.yarn_log_multiplier")? {
                    let deepseek = self.arch.name == "deepseek2";
                    let all = if deepseek { multiplier / 0.1 } else { multiplier };
                    set("mscale", Some(json!(if deepseek { all } else { 1.0 })));
                    set("mscale_all_dim", Some(json!(all)));
                }
            }
            _ => {
                let problem = "not supported, or without a factor; known: none, linear, yarn, longrope";
                return Err(self.meta.refuse("rope.scaling.type", problem));
            }
        }
        Ok(Some(scaling))
    }

    /// The values of a small tensor of factors, all above 0.
    fn factors(&self, name: &str) -> Result<Vec<f32>> {
        let missing =
            || FormatError::MissingTensor { path: self.path.to_owned(), tensor: name.to_owned(), expected: vec![] };
        let loc = *self.layout.by_name.get(name).ok_or_else(missing)?;
        let file = &self.files[loc.file];
        let bad = |problem: String| FormatError::TensorEntry {
            path: file.path().to_owned(),
            tensor: name.to_owned(),
            problem,
        };
        if loc.elements() > HEAD_DIM_MAX as u64 {
            return Err(bad(format!("{} factors are more than a head can have", loc.elements())));
        }
        let values = crate::safetensors::read_tensor_f32(file, loc)?;
        match values.iter().all(|v| v.is_finite() && *v > 0.0) {
            true => Ok(values),
            false => Err(bad("a factor is not above 0".to_owned())),
        }
    }

    /// What only some architectures need.
    fn particular(&self, model_type: &str) -> Result<Vec<(&'static str, Value)>> {
        let meta = &self.meta;
        if self
            .meta
            .opt_count("attention.value_length", HEAD_DIM_MAX)?
            .is_some_and(|v| Ok(v) != self.head_dim().map_err(drop))
            && meta.get("attention.kv_lora_rank").is_none()
        {
            return Err(meta.refuse("attention.value_length", "values of another width than keys are not supported"));
        }
        Ok(match self.arch.name {
            "deepseek2" => {
                let length = |own: &str, old: &str| match meta.opt_count(own, HEAD_DIM_MAX)? {
                    Some(n) => Ok(n),
                    None => meta.count(old, HEAD_DIM_MAX),
                };
                let keys = length("attention.key_length_mla", "attention.key_length")?;
                let rotated = meta.count("rope.dimension_count", HEAD_DIM_MAX)?;
                if keys <= rotated {
                    return Err(meta.refuse("rope.dimension_count", format!("below the {keys} of a key expected")));
                }
                let values = length("attention.value_length_mla", "attention.value_length")?;
                vec![("qk_nope_head_dim", json!(keys - rotated)), ("v_head_dim", json!(values))]
            }
            "gemma2" | "gemma3" => {
                // The largest models scale by the share of a head in the width, all others by the head's own width.
                let large = meta.count("block_count", LAYERS_MAX)? == if model_type == "gemma2" { 46 } else { 62 };
                let heads = meta.count("attention.head_count", HEADS_MAX)?;
                let scalar = if large { self.embedding()?.shape[1] / heads } else { self.head_dim()? };
                vec![("query_pre_attn_scalar", json!(scalar))]
            }
            "llama4" => {
                // Maverick alone goes without.
                vec![("use_qk_norm", json!(meta.opt_index("expert_count", usize::MAX)? != Some(128)))]
            }
            "qwen3next" | "qwen35moe" => {
                let heads = meta.count("ssm.time_step_rank", HEADS_MAX)?;
                let inner = meta.count("ssm.inner_size", HEADS_MAX * HEAD_DIM_MAX)?;
                if !inner.is_multiple_of(heads) {
                    return Err(
                        meta.refuse("ssm.inner_size", format!("a multiple of the {heads} value heads expected"))
                    );
                }
                let mut set = vec![("linear_value_head_dim", json!(inner / heads))];
                if let Some(Value::Array(flags)) = meta.get("attention.recurrent_layers") {
                    let layers = meta.count("block_count", LAYERS_MAX)?
                        - meta.opt_index("nextn_predict_layers", LAYERS_MAX)?.unwrap_or(0);
                    let kind = |flag: &Value| if *flag == json!(true) { "linear_attention" } else { "full_attention" };
                    set.push(("layer_types", flags.iter().take(layers).map(kind).collect()));
                }
                set
            }
            _ => Vec::new(),
        })
    }

    /// The specification: what the family says, and what only the tensors tell.
    fn spec(&self, config: &Config, family: &Family) -> Result<ModelSpec> {
        let mut spec = (family.spec)(config)?;
        if self.arch.one_added && spec.norm == NormKind::RmsPlusOne {
            spec.norm = NormKind::Rms;
        }
        let factors = match self.layout.has("rope_freqs.weight") {
            true => Some(self.factors("rope_freqs.weight")?),
            false => None,
        };
        for (l, layer) in spec.layers.iter_mut().enumerate() {
            let has = |name: &str| self.layout.has(&format!("blk.{l}.{name}"));
            if let Some(delta) = &mut layer.delta {
                // Converters put Qwen3.5's value heads into tiles.
                let apart = if self.arch.name == "qwen35moe" { DeltaLayout::Tiled } else { DeltaLayout::Split };
                delta.layout = if has("ssm_in.weight") { DeltaLayout::Grouped } else { apart };
            } else {
                layer.attn.qkv_bias = has("attn_q.bias") || has("attn_qkv.bias");
                layer.attn.o_bias = has("attn_output.bias");
            }
            let rope = &mut layer.attn.rope;
            if self.arch.permuted && rope.dim != layer.attn.head_dim {
                return Err(self.meta.refuse("rope.dimension_count", "heads that rotate as a whole expected"));
            }
            if let Some(factors) = factors.as_ref().filter(|_| rope.dim > 0) {
                if factors.len() != rope.dim / 2 {
                    let (path, tensor) = (self.path.to_owned(), "rope_freqs.weight".to_owned());
                    return Err(FormatError::Shape {
                        path,
                        tensor,
                        expected: [rope.dim / 2].into(),
                        found: [factors.len()].into(),
                    });
                }
                rope.inv_freq.iter_mut().zip(factors).for_each(|(f, factor)| *f /= factor);
            }
            if let FfnSpec::Moe(moe) = &mut layer.ffn {
                let up = self.layout.by_name.get(GGUF_NAMES.of(Role::SharedUp(l)).as_str());
                if let (Some(shared), Some(&up)) = (&mut moe.shared, up) {
                    // Some converters write another number into the metadata.
                    shared.intermediate_size = up.shape[0];
                }
                self.check_gating(moe.router.score)?;
            }
        }
        Ok(spec)
    }

    /// The score function that a file names must be the family's.
    fn check_gating(&self, score: RouterScore) -> Result<()> {
        let known = match self.meta.opt_index("expert_gating_func", usize::MAX)? {
            None | Some(0) => true,
            Some(1) => score != RouterScore::Sigmoid,
            Some(2) => score == RouterScore::Sigmoid,
            // Softmax over the chosen ones is softmax over all, renormalised.
            Some(3) => score == RouterScore::TopkThenSoftmax,
            Some(_) => false,
        };
        if known { Ok(()) } else { Err(self.meta.refuse("expert_gating_func", "not supported with this architecture")) }
    }

    /// A tensor in a layer that nobody asked for would change the results.
    fn refuse_unknown(&self, spec: &ModelSpec, unused: &[String]) -> Result<()> {
        let of_layer = |name: &&String| {
            let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
            // The rotation's frequencies, which some old files repeat.
            layer.is_some_and(|(l, what)| {
                l.parse().is_ok_and(|l: usize| l < spec.layers.len()) && !what.starts_with("attn_rot")
            })
        };
        match unused.iter().find(of_layer) {
            None => Ok(()),
            Some(tensor) => Err(FormatError::TensorEntry {
                path: self.path.to_owned(),
                tensor: tensor.clone(),
                problem: format!("architecture {} is not known to have it", self.arch.name),
            }),
        }
    }
}

impl GgufFile {
    /// The metadata, the file and its tensors by offset, which point to file `index`.
    pub(super) fn into_parts(self, index: usize) -> (BTreeMap<String, GgufValue>, DataFile, Vec<TensorLoc>) {
        let mut tensors: Vec<TensorLoc> = self.tensors.into_values().map(|t| t.into_loc(index)).collect();
        tensors.sort_by_key(|t| t.offset);
        (self.metadata, self.data, tensors)
    }
}
