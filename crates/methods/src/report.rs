//! What a method found, as data. Text, JSON and HTML are made from it in one place each.

use quorate_model::{Model, Overlay};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::MethodError;

/// The result of a method.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The method's name.
    pub method: String,
    /// The method's title.
    pub title: String,
    /// Identifier of its paper.
    pub paper: String,
    /// Its parameters.
    pub params: Value,
    /// What model it is: folder, family, layers and experts.
    pub model: String,
    /// Fingerprint of the model.
    pub fingerprint: String,
    /// The numbers that matter most, by name.
    pub headline: Map<String, Value>,
    /// Tables.
    pub tables: Vec<Table>,
    /// Numbers for every expert.
    pub maps: Vec<HeatMap>,
    /// What is known of each expert; with maps only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cards: Option<Cards>,
    /// Remarks: what a number means, what was left out and why.
    pub notes: Vec<String>,
    /// Files to keep: plans, lists, adapters. Not part of the JSON document.
    #[serde(skip)]
    pub files: Vec<OutputFile>,
    /// Experts with changed weights, to be written as a model folder. Not part of the JSON document.
    #[serde(skip)]
    pub experts: Vec<(quorate_lens::ExpertId, quorate_residency::Expert)>,
}

/// A table.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// Name, unique in the report.
    pub name: String,
    /// What it shows.
    pub about: String,
    /// Column names.
    pub columns: Vec<String>,
    /// Rows: text, numbers or null.
    pub rows: Vec<Vec<Value>>,
}

/// A number for every expert of every MoE layer.
#[derive(Clone, Debug, Serialize)]
pub struct HeatMap {
    /// Name, unique in the report; `GROUP: NAME` for one of a group of like maps.
    pub name: String,
    /// What the numbers are, and their unit.
    pub about: String,
    /// Decoder layer of each row.
    pub layers: Vec<usize>,
    /// Values, `[MoE layer][expert]`; `None` where there is none.
    pub values: Vec<Vec<Option<f64>>>,
    /// Whether zero is the middle, with meaning on both sides.
    pub diverging: bool,
}

/// What is known of each expert beyond the maps' numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cards {
    /// What they show.
    pub about: String,
    /// The lists of every card.
    pub lists: Vec<CardList>,
    /// The flags that a card may have.
    pub flags: Vec<Flag>,
    /// One card for each expert.
    pub cards: Vec<ExpertCard>,
}

/// A list that every card has. A column whose name begins with `share` holds numbers from 0 to 1.
#[derive(Clone, Debug, Serialize)]
pub struct CardList {
    /// Name.
    pub name: String,
    /// What it shows.
    pub about: String,
    /// Column names; the first column names the thing.
    pub columns: Vec<String>,
}

/// A property that some experts have.
#[derive(Clone, Debug, Serialize)]
pub struct Flag {
    /// Name.
    pub name: String,
    /// What it takes to have it.
    pub about: String,
}

/// What is known of one expert.
#[derive(Clone, Debug, Serialize)]
pub struct ExpertCard {
    /// Decoder layer.
    pub layer: usize,
    /// Global expert id.
    pub expert: usize,
    /// Names of its flags.
    pub flags: Vec<String>,
    /// Rows of each list: text, numbers, null, or passages `[[before, marked, after], ..]`.
    pub lists: Vec<Vec<Vec<Value>>>,
}

/// A file that a method made.
#[derive(Clone, Debug)]
pub struct OutputFile {
    /// Its name, without folder.
    pub name: String,
    /// What it holds.
    pub about: String,
    /// Its content.
    pub bytes: Vec<u8>,
}

impl Report {
    /// Notes one of the most important numbers.
    pub fn headline(&mut self, name: &str, value: impl Serialize) {
        self.headline.insert(name.to_string(), json!(value));
    }

    /// Adds a table and returns it, to be filled.
    pub fn table(&mut self, name: &str, about: &str, columns: &[&str]) -> &mut Table {
        let columns = columns.iter().map(ToString::to_string).collect();
        let table = Table { name: name.to_string(), about: about.to_string(), columns, rows: Vec::new() };
        self.tables.push(table);
        let last = self.tables.len() - 1;
        &mut self.tables[last]
    }

    /// Adds a map of one number per expert, numbered by `map`; `None` where there is none.
    pub fn map<V: Clone + Into<Option<f64>>>(
        &mut self,
        name: &str,
        about: &str,
        map: &quorate_lens::ExpertMap,
        values: &[V],
        diverging: bool,
    ) {
        let values = map.rows(values).into_iter().map(|row| row.into_iter().map(Into::into).collect()).collect();
        let (name, about, layers) = (name.to_string(), about.to_string(), map.layers.clone());
        self.maps.push(HeatMap { name, about, layers, values, diverging });
    }

    /// Adds a remark.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Adds an adapter of a model in the form of PEFT: `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// As [`peft::encode`](quorate_train::peft::encode).
    pub fn adapter(&mut self, model: &Model, overlay: &Overlay, about: &str) -> Result<(), MethodError> {
        let base = model.checkpoint().folder().display().to_string();
        for (name, bytes) in quorate_train::peft::encode(model.checkpoint(), overlay, &base)? {
            self.file(name, about, bytes);
        }
        Ok(())
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, about: &str, bytes: impl Into<Vec<u8>>) {
        self.files.push(OutputFile { name: name.to_string(), about: about.to_string(), bytes: bytes.into() });
    }
}

impl Table {
    /// Adds a row, one cell per column.
    ///
    /// # Panics
    /// If the number of cells is not that of the columns.
    pub fn row(&mut self, cells: impl Into<Vec<Value>>) {
        let cells = cells.into();
        assert_eq!(cells.len(), self.columns.len(), "cells of a row of table `{}`", self.name);
        self.rows.push(cells);
    }
}
