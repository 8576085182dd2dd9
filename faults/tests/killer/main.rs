//! The killer in CI time: fifty seeds of kill -9, freezes, drains and joins (P1, P3, P4, P5, P6); beside it, slow links.
//!
//! Longer campaigns: `cargo run --release -p halfstep-faults -- --seeds 500 --from 1000`.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

mod slow_links;

use faults::{Campaign, Verdict, summary};

const SEEDS: u64 = 50;

#[test]
fn fifty_seeds_of_faults_differ_in_nothing_lose_nothing_and_end() {
    let runs = Campaign::default().run(0..SEEDS, |run| {
        eprintln!("seed {}: {:.1?}, {:?}", run.seed, run.took, run.faults);
    });
    let table = summary(&runs);
    eprintln!("{table}");
    assert_eq!(runs.len() as u64, SEEDS);
    assert!(runs.iter().all(|run| run.verdict == Verdict::Identical), "{table}");
    // A campaign that hits nothing shows nothing.
    let coordinators: usize = runs.iter().filter_map(|run| run.faults.get("coordinator")).sum();
    assert!(coordinators >= 20, "only {coordinators} coordinators were killed\n{table}");
    assert!(runs.iter().any(|run| run.acknowledged > 0), "nothing was acknowledged before a kill\n{table}");
}
