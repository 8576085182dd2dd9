//! The coordinator as a process, with nodes that make their results up: jobs, restarts, watchers, cancels, the queue.

#![expect(clippy::unwrap_used, reason = "what fails here fails its test")]

mod support;

use halfstep_coordinator::jobs::collect;
use halfstep_coordinator::service::{Coordinator, CoordinatorOptions};
use halfstep_proto::wire::{self, JobState, node_message::Body};
use halfstep_proto::{BlobHash, JobEvent, Role, hello, job_to_wire, rounding};
use halfstep_work::{JobId, Verdict};
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::{Bench, FakeNode, Kind, PLACE, config, files_to_wire, request};
use tokio::time::timeout;

fn named(name: &str) -> Kind {
    Kind { name: name.into(), ..Kind::default() }
}

/// The results of an undisturbed run with one node.
async fn undisturbed(seed: u64) -> Vec<(String, halfstep_proto::BlobHash)> {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let _node = FakeNode::attach(&bench, Kind::default());
    let job = bench.submit_example(seed).await;
    assert_eq!(bench.exit(job).await, 0);
    let results = bench.results(job).await;
    coordinator.stop().await;
    results
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_runs_from_submission_to_results_and_is_known_when_submitted_again() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let nodes = [FakeNode::attach(&bench, named("a")), FakeNode::attach(&bench, named("b"))];
    let job = bench.submit_example(1).await;
    let events = bench.events(job).await;
    assert!(matches!(events[0], JobEvent::Planned { layers: 10, .. }), "{:?}", events[0]);
    let solved = events.iter().filter(|event| matches!(event, JobEvent::LayerSolved { .. })).count();
    assert_eq!(solved, 10);
    let end = events.last().unwrap();
    assert!(matches!(end, JobEvent::Finished { exit: 0, solved: 10, failed: 0, .. }), "{end:?}");
    let names: Vec<String> = bench.results(job).await.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["manifest.json", "model.encodings", "model.onnx", "model.qdq.onnx", "report.json"]);
    let collected = collect(&config(1)).unwrap();
    assert_eq!(bench.submit(&collected).await.unwrap(), (job, true));
    let late = bench.events(job).await;
    assert_eq!(late.iter().filter(|event| matches!(event, JobEvent::LayerSolved { .. })).count(), 10);
    let accepted = nodes.iter().flat_map(|node| node.verdicts.lock().unwrap().clone());
    assert!(accepted.into_iter().all(|(_, verdict)| verdict != Verdict::Stale));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_is_cut_off_in_the_middle_goes_on_and_gives_the_same_bytes() {
    let expected = undisturbed(1).await;
    let bench = Bench::new();
    let first = bench.start().await;
    let lazy = FakeNode::attach(&bench, Kind { solves_max: 5, ..named("lazy") });
    let job = bench.submit_example(1).await;
    bench
        .until("five chunks are solved", async |_| {
            lazy.verdicts
                .lock()
                .unwrap()
                .iter()
                .filter(|(lease, _)| matches!(lease.task, halfstep_work::Task::Solve { .. }))
                .count()
                == 5
        })
        .await;
    let epoch = first.epoch();
    // No farewell: as if it was killed.
    drop(first);
    drop(lazy);
    let mut again = None;
    bench
        .until("the state folder is free", async |bench| {
            let listener = bench.transport.listen(PLACE).await;
            let Ok(listener) = listener else { return false };
            again = Coordinator::start(bench.options(), vec![listener], Vec::new()).await.ok();
            again.is_some()
        })
        .await;
    let again = again.unwrap();
    assert_eq!((again.epoch(), again.resuming()), (epoch + 1, &[job][..]));
    let node = FakeNode::attach(&bench, named("eager"));
    assert_eq!(bench.exit(job).await, 0);
    assert_eq!(bench.results(job).await, expected);
    let chunks: usize = collect_chunks(&node);
    assert!(chunks > 0, "something was left to do");
    let solved = node.solved.load(Ordering::SeqCst);
    let all = solved + 5;
    let uninterrupted = expected_chunks(&bench, job).await;
    assert_eq!(all, uninterrupted, "what was acknowledged was not solved again");
    again.stop().await;
}

