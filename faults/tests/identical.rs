//! The same bytes from any number of nodes, in every strategy, as from one process (P1's premise, issue "the fleet").
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::time::Duration;

use anyhow::Result;
use faults::{Cluster, Job, Settings};

const LIMIT: Duration = Duration::from_secs(120);
const COUNTS: [u8; 4] = [1, 2, 3, 5];

/// One cluster for each number of nodes: what is compared is the output folder with that of `quantize`.
fn check(job: &Job, counts: &[u8], settings: &Settings) -> Result<()> {
    for count in counts {
        let mut cluster = Cluster::with(settings.clone())?;
        cluster.start_nodes(*count)?;
        let took = cluster.run(job, LIMIT)?;
        eprintln!("{count} nodes: identical after {took:.1?}");
    }
    Ok(())
}

fn check_counts(job: &Job) -> Result<()> {
    check(job, &COUNTS, &Settings::default())
}

#[test]
fn batches_give_the_same_bytes_on_1_2_3_and_5_nodes() -> Result<()> {
    check_counts(&Job::short().with(&["--partition", "batches"]))
}

#[test]
fn layers_give_the_same_bytes_on_1_2_3_and_5_nodes() -> Result<()> {
    check_counts(&Job::short().with(&["--partition", "layers:3"]))
}

#[test]
fn a_grid_gives_the_same_bytes_on_1_2_3_and_5_nodes() -> Result<()> {
    check_counts(&Job::short().with(&["--partition", "grid:2x2"]))
}

/// The one that `quantize` makes of `auto` too: nothing else is twice as fast on one machine.
#[test]
fn auto_is_batches_on_a_fast_network_and_says_on_what_it_rests() -> Result<()> {
    let job = Job::medium().with(&["--partition", "auto"]);
    for (count, link) in
        [(1, "assumed: one node receives nothing from others"), (2, "measured: the slowest of 2 lines")]
    {
        let mut cluster = Cluster::new()?;
        cluster.start_nodes(count)?;
        for name in cluster.node_names() {
            cluster.wait_attached(&name, 1)?;
        }
        let submission = cluster.submit(&job)?;
        let end = cluster.end(submission, LIMIT)?;
        assert_eq!(end.exit, 0, "{}", end.stderr);
        let said = end.stderr.lines().find(|line| line.contains("Spreading by batches over")).unwrap_or("");
        assert!(said.contains(link), "{}", end.stderr);
        eprintln!("{said}");
        cluster.assert_identical(&job, &end.output)?;
    }
    Ok(())
}

#[test]
fn independent_propagation_gives_the_same_bytes_on_1_and_3_nodes() -> Result<()> {
    check(&Job::short().with(&["--propagation", "independent"]), &[1, 3], &Settings::default())
}

#[test]
fn the_samples_objective_gives_the_same_bytes_on_1_and_3_nodes() -> Result<()> {
    check(&Job::short().with(&["--objective", "samples"]), &[1, 3], &Settings::default())
}

#[test]
fn several_threads_a_node_give_the_same_bytes() -> Result<()> {
    let settings = Settings { threads: 2, ..Settings::default() };
    check(&Job::short(), &[1, 3], &settings)
}

#[test]
fn two_jobs_at_once_and_one_after_another_do_not_mix() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    let jobs = [Job::short(), Job::short().with(&["--seed", "7"])];
    let submissions = [cluster.submit(&jobs[0])?, cluster.submit(&jobs[1])?];
    for submission in submissions {
        cluster.finish(submission, LIMIT)?;
    }
    cluster.run(&Job::short().with(&["--seed", "8"]), LIMIT).map(drop)
}

#[test]
fn the_same_job_again_has_the_same_id_and_its_results_at_once() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(1)?;
    let job = Job::short();
    let first = cluster.submit(&job)?;
    let id = |text: String| text.lines().next().unwrap_or_default().to_string();
    let out = first.output.clone();
    cluster.finish(first, LIMIT)?;
    cluster.kill_node("a")?;
    // No node is left: what comes is what was kept.
    let again = cluster.submit(&job)?;
    let second = cluster.end(again, LIMIT)?;
    assert_eq!(second.exit, 0, "{}", second.stderr);
    assert_ne!(second.output, out);
    cluster.assert_identical(&job, &second.output)?;
    let ids: Vec<String> = stdout_of(&cluster, "submit").into_iter().map(id).collect();
    assert_eq!(ids.len(), 2);
    assert_eq!(ids[0], ids[1]);
    assert!(ids[0].len() == 32 && ids[0].chars().all(|c| c.is_ascii_hexdigit()), "job id `{}`", ids[0]);
    Ok(())
}

/// Standard output of all processes whose name ends so, in the order they were started.
fn stdout_of(cluster: &Cluster, name: &str) -> Vec<String> {
    let ending = format!("-{name}.out");
    let files = faults::files_below(cluster.folder()).unwrap();
    let ours = files.into_iter().filter(|path| path.to_string_lossy().ends_with(&ending));
    ours.map(|path| std::fs::read_to_string(path).unwrap()).collect()
}
