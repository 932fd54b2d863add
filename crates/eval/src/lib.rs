//! Task files, batched answering, scoring, profiling runs.
//!
//! This crate must never know HTTP or a paper.

pub mod answer;
pub mod compare;
pub mod compare_tables;
pub mod encode;
pub mod evaluate;
pub mod perplexity;
pub mod profile;
pub mod statistics;
pub mod tasks;
