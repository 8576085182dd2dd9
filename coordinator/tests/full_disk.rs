//! A disk that is really full: nothing partial stays, and work goes on when there is space again.
//!
//! Needs to mount a tmpfs, so root on Linux; skipped elsewhere, and says so.

#![cfg(target_os = "linux")]
#![expect(clippy::print_stderr, reason = "a skipped test says why")]

use halfstep_coordinator::store::{Change, Store};
use halfstep_coordinator::{ArtefactError, Artefacts};
use halfstep_work::{ChunkId, JobId, LayerId};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Mounted for the life of the value.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(folder.path());
        let mounted = command.output().is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("skipped: mounting a tmpfs needs root");
        }
        mounted.then(|| Self(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

fn is_full(error: &ArtefactError) -> bool {
    matches!(error, ArtefactError::Storage { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
}

fn fill(disk: &Path) {
    let chunk = vec![7u8; 64 << 10];
    for size in [chunk.len(), 4096] {
        for number in 0.. {
            if fs::write(disk.join(format!("filler-{size}-{number}")), &chunk[..size]).is_err() {
                break;
            }
        }
    }
}

fn empty(disk: &Path) {
    for entry in fs::read_dir(disk).expect("the disk").flatten() {
        if entry.file_name().to_string_lossy().starts_with("filler") {
            fs::remove_file(entry.path()).expect("a filler");
        }
    }
}

#[test]
fn an_artefact_that_does_not_fit_leaves_nothing_and_fits_later() {
    let Some(disk) = SmallDisk::mount("2m") else { return };
    let artefacts = Artefacts::open(&disk.path().join("artefacts")).expect("space");
    let bytes = vec![3u8; 300_000];
    let hash = artefacts.put(b"small").expect("space");
    fill(disk.path());
    let error = artefacts.put(&bytes).expect_err("no space");
    assert!(is_full(&error), "{error}");
    assert!(error.to_string().contains("No space left"), "{error}");
    assert!(!artefacts.contains(&blake3::hash(&bytes)));
    assert_eq!(artefacts.read(&hash, 99).expect("still there"), &b"small"[..]);
    empty(disk.path());
    let hash = artefacts.put(&bytes).expect("space again");
    assert_eq!(artefacts.verify(&hash).expect("whole"), bytes.len() as u64);
}

#[test]
fn a_commit_that_does_not_fit_is_refused_whole_and_the_store_goes_on_later() {
    let Some(disk) = SmallDisk::mount("8m") else { return };
    let state = disk.path().join("state");
    let store = Store::open(&state).expect("space");
    let job = JobId([1; 16]);
    let change = |chunk| Change::Rounding {
        job,
        layer: LayerId(0),
        chunk: ChunkId(chunk),
        hash: blake3::hash(&[chunk as u8]),
    };
    store.commit(&[change(0)]).expect("space");
    fill(disk.path());
    let many: Vec<Change> = (1..100_000).map(change).collect();
    let error = store.commit(&many).expect_err("no space").to_string();
    assert!(error.starts_with("state database `"), "{error}");
    empty(disk.path());
    assert_eq!(store.committed(job).expect("readable").roundings.len(), 1);
    store.commit(&[change(1)]).expect("space again");
    drop(store);
    let store = Store::open(&state).expect("a state");
    assert_eq!(store.committed(job).expect("readable").roundings.len(), 2);
}
