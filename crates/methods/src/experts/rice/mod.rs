//! RICE: experts that go with thinking, found by their mutual information with marker tokens and strengthened while the
//! model answers.
//!
//! *What it measures.* On transcripts, nPMI of every expert with every marker (`npmi.rs`); the score is the sum of
//! coefficient times nPMI. *What it changes.* Where one of the best experts of the whole model is chosen, its gate is
//! multiplied by `beta`; gates are not renormalised, and an expert that is not chosen is not forced.
//!
//! *Agreement with the paper.* The paper's form is `--paper`: markers `<think>` (+1) and `</think>` (-1) (its third,
//! `Alternatively`, is a token of few models; add it with `--marker`), counted over all tokens of texts with thinking, and
//! two experts. The default differs in three ways: a marker counts at the token before it, where the model decides on it;
//! texts without thinking are read too, so that an expert of a position that all texts share does not stand out; and the
//! test prompts of the embedded tasks carry both switches, so that the decision to think is open. In both forms an
//! expert must have met a positive marker five times, the ranking is bootstrapped over texts, and a marker that always stands
//! at one position is refused, since an expert of that position could not be told from one of the token.
//!
//! *Limits.* Thinking that never ends counts as long as the answer may be. Where the model never thinks before the steering,
//! random experts cannot shorten its thinking: the control then only shows that they do not begin it.
//!
//! *Reference.* arXiv 2505.14681.

use clap::{Args, ValueEnum};
use quorate_eval::encode::EncodedItem;
use quorate_eval::evaluate::ItemScore;
use quorate_lens::{ExpertMap, ItemTrace};
use quorate_model::{ModelError, NoLens, Phase};
use serde::Serialize;
use serde_json::json;

mod norm_ratio;
pub mod npmi;
mod steering;
mod thinking;

use self::npmi::{Joint, best, bootstrap};
use self::thinking::{Bounds, one_token};
use crate::{Card, Kind, Lab, MethodError, Report, Run};

/// The card of RICE.
pub const CARD: Card = Card {
    id: "rice",
    title: "Two experts are all you need for steering thinking",
    paper: "arXiv 2505.14681",
    year: 2025,
    kind: Kind::Steer,
    needs: "a MoE model that thinks between two tokens; a task that it thinks about",
    cost: "the transcripts once; one evaluation for each control and factor",
    metrics: &[],
    run: "quorate rice\nquorate rice --paper\nquorate rice --experts 3 --beta 4 -o out/",
    about: "Finds the experts that are chosen together with marker tokens of thinking (normalised pointwise mutual \
            information), multiplies their gates while the model answers, and compares the length of its thinking and its \
            accuracy with random experts of the same layers and use.",
};

/// Fewest transcripts with thinking, and fewest test prompts, from which something is concluded.
const TEXTS_MIN: usize = 10;

/// Parameters of RICE.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Rice {
    /// Tasks whose transcripts are read
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', default_value = "wordproblem")]
    pub from: Vec<String>,
    /// Task on which the steering is measured
    #[arg(long, value_name = "NAME", default_value = "wordproblem")]
    pub task: String,
    /// The paper's form: --marker "<think>=1" --marker "</think>=-1" --at token --among all --texts thinking --prompts
    /// thinking, and the test prompts as they are
    #[arg(long, conflicts_with_all = ["markers", "at", "among", "texts", "prompts", "replace"])]
    pub paper: bool,
    /// A marker token and its coefficient; can be repeated
    #[arg(long = "marker", value_name = "TOKEN=COEFFICIENT", value_parser = marker, default_value = "<think>=1")]
    pub markers: Vec<(String, f64)>,
    /// The token that begins thinking
    #[arg(long, value_name = "TOKEN", default_value = "<think>")]
    pub begin: String,
    /// The token that ends thinking
    #[arg(long, value_name = "TOKEN", default_value = "</think>")]
    pub end: String,
    /// Where a marker counts
    #[arg(long, value_enum, default_value_t = Place::Before)]
    pub at: Place,
    /// Tokens over which probabilities are taken
    #[arg(long, value_enum, default_value_t = Among::Last)]
    pub among: Among,
    /// Transcripts that are read
    #[arg(long, value_enum, default_value_t = Which::All)]
    pub texts: Which,
    /// Read the answers given in the task files instead of the model's own
    #[arg(long)]
    pub given: bool,
    /// Take a marker even if it always stands at the same position
    #[arg(long)]
    pub constant_position: bool,
    /// Fewest times that an expert has met a marker of positive coefficient
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub least: u64,
    /// How many of the best experts are strengthened
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub experts: usize,
    /// Factor on their gates, compared with random experts; the plan has it
    #[arg(long, default_value_t = 16.0)]
    pub beta: f32,
    /// More factors, without random experts
    #[arg(long, value_name = "BETA,..", value_delimiter = ',', default_value = "2,4,64,256")]
    pub scan_betas: Vec<f32>,
    /// Other numbers of experts, with --beta, without random experts
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,3,5")]
    pub scan_experts: Vec<usize>,
    /// Steer the answer's tokens only, not the prompt's
    #[arg(long)]
    pub answer_only: bool,
    /// Test prompts on which the steering is measured
    #[arg(long, value_enum, default_value_t = Which::All)]
    pub prompts: Which,
    /// Text to replace in the test prompts, in this order; the default gives prompts of the embedded tasks both switches
    #[arg(long, value_name = "OLD=>NEW", value_parser = replacement, default_values = [" /no_think=> /think", " /think=> /no_think /think"])]
    pub replace: Vec<(String, String)>,
    /// Random sets of experts to compare with
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub sets: usize,
    /// Resamples of the transcripts for the ranking's firmness
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub resamples: usize,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub max_tokens: usize,
}

