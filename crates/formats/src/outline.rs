//! A model's architecture without its weights.

use std::path::Path;

use crate::families::{self, Family};
use crate::spec::ModelSpec;
use crate::{Config, Result};

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

    /// Of a folder with `config.json`, or of such a file under whatever name.
    ///
    /// # Errors
    /// As [`Config::read`] and [`Outline::new`].
    pub fn open(path: &Path) -> Result<Outline> {
        Outline::new(&Config::read(path)?)
    }
}
