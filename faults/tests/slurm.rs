//! The scripts of `slurm/`, as shipped, on a real Slurm of three hosts, submitted by a user who is not root.
//!
//! Each time the output has the bytes of one undisturbed process. Root and Debian's Slurm only; elsewhere skipped, saying
//! why.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use faults::{Job, Outputs, Slurm, example};

const LIMIT: Duration = Duration::from_secs(90);
const HOSTS: [&str; 3] = ["n1", "n2", "n3"];
const LOG: &str = "job.log";
const SOLVED: &str = "SOLVED";
/// What a host's death does to time is not what is tested here.
const TIMES: [(&str, &str); 3] =
    [("HALFSTEP_HEARTBEAT_MS", "100"), ("HALFSTEP_LEASE_MS", "1000"), ("HALFSTEP_LOG", "warn")];

/// A cluster with certificates, a job's inputs and a script to submit; `None`, said aloud, where that cannot be had.
struct Site {
    slurm: Slurm,
    job: Job,
}

impl Site {
    fn up(work: &[&str]) -> Result<Option<Self>> {
        let slurm = match Slurm::up(&HOSTS)? {
            Ok(slurm) => slurm,
            Err(reason) => {
                eprintln!("SKIPPED: {reason}");
                return Ok(None);
            }
        };
        let home = slurm.home();
        for name in ["model.onnx", "calibration.npz"] {
            fs::copy(example(name), home.join(name))?;
        }
        slurm.user(&[&slurm.halfstep(), "certs", "--dir", "certs", "--host", "n[1-3]"], &[])?;
        let job = Job::on(Path::new("model.onnx"), Path::new("calibration.npz")).with(&["--bits", "3"]);
        let job = job.with(&["--samples", "256", "--shard-size", "16"]).with(work);
        slurm.show(LOG);
        Ok(Some(Self { slurm, job }))
    }

    /// Edits a script as the guide says.
    fn edit(&self, script: &str, more: &[(&str, &str)]) -> Result<()> {
        let binary = format!("halfstep={}  #", self.slurm.halfstep());
        let arguments = self.job.arguments().join(" ");
        let mut replacements = vec![("halfstep=halfstep  ", binary.as_str())];
        if script != "nodes.sbatch" {
            replacements.push(("model.onnx --calibration calibration.npz --bits 4", &arguments));
        }
        replacements.extend(more);
        self.slurm.edit(script, &replacements)
    }

    /// Submits `halfstep.sbatch` on all hosts, and waits until the work is under way.
    fn begin(&mut self, more: &[(&str, &str)]) -> Result<u32> {
        self.edit("halfstep.sbatch", &[&[("--cpus-per-task=8", "--cpus-per-task=1")], more].concat())?;
        let job = self.slurm.sbatch(&["--exclusive", "--output", LOG, "halfstep.sbatch"], &TIMES)?;
        self.slurm.wait_lines(LOG, SOLVED, 1, LIMIT)?;
        Ok(job)
    }

    /// Waits until the job has ended well, and compares its results.
    fn finish(&mut self, job: u32) -> Result<()> {
        let state = self.slurm.wait_over(job, LIMIT)?;
        self.slurm
            .expect("the job to succeed", Duration::ZERO, |_| Ok((state == "COMPLETED 0:0").then_some(())))?;
        let differences = Outputs::of(&self.slurm.home().join("out"))?
            .differences(&*self.job.golden_from(&self.slurm.home())?);
        ensure!(differences.is_empty(), "{}", differences.join("\n"));
        Ok(())
    }
}

/// Long enough for something to happen in the middle.
const LONG: [&str; 2] = ["--iterations", "6000"];

#[test]
fn a_job_over_three_hosts_as_the_guide_says() -> Result<()> {
    let Some(mut site) = Site::up(&["--iterations", "600"])? else { return Ok(()) };
    let since = Instant::now();
    let job = site.begin(&[])?;
    site.finish(job)?;
    for (rank, host) in HOSTS.iter().enumerate() {
        let line = format!("Slurm job {job}, task {rank} of 3 on {host}");
        ensure!(site.slurm.lines(LOG, &line).len() == 1, "`{line}` is not in the log");
    }
    let listening = format!("Listening on 0.0.0.0:{}", 20_000 + job % 20_000);
    ensure!(site.slurm.lines(LOG, &listening).len() == 1, "not `{listening}`");
    eprintln!("three hosts: identical after {:.1?}", since.elapsed());
    Ok(())
}

