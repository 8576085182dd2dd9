//! Nodes that come, go, freeze, crawl and crash; a coordinator that does (P1, P2, P4, P8, P10, P11, P13, P14, P24, P26).
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use faults::{Cluster, Job, Launch, Permit, Settings, Throttle, install, until};

const LIMIT: Duration = Duration::from_secs(120);
/// For a machine that is busy; measured figures are printed.
const SLACK: Duration = Duration::from_secs(5);

/// First line of progress of a job that is under way.
const SOLVED: &str = "SOLVED";

#[test]
fn a_killed_node_costs_its_task_and_nothing_else() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    let mut submission = cluster.submit(&Job::long())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    cluster.kill_node("a")?;
    let killed = Instant::now();
    let lost = |cluster: &mut Cluster| {
        let status = cluster.node_status("a")?;
        Ok(status.is_none_or(|node| node["state"] == "lost").then_some(()))
    };
    cluster.expect("the killed node to be noticed", LIMIT, lost)?;
    eprintln!("P2: a dead process was noticed after {:.1?}", killed.elapsed());
    ensure!(killed.elapsed() < Duration::from_secs(1) + SLACK);
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn a_frozen_node_is_lost_after_the_lease_and_fenced_when_it_wakes() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    let mut submission = cluster.submit(&Job::long())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    let frozen = Instant::now();
    cluster.node("a")?.freeze()?;
    let lost = |cluster: &mut Cluster| {
        let status = cluster.node_status("a")?;
        Ok(status.is_none_or(|node| node["state"] == "lost").then_some(()))
    };
    cluster.expect("the frozen node to be lost", LIMIT, lost)?;
    let (noticed, settings) = (frozen.elapsed(), cluster.settings.clone());
    eprintln!("P2: silence was noticed after {noticed:.1?} (lease {:?})", settings.lease);
    ensure!(noticed < settings.lease + settings.heartbeat + SLACK);
    cluster.finish(submission, LIMIT)?;
    cluster.node("a")?.thaw()?;
    cluster.wait_attached("a", 2)?;
    // It is as good as new.
    cluster.kill_node("b")?;
    cluster.run(&Job::short(), LIMIT).map(drop)
}

#[test]
fn a_zombies_results_are_refused_and_counted() -> Result<()> {
    let mut cluster = Cluster::new()?;
    // Long tasks: what it has in hand when it freezes is in hand when it wakes.
    cluster.start_nodes(2)?;
    let mut submission = cluster.submit(&Job::longer())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    for _ in 0..3 {
        cluster.node("a")?.freeze()?;
        let lease = cluster.settings.lease;
        let late = Instant::now() + lease * 2;
        faults::now_or_by(late, || Ok(submission.process.ended()?.is_some()))?;
        cluster.node("a")?.thaw()?;
        cluster.wait_attached("a", 1)?;
    }
    cluster.finish(submission, LIMIT)?;
    let log = cluster.coordinator()?.stderr();
    let (refused, fenced) =
        (log.matches("an outcome does not count").count(), log.matches("fenced=true").count());
    let job = cluster.jobs()?.pop().unwrap_or_default();
    let count = |key: &str| job[key].as_u64().unwrap_or(0);
    eprintln!("P8: {refused} outcomes refused, {fenced} registrations fenced; counted: {job}");
    ensure!(refused + fenced > 0, "{log}");
    ensure!(count("fenced_nodes") + count("fenced_results") > 0, "{job}");
    ensure!(count("fenced_nodes") == fenced as u64, "{job}\n{log}");
    ensure!(count("layers") > 0 && count("layers") == count("layers_done"), "{job}");
    Ok(())
}

