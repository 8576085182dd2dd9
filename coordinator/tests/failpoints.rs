//! Every failpoint of the store and of artefacts: as an error, as a full disk, as the death of the process.
//!
//! `cargo test -p halfstep-coordinator --features failpoints --test failpoints`

#![cfg(feature = "failpoints")]

use fail::FailScenario;
use halfstep_coordinator::failpoints::{FAILPOINTS, setup};
use halfstep_coordinator::store::{Change, Store};
use halfstep_coordinator::{ArtefactError, Artefacts};
use halfstep_work::{ChunkId, JobId, LayerId};
use std::path::Path;
use std::process::Command;

const JOB: JobId = JobId([9; 16]);
const ARTEFACT: [&str; 5] =
    ["artefact.create", "artefact.write", "artefact.fsync", "artefact.rename", "artefact.folder"];
const STORE: [&str; 3] = ["store.open.epoch", "store.commit.before", "store.commit.after"];
/// Where the child of `death_at_any_point_loses_nothing_acknowledged` works.
const CHILD: &str = "HALFSTEP_FAILPOINT_CHILD";

fn rounding(chunk: u32, hash: blake3::Hash) -> Change {
    Change::Rounding { job: JOB, layer: LayerId(0), chunk: ChunkId(chunk), hash }
}

#[test]
fn a_full_disk_at_any_step_of_an_artefact_is_an_error_and_leaves_nothing() {
    let scenario = FailScenario::setup();
    let folder = tempfile::tempdir().unwrap();
    let artefacts = Artefacts::open(folder.path()).unwrap();
    for point in ARTEFACT {
        fail::cfg(point, "return(full)").unwrap();
        let error = artefacts.put(point.as_bytes()).unwrap_err();
        let ArtefactError::Storage { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull, "{point}: {error}");
        // The last step comes after the rename: the artefact is there and whole, only not known to be durable.
        let hash = blake3::hash(point.as_bytes());
        assert_eq!(artefacts.contains(&hash), point == "artefact.folder", "{point}");
        fail::cfg(point, "off").unwrap();
        assert_eq!(artefacts.put(point.as_bytes()).unwrap(), hash);
    }
    scenario.teardown();
}

#[test]
fn a_refused_commit_is_not_there_and_one_that_fails_late_is() {
    let scenario = FailScenario::setup();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let hash = blake3::hash(b"x");
    for (chunk, point, there) in [(0, "store.commit.before", 0), (1, "store.commit.after", 1)] {
        fail::cfg(point, "return").unwrap();
        assert!(store.commit(&[rounding(chunk, hash)]).unwrap_err().to_string().contains(point));
        assert_eq!(store.committed(JOB).unwrap().roundings.len(), there);
        fail::cfg(point, "off").unwrap();
    }
    store.commit(&[rounding(2, hash)]).unwrap();
    assert_eq!(store.committed(JOB).unwrap().roundings.len(), 2);
    scenario.teardown();
}

/// Puts and commits three roundings, saying so after each; run as a process of its own by the test below.
#[test]
fn child() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    setup();
    let store = Store::open(Path::new(&folder)).unwrap();
    let artefacts = Artefacts::open(&Path::new(&folder).join("artefacts")).unwrap();
    for chunk in 0..3u32 {
        let hash = artefacts.put(&[chunk as u8; 100]).unwrap();
        store.commit(&[rounding(chunk, hash)]).unwrap();
        println!("acknowledged {chunk}");
    }
}

#[test]
fn death_at_any_point_loses_nothing_acknowledged() {
    for point in ARTEFACT.iter().chain(&STORE) {
        for visit in 0..3 {
            let folder = tempfile::tempdir().unwrap();
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["child", "--exact", "--nocapture"]).env(CHILD, folder.path());
            command.env("FAILPOINTS", format!("{point}={visit}*off->1*return(abort)"));
            let output = command.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let acknowledged = text.lines().filter(|line| line.contains("acknowledged")).count();
            let single = *point == "store.open.epoch" && visit > 0;
            assert_eq!(output.status.success(), single, "{point} {visit}: {text}");
            let store = Store::open(folder.path()).unwrap();
            let artefacts = Artefacts::open(&folder.path().join("artefacts")).unwrap();
            let committed = store.committed(JOB).unwrap().roundings;
            assert!(
                committed.len() >= acknowledged,
                "{point} {visit}: {acknowledged} acknowledged, {committed:?}"
            );
            for ((_, chunk), hash) in committed {
                assert_eq!(artefacts.read(&hash, 1000).unwrap(), vec![chunk.0 as u8; 100], "{point} {visit}");
            }
        }
    }
}

#[test]
fn the_points_tested_here_are_in_the_table() {
    assert!(ARTEFACT.iter().chain(&STORE).all(|point| FAILPOINTS.contains(point)));
}
