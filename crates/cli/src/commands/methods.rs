//! `quorate methods`: what there is and how to run it.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use quorate_lens::LensError;
use quorate_methods::{Card, METHODS, METRICS};
use serde_json::json;

use crate::common::{Common, say};

/// Arguments of `methods`.
#[derive(Args)]
#[command(after_help = "Examples:\n  quorate methods\n  quorate methods premoe\n  quorate methods --json")]
pub struct Methods {
    /// Show one method, by its own name or that of a metric
    name: Option<String>,
    /// Write a page for each method into this folder; what was written below the generated part stays
    #[arg(long, value_name = "DIR")]
    docs: Option<PathBuf>,
}

impl Methods {
    pub fn run(&self, common: &Common) -> Result<()> {
        if let Some(folder) = &self.docs {
            return crate::method::write_pages(common, folder);
        }
        let chosen: Vec<&Card> = match &self.name {
            None => METHODS.iter().map(|m| m.card).collect(),
            Some(name) => {
                let card = METHODS.iter().map(|m| m.card).find(|m| m.id == name || m.metrics.contains(&name.as_str()));
                vec![card.ok_or_else(|| {
                    LensError::unknown(
                        "method",
                        name,
                        METHODS.iter().map(|m| m.card.id).chain(METRICS.iter().map(|m| m.name)),
                    )
                })?]
            }
        };
        let metrics_of =
            |card: &Card| METRICS.iter().filter(|m| card.metrics.contains(&m.name)).copied().collect::<Vec<_>>();
        if common.json {
            let cards = chosen.iter().map(|card| json!({ "card": card, "metrics": metrics_of(card) }));
            return common.print_json(&cards.collect::<Vec<_>>());
        }
        for card in chosen {
            say!("{}: {} ({}, {})", card.id, card.title, card.paper, card.year)?;
            if self.name.is_some() {
                say!("\n{}\n\nneeds: {}\ncost:  {}\nrun:   {}\n", card.about, card.needs, card.cost, card.run)?;
            }
            for metric in metrics_of(card) {
                let gauge = if metric.gauge_dependent { " [gauge dependent]" } else { "" };
                say!("  {:15} {}{gauge}", metric.name, metric.about)?;
            }
        }
        Ok(())
    }
}