#[test]
fn nodes_1_4_2_in_mid_run_give_the_same_bytes_and_a_new_one_works_at_once() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_node("a")?;
    let job = Job::longer();
    job.golden()?;
    let mut submission = cluster.submit(&job)?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    for name in ["b", "c", "d"] {
        cluster.start_node(name)?;
    }
    cluster.wait_attached("b", 1)?;
    let attached = Instant::now();
    let works = |cluster: &mut Cluster| {
        let status = cluster.node_status("b")?.unwrap_or_default();
        let number = |key: &str| status[key].as_u64().unwrap_or(0);
        Ok((number("leases") + number("tasks_done") > 0).then_some(()))
    };
    cluster.expect("the new node to have work", LIMIT, works)?;
    eprintln!("P10: a new node had work {:.1?} after it attached", attached.elapsed());
    ensure!(attached.elapsed() < Duration::from_secs(2) + SLACK);
    for name in ["a", "c"] {
        cluster.node(name)?.terminate()?;
    }
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn a_drained_node_exits_within_five_seconds_and_a_second_signal_is_harmless() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(3)?;
    let mut submission = cluster.submit(&Job::long())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    for (name, signals) in [("a", 1), ("b", 2)] {
        let mut node = cluster.take_node(name)?;
        let asked = Instant::now();
        (0..signals).try_for_each(|_| node.terminate())?;
        let code = node.wait(Duration::from_secs(5) + SLACK)?;
        eprintln!("P26: {signals} x SIGTERM: exit {code} after {:.1?}", asked.elapsed());
        ensure!(code == 0, "{}", node.stderr());
    }
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn a_coordinator_told_to_stop_exits_within_five_seconds_and_goes_on_when_started_again() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    let mut submission = cluster.submit(&Job::long())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    let asked = Instant::now();
    cluster.coordinator()?.terminate()?;
    let code = cluster.coordinator()?.wait(Duration::from_secs(5) + SLACK)?;
    eprintln!("P26: coordinator: exit {code} after {:.1?}", asked.elapsed());
    ensure!(code == 0, "{}", cluster.coordinator()?.stderr());
    cluster.start_coordinator()?;
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn a_killed_coordinator_resumes_by_itself_within_five_seconds() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    let job = Job::longer();
    job.golden()?;
    let mut submission = cluster.submit(&job)?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    cluster.kill_coordinator()?;
    let started = Instant::now();
    cluster.start_coordinator()?;
    let resuming = cluster.coordinator()?.wait_line("Resuming", SLACK)?;
    eprintln!("{resuming}");
    let works = |cluster: &mut Cluster| {
        let leases = |node: &serde_json::Value| node["leases"].as_u64().unwrap_or(0);
        Ok(cluster.nodes()?.iter().any(|node| leases(node) > 0).then_some(()))
    };
    cluster.expect("tasks to be given out again", LIMIT, works)?;
    eprintln!("P4: scheduling again {:.1?} after the start", started.elapsed());
    ensure!(started.elapsed() < Duration::from_secs(5) + SLACK);
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn stopped_and_resumed_twenty_times_gives_the_same_bytes() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    let mut submission = cluster.submit(&Job::long())?;
    let mut stops = 0;
    for stop in 0..20u64 {
        // Enough to get a little further each time.
        let pause = Instant::now() + Duration::from_millis(60 + 10 * stop);
        if faults::now_or_by(pause, || Ok(submission.process.ended()?.is_some()))? {
            break;
        }
        cluster.kill_coordinator()?;
        cluster.start_coordinator()?;
        stops += 1;
    }
    eprintln!("P6: {stops} stops");
    ensure!(stops > 0);
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn a_job_without_nodes_waits_says_why_and_is_bounded() -> Result<()> {
    let settings = Settings { no_nodes: Duration::from_secs(2), ..Settings::default() };
    let mut cluster = Cluster::with(settings)?;
    let submission = cluster.submit(&Job::short())?;
    let end = cluster.end(submission, Duration::from_secs(2) + SLACK * 2)?;
    eprintln!("P14: exit {} after {:.1?}: {}", end.exit, end.took, end.stderr.trim());
    ensure!(end.exit != 0 && end.took >= Duration::from_secs(2));
    ensure!(end.stderr.contains("node"), "{}", end.stderr);
    ensure!(!end.output.exists(), "nothing was produced, yet there is an output folder");
    Ok(())
}

