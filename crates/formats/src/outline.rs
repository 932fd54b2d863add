//! A model's architecture without its weights.

use std::path::Path;

use crate::families::{self, Family};
use crate::spec::ModelSpec;
use crate::{Config, Result, gguf};

/// A model's architecture, from its configuration alone.
#[derive(Clone, Debug)]
pub struct Outline {
    /// The architecture.
    pub spec: ModelSpec,
    /// The family that read it.
    pub family: &'static Family,
}

impl Outline {
    /// Of a configuration.
    ///
    /// # Errors
    /// No family reads it, or a value is absurd or not supported.
    pub fn new(config: &Config) -> Result<Outline> {
        let family = families::find(config)?;
        Ok(Outline { spec: (family.spec)(config)?, family })
    }

    /// Of a folder with `config.json`, of such a file under whatever name, or of a `.gguf` file's header.
    ///
    /// # Errors
    /// As [`Config::read`] and [`Outline::new`]; what is wrong with a header.
    pub fn open(path: &Path) -> Result<Outline> {
        if path.extension().is_some_and(|end| end == "gguf") {
            let model = gguf::open_model(path, false)?;
            return Ok(Outline { spec: model.spec, family: model.family });
        }
        Outline::new(&Config::read(path)?)
    }
}