#[test]
fn a_host_that_dies() -> Result<()> {
    let Some(mut site) = Site::up(&LONG)? else { return Ok(()) };
    let job = site.begin(&[])?;
    let since = Instant::now();
    site.slurm.kill_host("n3")?;
    site.finish(job)?;
    eprintln!("a dead host: identical after {:.1?} more", since.elapsed());
    Ok(())
}

#[test]
fn a_host_that_is_cut_off_and_comes_back() -> Result<()> {
    let Some(mut site) = Site::up(&LONG)? else { return Ok(()) };
    let job = site.begin(&[])?;
    let since = Instant::now();
    site.slurm.cut_off("n3")?;
    site.slurm.wait_lines(LOG, "LOST", 1, LIMIT)?;
    let lost = since.elapsed();
    site.slurm.heal("n3");
    // It was given up, and is let in again.
    site.slurm.wait_lines(LOG, "Attached to", 4, LIMIT)?;
    site.finish(job)?;
    eprintln!("a partition: given up after {lost:.1?}, identical after {:.1?}", since.elapsed());
    Ok(())
}

#[test]
fn a_job_that_is_preempted_goes_on_where_it_was() -> Result<()> {
    let Some(mut site) = Site::up(&LONG)? else { return Ok(()) };
    let job = site.begin(&[])?;
    let since = Instant::now();
    let urgent = ["--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "true"];
    let urgent = site.slurm.sbatch(&urgent, &[])?;
    ensure!(site.slurm.wait_over(urgent, LIMIT)?.starts_with("COMPLETED"), "the urgent job did not run");
    ensure!(!site.slurm.home().join("out").exists(), "the job was over before it was preempted");
    site.slurm.wait_lines(LOG, "restarted once", 4, LIMIT)?;
    site.finish(job)?;
    for (said, times) in [("DUE TO PREEMPTION", 1), ("Resuming", 1), ("Draining", 3)] {
        ensure!(site.slurm.lines(LOG, said).len() >= times, "`{said}` is not in the log {times} times");
    }
    eprintln!("a preemption: identical after {:.1?} more", since.elapsed());
    Ok(())
}

#[test]
fn a_job_whose_coordinator_is_killed_or_whose_time_is_up_is_requeued_up_to_a_limit() -> Result<()> {
    let Some(mut site) = Site::up(&LONG)? else { return Ok(()) };
    let limit = ("coordinator --slurm", "coordinator --slurm --requeue-limit 2");
    let job = site.begin(&[limit])?;
    let since = Instant::now();
    let warn =
        |slurm: &Slurm| slurm.user(&["scancel", "--batch", "--signal=USR1", &job.to_string()], &[]).map(drop);
    // A coordinator that is killed can ask for nothing: the script does.
    site.slurm.kill_command("n1", "coordinator")?;
    site.slurm.wait_lines(LOG, "Resuming", 1, LIMIT)?;
    warn(&site.slurm)?;
    site.slurm.wait_lines(LOG, "Handed back: exit 75 asks for restart 2 of at most 2", 1, LIMIT)?;
    // The third time is one too many.
    site.slurm.wait_lines(LOG, "Resuming", 2, LIMIT)?;
    warn(&site.slurm)?;
    let state = site.slurm.wait_over(job, LIMIT)?;
    ensure!(state == "FAILED 1:0", "expected FAILED 1:0, found {state}");
    let words = "stopped for good after 2 restarts, expected at most 2";
    ensure!(site.slurm.lines(LOG, words).len() == 1, "`{words}` is not in the log");
    ensure!(!site.slurm.home().join("out").exists(), "the job was over before it was stopped");
    // Nothing is lost: the script again, and it goes on.
    let again = site.slurm.sbatch(&["--exclusive", "--output", LOG, "halfstep.sbatch"], &TIMES)?;
    site.finish(again)?;
    ensure!(site.slurm.lines(LOG, "Resuming").len() == 3, "the state of the first job was not used");
    eprintln!(
        "a killed coordinator, a requeue, a limit, a new job: identical after {:.1?} more",
        since.elapsed()
    );
    Ok(())
}

#[test]
fn an_elastic_fleet_follows_its_coordinator() -> Result<()> {
    let Some(mut site) = Site::up(&LONG)? else { return Ok(()) };
    let since = Instant::now();
    site.edit("coordinator.sbatch", &[("--cpus-per-task=2", "--cpus-per-task=1")])?;
    site.edit("nodes.sbatch", &[("#SBATCH --gpus=1\n", ""), ("--cpus-per-task=8", "--cpus-per-task=1")])?;
    // Nodes first: they wait.
    let nodes = site.slurm.sbatch(&["--array=0-3", "--output=node-%a.log", "nodes.sbatch"], &TIMES)?;
    (0..4).for_each(|task| site.slurm.show(&format!("node-{task}.log")));
    for task in 0..4 {
        site.slurm.wait_lines(&format!("node-{task}.log"), "is not there yet", 1, LIMIT)?;
    }
    let first = site.slurm.sbatch(&["--output", LOG, "--nodelist=n1", "coordinator.sbatch"], &TIMES)?;
    for task in 0..4 {
        site.slurm.wait_lines(&format!("node-{task}.log"), "Attached to n1:", 1, LIMIT)?;
    }
    site.slurm.wait_lines(LOG, SOLVED, 1, LIMIT)?;
    // One node is cancelled, one is told that its time is up and comes back.
    site.slurm.user(&["scancel", &format!("{nodes}_0")], &[])?;
    site.slurm.user(&["scancel", "--batch", "--signal=USR1", &format!("{nodes}_1")], &[])?;
    site.slurm.wait_lines("node-1.log", "Handed back: exit 75 asks for restart 1 of at most 20", 1, LIMIT)?;
    site.slurm.user(&["scancel", &first.to_string()], &[])?;
    site.slurm.wait_over(first, LIMIT)?;
    ensure!(!site.slurm.home().join("out").exists(), "the job was over before its coordinator was cancelled");
    let second = site.slurm.sbatch(&["--output", LOG, "--nodelist=n2", "coordinator.sbatch"], &TIMES)?;
    site.finish(second)?;
    for task in 1..4 {
        let log = format!("node-{task}.log");
        site.slurm.wait_lines(&log, "Nothing left to do", 1, LIMIT)?;
    }
    for task in 2..4 {
        let log = format!("node-{task}.log");
        ensure!(site.slurm.lines(&log, "Leaving n1:").len() == 1, "node {task} did not leave n1");
        ensure!(site.slurm.lines(&log, "Attached to n2:").len() == 1, "node {task} did not follow to n2");
    }
    ensure!(site.slurm.lines("node-1.log", "restarted once").len() == 1, "node 1 did not come back");
    ensure!(site.slurm.lines("node-0.log", "Attached to n2:").is_empty(), "node 0 was requeued");
    eprintln!("an elastic fleet: identical after {:.1?}", since.elapsed());
    Ok(())
}

#[test]
fn a_task_takes_the_gpu_that_slurm_gave_it() -> Result<()> {
    let Some(site) = Site::up(&["--iterations", "20"])? else { return Ok(()) };
    let node = "said=$(\"$0\" node --slurm --certs certs 2>&1); echo $SLURM_LOCALID: $CUDA_VISIBLE_DEVICES: $? $said";
    let words = ["srun", "--nodes=1", "--ntasks=2", "--gpus-per-node=2", "sh", "-c", node];
    let said = site.slurm.user(&[&words[..], &[&site.slurm.halfstep()]].concat(), &[])?;
    let mut lines: Vec<&str> = said.lines().collect();
    lines.sort_unstable();
    // They are no real ones: each task says so of its own, and does not work on the CPU instead.
    for (task, line) in lines.iter().enumerate() {
        ensure!(line.starts_with(&format!("{task}: 0,1: 78 ")), "{said}");
        ensure!(line.contains(&format!("device `cuda:{task}`: ")), "{said}");
    }
    ensure!(lines.len() == 2, "{said}");
    Ok(())
}
