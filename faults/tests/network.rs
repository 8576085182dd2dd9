//! Coordinator and nodes on hosts of their own, joined by a network that fails (P1, P2, P8, P15).
//!
//! Network namespaces with TLS, as on real hosts. Root only; elsewhere skipped, saying why. Not here: slow links
//! (`killer/slow_links.rs`).
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::time::{Duration, Instant};

use anyhow::Result;
use faults::{Job, Network, NetworkFault, Permit, now_or_by};

const LIMIT: Duration = Duration::from_secs(90);
const SOLVED: &str = "SOLVED";

/// `None`, said aloud, where there are no such hosts.
fn up(lease: Duration) -> Result<Option<Network>> {
    let network = Network::up(lease, Permit::one())?;
    Ok(network.inspect_err(|reason| eprintln!("SKIPPED: {reason}")).ok())
}

/// Breaks the link of node `a` in mid-run for this many leases, heals it, and wants the same bytes.
fn check(fault: NetworkFault, leases: f64) -> Result<()> {
    let Some(mut network) = up(Duration::from_secs(1))? else { return Ok(()) };
    let mut submission = network.submit(&Job::longer())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    network.bench.apply("a", fault)?;
    let healed = Instant::now() + network.cluster.settings.lease.mul_f64(leases);
    let early = now_or_by(healed, || Ok(submission.process.ended()?.is_some()))?;
    network.bench.heal("a");
    let took = network.cluster.finish(submission, LIMIT)?;
    eprintln!(
        "P15: {fault:?}: identical after {took:.1?}{}",
        if early { ", before it was healed" } else { "" }
    );
    // The node finds its way back.
    let took = {
        network.cluster.kill_node("b")?;
        let submission = network.submit(&Job::short())?;
        network.cluster.finish(submission, LIMIT)?
    };
    eprintln!("P15: {fault:?}: the healed node alone did a short job in {took:.1?}");
    Ok(())
}

#[test]
fn a_partition_longer_than_the_lease() -> Result<()> {
    check(NetworkFault::Partition, 2.5)
}

#[test]
fn a_partition_shorter_than_the_lease() -> Result<()> {
    check(NetworkFault::Partition, 0.5)
}

#[test]
fn a_node_that_hears_but_is_not_heard() -> Result<()> {
    check(NetworkFault::Mute, 2.5)
}

#[test]
fn connections_that_are_reset() -> Result<()> {
    check(NetworkFault::Reset, 1.0)
}

#[test]
fn a_coordinator_that_is_cut_off_from_all_nodes() -> Result<()> {
    let Some(mut network) = up(Duration::from_secs(1))? else { return Ok(()) };
    let mut submission = network.submit(&Job::long())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    network.bench.apply("coord", NetworkFault::Partition)?;
    let healed = Instant::now() + Duration::from_millis(2500);
    now_or_by(healed, || Ok(submission.process.ended()?.is_some()))?;
    network.bench.heal("coord");
    let took = network.cluster.finish(submission, LIMIT)?;
    eprintln!("P15: coordinator cut off: identical after {took:.1?}");
    Ok(())
}
