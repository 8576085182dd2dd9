//! Nodes that add up statistics in a group, as real processes: the same bytes, whatever becomes of members and of the library.
//!
//! The library stands in for NCCL and is built here; nodes take it for NCCL by its name and let it add in their own memory
//! (`HALFSTEP_NCCL_HOST_MEMORY`, which only binaries with failpoints know).
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use faults::{Cluster, Job, Launch, example};

const LIMIT: Duration = Duration::from_secs(120);
/// What a member says of a round.
const ADDED: &str = "added up";
/// What the coordinator says of a group, and of its end.
const TOGETHER: &str = "nodes add up statistics together";
const OVER: &str = "the nodes' group is over";

/// A folder with a library of these faults; all of a cluster meet in one place.
fn library(cluster: &Cluster, flags: &[&str]) -> Result<PathBuf> {
    let folder = cluster.folder().join(format!("nccl-{}", flags.concat()));
    std::fs::create_dir_all(&folder)?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../node/compute/tests/nccl/fake_nccl.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-pthread", "-O1", "-o"]).arg(folder.join("libnccl.so.2")).arg(source);
    compiler.args(flags.iter().map(|flag| format!("-DFAKE_{flag}")));
    compiler.arg(format!("-DFAKE_FOLDER=\"{}\"", cluster.folder().display()));
    ensure!(compiler.status()?.success(), "{compiler:?}");
    Ok(folder)
}

/// Starts a node that adds up by the library of these faults.
fn start(cluster: &mut Cluster, name: &str, flags: &[&str]) -> Result<()> {
    let folder = library(cluster, flags)?;
    let mut launch = Launch::arguments(&["--nccl", "--cuda-libraries", &folder.to_string_lossy()]);
    launch.env.push(("HALFSTEP_NCCL_HOST_MEMORY".into(), "1".into()));
    cluster.start_node_as(name, launch)
}

#[test]
fn nodes_that_add_up_together_give_the_same_bytes() -> Result<()> {
    let mut cluster = Cluster::new()?;
    for name in ["a", "b", "c"] {
        start(&mut cluster, name, &[])?;
    }
    let took = cluster.run(&Job::longer(), LIMIT)?;
    let rounds = ["a", "b", "c"].map(|name| cluster.node(name).unwrap().stderr().matches(ADDED).count());
    eprintln!("three nodes in a group: identical after {took:.1?}, rounds added up by each: {rounds:?}");
    ensure!(rounds[0] > 0 && rounds.iter().all(|count| *count == rounds[0]), "rounds: {rounds:?}");
    let log = cluster.coordinator()?.stderr();
    ensure!(!log.contains(OVER), "the group failed: {log}");
    Ok(())
}

#[test]
fn a_member_that_is_killed_or_frozen_costs_the_group_and_no_result() -> Result<()> {
    let mut cluster = Cluster::new()?;
    for name in ["a", "b", "c", "d"] {
        // Nobody tells the others: they wait in vain until the coordinator ends it.
        start(&mut cluster, name, &["SILENT"])?;
    }
    let sizes = ["--bits", "3", "--samples", "256", "--shard-size", "16", "--iterations", "12000"];
    let job = Job::on(&example("model.onnx"), &example("calibration.npz")).with(&sizes);
    let mut submission = cluster.submit(&job)?;
    cluster.node("a")?.wait_line(ADDED, LIMIT)?;
    cluster.kill_node("d")?;
    cluster.coordinator()?.wait_lines(TOGETHER, 2, LIMIT)?;
    cluster.node("c")?.freeze()?;
    let late = Instant::now() + cluster.settings.lease * 3;
    faults::now_or_by(late, || Ok(submission.process.ended()?.is_some()))?;
    cluster.node("c")?.thaw()?;
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn a_library_that_breaks_in_the_middle_is_done_without() -> Result<()> {
    let mut cluster = Cluster::new()?;
    start(&mut cluster, "a", &[])?;
    start(&mut cluster, "b", &["ERROR_AFTER=5"])?;
    cluster.run(&Job::longer(), LIMIT)?;
    let log = cluster.coordinator()?.stderr();
    ensure!(log.contains(TOGETHER) && log.contains(OVER), "no group, or no end of it: {log}");
    Ok(())
}

#[test]
fn a_library_that_never_joins_holds_nobody_up() -> Result<()> {
    let mut cluster = Cluster::new()?;
    start(&mut cluster, "a", &[])?;
    start(&mut cluster, "b", &["INIT_STUCK"])?;
    cluster.run(&Job::long(), LIMIT)?;
    ensure!(!cluster.coordinator()?.stderr().contains(TOGETHER));
    Ok(())
}

#[test]
fn a_node_without_nccl_or_a_device_says_so() -> Result<()> {
    let mut cluster = Cluster::new()?;
    let folder = library(&cluster, &["WITHOUT_ABORT"])?;
    let folder = folder.to_string_lossy().into_owned();
    let node = ["node", "--nccl", "--device", "cpu"];
    let answer = cluster.ask(&[&node[..], &["--cuda-libraries", &folder]].concat())?;
    ensure!(answer.exit == 78, "{answer:?}");
    ensure!(answer.stderr.contains("has no function ncclCommAbort"), "{}", answer.stderr);
    let folder = library(&cluster, &[])?.to_string_lossy().into_owned();
    let answer = cluster.ask(&[&node[..], &["--cuda-libraries", &folder]].concat())?;
    ensure!(answer.exit == 78, "{answer:?}");
    ensure!(answer.stderr.contains("the node has no CUDA device"), "{}", answer.stderr);
    Ok(())
}
