//! Runs a job while a schedule of faults is carried out, and judges what came out.
//!
//! A run is good if the client ends with exit code 0 in bounded time, every output file has the bytes of an undisturbed
//! run, no process ended by itself, and no rounding that the coordinator said to be durable was committed again. Not here: which faults (`schedule`), tests of single promises.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::by_hand::in_time;
use crate::capacity::Permit;
use crate::cluster::{Cluster, Launch, Settings, Submission, letter};
use crate::job::Job;
use crate::outputs::Outputs;
use crate::parallel::in_parallel;
use crate::process::Process;
use crate::schedule::{Fault, Schedule};
use crate::wait::now_or_by;

/// After the last fault a job of two seconds must end within this.
const HANG: Duration = Duration::from_secs(90);
/// A drained node ends within 5 s; the rest is for a machine that is busy.
const DRAIN: Duration = Duration::from_secs(15);
/// Exit of a process that SIGTERM ended.
const TERMINATED: i32 = 143;
/// More nodes than this would only fight for two cores.
const NODES_MAX: usize = 5;

/// How a run went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should.
    Identical,
    /// Other bytes: which files.
    Differs(Vec<String>),
    /// Roundings that were acknowledged and computed again.
    Lost(Vec<String>),
    /// The client did not end.
    Hung(String),
    /// Anything else.
    Failed(String),
}

/// One seed's run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Where everything random came from.
    pub seed: u64,
    /// How it went.
    pub verdict: Verdict,
    /// Faults carried out, by kind.
    pub faults: BTreeMap<&'static str, usize>,
    /// Roundings that had been acknowledged when a coordinator was killed last.
    pub acknowledged: usize,
    /// Wall time.
    pub took: Duration,
}

/// Many seeds.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// Of every cluster.
    pub settings: Settings,
    /// What is computed, in several ways.
    pub job: Job,
    /// No seed begins after this moment.
    pub end: Option<Instant>,
}

impl Default for Campaign {
    fn default() -> Self {
        Self { settings: Settings::default(), job: Job::medium(), end: None }
    }
}

impl Campaign {
    /// Runs all seeds, as many at a time as clusters may run; `tell` hears of each as it ends.
    pub fn run(&self, seeds: Range<u64>, tell: impl Fn(&Run) + Sync) -> Vec<Run> {
        in_parallel(seeds.take_while(|_| in_time(self.end)), |seed| {
            let run = self.run_seed(seed);
            tell(&run);
            run
        })
    }

    fn run_seed(&self, seed: u64) -> Run {
        let permit = Permit::one();
        let start = Instant::now();
        let schedule = Schedule::draw(seed, &self.settings);
        let mut faults = BTreeMap::new();
        let mut acknowledged = 0;
        let job = job_of(&self.job, &schedule);
        let result = Killer::start(job, &schedule, &self.settings, permit)
            .and_then(|killer| killer.run(&schedule, &mut faults, &mut acknowledged));
        let verdict = result.unwrap_or_else(|error| Verdict::Failed(format!("seed {seed}: {error:#}")));
        Run { seed, verdict, faults, acknowledged, took: start.elapsed() }
    }
}

fn job_of(job: &Job, schedule: &Schedule) -> Job {
    let job = job.clone();
    match schedule.job % 4 {
        0 => job.with(&["--partition", "layers:3"]),
        1 => job.with(&["--propagation", "independent"]),
        _ => job,
    }
}

/// What follows a fault after a while.
#[derive(Clone, Debug)]
enum Then {
    StartNode(String),
    ThawNode(String),
    StartCoordinator,
    ThawCoordinator,
    StartClient,
}

struct Killer {
    cluster: Cluster,
    job: Job,
    client: Option<Submission>,
    draining: Vec<Process>,
    pending: Vec<(Instant, Then)>,
    nodes_started: u8,
}

impl Killer {
    fn start(job: Job, schedule: &Schedule, settings: &Settings, permit: Permit) -> Result<Self> {
        job.golden().context("undisturbed run")?;
        let mut cluster = Cluster::launched(settings.clone(), Launch::default(), permit)?;
        cluster.start_nodes(schedule.nodes)?;
        let client = Some(cluster.submit(&job)?);
        let nodes_started = schedule.nodes;
        Ok(Self { cluster, job, client, draining: Vec::new(), pending: Vec::new(), nodes_started })
    }

    fn run(
        mut self,
        schedule: &Schedule,
        counts: &mut BTreeMap<&'static str, usize>,
        acknowledged: &mut usize,
    ) -> Result<Verdict> {
        let start = Instant::now();
        let mut faults: VecDeque<(Instant, Fault)> =
            schedule.faults.iter().map(|(at, fault)| (start + *at, *fault)).collect();
        while let Some(at) = self.next_time(&faults) {
            if now_or_by(at, || self.client_ended())? {
                break;
            }
            self.all_alive()?;
            if faults.front().is_some_and(|(time, _)| *time <= at) {
                if let Some((_, fault)) = faults.pop_front() {
                    *counts.entry(fault.kind()).or_default() += 1;
                    self.commit(fault, acknowledged)?;
                }
            } else {
                self.follow_up(at)?;
            }
        }
        self.judge()
    }

    fn next_time(&self, faults: &VecDeque<(Instant, Fault)>) -> Option<Instant> {
        let pending = self.pending.iter().map(|(at, _)| *at);
        pending.chain(faults.front().map(|(at, _)| *at)).min()
    }

