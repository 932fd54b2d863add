//! Sites: the addressed values inside the forward pass that a lens may read or edit.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ModelError;

macro_rules! sites {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $units:ident;)*) => {
        /// A place in the forward pass. `N` is the number of token rows of the batch.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub enum Site { $($(#[$doc])* $variant,)* }

        impl Site {
            /// Every site, in the order in which the forward pass reaches them.
            pub const ALL: &'static [Site] = &[$(Site::$variant,)*];

            /// The name in files, on the command line and in errors.
            pub fn name(self) -> &'static str {
                match self { $(Site::$variant => $name,)* }
            }

            /// What the units of this site are, those that a selector's `units` names.
            pub fn units(self) -> Units {
                match self { $(Site::$variant => Units::$units,)* }
            }
        }
    };
}

sites! {
    /// Residual stream entering the layer, `[N, d]`.
    ResidPre = "resid_pre", Neuron;
    /// Input of the q, k and v projections (after the norm), `[N, d]`.
    AttnIn = "attn_in", Neuron;
    /// Queries after the q/k norm, before RoPE, `[N, H, head_dim]`.
    AttnQ = "attn_q", Head;
    /// Keys after the q/k norm, before RoPE, `[N, H_kv, head_dim]`.
    AttnK = "attn_k", Head;
    /// Values, `[N, H_kv, head_dim]`.
    AttnV = "attn_v", Head;
    /// Queries after RoPE, `[N, H, head_dim]`.
    AttnQRot = "attn_q_rot", Head;
    /// Keys after RoPE, as they enter the KV cache, `[N, H_kv, head_dim]`.
    AttnKRot = "attn_k_rot", Head;
    /// Attention scores after scaling and masking, `[N, H, S]`, `-inf` where invisible; `S` is the longest key range of
    /// the batch. What is written at invisible keys has no effect, here and at `attn_pattern`.
    AttnScores = "attn_scores", Head;
    /// Attention probabilities, `[N, H, S]`.
    AttnPattern = "attn_pattern", Head;
    /// Head outputs before the output projection, `[N, H, head_dim]`.
    Z = "z", Head;
    /// Output of the attention block, `[N, d]`.
    AttnOut = "attn_out", Neuron;
    /// Residual stream between attention and FFN, `[N, d]`.
    ResidMid = "resid_mid", Neuron;
    /// Input of the FFN and of the router (after the norm), `[N, d]`.
    FfnIn = "ffn_in", Neuron;
    /// Raw router logits, `[N, E]`, before any bias, mask or score function.
    RouterLogits = "router_logits", Expert;
    /// Added to the scores for the choice of experts only, never to the gates, `[N, E]`; zeros unless edited.
    Selection = "selection", Expert;
    /// Chosen experts and their gates, `[N, k]` each ([`crate::Routing`]).
    Routing = "routing", Expert;
    /// Inner activation `act(gate x) * up x` of each chosen expert, `[N, k, I]`, slots in rank order.
    ExpertHidden = "expert_hidden", Expert;
    /// Output of each chosen expert before its gate, `[N, k, d]`.
    ExpertOut = "expert_out", Expert;
    /// Sum of the gated routed experts, `[N, d]`; without the shared expert.
    MoeOut = "moe_out", Neuron;
    /// Inner activation of a dense FFN, or of the shared expert of a MoE layer, `[N, I]`.
    MlpHidden = "mlp_hidden", Neuron;
    /// Output of the whole FFN block, shared expert included, `[N, d]`.
    MlpOut = "mlp_out", Neuron;
    /// Residual stream leaving the layer, `[N, d]`.
    ResidPost = "resid_post", Neuron;
    /// Residual stream after the final norm, `[M, d]`, for the rows whose logits are wanted.
    FinalNorm = "final_norm", Neuron;
    /// Logits, `[M, V]`, for the rows whose logits are wanted.
    Logits = "logits", Neuron;
}

/// What one unit of a site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Units {
    /// A coordinate of the last axis.
    Neuron,
    /// An attention head (axis 1).
    Head,
    /// A routed expert, by its global id.
    Expert,
}

impl Site {
    /// Whether the site exists once per layer (all but `final_norm` and `logits`).
    pub fn per_layer(self) -> bool {
        !matches!(self, Site::FinalNorm | Site::Logits)
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Site {
    type Err = ModelError;
    fn from_str(text: &str) -> Result<Self, ModelError> {
        Site::ALL
            .iter()
            .copied()
            .find(|s| s.name() == text)
            .ok_or_else(|| ModelError::UnknownSite { name: text.to_string() })
    }
}

impl TryFrom<String> for Site {
    type Error = ModelError;
    fn try_from(text: String) -> Result<Self, ModelError> {
        text.parse()
    }
}

impl From<Site> for String {
    fn from(site: Site) -> String {
        site.name().to_string()
    }
}

/// A set of sites.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SiteSet(u32);

impl SiteSet {
    /// The empty set.
    pub const NONE: SiteSet = SiteSet(0);

    /// The set of the given sites.
    pub fn of(sites: &[Site]) -> SiteSet {
        sites.iter().fold(SiteSet::NONE, |set, &s| set.with(s))
    }

    /// This set and one more site.
    pub fn with(self, site: Site) -> SiteSet {
        SiteSet(self.0 | 1 << site as u32)
    }

    /// Whether the site is in the set.
    pub fn contains(self, site: Site) -> bool {
        self.0 & (1 << site as u32) != 0
    }

    /// The union.
    pub fn union(self, other: SiteSet) -> SiteSet {
        SiteSet(self.0 | other.0)
    }

    /// Whether no site is in the set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_are_unique() {
        for &site in Site::ALL {
            assert_eq!(site.name().parse::<Site>().unwrap(), site);
        }
        assert!("resid".parse::<Site>().unwrap_err().to_string().contains("resid_pre"));
    }

    #[test]
    fn sets_hold_what_was_put_in() {
        let set = SiteSet::of(&[Site::Z, Site::Logits]);
        assert!(set.contains(Site::Z) && set.contains(Site::Logits) && !set.contains(Site::AttnQ));
        assert!(SiteSet::NONE.is_empty());
    }
}
