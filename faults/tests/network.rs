//! Coordinator and nodes on hosts of their own, joined by a network that fails (P1, P2, P8, P15).
//!
//! Network namespaces with TLS, as on real hosts. Root only; elsewhere skipped, saying why.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use faults::{Bench, Cluster, Job, Launch, NetworkFault, Permit, Settings, Submission, now_or_by};

const LIMIT: Duration = Duration::from_secs(90);
const SOLVED: &str = "SOLVED";
const PORT: u16 = 7421;

struct Network {
    // Processes go before the hosts they run on.
    cluster: Cluster,
    bench: Bench,
}

impl Network {
    /// A coordinator and two nodes, each on its host; `None`, said aloud, where that cannot be had.
    fn up(lease: Duration) -> Result<Option<Self>> {
        let permit = Permit::one();
        let bench = match Bench::up(&["coord", "a", "b"])? {
            Ok(bench) => bench,
            Err(reason) => {
                eprintln!("SKIPPED: {reason}");
                return Ok(None);
            }
        };
        let listen = SocketAddr::new(bench.ip("coord")?.parse()?, PORT);
        let mut cluster =
            Cluster::empty(Settings { lease, listen: Some(listen), ..Settings::default() }, permit)?;
        let certs = cluster.folder().join("certs");
        let folder = certs.to_string_lossy().into_owned();
        let hosts = [bench.ip("coord")?, bench.ip("a")?, bench.ip("b")?];
        let mut arguments = vec!["certs", "--dir", &folder];
        hosts.iter().for_each(|host| arguments.extend(["--host", host]));
        let mut made = cluster.bare("certs", &arguments)?;
        ensure!(made.wait(LIMIT)? == 0, "certs: {}", made.stderr());
        cluster.settings.certs = Some(certs);
        let place = |host: &str| Launch { prefix: bench.prefix(host), ..Launch::default() };
        cluster.start_coordinator_as(place("coord"))?;
        for host in ["a", "b"] {
            let address = format!("{}:{PORT}", bench.ip(host)?);
            let args = ["--listen", &address, "--advertise", &address].map(str::to_string).to_vec();
            cluster.start_node_as(host, Launch { args, ..place(host) })?;
        }
        for host in ["a", "b"] {
            cluster.wait_attached(host, 1)?;
        }
        Ok(Some(Self { cluster, bench }))
    }

    fn submit(&mut self, job: &Job) -> Result<Submission> {
        job.golden()?;
        let launch = Launch { prefix: self.bench.prefix("coord"), ..Launch::default() };
        self.cluster.submit_as(job, &launch)
    }
}

/// Breaks the link of node `a` in mid-run for this many leases, heals it, and wants the same bytes.
fn check(fault: NetworkFault, leases: f64) -> Result<()> {
    let Some(mut network) = Network::up(Duration::from_secs(1))? else { return Ok(()) };
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
    let Some(mut network) = Network::up(Duration::from_secs(1))? else { return Ok(()) };
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

#[test]
fn a_fifth_of_all_packets_lost() -> Result<()> {
    let Some(mut network) = Network::up(Duration::from_secs(3))? else { return Ok(()) };
    for host in ["coord", "a", "b"] {
        network.bench.apply(host, NetworkFault::Loss(20))?;
    }
    let submission = network.submit(&few_bytes())?;
    let took = network.cluster.finish(submission, LIMIT)?;
    eprintln!("P15: 20 % loss on every host: identical after {took:.1?}");
    Ok(())
}

#[test]
fn a_link_of_one_megabit() -> Result<()> {
    let Some(mut network) = Network::up(Duration::from_secs(10))? else { return Ok(()) };
    network.bench.apply("a", NetworkFault::Slow(1000))?;
    let submission = network.submit(&few_bytes())?;
    let took = network.cluster.finish(submission, LIMIT)?;
    eprintln!("P15: 1 Mbit/s to one of two nodes: identical after {took:.1?}");
    Ok(())
}

/// Without the layers whose sums take megabytes.
fn few_bytes() -> Job {
    Job::short().with(&["--skip", "/4*", "--skip", "/5*"])
}