    fn client_ended(&mut self) -> Result<bool> {
        match &mut self.client {
            Some(client) => Ok(client.process.ended()?.is_some()),
            None => Ok(false),
        }
    }

    /// Whatever is not being killed has to live.
    fn all_alive(&mut self) -> Result<()> {
        if let Ok(coordinator) = self.cluster.coordinator()
            && coordinator.ended()?.is_some()
        {
            return coordinator.expired("to go on");
        }
        for name in self.cluster.node_names() {
            let node = self.cluster.node(&name)?;
            if node.ended()?.is_some() {
                return node.expired("to go on");
            }
        }
        Ok(())
    }

    fn commit(&mut self, fault: Fault, acknowledged: &mut usize) -> Result<()> {
        match fault {
            Fault::KillNode { victim, away } => match self.pick(victim) {
                Some(name) => {
                    self.cluster.kill_node(&name)?;
                    self.later(away, Then::StartNode(name));
                }
                None => return Ok(()),
            },
            Fault::KillCoordinator { away } => self.kill_coordinator(away, acknowledged)?,
            Fault::KillEverything { away } => {
                self.kill_coordinator(away, acknowledged)?;
                for name in self.cluster.node_names() {
                    self.cluster.kill_node(&name)?;
                    self.later(away, Then::StartNode(name));
                }
                self.draining.clear();
                self.kill_client(away);
            }
            Fault::FreezeNode { victim, away } => {
                if let Some(name) = self.pick(victim) {
                    self.cluster.node(&name)?.freeze()?;
                    self.later(away, Then::ThawNode(name));
                }
            }
            Fault::FreezeCoordinator { away } => {
                if let Ok(coordinator) = self.cluster.coordinator() {
                    coordinator.freeze()?;
                    self.later(away, Then::ThawCoordinator);
                }
            }
            Fault::Join => self.join()?,
            Fault::Drain { victim } => {
                if let Some(name) = self.pick(victim) {
                    let node = self.cluster.take_node(&name)?;
                    node.thaw()?;
                    node.terminate()?;
                    self.draining.push(node);
                    self.join()?;
                }
            }
            Fault::KillClient => self.kill_client(Duration::from_millis(100)),
        }
        Ok(())
    }

    fn kill_coordinator(&mut self, away: Duration, acknowledged: &mut usize) -> Result<()> {
        if self.cluster.has_coordinator()? {
            self.cluster.kill_coordinator()?;
            *acknowledged = self.cluster.acknowledged()?.len();
            self.later(away, Then::StartCoordinator);
        }
        Ok(())
    }

    fn kill_client(&mut self, away: Duration) {
        // Dropping kills.
        if self.client.take().is_some() {
            self.later(away, Then::StartClient);
        }
    }

    fn join(&mut self) -> Result<()> {
        if self.cluster.node_names().len() < NODES_MAX {
            let name = letter(self.nodes_started);
            self.nodes_started += 1;
            self.cluster.start_node(&name)?;
        }
        Ok(())
    }

    fn pick(&self, victim: u8) -> Option<String> {
        let mut names = self.cluster.node_names();
        if names.is_empty() { None } else { Some(names.swap_remove(usize::from(victim) % names.len())) }
    }

    fn later(&mut self, away: Duration, then: Then) {
        self.pending.push((Instant::now() + away, then));
    }

    fn follow_up(&mut self, at: Instant) -> Result<()> {
        let Some(index) = self.pending.iter().position(|(time, _)| *time == at) else {
            return Ok(());
        };
        match self.pending.remove(index).1 {
            Then::StartNode(name) if self.cluster.node(&name).is_err() => self.cluster.restart_node(&name),
            Then::ThawNode(name) => self.cluster.node(&name).map_or(Ok(()), |node| node.thaw()),
            Then::StartCoordinator if !self.cluster.has_coordinator()? => {
                self.cluster.start_coordinator().map(drop)
            }
            Then::ThawCoordinator => self.cluster.coordinator().map_or(Ok(()), |process| process.thaw()),
            Then::StartClient if self.client.is_none() => {
                self.client = Some(self.cluster.submit(&self.job.clone())?);
                Ok(())
            }
            Then::StartNode(_) | Then::StartCoordinator | Then::StartClient => Ok(()),
        }
    }

    fn judge(mut self) -> Result<Verdict> {
        let client = self.client.take().context("no client is left")?;
        let end = match self.cluster.end(client, HANG) {
            Ok(end) => end,
            Err(error) => return Ok(Verdict::Hung(format!("{error:#}"))),
        };
        ensure!(end.exit == 0, "submit: expected exit 0, got {}\n{}", end.exit, self.cluster.logs.tails());
        let differences = Outputs::of(&end.output)?.differences(&*self.job.golden()?);
        if !differences.is_empty() {
            return Ok(Verdict::Differs(differences));
        }
        let lost = self.cluster.acknowledged()?.lost();
        if !lost.is_empty() {
            return Ok(Verdict::Lost(lost));
        }
        for mut node in std::mem::take(&mut self.draining) {
            let code = node.wait(DRAIN)?;
            // A signal may come before a new process listens for any.
            let unready = code == TERMINATED && !node.stderr().contains("Serving on");
            ensure!(
                code == 0 || unready,
                "drained node: expected exit 0, got {code}\n{}",
                self.cluster.logs.tails()
            );
        }
        Ok(Verdict::Identical)
    }
}
