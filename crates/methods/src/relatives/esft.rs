//! ESFT: the smallest set of experts with a given share of the scores.
//!
//! *Formula.* Per layer, by the mean gate (`gate-sum`) or the token selection ratio (`frequency`, up to the factor k): the
//! fewest experts, best first, whose scores sum to the share `p` of the layer's. The selector is
//! [`quorate_lens::Keep::Share`]; with a given number of places, [`quorate_lens::Scope::EqualShare`] finds the `p` that
//! fills them.
//!
//! *Agreement with the paper.* It chooses experts to train, with `p` of 0.1 to 0.2; to keep experts, `p` is larger.
//!
//! *Reference.* arXiv 2407.01906.

use crate::{Card, Kind};

/// The card of ESFT.
pub const CARD: Card = Card {
    id: "esft",
    title: "ESFT: the experts that a task's tokens go to, by cumulative share",
    paper: "arXiv 2407.01906",
    year: 2024,
    kind: Kind::Score,
    needs: "a MoE model; texts of each task",
    cost: "one forward pass over the texts",
    metrics: &["gate-sum", "frequency"],
    run: "quorate run \"78+95=\" --task arithmetic --metric gate-sum --share 0.9\n\
          quorate eval --task own --metric frequency --keep 8 --scope equal-share",
    about: "Keeps in each layer the fewest experts that hold a share of the gates or of the selections; layers where use is \
            spread keep more.",
};
