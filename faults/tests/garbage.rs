//! Noise, half-finished greetings and messages that are far too long, at a coordinator's and a node's port (P20).
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use faults::{Cluster, Job, Process, oversized_call, throw};

const LIMIT: Duration = Duration::from_secs(60);
/// Far beyond the receive limit of 4 MiB.
const TOO_MUCH: u32 = 256 << 20;
/// What a server may keep of all that was thrown at it.
const GROWTH_MAX: u64 = 64 << 20;
const SEED: u64 = 20;

const METHODS: [&str; 6] = [
    "/halfstep.v1.Client/Submit",
    "/halfstep.v1.Client/List",
    "/halfstep.v1.Fleet/Commit",
    "/halfstep.v1.Fleet/Attach",
    "/halfstep.v1.Artefacts/Fetch",
    "/halfstep.v1.Artefacts/Upload",
];

#[test]
fn garbage_is_refused_in_bounded_memory_and_work_goes_on() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    cluster.wait_attached("a", 1)?;
    let mut submission = cluster.submit(&Job::long())?;
    submission.process.wait_line("SOLVED", LIMIT)?;
    let coordinator = cluster.address();
    let node = node_address(&mut cluster, "a")?;
    let before = [cluster.coordinator()?.resident_bytes()?, cluster.node("a")?.resident_bytes()?];
    for address in [coordinator, node] {
        noise(address)?;
        oversized(address)?;
    }
    cluster.finish(submission, LIMIT)?;
    let grown = |process: &Process, before: u64| {
        Ok::<_, anyhow::Error>(process.resident_bytes()?.saturating_sub(before))
    };
    let growth = [grown(cluster.coordinator()?, before[0])?, grown(cluster.node("a")?, before[1])?];
    eprintln!("P20: coordinator grew by {} KiB, node by {} KiB", growth[0] >> 10, growth[1] >> 10);
    ensure!(growth.iter().all(|bytes| *bytes < GROWTH_MAX), "{growth:?} bytes");
    for log in [cluster.coordinator()?.stderr(), cluster.node("a")?.stderr()] {
        ensure!(!log.contains("panicked"), "{log}");
    }
    // Both still serve.
    cluster.kill_node("b")?;
    cluster.run(&Job::short(), LIMIT).map(drop)
}

fn node_address(cluster: &mut Cluster, name: &str) -> Result<SocketAddr> {
    let status = cluster.node_status(name)?.context("the node is not listed")?;
    Ok(status["address"].as_str().context("the node has no address")?.parse()?)
}

fn noise(address: SocketAddr) -> Result<()> {
    let mut rng = fastrand::Rng::with_seed(SEED);
    let brief = Duration::from_millis(50);
    let greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // A frame that announces 16 MiB, of a kind that does not exist.
    let frame = [greeting.as_slice(), &[0xff, 0xff, 0xff, 0x77, 0xff, 0xff, 0xff, 0xff, 0xff]].concat();
    // The first bytes of a TLS greeting that never ends.
    let hello = [0x16, 0x03, 0x01, 0x40, 0x00, 0x01, 0x00, 0x3f, 0xfc, 0x03, 0x03];
    for bytes in [b"".as_slice(), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", greeting, &frame, &hello] {
        throw(address, bytes, brief)?;
    }
    for size in [1, 9, 24, 1000, 65_537, 4 << 20] {
        let bytes: Vec<u8> = (0..size).map(|_| rng.u8(..)).collect();
        throw(address, &bytes, brief)?;
        throw(address, &[greeting.as_slice(), &bytes].concat(), brief)?;
    }
    Ok(())
}

fn oversized(address: SocketAddr) -> Result<()> {
    for method in METHODS {
        let reply = oversized_call(address, method, TOO_MUCH)?;
        eprintln!("{address} {method}: {reply:?}");
        // Refused by name, or the method is not there, or the connection was closed; never taken.
        ensure!(reply.status != Some(0), "{method}: 256 MiB were accepted");
    }
    Ok(())
}

#[test]
fn connections_that_say_nothing_do_not_keep_others_out() -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(1)?;
    let silent: Vec<std::net::TcpStream> =
        (0..200).filter_map(|_| std::net::TcpStream::connect(cluster.address()).ok()).collect();
    ensure!(!silent.is_empty());
    cluster.run(&Job::short(), LIMIT)?;
    eprintln!("P20: {} silent connections while a job ran", silent.len());
    Ok(())
}
