//! One file per paper: what it records, how it scores, what it keeps or changes.
//!
//! Nothing here opens files, starts threads or prints. A method declares itself by a [`Card`] in [`METHODS`]; expert
//! scores are entries of [`METRICS`].

mod card;
pub mod experts;
pub mod patterns;

pub use card::{Card, Kind};
pub use experts::{DEFAULT_METRIC, METRICS, Metric, Phases, all_tables, metric};

/// Every method, in the order in which `quorate methods` lists them.
pub const METHODS: &[&Card] =
    &[&experts::premoe::CARD, &experts::unified::CARD, &experts::easy_ep::CARD, &experts::controls::CARD];
