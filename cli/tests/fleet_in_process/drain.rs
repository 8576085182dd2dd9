//! A node that leaves in good order leaves its carries to others: what a lost node's would have to be replayed is not.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use halfstep_agent::Drain;
use halfstep_coordinator::service::Timing;
use halfstep_proto::Transport;

use crate::crew::{Client, coordinator, job, node, runs};

/// Stages that are over when the node leaves, of ten.
const STAGES: u64 = 5;

#[derive(Clone, Copy, PartialEq)]
enum Leaves {
    Not,
    Drained,
    Killed,
}

struct Ran {
    results: BTreeMap<String, Vec<u8>>,
    /// Samples through operators, on both nodes.
    runs: u64,
}

/// A job on two nodes, one of which leaves in the middle.
async fn run(how: Leaves) -> Ran {
    let (folder, transport) = (tempfile::tempdir().unwrap(), Transport::memory());
    let timing = Timing { heartbeat: Duration::from_millis(100), ..Timing::default() };
    let coordinator = coordinator(&transport, "c", &folder.path().join("state"), timing).await.unwrap();
    let drain = Drain::new();
    let (leaving, counts) = node("a", &transport, "c", "", folder.path());
    let leaving = tokio::spawn(leaving.run(drain.clone(), |_| {}));
    let (stays, others) = node("b", &transport, "c", "", folder.path());
    let stays = tokio::spawn(stays.run(Drain::new(), |_| {}));
    let (client, job) = (Client { transport, coordinator: "c".into() }, job(16, 30));
    client.submit(&job).await;
    if how != Leaves::Not {
        client.stages(job.id, STAGES).await;
    }
    match how {
        Leaves::Not => {}
        Leaves::Drained => {
            let asked = Instant::now();
            drain.begin("SIGTERM");
            leaving.await.unwrap().unwrap();
            assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        }
        Leaves::Killed => leaving.abort(),
    }
    let results = client.results(job.id).await;
    stays.abort();
    coordinator.stop().await;
    Ran { results, runs: runs(&counts) + runs(&others) }
}

#[test]
fn a_drained_nodes_carries_are_taken_over_and_not_replayed() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let [plain, drained, killed] =
        [Leaves::Not, Leaves::Drained, Leaves::Killed].map(|how| runtime.block_on(run(how)));
    let again = [&drained, &killed].map(|ran| ran.runs.saturating_sub(plain.runs));
    eprintln!(
        "samples through operators: {}; drained {} more, killed {} more",
        plain.runs, again[0], again[1]
    );
    assert!(plain.results == drained.results && plain.results == killed.results, "the same bytes");
    assert!(again[1] > plain.runs / 50, "a killed node's carries are replayed: {again:?} of {}", plain.runs);
    assert!(again[0] * 4 <= again[1], "a drained node's are not: {again:?}");
}
