//! The commands of a fleet: a coordinator, its nodes, and the people who give it jobs.
//!
//! Everything here is argument and presentation; the services are in `halfstep_coordinator` and `halfstep_agent`.

pub(crate) mod args;
mod certs;
pub(crate) mod connect;
mod coordinator;
mod drain;
mod explain;
mod fetch;
mod follow;
mod jobs;
mod node;
mod pod;
mod present;
mod shutdown;
mod slurm;
mod submit;
mod whereabouts;

pub(crate) use certs::certs;
pub(crate) use connect::{Line, runtime, unusable};
pub(crate) use coordinator::coordinator;
pub(crate) use drain::drain;
pub(crate) use explain::explain;
pub(crate) use fetch::fetch_into;
pub(crate) use follow::Follower;
pub(crate) use jobs::{cancel, fetch, forget, nodes, status, watch};
pub(crate) use node::node;
pub(crate) use pod::{PodArgs, pod};
pub(crate) use present::present;
pub(crate) use shutdown::{Again, Shutdown};
pub(crate) use submit::{end_of, submit, submit_over};
