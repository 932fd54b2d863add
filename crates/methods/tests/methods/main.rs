//! Every method against an answer that is known: planted, an identity, or chance.
//!
//! One program, so that it is linked once.

#[path = "../../../model/tests/support/mod.rs"]
mod engine;

mod atlas;
mod gauge;
mod pathways;
mod planted;
mod relatives;
mod rerouting;
mod rice;
mod router_lens;
mod routing;
mod steering;
mod super_experts;
mod support;
