//! Disks that are full, bits that flip, files that are cut off, a state folder with two owners (P7, P9, P16, P22).
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may stop, and says what it measured")]

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use faults::{Cluster, Job, Launch, Permit, Settings, SmallDisk, artefacts, files_below, flip_bit, truncate};

const LIMIT: Duration = Duration::from_secs(120);
const SOLVED: &str = "SOLVED";
const BAD_INPUT: i32 = 65;

#[test]
fn a_second_coordinator_on_the_same_state_refuses_to_start() -> Result<()> {
    let mut cluster = Cluster::new()?;
    let state = cluster.state_dir().to_string_lossy().into_owned();
    let arguments = ["coordinator", "--state-dir", &state, "--listen", "127.0.0.1:0", "--insecure"];
    let mut second = cluster.bare("second", &arguments)?;
    let code = second.wait(LIMIT)?;
    ensure!(code == BAD_INPUT, "exit {code}: {}", second.stderr());
    ensure!(second.stderr().contains(&state), "{}", second.stderr());
    eprintln!("P9: {}", second.stderr().trim());
    // The first one is none the worse.
    cluster.start_nodes(1)?;
    cluster.run(&Job::short(), LIMIT)?;
    // And when it is gone, however it went, the next one may.
    cluster.kill_coordinator()?;
    cluster.start_coordinator().map(drop)
}

/// Stops a coordinator in mid-run, harms one of its artefacts, and lets it go on with fresh nodes.
fn harmed(harm: impl Fn(&PathBuf) -> Result<()>) -> Result<()> {
    let mut cluster = Cluster::new()?;
    cluster.start_nodes(2)?;
    let job = Job::long();
    job.golden()?;
    let mut submission = cluster.submit(&job)?;
    submission.process.wait_lines(SOLVED, 3, LIMIT)?;
    cluster.kill_coordinator()?;
    for name in cluster.node_names() {
        cluster.kill_node(&name)?;
    }
    let committed = cluster.acknowledged()?;
    ensure!(committed.len() >= 3, "{committed:?}\n{}", cluster.logs.tails());
    // Every artefact: whichever is read next is a harmed one.
    for path in artefacts(&cluster.state_dir())? {
        harm(&path)?;
    }
    cluster.start_coordinator()?;
    cluster.start_nodes(2)?;
    cluster.finish(submission, LIMIT)?;
    let again = cluster.acknowledged()?.lost();
    eprintln!("P16: {} roundings harmed, {} computed again", committed.len(), again.len());
    ensure!(again.len() == committed.len(), "{again:?}");
    Ok(())
}

#[test]
fn a_flipped_bit_in_any_artefact_is_detected_and_computed_again() -> Result<()> {
    for bit in [0, 100_003, u64::MAX / 64] {
        harmed(|path| flip_bit(path, bit))?;
    }
    Ok(())
}

#[test]
fn a_truncated_artefact_is_detected_and_computed_again() -> Result<()> {
    harmed(|path| truncate(path, 0))?;
    harmed(|path| {
        let half = std::fs::metadata(path)?.len() / 2;
        truncate(path, half)
    })
}

#[test]
fn a_missing_artefact_is_computed_again() -> Result<()> {
    harmed(|path| Ok(std::fs::remove_file(path)?))
}

#[test]
fn a_flipped_bit_in_a_spilled_carry_is_detected_and_computed_again() -> Result<()> {
    let mut cluster = Cluster::new()?;
    // Nothing fits into memory: every carry goes through a file.
    cluster.start_node_as("a", Launch::arguments(&["--memory-budget", "1KiB"]))?;
    let job = Job::long();
    job.golden()?;
    let mut submission = cluster.submit(&job)?;
    let spill = cluster.folder().join("spill-a");
    let mut flipped = 0;
    for layer in [1, 3, 5] {
        submission.process.wait_lines(SOLVED, layer, LIMIT)?;
        cluster.node("a")?.freeze()?;
        for path in files_below(&spill)? {
            flipped += usize::from(flip_bit(&path, 80_000).is_ok());
        }
        cluster.node("a")?.thaw()?;
    }
    eprintln!("P16: {flipped} bits flipped in carries");
    ensure!(flipped > 0, "no carry was spilled");
    cluster.finish(submission, LIMIT).map(drop)
}

