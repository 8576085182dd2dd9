//! Links that lose or delay nearly everything (P15). Root only; elsewhere skipped, saying why.
//!
//! They wait for the network for minutes and hardly compute, so they run beside the killer.

use std::time::Duration;

use anyhow::Result;
use faults::{Job, Network, NetworkFault, Permit};

const LIMIT: Duration = Duration::from_secs(180);

/// Runs a job over hosts with this fault.
fn check(lease: Duration, hosts: &[&str], fault: NetworkFault) -> Result<()> {
    let mut network = match Network::up(lease, Permit::none())? {
        Ok(network) => network,
        Err(reason) => {
            eprintln!("SKIPPED: {reason}");
            return Ok(());
        }
    };
    hosts.iter().try_for_each(|host| network.bench.apply(host, fault))?;
    // Without the layers whose sums take megabytes.
    let submission = network.submit(&Job::short().with(&["--skip", "/4*", "--skip", "/5*"]))?;
    let took = network.cluster.finish(submission, LIMIT)?;
    eprintln!("P15: {fault:?} on {}: identical after {took:.1?}", hosts.join(", "));
    Ok(())
}

#[test]
fn a_fifth_of_all_packets_lost() -> Result<()> {
    check(Duration::from_secs(3), &["coord", "a", "b"], NetworkFault::Loss(20))
}

#[test]
fn a_link_of_one_megabit() -> Result<()> {
    check(Duration::from_secs(10), &["a"], NetworkFault::Slow(1000))
}