/// Where a marker counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// At the marker
    Token,
    /// At the token before it, where the model decides on it
    Before,
}

/// Which tokens of a transcript count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Among {
    /// Prompt and answer
    All,
    /// The answer
    Answer,
    /// The thinking, its begin and end included
    Thinking,
    /// The last token of each prompt
    Last,
}

/// Which texts or prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Which {
    /// Those about which the model thinks
    Thinking,
    /// All
    All,
}

fn marker(text: &str) -> Result<(String, f64), String> {
    let bad = || format!("`{text}` is no TOKEN=COEFFICIENT");
    let (token, coefficient) = text.rsplit_once('=').filter(|(token, _)| !token.is_empty()).ok_or_else(bad)?;
    let coefficient: f64 = coefficient.parse().map_err(|_| bad())?;
    if coefficient.is_finite() { Ok((token.to_string(), coefficient)) } else { Err(bad()) }
}

fn replacement(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once("=>").filter(|(old, _)| !old.is_empty());
    parts.map(|(old, new)| (old.to_string(), new.to_string())).ok_or_else(|| format!("`{text}` is no OLD=>NEW"))
}

impl Run for Rice {
    fn run(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        self.in_form().find_and_steer(lab)
    }
}

/// What was found on the transcripts.
struct Found {
    map: ExpertMap,
    bounds: Bounds,
    scores: Vec<Option<f64>>,
    /// Use of every expert.
    counts: Vec<u64>,
    transcripts: Vec<EncodedItem>,
}

impl Rice {
    /// With the paper's choices in place if they are asked for.
    fn in_form(&self) -> Rice {
        if !self.paper {
            return self.clone();
        }
        let markers = vec![(self.begin.clone(), 1.0), (self.end.clone(), -1.0)];
        let (at, among, texts, prompts) = (Place::Token, Among::All, Which::Thinking, Which::Thinking);
        Rice { markers, at, among, texts, prompts, replace: Vec::new(), ..self.clone() }
    }