#[test]
fn a_job_whose_nodes_all_died_goes_on_with_the_next_one() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    let mut submission = cluster.submit(&Job::long())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    for name in ["a", "b"] {
        cluster.kill_node(name)?;
    }
    cluster.start_node("c")?;
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn a_straggler_does_not_hold_the_job_up() -> Result<()> {
    let mut undisturbed = Duration::ZERO;
    for share in [100, 20, 0] {
        let mut cluster = Cluster::launched(Settings::default(), Launch::default(), Permit::alone())?;
        cluster.start_nodes(3)?;
        cluster.wait_attached("a", 1)?;
        let job = Job::long();
        job.golden()?;
        let submission = cluster.submit(&job)?;
        let throttle = Throttle::new(cluster.node("a")?.pid(), share, Duration::ZERO);
        let took = cluster.finish(submission, LIMIT)?;
        drop(throttle);
        let lease = cluster.settings.lease;
        eprintln!("P11: one of three nodes at {share} % of its CPU: {took:.1?}");
        match share {
            100 => undisturbed = took,
            _ => ensure!(
                took < undisturbed.mul_f64(2.0) + lease * 2 + SLACK,
                "{took:?}, undisturbed {undisturbed:?}"
            ),
        }
    }
    Ok(())
}

#[test]
fn clocks_that_are_ninety_days_off_change_nothing() -> Result<()> {
    if let Err(reason) = install("faketime", "faketime") {
        eprintln!("SKIPPED: {reason}");
        return Ok(());
    }
    let skewed = |offset: &str| Launch {
        prefix: ["env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-f", offset]
            .map(str::to_string)
            .to_vec(),
        ..Launch::default()
    };
    let mut cluster = Cluster::new()?;
    cluster.start_node_as("a", skewed("-90d"))?;
    cluster.start_node_as("b", skewed("+90d"))?;
    let mut submission = cluster.submit(&Job::long())?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    for name in ["a", "b"] {
        ensure!(
            cluster.node_status(name)?.is_some_and(|node| node["state"] != "lost"),
            "node {name} is lost"
        );
    }
    cluster.finish(submission, LIMIT)?;
    ensure!(cluster.node("a")?.stderr().matches("Attached to").count() == 1);
    Ok(())
}

#[test]
fn embedded_quantize_killed_again_and_again_resumes_with_the_same_command() -> Result<()> {
    let mut cluster = Cluster::empty(Settings::default(), Permit::one())?;
    let job = Job::long();
    job.golden()?;
    let output = cluster.folder().join("out");
    let mut arguments = vec!["quantize".to_string()];
    arguments.extend(job.arguments());
    arguments.extend(["--output".to_string(), output.to_string_lossy().into_owned()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut kills = 0;
    for attempt in 1..=30u64 {
        let mut process = cluster.bare("quantize", &arguments)?;
        let limit = if attempt == 30 { LIMIT } else { Duration::from_millis(250 + 100 * attempt) };
        match until(limit, || process.ended())? {
            Some(code) => {
                ensure!(code == 0, "exit {code}\n{}", cluster.logs.tails());
                break;
            }
            // Results are in place, all at once: what is left is to say so. Their bytes are compared below.
            None if output.exists() => {
                let code = until(LIMIT, || process.ended())?;
                ensure!(code == Some(0), "results are in place, yet it ends with {code:?}");
                break;
            }
            None => {
                process.kill()?;
                kills += 1;
            }
        }
    }
    eprintln!("P6: embedded run killed {kills} times");
    ensure!(kills > 0);
    ensure!(hidden_files(cluster.folder()).is_empty(), "left: {:?}", hidden_files(cluster.folder()));
    cluster.assert_identical(&job, &output)
}

fn hidden_files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with('.')).collect()
}
