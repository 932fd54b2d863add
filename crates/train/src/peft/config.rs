//! `adapter_config.json`.

use std::path::Path;

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::TrainError;

/// What of an adapter's configuration changes numbers.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    /// Default rank.
    pub rank: usize,
    /// Default numerator of the scale.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub rslora: bool,
    /// Ranks of modules by pattern; the first that matches counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Numerators by pattern.
    pub alpha_pattern: Vec<(String, f64)>,
}

/// Keys that must be absent, null, false or empty, since what they ask for is not supported.
const REFUSED: &[&str] = &[
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
];

/// Initialisations after which PEFT changes the base weights, too.
const MUTATING: &[&str] = &["pissa", "olora", "corda", "loftq"];

impl AdapterConfig {
    /// Reads what `adapter_config.json` says; `path` is for errors.
    ///
    /// # Errors
    /// Another kind of adapter than LoRA, or an option that is not supported.
    pub fn parse(path: &Path, config: &Map<String, Value>) -> Result<AdapterConfig, TrainError> {
        let refuse = |problem: String| TrainError::Adapter { path: path.to_owned(), problem };
        match config.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => return Err(refuse(format!("it is of the kind {other}; help: only LORA is supported"))),
            None => return Err(refuse("its configuration has no peft_type; help: is it an adapter?".to_string())),
        }
        let off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(values) => values.is_empty(),
            Value::Object(values) => values.is_empty(),
            _ => false,
        };
        if let Some(key) = REFUSED.iter().find(|key| config.get(**key).is_some_and(|v| !off(v))) {
            return Err(refuse(format!("{key} is not supported; help: merge it into the model with peft first")));
        }
        let init = config.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        if MUTATING.iter().any(|kind| init.starts_with(kind)) {
            let help = "help: save it as a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)";
            return Err(refuse(format!("init_lora_weights {init} changes the base weights, too; {help}")));
        }
        let number = |key: &str, default: f64| match config.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().filter(|v| v.is_finite()).ok_or_else(|| refuse(format!("{key} is {value}"))),
        };
        let pattern = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Object(map)) => {
                let entry = |(k, v): (&String, &Value)| Some((k.clone(), v.as_f64().filter(|v| v.is_finite())?));
                map.iter().map(entry).collect::<Option<Vec<_>>>().ok_or_else(|| refuse(format!("{key} is broken")))
            }
            Some(other) => Err(refuse(format!("{key} is {other}"))),
        };
        let rank = |r: f64| match r {
            r if r >= 1.0 && r.fract() == 0.0 && r <= f64::from(u32::MAX) => Ok(r as usize),
            r => Err(refuse(format!("a rank is {r}"))),
        };
        let ranks = pattern("rank_pattern")?.into_iter().map(|(key, r)| Ok((key, rank(r)?)));
        Ok(AdapterConfig {
            rank: rank(number("r", 8.0)?)?,
            alpha: number("lora_alpha", 8.0)?,
            rslora: config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            rank_pattern: ranks.collect::<Result<_, TrainError>>()?,
            alpha_pattern: pattern("alpha_pattern")?,
        })
    }

    /// Rank and scale of a module, by its name without prefix.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub fn of(&self, path: &Path, module: &str) -> Result<(usize, f32), TrainError> {
        let rank = first(path, &self.rank_pattern, module)?.unwrap_or(self.rank);
        let alpha = first(path, &self.alpha_pattern, module)?.unwrap_or(self.alpha);
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank, (alpha / divisor) as f32))
    }
}

/// The value of the first pattern that matches the whole name, or what stands behind a dot in it; the name of the module, or
/// of its weight (which is what PEFT looks for where the parameter is targeted).
fn first<T: Copy>(path: &Path, patterns: &[(String, T)], module: &str) -> Result<Option<T>, TrainError> {
    for (pattern, value) in patterns {
        let refuse = |error: fancy_regex::Error| {
            let problem = format!("the pattern {pattern:?} cannot be used: {error}");
            TrainError::Adapter { path: path.to_owned(), problem }
        };
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).map_err(refuse)?;
        for name in [module, &format!("{module}.weight")] {
            if regex.is_match(name).map_err(refuse)? {
                return Ok(Some(*value));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(config: Value) -> Result<AdapterConfig, TrainError> {
        AdapterConfig::parse(Path::new("adapter"), config.as_object().unwrap())
    }

    #[test]
    fn scales_follow_defaults_patterns_and_rslora() {
        let config = parse(json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 8, "some_new_key": {"a": 1}, "layer_replication": null,
            "rank_pattern": {"gate.weight": 1, "q_proj": 16, r"layers\.[01]\..*v_proj": 2}, "alpha_pattern": {r".*\.q_proj": 4.0},
        }))
        .unwrap();
        let of = |module: &str| config.of(Path::new("adapter"), module).unwrap();
        assert_eq!(of("model.layers.0.self_attn.k_proj"), (4, 2.0));
        assert_eq!(of("model.layers.0.self_attn.q_proj"), (16, 0.25));
        assert_eq!(of("model.layers.1.self_attn.v_proj"), (2, 4.0));
        assert_eq!(of("model.layers.2.self_attn.v_proj"), (4, 2.0));
        assert_eq!(of("model.layers.0.self_attn.xq_proj"), (4, 2.0));
        assert_eq!(of("model.layers.0.mlp.gate"), (1, 8.0));
        let config = parse(json!({"peft_type": "LORA", "r": 16, "lora_alpha": 8, "use_rslora": true})).unwrap();
        assert_eq!(config.of(Path::new("adapter"), "x").unwrap(), (16, 2.0));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let cases = [
            (json!({"peft_type": "IA3"}), "it is of the kind IA3; help: only LORA"),
            (json!({}), "has no peft_type"),
            (json!({"peft_type": "LORA", "use_dora": true}), "use_dora is not supported; help: merge"),
            (json!({"peft_type": "LORA", "layer_replication": [[0, 2]]}), "layer_replication is not supported"),
            (json!({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}), "changes the base weights"),
            (json!({"peft_type": "LORA", "r": 0}), "a rank is 0"),
            (json!({"peft_type": "LORA", "lora_alpha": "x"}), "lora_alpha is \"x\""),
        ];
        for (config, message) in cases {
            let error = parse(config).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
