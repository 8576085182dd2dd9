//! Coordinator and nodes on hosts of their own, joined by a network that fails (P1, P2, P8, P15).
//!
//! Network namespaces with TLS, as on real hosts. Root only; elsewhere skipped, saying why. Not here: slow links
//! (`killer/slow_links.rs`).
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use faults::{Job, Launch, Network, NetworkFault, Permit, now_or_by};
use serde_json::Value;

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

/// Figures of both nodes, whose lines all go over host a's link.
fn measured(network: &mut Network) -> Result<Vec<f64>> {
    let launch = Launch { prefix: network.bench.prefix("coord"), ..Launch::default() };
    let answer = network.cluster.ask_as(&["nodes", "--measure", "--json"], &launch)?;
    let nodes: Vec<Value> = serde_json::from_str(&answer.stdout)?;
    let figures = nodes.iter().map(|node| node["link"]["bytes_per_second"].as_f64());
    let figures: Option<Vec<f64>> = figures.collect();
    figures.filter(|figures| figures.len() == 2).with_context(|| format!("expected two figures: {nodes:?}"))
}

/// The partition recommended over the nodes that are there, and what is said of their network.
fn recommended(network: &mut Network) -> Result<(String, Value)> {
    let launch = Launch { prefix: network.bench.prefix("coord"), ..Launch::default() };
    let job = Job::longer().arguments();
    let mut arguments = vec!["plan", "--json"];
    arguments.extend(job.iter().map(String::as_str));
    let answer = network.cluster.ask_as(&arguments, &launch)?;
    let plan: Value = serde_json::from_str(&answer.stdout).with_context(|| answer.stderr.clone())?;
    let rows = plan["fleet"].as_array().context("no partitions")?;
    let taken = rows.iter().find(|row| row["why"].is_string()).context("none is recommended")?;
    Ok((taken["partition"].as_str().unwrap_or_default().into(), plan["link"].clone()))
}

/// Of one network of this speed; a machine that is busy makes it look slower, so that it may be tried again.
fn check_speed(kilobits: u32, expected: &str, last_try: bool) -> Result<bool> {
    let Some(mut network) = up(Duration::from_secs(10))? else { return Ok(true) };
    network.bench.apply("a", NetworkFault::Slow(kilobits))?;
    let figures = measured(&mut network)?;
    let (partition, link) = recommended(&mut network)?;
    let speed = f64::from(kilobits) * 125.0;
    eprintln!("{kilobits} kbit/s: measured {figures:.0?} bytes/s of {speed}, {partition}, {link}");
    ensure!(figures.iter().all(|figure| *figure < speed * 1.5), "faster than {speed}: {figures:?}");
    let near = figures.iter().all(|figure| *figure > speed / 1.5);
    ensure!(near || !last_try, "expected {speed} within a factor of 1.5, measured {figures:?}");
    ensure!(link["origin"] == "measured", "{link}");
    ensure!(!near || partition == expected, "expected {expected} at {kilobits} kbit/s, found {partition}");
    Ok(near)
}

#[test]
fn the_speed_of_a_link_is_measured_and_decides_how_a_job_is_spread() -> Result<()> {
    for (kilobits, expected) in [(1_000, "layers:2"), (100_000, "batches")] {
        for nth in 0..3 {
            if check_speed(kilobits, expected, nth == 2)? {
                break;
            }
        }
    }
    Ok(())
}
