//! One undisturbed or slowed run of a job on a fleet of real processes, with what it cost: for the tables of the binaries.
//!
//! Not here: what is compared with what (`bin/`).

use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use crate::by_hand::{Bounds, Inputs};
use crate::capacity::Permit;
use crate::cluster::{Cluster, Launch, Settings, letter};
use crate::cpu::cpu_seconds;
use crate::job::Job;
use crate::outputs::Outputs;
use crate::throttle::Throttle;

/// A job that takes longer is not one to measure with.
const LIMIT: Duration = Duration::from_secs(3600);
/// Nodes tell what they moved with their heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// What to measure with.
#[derive(Clone, Debug, Args)]
pub struct Workload {
    /// The files it works on.
    #[command(flatten)]
    pub inputs: Inputs,

    /// Give each node this many threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub threads: usize,

    /// Run each case this often and show the median of the times
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,

    /// How long, and where to write.
    #[command(flatten)]
    pub bounds: Bounds,

    /// More options of the job
    #[arg(last = true, value_name = "OPTION")]
    pub options: Vec<String>,
}

/// What one run took.
#[derive(Clone, Debug)]
pub struct Cost {
    /// From submission to results, seconds.
    pub wall: f64,
    /// Seconds of CPU of all nodes together, from before the submission.
    pub nodes_cpu: f64,
    /// The same of the coordinator.
    pub coordinator_cpu: f64,
    /// Bytes that nodes fetched from each other and from the coordinator.
    pub fetched: u64,
    /// Of these, bytes that nodes sent, with the roundings they uploaded.
    pub sent: u64,
    /// What came out.
    pub outputs: Outputs,
}

impl Workload {
    /// The job, with options of the case before those of the user.
    pub fn job(&self, case: &[&str]) -> Job {
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        self.inputs.of(Job::plain()).with(case).with(&options)
    }

    /// Runs a job on one node per entry of `shares`, each running for this percentage of the time. The median by time of
    /// as many runs as were asked for.
    ///
    /// # Errors
    /// If a run fails or two differ in their results.
    pub fn measure(&self, job: &Job, shares: &[u32]) -> Result<Cost> {
        let mut costs = Vec::new();
        for _ in 0..self.repeat {
            costs.push(self.once(job, shares)?);
        }
        let first = &costs[0].outputs;
        for other in &costs[1..] {
            let differences = first.differences(&other.outputs);
            ensure!(differences.is_empty(), "the same case twice: {}", differences.join("\n"));
        }
        costs.sort_by(|a, b| a.wall.total_cmp(&b.wall));
        let median = costs.len() / 2;
        Ok(costs.swap_remove(median))
    }

    fn once(&self, job: &Job, shares: &[u32]) -> Result<Cost> {
        // Real times: nothing is to fail.
        let settings = Settings {
            heartbeat: HEARTBEAT,
            lease: HEARTBEAT * 10,
            threads: self.threads,
            ..Settings::default()
        };
        let mut cluster = Cluster::launched(settings, Launch::default(), Permit::alone())?;
        cluster.start_nodes(u8::try_from(shares.len())?)?;
        let mut throttles = Vec::new();
        for (index, share) in (0u8..).zip(shares) {
            let name = letter(index);
            cluster.wait_attached(&name, 1)?;
            let lag = Duration::from_millis(u64::from(index) * 37 % 100);
            throttles.push(Throttle::new(cluster.node(&name)?.pid(), *share, lag));
        }
        let before = spent(&mut cluster)?;
        let submission = cluster.submit(job)?;
        let end = cluster.end(submission, LIMIT)?;
        ensure!(matches!(end.exit, 0 | 3), "exit {}: {}", end.exit, end.stderr);
        let after = spent(&mut cluster)?;
        drop(throttles);
        std::thread::sleep(HEARTBEAT + HEARTBEAT / 4);
        let nodes = cluster.nodes()?;
        let sum = |key: &str| nodes.iter().map(|node| node[key].as_u64().unwrap_or(0)).sum();
        Ok(Cost {
            wall: end.took.as_secs_f64(),
            nodes_cpu: after.0 - before.0,
            coordinator_cpu: after.1 - before.1,
            fetched: sum("bytes_fetched"),
            sent: sum("bytes_sent"),
            outputs: Outputs::of(&end.output)?,
        })
    }
}

/// CPU of the nodes and of the coordinator so far; nothing where the system does not say.
fn spent(cluster: &mut Cluster) -> Result<(f64, f64)> {
    let mut nodes = 0.0;
    for name in cluster.node_names() {
        nodes += cpu_seconds(cluster.node(&name)?.pid()).unwrap_or(0.0);
    }
    Ok((nodes, cpu_seconds(cluster.coordinator()?.pid()).unwrap_or(0.0)))
}
