//! What a running fleet shows of itself, seen from outside: real processes, real clients.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test may stop, and says what it saw"
)]

#[path = "support/process.rs"]
mod process;

use std::time::{Duration, Instant};

use halfstep_proto::{Role, Security, Transport};
use process::Process;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const LIMIT: Duration = Duration::from_secs(60);
/// Startup, readiness, the empty name, liveness.
const SERVICES: [&str; 4] = ["startup", "readiness", "", "liveness"];

/// What a probe is answered for each service.
fn probe(address: &str) -> [bool; 4] {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = Transport::tcp(Security::Plaintext).connector(address, Role::Node).channel();
        let mut client = HealthClient::new(channel);
        let mut serving = [false; 4];
        for (answer, service) in serving.iter_mut().zip(SERVICES) {
            let request = HealthCheckRequest { service: service.into() };
            let said = client.check(request).await.unwrap().into_inner().status();
            *answer = said == ServingStatus::Serving;
        }
        serving
    })
}

fn until(address: &str, what: &str, expect: [bool; 4]) {
    let began = Instant::now();
    loop {
        let seen = probe(address);
        if seen == expect {
            return;
        }
        assert!(began.elapsed() < LIMIT, "{what}: {SERVICES:?} are {seen:?}, expected {expect:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn coordinator(folder: &std::path::Path, listen: &str) -> Process {
    let state = folder.join("state");
    let arguments =
        ["coordinator", "--listen", listen, "--insecure", "--health", "127.0.0.1:0", "--state-dir"];
    Process::start(&[&arguments[..], &[state.to_str().unwrap()]].concat())
}

fn node(coordinator: &str) -> Process {
    Process::start(&[
        "node",
        "--coordinator",
        coordinator,
        "--insecure",
        "--threads",
        "1",
        "--health",
        "127.0.0.1:0",
    ])
}

#[test]
fn probes_tell_a_process_that_lives_from_one_that_takes_part() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = coordinator(folder.path(), "127.0.0.1:0");
    let health = first.said("Health on ");
    let address = first.said("Listening on ");
    until(&health, "a coordinator is ready", [true; 4]);

    let mut node = node(&address);
    let probed = node.said("Health on ");
    until(&probed, "a node is attached", [true; 4]);
    first.signal("-KILL");
    until(&probed, "without its coordinator a node lives and is not ready", [true, false, false, true]);
    let mut second = coordinator(folder.path(), &address);
    second.said("Listening on ");
    until(&probed, "it is attached again", [true; 4]);

    // A frozen coordinator answers nothing, and that is no reason to restart the node.
    second.signal("-STOP");
    assert!(probe(&probed)[3]);
    second.signal("-CONT");
    node.signal("-TERM");
    assert_eq!(node.wait(LIMIT), Some(0));
    second.signal("-TERM");
    assert_eq!(second.wait(LIMIT), Some(0));
}

#[test]
fn a_health_port_that_cannot_be_had_is_named_before_anything_is_begun() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let mut refused = Process::start(&[
        "coordinator",
        "--listen",
        "127.0.0.1:0",
        "--insecure",
        "--health",
        &address,
        "--state-dir",
        state.to_str().unwrap(),
    ]);
    assert_eq!(refused.wait(LIMIT), Some(78));
    assert!(refused.stderr().contains(&format!("cannot listen on `{address}`")), "{}", refused.stderr());
    assert!(!state.exists());
}
