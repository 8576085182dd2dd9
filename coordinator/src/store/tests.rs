//! Reopening, damage, second openers, and prefixes of commits.

use super::*;
use halfstep_work::{ChunkId, Failure, FailureClass, JobId, LayerId};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

fn job(id: u8, order: u64, stage: JobStage) -> JobRecord {
    let file = InputFile {
        role: FileRole::Model,
        name: "model.onnx".into(),
        size: 5,
        hash: blake3::hash(b"model"),
        path: Some("/models/model.onnx".into()),
    };
    JobRecord {
        id: JobId([id; 16]),
        order,
        submitted_unix_ms: 1_700_000_000_000,
        spec: b"{}".to_vec(),
        files: vec![file],
        stage,
        computed_by: Some(("device".into(), "engine".into())),
        counts: JobCounts { stages: order, stages_done: 1, layers: 3, layers_done: 2 },
    }
}

fn rounding(job: u8, layer: u32, chunk: u32, content: u8) -> Change {
    let hash = blake3::hash(&[content]);
    Change::Rounding { job: JobId([job; 16]), layer: LayerId(layer), chunk: ChunkId(chunk), hash }
}

fn stages() -> Vec<JobStage> {
    let results = vec![ResultFile { name: "model.onnx".into(), size: 9, hash: blake3::hash(b"result") }];
    vec![
        JobStage::Queued,
        JobStage::Running,
        JobStage::Finished { exit: 3, results },
        JobStage::Failed { exit: 65, failure: Failure::new(FailureClass::BadInput, "no layer") },
        JobStage::Cancelled,
    ]
}

#[test]
fn every_reopening_is_a_new_incarnation_and_forgets_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let jobs: Vec<JobRecord> =
        stages().into_iter().enumerate().map(|(i, stage)| job(9 - i as u8, i as u64, stage)).collect();
    for epoch in 1..4 {
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.epoch(), epoch);
        if epoch == 1 {
            store.commit(&jobs.iter().cloned().map(Change::Job).collect::<Vec<_>>()).unwrap();
        }
        assert_eq!(store.jobs().unwrap(), jobs);
    }
}

#[test]
fn jobs_do_not_see_each_others_work_and_are_forgotten_whole() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let failure = Failure::new(FailureClass::NonFinite, "NaN");
    let given_up =
        |id: u8| Change::GivenUp { job: JobId([id; 16]), layer: LayerId(u32::MAX), failure: failure.clone() };
    let changes: Vec<Change> = [1u8, 2, 255]
        .into_iter()
        .flat_map(|id| {
            [Change::Job(job(id, 0, JobStage::Running)), rounding(id, 3, u32::MAX, id), given_up(id)]
        })
        .collect();
    store.commit(&changes).unwrap();
    store.commit(&[Change::ForgetJob(JobId([2; 16]))]).unwrap();
    for id in [1u8, 255] {
        let committed = store.committed(JobId([id; 16])).unwrap();
        let place = (LayerId(3), ChunkId(u32::MAX));
        assert_eq!(committed.roundings, BTreeMap::from([(place, blake3::hash(&[id]))]));
        assert_eq!(committed.given_up, BTreeMap::from([(LayerId(u32::MAX), failure.clone())]));
    }
    assert_eq!(store.committed(JobId([2; 16])).unwrap(), Committed::default());
    assert_eq!(store.jobs().unwrap().len(), 2);
}

#[test]
fn a_second_opener_is_refused_with_the_folder_and_the_holder() {
    let folder = tempfile::tempdir().unwrap();
    let first = Store::open(folder.path()).unwrap();
    let error = Store::open(folder.path()).err().unwrap().to_string();
    let (shown, id) = (folder.path().display(), std::process::id());
    assert_eq!(error, format!("state folder `{shown}`: in use by another coordinator (process {id})"));
    drop(first);
    assert_eq!(Store::open(folder.path()).unwrap().epoch(), 2);
}

/// What a damaged database may answer: an error, or exactly what was committed; never something else.
fn open_damaged(folder: &Path, expected: &[JobRecord]) -> bool {
    let found = Store::open(folder).and_then(|store| store.jobs());
    match found {
        Ok(jobs) => {
            assert_eq!(jobs, expected);
            false
        }
        Err(_) => true,
    }
}

#[test]
fn a_flipped_bit_is_found_or_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let jobs = vec![job(1, 0, JobStage::Running), job(2, 1, JobStage::Queued)];
    let store = Store::open(folder.path()).unwrap();
    store.commit(&jobs.iter().cloned().map(Change::Job).collect::<Vec<_>>()).unwrap();
    drop(store);
    let path = folder.path().join("state.redb");
    let good = fs::read(&path).unwrap();
    // All places that hold the word "models", a part of the job's record, and some elsewhere.
    let word = b"/models/";
    let places: Vec<usize> = (0..good.len() - 8).filter(|at| &good[*at..*at + 8] == word).collect();
    assert!(!places.is_empty());
    let mut found = 0;
    for at in places.iter().copied().chain((0..good.len()).step_by(good.len() / 40)) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&path, &bad).unwrap();
        found += usize::from(open_damaged(folder.path(), &jobs));
    }
    assert!(found > 0, "no flipped bit was found");
}

#[test]
fn a_truncated_or_foreign_database_is_refused_clearly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    drop(Store::open(folder.path()).unwrap());
    let good = fs::read(&path).unwrap();
    for bad in [&good[..good.len() / 2], &good[..100], b"not a database at all"] {
        fs::write(&path, bad).unwrap();
        let error = Store::open(folder.path()).err().unwrap().to_string();
        assert!(error.starts_with(&format!("state database `{}`: ", path.display())), "{error}");
    }
}

/// Bytes of the whole folder as a crash at this moment would leave them.
fn snapshot(from: &Path, to: &Path) {
    fs::copy(from.join("state.redb"), to.join("state.redb")).unwrap();
}

fn apply(model: &mut BTreeMap<(u8, u32, u32), u8>, change: &(u8, u32, u32, u8)) {
    model.insert((change.0, change.1, change.2), change.3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// After any number of commits, a store whose process vanished holds exactly what was acknowledged.
    #[test]
    fn a_crash_after_any_commit_keeps_exactly_the_commits_before(
        commits in prop::collection::vec(prop::collection::vec((1u8..3, 0u32..3, 0u32..3, 0u8..9), 1..4), 1..6)
    ) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut model = BTreeMap::new();
        for commit in &commits {
            let changes: Vec<Change> = commit.iter().map(|c| rounding(c.0, c.1, c.2, c.3)).collect();
            store.commit(&changes).unwrap();
            commit.iter().for_each(|change| apply(&mut model, change));
            let crashed = tempfile::tempdir().unwrap();
            snapshot(folder.path(), crashed.path());
            let again = Store::open(crashed.path()).unwrap();
            for id in 1u8..3 {
                let expected: BTreeMap<_, _> = model
                    .iter()
                    .filter(|(key, _)| key.0 == id)
                    .map(|(key, content)| ((LayerId(key.1), ChunkId(key.2)), blake3::hash(&[*content])))
                    .collect();
                prop_assert_eq!(again.committed(JobId([id; 16])).unwrap().roundings, expected);
            }
        }
    }
}
