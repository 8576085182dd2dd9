//! Replays inputs that broke a target or are built to break one, and the seeds.

use std::path::Path;

use halfstep_fuzz::{Limited, TARGETS, execute};

#[global_allocator]
static ALLOCATOR: Limited = Limited;

#[test]
fn inputs_that_once_broke_a_target_no_longer_do() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let mut replayed = 0;
    for folder in std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()) {
        if !folder.is_dir() {
            continue;
        }
        let name = folder.file_name().unwrap().to_str().unwrap();
        let target =
            TARGETS.iter().find(|target| target.name == name).expect("folders are named for targets");
        for file in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            let outcome = execute(target, &std::fs::read(&file).unwrap()).unwrap();
            assert_eq!(outcome, Ok(()), "{}", file.display());
            replayed += 1;
        }
    }
    assert!(replayed > 0, "no regressions found in {}", root.display());
}

#[test]
fn every_seed_passes_its_target() {
    for target in TARGETS {
        let seeds = (target.seeds)().unwrap();
        assert!(!seeds.is_empty(), "{}", target.name);
        for (index, seed) in seeds.iter().enumerate() {
            assert_eq!(execute(target, seed).unwrap(), Ok(()), "{} seed {index}", target.name);
        }
    }
}
