//! A harness that starts real `halfstep` processes, does harm to them, and compares what they produce.
//!
//! It sees what a user sees: the binary, its files, its sockets. It depends on no other crate of the project, so a wrong
//! belief shared by the parts cannot hide here. Every wait has a deadline; one that passes is an error that carries the
//! tails of all logs. Every random choice comes from a seed that is part of the error.
//! Not here: faults inside one process, which belong to the crate they concern.

mod acknowledged;
mod bench;
mod binary;
mod by_hand;
mod capacity;
mod cluster;
mod cpu;
mod damage;
mod garbage;
mod job;
mod killer;
mod kubelet;
mod logs;
mod manifest;
mod measure;
mod network;
mod outputs;
mod parallel;
mod points;
mod process;
mod schedule;
mod sheet;
mod slurm;
mod small_disk;
mod table;
mod throttle;
mod wait;

pub use acknowledged::{Acknowledged, artefacts};
pub use bench::{Bench, NetworkFault};
pub use binary::{binary, example, install, is_root};
pub use by_hand::{Bounds, Inputs, end, in_time, say};
pub use capacity::Permit;
pub use cluster::{Answer, Cluster, Finished, Launch, Settings, Submission};
pub use cpu::{cpu_seconds, load};
pub use damage::{files_below, flip_bit, truncate};
pub use garbage::{Reply, oversized_call, throw};
pub use job::Job;
pub use killer::{Campaign, Run, Verdict};
pub use kubelet::Kubelet;
pub use logs::Logs;
pub use manifest::{Consequence, JobManifest, Mount, Volume};
pub use measure::{Cost, Workload};
pub use network::Network;
pub use outputs::Outputs;
pub use parallel::in_parallel;
pub use points::failpoints;
pub use process::Process;
pub use schedule::{Fault, Schedule};
pub use sheet::{Cell, Sheet};
pub use slurm::Slurm;
pub use small_disk::SmallDisk;
pub use table::{figures, summary, word};
pub use throttle::Throttle;
pub use wait::{now_or_by, until};