fn collect_chunks(node: &FakeNode) -> usize {
    node.verdicts.lock().unwrap().iter().filter(|(_, verdict)| *verdict == Verdict::Accepted).count()
}

/// Chunks of the example, from its own plan.
async fn expected_chunks(bench: &Bench, job: JobId) -> usize {
    let artefacts = bench.folder.path().join("state/artefacts");
    let stored = std::fs::read_dir(artefacts).unwrap().flatten();
    let files = stored.filter(|folder| folder.path().is_dir());
    let count = files.map(|folder| std::fs::read_dir(folder.path()).unwrap().count()).sum();
    assert!(count > 0, "{job}");
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_is_replaced_and_the_bytes_are_the_same() {
    let expected = undisturbed(2).await;
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let dying = FakeNode::attach(&bench, Kind { solves_max: 3, ..named("dying") });
    let job = bench.submit_example(2).await;
    bench.until("three chunks are solved", async |_| dying.solved.load(Ordering::SeqCst) > 3).await;
    drop(dying);
    let mut events = bench.client().watch(request(job)).await.unwrap().into_inner();
    let seen = async {
        while let Some(event) = events.message().await.unwrap() {
            if matches!(JobEvent::try_from(&event).unwrap(), JobEvent::NodeLost { .. }) {
                return;
            }
        }
        panic!("nobody noticed");
    };
    timeout(Duration::from_secs(5), seen).await.expect("a dead node is noticed in time");
    let _node = FakeNode::attach(&bench, named("alive"));
    assert_eq!(bench.exit(job).await, 0);
    assert_eq!(bench.results(job).await, expected);
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_run_one_after_the_other_and_a_queued_one_can_be_cancelled() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let (first, second, third) =
        (bench.submit_example(1).await, bench.submit_example(2).await, bench.submit_example(3).await);
    bench
        .until("the first job waits for nodes", async |bench| {
            bench.status(first).await.detail.contains("no node takes part")
        })
        .await;
    assert_eq!(bench.status(third).await.detail, "waits for 2 jobs before it");
    let cancelled = bench.client().cancel(request(second)).await.unwrap().into_inner();
    assert_eq!((cancelled.state(), cancelled.exit), (JobState::Cancelled, 75));
    let _node = FakeNode::attach(&bench, Kind::default());
    assert_eq!(bench.exit(first).await, 0);
    assert_eq!(bench.exit(third).await, 0);
    assert_eq!(bench.exit(second).await, 75);
    let list = wire::ListRequest { hello: Some(hello()) };
    let jobs = bench.client().list(list).await.unwrap().into_inner().jobs;
    let found: Vec<_> = jobs.iter().map(|job| (job.job.clone(), job.state())).collect();
    let expected = [(first, JobState::Finished), (second, JobState::Cancelled), (third, JobState::Finished)];
    assert_eq!(found, expected.map(|(job, state)| (job_to_wire(job), state)));
    coordinator.stop().await;
    let coordinator = bench.start().await;
    let status = bench.status(first).await;
    let counts = [status.stages_done, status.stages, status.layers_done, status.layers];
    assert_eq!(counts, [10; 4], "a finished job shows its totals, after a restart too");
    assert_eq!(bench.status(second).await.layers, 0, "it was never planned");
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_job_is_cancelled_at_once_and_goes_on_when_submitted_again() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let slow = FakeNode::attach(&bench, Kind { solves_max: 2, ..named("slow") });
    let job = bench.submit_example(4).await;
    bench.until("two chunks are solved", async |_| slow.solved.load(Ordering::SeqCst) > 2).await;
    bench.client().cancel(request(job)).await.unwrap();
    assert_eq!(timeout(Duration::from_secs(2), bench.exit(job)).await.unwrap(), 75);
    drop(slow);
    let node = FakeNode::attach(&bench, named("second"));
    let collected = collect(&config(4)).unwrap();
    assert_eq!(bench.submit(&collected).await.unwrap(), (job, false));
    assert_eq!(bench.exit(job).await, 0);
    let solved = node.solved.load(Ordering::SeqCst);
    assert_eq!(solved + 2, expected_chunks(&bench, job).await);
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_kind_is_refused_by_both_names() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let first = FakeNode::attach(&bench, Kind { pause: Duration::from_millis(50), ..named("first") });
    let job = bench.submit_example(5).await;
    bench.until("work has begun", async |_| !first.verdicts.lock().unwrap().is_empty()).await;
    let other = FakeNode::attach(&bench, Kind { device: "another device".into(), ..named("other") });
    bench.until("the other is refused", async |_| other.refused.lock().unwrap().is_some()).await;
    let why = other.refused.lock().unwrap().clone().unwrap();
    assert!(why.contains("`other`: computes with another device and fake engine"), "{why}");
    assert!(why.contains("begun with fake device and fake engine"), "{why}");
    let (state, detail) = state_of(&bench, "other").await;
    assert_eq!((state.as_str(), detail), ("left out", why.clone()));
    assert!(bench.status(job).await.detail.ends_with(&format!("; left out: {why}")));
    assert_eq!(bench.exit(job).await, 0);
    assert_eq!(other.verdicts.lock().unwrap().len(), 0);
    // It is left out of that job, not of the fleet.
    drop(first);
    bench.until("the first is gone", async |bench| nodes(bench).await.len() == 1).await;
    assert_eq!(state_of(&bench, "other").await, ("working".into(), String::new()));
    let next = bench.submit_example(15).await;
    assert_eq!(bench.exit(next).await, 0);
    assert!(!other.verdicts.lock().unwrap().is_empty());
    coordinator.stop().await;
}

async fn nodes(bench: &Bench) -> Vec<wire::NodeStatus> {
    let request = wire::NodesRequest { hello: Some(hello()), measure: false };
    bench.client().nodes(request).await.unwrap().into_inner().nodes
}

async fn state_of(bench: &Bench, name: &str) -> (String, String) {
    let all = nodes(bench).await;
    let of = |node: &&wire::NodeStatus| node.description.as_ref().unwrap().name == name;
    let found = all.iter().find(of).unwrap();
    (found.state.clone(), found.detail.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_open_a_job_is_left_out_as_long_as_another_can() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let lacks = Kind { cannot_open: Some("operator Foo: not known".into()), ..named("lacks") };
    let first = FakeNode::attach(&bench, lacks.clone());
    let _second = FakeNode::attach(&bench, named("has"));
    bench.until("both are there", async |bench| nodes(bench).await.len() == 2).await;
    let job = bench.submit_example(13).await;
    assert_eq!(bench.exit(job).await, 0);
    let why = first.refused.lock().unwrap().clone().unwrap();
    assert!(
        why.contains("node `lacks`: cannot open job") && why.ends_with("operator Foo: not known"),
        "{why}"
    );
    drop(_second);
    let _third = FakeNode::attach(&bench, lacks);
    bench
        .until("only such are left", async |bench| {
            let all = nodes(bench).await;
            all.len() == 2 && all.iter().all(|node| node.description.as_ref().unwrap().name == "lacks")
        })
        .await;
    let hopeless = bench.submit_example(14).await;
    assert_eq!(bench.exit(hopeless).await, 65, "nobody is left who could");
    assert!(bench.status(hopeless).await.detail.contains("operator Foo: not known"));
    coordinator.stop().await;
}

fn files_below(folder: std::path::PathBuf) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    entries.flatten().map(|e| if e.path().is_dir() { files_below(e.path()) } else { 1 }).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_job_leaves_nothing_behind_but_what_others_use() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let left = |part: &str| files_below(bench.folder.path().join("state").join(part));
    let (first, second) = (bench.submit_example(1).await, bench.submit_example(2).await);
    for unfinished in [first, second] {
        let refused = bench.client().forget(request(unfinished)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains(&format!("`halfstep cancel {unfinished}` ends it")), "{refused}");
    }
    let _node = FakeNode::attach(&bench, Kind::default());
    assert_eq!((bench.exit(first).await, bench.exit(second).await), (0, 0));
    // Made-up roundings are the same for both jobs: the first one's are the second one's too.
    let artefacts = left("artefacts");
    let forgotten = bench.client().forget(request(first)).await.unwrap().into_inner();
    assert!(forgotten.bytes_freed > 0);
    assert_eq!((left("artefacts"), left(&format!("jobs/{first}"))), (artefacts, 0));
    assert_eq!(bench.client().status(request(first)).await.unwrap_err().code(), tonic::Code::NotFound);
    assert_eq!(bench.client().forget(request(first)).await.unwrap_err().code(), tonic::Code::NotFound);
    assert_eq!(bench.results(second).await.len(), 5);
    bench.client().forget(request(second)).await.unwrap();
    assert_eq!((left("artefacts"), left("jobs")), (0, 0));
    coordinator.stop().await;
    let coordinator = bench.start().await;
    let list = wire::ListRequest { hello: Some(hello()) };
    assert!(bench.client().list(list).await.unwrap().into_inner().jobs.is_empty());
    let _again = FakeNode::attach(&bench, Kind::default());
    assert_eq!(bench.submit_example(1).await, first);
    assert_eq!(bench.exit(first).await, 0, "what was forgotten can be submitted again");
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_job_refers_to_goes_roundings_when_a_job_ends_inputs_when_a_coordinator_starts() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let stored = |hash: BlobHash| {
        let name = hash.to_string();
        bench.folder.path().join("state/artefacts").join(&name[..2]).join(name).is_file()
    };
    let mut never_committed = rounding::MAGIC.to_vec();
    never_committed.extend_from_slice(b"came, and its node died");
    let uploaded = bench.data().upload(never_committed.into()).await.unwrap();
    let input = b"an input whose job will be submitted soon".to_vec();
    let input = bench.data().upload(input.into()).await.unwrap();
    let node = FakeNode::attach(&bench, Kind::default());
    let job = bench.submit_example(1).await;
    assert_eq!(bench.exit(job).await, 0);
    bench.until("the rounding is gone", async |_| !stored(uploaded)).await;
    assert!(stored(input), "somebody may be about to submit its job");
    let committed = files_below(bench.folder.path().join("state/artefacts")) - 1;
    assert_eq!(committed, node.solved.load(Ordering::SeqCst), "all that was committed is there");
    // Whoever submits the job again needs them.
    let second = bench.submit_example(2).await;
    bench
        .until("the second job is under way", async |_| node.solved.load(Ordering::SeqCst) > committed)
        .await;
    bench.client().cancel(request(second)).await.unwrap();
    coordinator.stop().await;
    let coordinator = bench.start().await;
    assert!(!stored(input) && !stored(uploaded));
    assert_eq!(files_below(bench.folder.path().join("state/artefacts")), committed);
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_jobs_are_kept_as_were_asked_for() {
    let bench = Bench::new();
    let listener = bench.transport.listen(PLACE).await.unwrap();
    let options = CoordinatorOptions { keep_jobs: Some(1), ..bench.options() };
    let coordinator = Coordinator::start(options, vec![listener], Vec::new()).await.unwrap();
    let _node = FakeNode::attach(&bench, Kind::default());
    let first = bench.submit_example(1).await;
    assert_eq!(bench.exit(first).await, 0);
    assert_eq!(bench.status(first).await.state(), JobState::Finished, "one is kept");
    let second = bench.submit_example(2).await;
    assert_eq!(bench.exit(second).await, 0);
    assert_eq!(bench.client().status(request(first)).await.unwrap_err().code(), tonic::Code::NotFound);
    assert_eq!(bench.results(second).await.len(), 5);
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_node_is_let_go_and_another_finishes() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let leaving = FakeNode::attach(&bench, Kind { pause: Duration::from_millis(20), ..named("leaving") });
    let job = bench.submit_example(6).await;
    bench.until("work has begun", async |_| !leaving.verdicts.lock().unwrap().is_empty()).await;
    let drain = wire::NodeMessage { body: Some(Body::Drain(wire::Drain { reason: "SIGTERM".into() })) };
    leaving.said.send(drain).await.unwrap();
    bench.until("it is let go", async |_| leaving.farewell.load(Ordering::SeqCst)).await;
    let _staying = FakeNode::attach(&bench, named("staying"));
    assert_eq!(bench.exit(job).await, 0);
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_does_not_read_holds_up_nobody() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let job = bench.submit_example(7).await;
    let mut stuck = Vec::new();
    for _ in 0..20 {
        stuck.push(bench.client().watch(request(job)).await.unwrap());
    }
    let _node = FakeNode::attach(&bench, Kind::default());
    assert_eq!(bench.exit(job).await, 0);
    drop(stuck);
    timeout(Duration::from_secs(7), coordinator.stop()).await.expect("stops in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_not_here_are_asked_for_and_used_when_uploaded() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let here = collect(&config(8)).unwrap();
    let mut far = here.clone();
    far.files.iter_mut().for_each(|file| file.path = None);
    let offer = wire::OfferRequest { hello: Some(hello()), files: files_to_wire(&far) };
    let missing = bench.client().offer(offer.clone()).await.unwrap().into_inner().missing;
    assert_eq!(missing.len(), 2);
    let refused = bench.submit(&far).await.unwrap_err();
    assert!(refused.message().contains("upload it first"), "{}", refused.message());
    for file in &here.files {
        bench.data().upload_file(file.path.as_ref().unwrap()).await.unwrap();
    }
    assert!(bench.client().offer(offer).await.unwrap().into_inner().missing.is_empty());
    assert_eq!(bench.submit(&far).await.unwrap(), (here.id, false));
    let _node = FakeNode::attach(&bench, Kind::default());
    assert_eq!(bench.exit(here.id).await, 0);
    assert_eq!(bench.results(here.id).await, undisturbed(8).await);
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_cannot_be_read_fails_with_its_reason_and_the_next_one_runs() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let mut bad = config(9);
    let model = bench.folder.path().join("model.onnx");
    std::fs::copy(support::example("model.onnx"), &model).unwrap();
    bad.model = model.clone();
    let mut collected = collect(&bad).unwrap();
    std::fs::write(&model, b"\x08\x07 no model").unwrap();
    collected.files[0].hash = blake3::hash(b"\x08\x07 no model");
    collected.files[0].size = 11;
    let (job, _) = bench.submit(&collected).await.unwrap();
    let next = bench.submit_example(10).await;
    assert_eq!(bench.exit(job).await, 65);
    let status = bench.status(job).await;
    assert!(status.detail.contains("model.onnx"), "{}", status.detail);
    let _node = FakeNode::attach(&bench, Kind::default());
    assert_eq!(bench.exit(next).await, 0);
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_jobs_other_versions_and_second_coordinators_are_refused() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let unknown = bench.client().status(request(JobId([7; 16]))).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    let other = wire::Hello { protocol: 99, version: "9.9".into() };
    let refused = bench.client().list(wire::ListRequest { hello: Some(other) }).await.unwrap_err();
    assert!(refused.message().contains("halfstep 9.9 (protocol 99)"), "{}", refused.message());
    let second = Coordinator::start(bench.options(), Vec::new(), Vec::new()).await.err().unwrap().to_string();
    assert!(second.contains("in use by another coordinator"), "{second}");
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_answers_on_its_own_port() {
    let bench = Bench::new();
    let listener = bench.transport.listen(PLACE).await.unwrap();
    let health = bench.transport.listen("health").await.unwrap();
    let coordinator = Coordinator::start(bench.options(), vec![listener], vec![health]).await.unwrap();
    let channel = bench.transport.connector("health", Role::Coordinator).channel();
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = tonic_health::pb::HealthCheckRequest { service: "halfstep.v1.Fleet".into() };
    let answer = client.check(request).await.unwrap().into_inner();
    assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);
    let mut jobs = wire::client_client::ClientClient::new(channel);
    let refused = jobs.list(wire::ListRequest { hello: Some(hello()) }).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unimplemented);
    coordinator.stop().await;
}

async fn welcome(bench: &Bench, node: &FakeNode) -> wire::Welcome {
    bench.until("it is welcome", async |_| node.welcome.lock().unwrap().is_some()).await;
    node.welcome.lock().unwrap().clone().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_keeps_its_registration_over_a_short_break_and_is_fenced_after_a_long_one() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let node = FakeNode::attach(&bench, named("a"));
    let first = welcome(&bench, &node).await;
    drop(node);
    let node = FakeNode::attach_again(&bench, named("a"), Some((first.node, first.epoch)));
    let second = welcome(&bench, &node).await;
    assert_eq!((second.node, second.fenced), (first.node, false));
    drop(node);
    let nodes = wire::NodesRequest { hello: Some(hello()), measure: false };
    bench
        .until("it is forgotten", async |bench| {
            bench.client().nodes(nodes.clone()).await.unwrap().into_inner().nodes.is_empty()
        })
        .await;
    let node = FakeNode::attach_again(&bench, named("a"), Some((first.node, first.epoch)));
    let third = welcome(&bench, &node).await;
    assert!(third.fenced && third.node != first.node, "{third:?}");
    let counted = bench.client().nodes(nodes).await.unwrap().into_inner();
    assert_eq!((counted.fenced_nodes, counted.fenced_results), (1, 0));
    drop(node);
    let node = FakeNode::attach_again(&bench, named("a"), Some((first.node, first.epoch + 7)));
    let other = welcome(&bench, &node).await;
    assert!(!other.fenced, "what another incarnation gave is not lost: {other:?}");
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_of_another_incarnation_or_unknown_leases_are_stale() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let node = FakeNode::attach(&bench, Kind { solves_max: 0, ..named("a") });
    let job = bench.submit_example(11).await;
    bench.until("work has begun", async |_| !node.verdicts.lock().unwrap().is_empty()).await;
    let told = welcome(&bench, &node).await;
    let (lease, _) = node.verdicts.lock().unwrap()[0].clone();
    let commit = |epoch: u64, lease: u64| wire::CommitRequest {
        job: job_to_wire(job),
        node: told.node,
        epoch,
        lease,
        attempt: 1,
        outcome: Some(wire::commit_request::Outcome::Done(wire::Done {
            kind: Some(wire::done::Kind::Accumulated(wire::Empty {})),
        })),
        cost: Some(wire::Cost::default()),
    };
    let mut fleet = wire::fleet_client::FleetClient::new(bench.channel());
    // Of an incarnation before: the node may be about to name the lease to this one.
    let before = fleet.commit(commit(told.epoch - 1, lease.id.0)).await.unwrap_err();
    assert_eq!(before.code(), tonic::Code::Unavailable);
    assert!(before.message().contains("attach first"), "{before}");
    for (epoch, id) in [(told.epoch + 1, lease.id.0), (told.epoch, 1 << 60)] {
        let reply = fleet.commit(commit(epoch, id)).await.unwrap().into_inner();
        assert_eq!(Verdict::try_from(reply).unwrap(), Verdict::Stale);
    }
    let waiting = bench.submit_example(12).await;
    let early = wire::CommitRequest { job: job_to_wire(waiting), ..commit(told.epoch, 1) };
    assert_eq!(fleet.commit(early).await.unwrap_err().code(), tonic::Code::Unavailable);
    let unknown = wire::CommitRequest { job: vec![9; 16], ..commit(told.epoch, 1) };
    let reply = fleet.commit(unknown).await.unwrap().into_inner();
    assert_eq!(Verdict::try_from(reply).unwrap(), Verdict::Stale);
    let nodes = wire::NodesRequest { hello: Some(hello()), measure: false };
    assert_eq!(bench.client().nodes(nodes).await.unwrap().into_inner().fenced_results, 3);
    assert_eq!(bench.status(job).await.fenced_results, 2, "those of other jobs are not this job's");
    coordinator.stop().await;
}

/// Its node may be about to name the lease: called stale now and taken up then, it would be in nobody's hands for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outcome_that_comes_before_what_its_node_has_in_hand_is_asked_for_again() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let job = bench.submit_example(13).await;
    let late = Kind { opens_after: Duration::from_secs(1), solves_max: 0, ..named("late") };
    let node = FakeNode::attach(&bench, late);
    let told = welcome(&bench, &node).await;
    let commit = wire::CommitRequest {
        job: job_to_wire(job),
        node: told.node,
        epoch: told.epoch,
        lease: 1 << 60,
        attempt: 1,
        outcome: Some(wire::commit_request::Outcome::Done(wire::Done {
            kind: Some(wire::done::Kind::Accumulated(wire::Empty {})),
        })),
        cost: Some(wire::Cost::default()),
    };
    let mut fleet = wire::fleet_client::FleetClient::new(bench.channel());
    let mut unheard = 0;
    let verdict = loop {
        match fleet.commit(commit.clone()).await {
            Ok(reply) => break Verdict::try_from(reply.into_inner()).unwrap(),
            Err(status) => {
                assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
                unheard += u32::from(status.message().contains("in hand"));
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(verdict, Verdict::Stale, "it has said that it knows nothing of the lease");
    assert!(unheard > 0, "it was asked to wait");
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_for_one_job_forgets_the_others() {
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let (first, second) = (bench.submit_example(1).await, bench.submit_example(2).await);
    coordinator.stop().await;
    let mut options = bench.options();
    options.only = Some(second);
    let coordinator = Coordinator::start(options, Vec::new(), Vec::new()).await.unwrap();
    assert_eq!(coordinator.resuming(), [second]);
    coordinator.stop().await;
    assert!(!bench.folder.path().join(format!("state/jobs/{first}")).exists());
}

fn line_of<'a>(nodes: &'a [wire::NodeStatus], name: &str) -> Option<&'a wire::NodeLine> {
    let of = |node: &&wire::NodeStatus| node.description.as_ref().unwrap().name == name;
    nodes.iter().find(of).unwrap().line.as_ref()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_are_measured_when_asked_for_and_not_again_while_they_are_known() {
    use wire::line_measured::Result::{BytesPerSecond, Failed};
    let bench = Bench::new();
    let coordinator = bench.start().await;
    let measure = async |measure| {
        let request = wire::NodesRequest { hello: Some(hello()), measure };
        bench.client().nodes(request).await.unwrap().into_inner().nodes
    };
    assert!(measure(true).await.is_empty(), "nobody is there to measure anything");
    let kinds = [
        Kind { line: Some(BytesPerSecond(125_000)), ..named("a") },
        Kind { line: Some(Failed("no\u{1b}way".into())), ..named("b") },
        named("says nothing"),
    ];
    let _nodes = kinds.clone().map(|kind| FakeNode::attach(&bench, kind));
    bench.until("all are there", async |bench| nodes(bench).await.len() == 3).await;
    assert!(measure(false).await.iter().all(|node| node.line.is_none()), "nobody asked yet");
    let asked = || kinds.each_ref().map(|kind| kind.measured.lock().unwrap().len());
    let (began, told) = (std::time::Instant::now(), measure(true).await);
    // Two who ask at once share what is measured.
    let (same, again) = tokio::join!(measure(true), measure(false));
    assert!(began.elapsed() >= std::time::Duration::from_millis(2400), "it waits for who says nothing");
    assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
    for seen in [&told, &same, &again] {
        assert_eq!(line_of(seen, "a").unwrap().bytes_per_second, 125_000);
        assert_ne!(line_of(seen, "a").unwrap().from_name, "a");
        let (b, silent) = (line_of(seen, "b").unwrap(), line_of(seen, "says nothing"));
        assert_eq!((b.bytes_per_second, b.failed.as_str()), (0, "noway"));
        assert!(seen == &again || silent.unwrap().failed.contains("no answer"), "{silent:?}");
    }
    assert_eq!(asked(), [1, 2, 2], "what is known is not measured again");
    assert_eq!(kinds[0].measured.lock().unwrap()[0], "nowhere:1");
    coordinator.stop().await;
}