    fn find_and_steer(&self, lab: &mut Lab<'_>) -> Result<Report, MethodError> {
        let map = lab.experts()?;
        let tokenizer = lab.model.tokenizer();
        let ids = self.markers.iter().map(|(text, _)| one_token(tokenizer, text)).collect::<Result<Vec<_>, _>>()?;
        let bounds = Bounds { begin: one_token(tokenizer, &self.begin)?, end: one_token(tokenizer, &self.end)? };
        let transcripts = self.transcripts(lab, bounds)?;
        let trace = lab.trace(&transcripts, false)?;
        let texts: Vec<Joint> = trace.items.iter().map(|item| self.joint(item, &map, &ids, bounds)).collect();
        let all = Joint::sum(&texts);
        self.check_markers(&all, &trace.items, &ids)?;
        let coefficients: Vec<f64> = self.markers.iter().map(|m| m.1).collect();
        let scores = all.scores(&coefficients, self.least);
        let best = best(&scores, self.experts);
        if best.len() < self.experts {
            return Err(MethodError::needs(
                format!("only {} experts met a marker {} times", best.len(), self.least),
                "give more texts, or lower --least or --experts",
            ));
        }
        let mut report = Report::default();
        report.headline("experts", map.ids(&best).iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
        report.headline("transcripts", transcripts.len());
        let firm = bootstrap(&texts, &coefficients, self.least, self.experts, self.resamples, lab.seed);
        self.rank_table(&mut report, &map, &all, &scores, &firm);
        let found = Found { bounds, scores, counts: trace.counts(&map), transcripts, map };
        let before = self.before(lab, bounds)?;
        self.steer(lab, &found, &before, &mut report)?;
        let list = self.change(&found.map, &best, self.beta);
        report.file("plan.toml", "the steering, as a plan", lab.plan(list)?);
        Ok(report)
    }

    /// The model's own answers, or those given.
    fn transcripts(&self, lab: &mut Lab<'_>, bounds: Bounds) -> Result<Vec<EncodedItem>, MethodError> {
        let mut items = Vec::new();
        for task in &self.from {
            items.extend(lab.task("train-sample", task)?.items);
        }
        let mut texts = lab.encode(&items)?;
        if !self.given {
            let own = lab.answer("answering", &items.iter().collect::<Vec<_>>(), self.max_tokens, &mut NoLens)?;
            for (text, score) in texts.iter_mut().zip(own) {
                let ItemScore::Exact { text: answer, .. } = score else { continue };
                text.answer = lab.model.tokenizer().encode(&answer, false).map_err(ModelError::from)?;
            }
        }
        let thinks = |t: &EncodedItem| bounds.of(&[t.prompt.as_slice(), &t.answer].concat()).is_some();
        let (all, thinking) = (texts.len(), texts.iter().filter(|t| thinks(t)).count());
        if thinking < TEXTS_MIN {
            return Err(MethodError::needs(
                format!("{thinking} of {all} answers think, beginning with `{}`; {TEXTS_MIN} are needed", self.begin),
                "use a model that thinks, prompts that ask for it, or another --begin and --end",
            ));
        }
        texts.retain(|t| self.texts == Which::All || thinks(t));
        Ok(texts)
    }

    fn joint(&self, item: &ItemTrace, map: &ExpertMap, markers: &[u32], bounds: Bounds) -> Joint {
        let thinking = bounds.of(&item.tokens).unwrap_or(0..0);
        Joint::of(item, map, markers, self.at == Place::Before, |row, phase: Phase| match self.among {
            Among::All => true,
            Among::Answer => !phase.is_prompt(),
            Among::Thinking => thinking.contains(&row),
            Among::Last => phase == Phase::PromptLast,
        })
    }

    /// Refuses markers from which nothing can be learnt.
    fn check_markers(&self, all: &Joint, items: &[ItemTrace], ids: &[u32]) -> Result<(), MethodError> {
        for (m, (text, _)) in self.markers.iter().enumerate() {
            if all.tokens[m] < self.least {
                return Err(MethodError::needs(
                    format!("the marker `{text}` counts {} times, {} are needed", all.tokens[m], self.least),
                    "give more texts, another marker, or another --among",
                ));
            }
            let mut rows = items.iter().flat_map(|i| (0..i.tokens.len()).filter(|&t| i.tokens[t] == ids[m]));
            let first = rows.next().unwrap_or(0);
            if !self.constant_position && rows.all(|r| r == first) {
                return Err(MethodError::needs(
                    format!(
                        "the marker `{text}` is always token {first} of its text: an expert of that position cannot be \
                         told from one of the token"
                    ),
                    "leave it out, or give --constant-position",
                ));
            }
        }
        Ok(())
    }

    fn rank_table(&self, report: &mut Report, map: &ExpertMap, all: &Joint, scores: &[Option<f64>], firm: &[f64]) {
        let mut columns = ["rank", "expert", "score", "firmness", "tokens"].map(str::to_string).to_vec();
        for (text, _) in &self.markers {
            columns.extend([format!("npmi {text}"), format!("n {text}")]);
        }
        let about = format!(
            "firmness: share of {} resamples of the texts with the expert among the best {}",
            self.resamples, self.experts
        );
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let table = report.table("experts", &about, &columns);
        for (rank, e) in best(scores, self.experts.max(10)).into_iter().enumerate() {
            let mut row = vec![json!(rank + 1), json!(map.id(e).to_string()), json!(scores[e]), json!(firm[e])];
            row.push(json!(all.experts[e]));
            for m in 0..self.markers.len() {
                row.extend([json!(all.npmi(m, e)), json!(all.both[m][e])]);
            }
            table.row(row);
        }
        let values: Vec<f64> = scores.iter().map(|s| s.unwrap_or(0.0)).collect();
        report.map("score", "sum of coefficient times nPMI; 0 where too few were counted", map, &values, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_and_replacements_parse() {
        assert_eq!(marker("</think>=-1").unwrap(), ("</think>".into(), -1.0));
        assert_eq!(marker("==0.5").unwrap(), ("=".into(), 0.5));
        for bad in ["x", "=1", "x=", "x=nan"] {
            assert!(marker(bad).unwrap_err().contains(bad));
        }
        assert_eq!(replacement(" /think=>").unwrap(), (" /think".into(), String::new()));
        assert!(replacement("=>x").is_err() && replacement("x").is_err());
    }
}
