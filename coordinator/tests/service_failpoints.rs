//! A job goes on when disks refuse for a while, at every step of the engine and of writing results.
//!
//! `cargo test -p halfstep-coordinator --features failpoints --test service_failpoints`

#![cfg(feature = "failpoints")]

mod support;

use fail::FailScenario;
use halfstep_proto::JobEvent;
use support::{Bench, FakeNode, Kind};

/// Point, and how it fails: a few times, not for ever.
const TROUBLE: [(&str, &str); 9] = [
    ("store.commit.before", "10%return(full)"),
    ("store.commit.after", "10%return(full)"),
    ("artefact.create", "10%return(full)"),
    ("artefact.write", "10%return(full)"),
    ("artefact.fsync", "10%return(full)"),
    ("artefact.rename", "10%return(full)"),
    ("engine.commit.before", "20%return(full)"),
    ("engine.commit.after", "20%return(full)"),
    ("export.rename", "1*return(full)->off"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_survives_disks_that_refuse_and_gives_the_same_bytes() {
    let scenario = FailScenario::setup();
    let mut expected = None;
    for (point, action) in [("", "")].iter().chain(&TROUBLE) {
        let bench = Bench::new();
        let coordinator = bench.start().await;
        let job = bench.submit_example(1).await;
        if !point.is_empty() {
            fail::cfg(*point, action).unwrap();
        }
        let _nodes = [FakeNode::attach(&bench, Kind::default()), FakeNode::attach(&bench, Kind::default())];
        let events = bench.events(job).await;
        if !point.is_empty() {
            fail::cfg(*point, "off").unwrap();
        }
        let end = events.last().unwrap();
        assert!(matches!(end, JobEvent::Finished { exit: 0, .. }), "{point}: {end:?}");
        let results = bench.results(job).await;
        assert_eq!(*expected.get_or_insert_with(|| results.clone()), results, "{point}");
        coordinator.stop().await;
    }
    scenario.teardown();
}
