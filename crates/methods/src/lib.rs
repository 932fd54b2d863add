//! One file per paper: what it records, how it scores, what it keeps or changes.
//!
//! Nothing here opens files, starts threads or prints. A method declares itself by a [`Card`] in [`METHODS`]; expert
//! scores are entries of [`METRICS`]; a method with a command implements [`Run`] on its arguments and works in a [`Lab`].

pub mod assignment;
mod card;
pub mod contrast;
mod error;
pub mod experts;
mod lab;
mod method;
pub mod patterns;
pub mod relatives;
mod report;
pub mod routing;

pub use card::{Card, Kind};
pub use error::MethodError;
pub use experts::{DEFAULT_METRIC, METRICS, Metric, Phases, all_tables, metric};
pub use lab::{Lab, Trained, World};
pub use method::{Method, Run, Runner, model_name};
pub use report::{CardList, Cards, ExpertCard, Flag, HeatMap, OutputFile, Report, Table};

/// Every method, in the order in which `quorate methods` lists them.
pub const METHODS: &[Method] = &[
    Method::score(&experts::premoe::CARD),
    Method::score(&experts::unified::CARD),
    Method::score(&experts::easy_ep::CARD),
    Method::score(&experts::controls::CARD),
    Method::command::<experts::atlas::Atlas>(&experts::atlas::CARD),
    Method::command::<experts::mote::Mote>(&experts::mote::CARD),
    Method::command::<experts::core_experts::CoreExperts>(&experts::core_experts::CARD),
    Method::command::<experts::rice::Rice>(&experts::rice::CARD),
    Method::command::<experts::super_experts::SuperExperts>(&experts::super_experts::CARD),
    Method::command::<experts::rerouting::RerouteTasks>(&experts::rerouting::CARD),
    Method::command::<experts::router_lens::RouterLens>(&experts::router_lens::CARD),
    Method::command::<experts::ceft::Ceft>(&experts::ceft::CARD),
    Method::command::<relatives::naee::Naee>(&relatives::naee::CARD),
    Method::command::<relatives::mone::Mone>(&relatives::mone::CARD),
    Method::command::<relatives::merge_experts::MergeExperts>(&relatives::merge_experts::CARD),
    Method::command::<relatives::aimer::Aimer>(&relatives::aimer::CARD),
    Method::score(&relatives::esft::CARD),
    Method::command::<routing::flame::RoutingMetrics>(&routing::flame::CARD),
    Method::command::<routing::closer_look::CloserLook>(&routing::closer_look::CARD),
    Method::command::<routing::contribution::Contribution>(&routing::contribution::CARD),
    Method::command::<routing::pathways::Pathways>(&routing::pathways::CARD),
];
