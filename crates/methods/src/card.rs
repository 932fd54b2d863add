//! What a method is, as data: the source of `quorate methods`, of the sub-commands and of the documentation.

use serde::Serialize;

/// What a method does in the chain record -> score -> select -> intervene.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Scores units.
    Score,
    /// Measures and reports.
    Analysis,
    /// Changes what a model does while it runs.
    Steer,
    /// Changes weights.
    Edit,
    /// Trains a part of a model.
    Train,
    /// A whole system: scores, selects, stores and retrieves.
    System,
    /// A control that real methods must beat.
    Control,
}

/// A method's card.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Card {
    /// Short name; of a method with a command, the command's.
    pub id: &'static str,
    /// Title of the paper, or what it is.
    pub title: &'static str,
    /// Identifier of the paper, e.g. `arXiv 2505.17639`.
    pub paper: &'static str,
    /// Year of publication.
    pub year: u16,
    /// What it does.
    pub kind: Kind,
    /// What it needs of a model and of data.
    pub needs: &'static str,
    /// What it costs.
    pub cost: &'static str,
    /// Names of its expert metrics.
    pub metrics: &'static [&'static str],
    /// A command that shows it.
    pub run: &'static str,
    /// What it measures or changes, formula, agreement with the paper, limits.
    pub about: &'static str,
}