#[test]
fn a_flipped_bit_in_the_state_is_survived_or_refused_but_never_believed() -> Result<()> {
    let mut refused = 0;
    for part in 1..8u64 {
        let mut cluster = Cluster::new()?;
        cluster.start_nodes(2)?;
        let job = Job::long();
        job.golden()?;
        let mut submission = cluster.submit(&job)?;
        submission.process.wait_lines(SOLVED, 2, LIMIT)?;
        cluster.kill_coordinator()?;
        let artefacts = artefacts(&cluster.state_dir())?;
        let others: Vec<PathBuf> = files_below(&cluster.state_dir())?
            .into_iter()
            .filter(|path| !artefacts.contains(path))
            .filter(|path| std::fs::metadata(path).is_ok_and(|data| data.len() > 0))
            .collect();
        for path in &others {
            let bits = std::fs::metadata(path)?.len() * 8;
            // One bit of the file; the last time, one of every 512 bytes.
            let step = if part < 7 { bits } else { 512 * 8 };
            for at in (bits / 8 * (part - 1) + part..bits).step_by(step as usize) {
                flip_bit(path, at)?;
            }
        }
        let mut coordinator = cluster.spawn_coordinator(&Launch::default())?;
        let listening = coordinator.wait_line("Listening on", Duration::from_secs(10));
        if listening.is_err() {
            let code = coordinator.wait(LIMIT)?;
            ensure!(code == BAD_INPUT, "exit {code}: {}", coordinator.stderr());
            ensure!(!coordinator.stderr().contains("panicked"), "{}", coordinator.stderr());
            refused += 1;
            continue;
        }
        cluster.adopt_coordinator(coordinator);
        let end = cluster.end(submission, LIMIT)?;
        match end.exit {
            0 => cluster.assert_identical(&job, &end.output)?,
            _ => refused += 1,
        }
    }
    eprintln!("P5: {refused} of 7 harmed states were refused, the others gave the same bytes");
    Ok(())
}

#[test]
fn a_full_disk_shows_nothing_partial_and_the_job_goes_on_when_space_returns() -> Result<()> {
    let place = tempfile::TempDir::new()?;
    // The model is 487 KB, the calibration data 659 KB; with a database of redb's least size.
    let disk = match SmallDisk::mount(&place.path().join("disk"), 3 * 1024)? {
        Ok(disk) => disk,
        Err(reason) => {
            eprintln!("SKIPPED: {reason}");
            return Ok(());
        }
    };
    let state_dir = disk.path().join("state");
    let settings = Settings { state_dir: Some(state_dir.clone()), ..Settings::default() };
    let mut cluster = Cluster::launched(settings, Launch::default(), Permit::one())?;
    cluster.start_nodes(2)?;
    let job = Job::long();
    job.golden()?;
    let mut submission = cluster.submit(&job)?;
    submission.process.wait_line(SOLVED, LIMIT)?;
    // Fill what is left, keep it full for a while, give it back.
    let filler = disk.path().join("filler");
    let _ = std::fs::write(&filler, vec![0; 64 << 20]);
    let full = std::time::Instant::now() + Duration::from_secs(2);
    faults::now_or_by(full, || Ok(submission.process.ended()?.is_some()))?;
    ensure!(
        !submission.output.exists() || submission.process.ended()? == Some(0),
        "partial results are visible"
    );
    std::fs::remove_file(&filler)?;
    let end = cluster.end(submission, LIMIT)?;
    eprintln!("P22: exit {} after {:.1?}: {}", end.exit, end.took, end.stderr.lines().last().unwrap_or(""));
    if end.exit == 0 {
        return cluster.assert_identical(&job, &end.output);
    }
    // Failed with a clear message; the same command completes it.
    ensure!(!end.output.exists(), "partial results are visible");
    if !cluster.has_coordinator()? {
        cluster.start_coordinator()?;
    }
    cluster.run(&job, LIMIT).map(drop)
}
