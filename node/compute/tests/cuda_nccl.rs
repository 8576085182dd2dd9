//! Groups of NCCL over a library that stands in for it (`nccl/fake_nccl.c`, built here): loading, sums, every way to fail.
//!
//! Ranks are threads, memory is the host's. What each library does wrong is compiled into it, so that tests may run beside
//! each other. Not here: NCCL itself (`cuda_nccl_devices`).

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use halfstep_compute::cuda::{Communicator, Memory, Nccl, NcclError, Patience, Place, UniqueId};
use halfstep_compute::random::Stream;

/// Enough for threads on a busy machine.
const LONG: Duration = Duration::from_secs(30);
/// For what is to be waited for in vain.
const SHORT: Duration = Duration::from_millis(300);

const PATIENT: Patience<'_> = Patience { limit: LONG, given_up: &|| false };
const HASTY: Patience<'_> = Patience { limit: SHORT, given_up: &|| false };

/// A folder where ranks meet, and libraries built for it.
struct Fakes {
    folder: tempfile::TempDir,
}

impl Fakes {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn build(&self, flags: &[&str]) -> PathBuf {
        let library = self.folder.path().join(format!("lib{}.so", flags.concat()));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl/fake_nccl.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-pthread", "-O1", "-Wall", "-Wextra", "-Werror", "-o"]);
        compiler.arg(&library).arg(source).args(flags.iter().map(|flag| format!("-DFAKE_{flag}")));
        compiler.arg(format!("-DFAKE_FOLDER=\"{}\"", self.folder.path().display()));
        assert!(compiler.status().unwrap().success(), "{compiler:?}");
        library
    }

    fn open(&self, flags: &[&str]) -> Arc<Nccl> {
        Nccl::open(&self.build(flags)).unwrap()
    }

    /// Whether a member of some group was aborted.
    fn was_aborted(&self) -> bool {
        let groups = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        groups.filter(|path| path.is_dir()).any(|group| group.join("gone-0-0").exists())
    }
}

fn join(
    library: &Arc<Nccl>,
    id: UniqueId,
    place: (usize, usize),
    patience: &Patience<'_>,
) -> Result<Communicator, NcclError> {
    Communicator::join(library, id, Place { rank: place.0, size: place.1 }, Memory::host(), patience)
}

/// Runs every rank of a group on a thread of its own, rank `n` with the `n`-th library.
fn group<T: Send>(
    libraries: &[&Arc<Nccl>],
    work: impl Fn(usize, Result<Communicator, NcclError>) -> T + Sync,
) -> Vec<T> {
    let id = libraries[0].unique_id().unwrap();
    let size = libraries.len();
    thread::scope(|scope| {
        let work = &work;
        let ranks = libraries.iter().enumerate().map(|(rank, library)| {
            scope.spawn(move || work(rank, join(library, id, (rank, size), &PATIENT)))
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Integers of one rank: all 64 bits.
fn integers(rank: usize, len: usize) -> Vec<i64> {
    let mut stream = Stream::new(rank as u64, 11, len as u32);
    (0..len).map(|_| (u64::from(stream.next_u32()) << 32 | u64::from(stream.next_u32())) as i64).collect()
}

fn sums(size: usize, len: usize) -> Vec<i64> {
    let mut sums = vec![0i64; len];
    for rank in 0..size {
        sums.iter_mut().zip(integers(rank, len)).for_each(|(sum, value)| *sum = sum.wrapping_add(value));
    }
    sums
}

#[test]
fn a_library_is_opened_or_the_reason_is_said() {
    let fakes = Fakes::new();
    assert_eq!(fakes.open(&[]).version(), "2.27.3");
    assert_eq!(fakes.open(&["VERSION=21405"]).version(), "2.14.5");
    let why = |flags: &[&str]| Nccl::open(&fakes.build(flags)).unwrap_err().to_string();
    assert!(why(&["WITHOUT_ABORT"]).ends_with("has no function ncclCommAbort"));
    assert!(why(&["VERSION=2708"]).ends_with("is version 2.7.8, expected 2.14 or newer of 2"));
    assert!(why(&["VERSION=21304"]).contains("is version 2.13.4"));
    assert!(why(&["VERSION=30000"]).contains("is version 3.0.0"));
    let error = Nccl::open(Path::new("/no/libnccl.so.2")).unwrap_err().to_string();
    assert!(error.starts_with("NCCL is missing: `/no/libnccl.so.2` does not open: "), "{error}");
}

#[test]
fn sums_are_those_of_all_ranks_bit_by_bit() {
    let fakes = Fakes::new();
    let library = fakes.open(&[]);
    for size in [1, 2, 3, 5] {
        for (rank, (all, part)) in group(&vec![&library; size], |rank, joined| {
            let mut joined = joined.unwrap();
            assert_eq!(joined.place(), Place { rank, size });
            let mut all = Vec::new();
            for len in [0, 1, 7, 1000] {
                let mut values = integers(rank, len);
                joined.all_reduce(&mut values, &PATIENT).unwrap();
                all.push(values);
            }
            let mut part = vec![0; 13];
            joined.reduce_scatter(&integers(rank, 13 * size), &mut part, &PATIENT).unwrap();
            joined.leave(&PATIENT).unwrap();
            (all, part)
        })
        .into_iter()
        .enumerate()
        {
            let expected: Vec<_> = [0, 1, 7, 1000].map(|len| sums(size, len)).into();
            assert_eq!(all, expected, "{rank} of {size}");
            assert_eq!(part, sums(size, 13 * size)[13 * rank..][..13], "{rank} of {size}");
        }
    }
    assert!(!fakes.was_aborted());
}

#[test]
fn bytes_of_any_length_come_from_the_root() {
    let fakes = Fakes::new();
    let library = fakes.open(&[]);
    for length in [0, 1, 8, 21] {
        let of = |rank: usize| (0..length).map(|i| (i * 7 + rank * 31) as u8).collect::<Vec<u8>>();
        for bytes in group(&[&library; 3], |rank, joined| {
            let mut bytes = of(rank);
            joined.unwrap().broadcast(&mut bytes, 2, &PATIENT).unwrap();
            bytes
        }) {
            assert_eq!(bytes, of(2));
        }
    }
}

#[test]
fn numbers_that_do_not_fit_are_refused_before_any_call() {
    let fakes = Fakes::new();
    let library = fakes.open(&[]);
    let id = library.unique_id().unwrap();
    let why = |place| join(&library, id, place, &PATIENT).unwrap_err().to_string();
    assert_eq!(why((2, 2)), "NCCL group: rank is 2, expected less than 2");
    assert_eq!(why((0, 0)), "NCCL group: size is 0, expected 1 or more");
    let error = UniqueId::new(&[0; 3]).unwrap_err().to_string();
    assert_eq!(error, "NCCL group: length of an id is 3, expected 128");
    assert_eq!(UniqueId::new(id.bytes()), Ok(id));
    let mut joined = join(&library, id, (0, 1), &PATIENT).unwrap();
    let error = joined.reduce_scatter(&[1, 2, 3], &mut [0, 0], &PATIENT).unwrap_err().to_string();
    assert_eq!(error, "NCCL group: length of the values is 3, expected 1 times 2");
    let error = joined.broadcast(&mut [0], 1, &PATIENT).unwrap_err().to_string();
    assert_eq!(error, "NCCL group: rank is 1, expected less than 1");
    assert!(!joined.is_over(), "nothing has happened to the group");
    let mut values = [5];
    joined.all_reduce(&mut values, &PATIENT).unwrap();
    assert_eq!(values, [5]);
}

#[test]
fn joining_ends_by_refusal_deadline_or_when_it_is_given_up() {
    let fakes = Fakes::new();
    let refusing = fakes.open(&["INIT_REFUSED"]);
    let error = join(&refusing, refusing.unique_id().unwrap(), (0, 1), &PATIENT).unwrap_err().to_string();
    assert_eq!(error, "NCCL ncclCommInitRankConfig: invalid usage (result 5)");

    let stuck = fakes.open(&["INIT_STUCK"]);
    let began = Instant::now();
    let error = join(&stuck, stuck.unique_id().unwrap(), (0, 1), &HASTY).unwrap_err().to_string();
    assert_eq!(error, "NCCL group: joining took more than 0.3 s");
    assert!((SHORT..LONG / 2).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert!(fakes.was_aborted());

    let given_up = || began.elapsed() > SHORT * 2;
    let patience = Patience { limit: LONG, given_up: &given_up };
    let error = join(&stuck, stuck.unique_id().unwrap(), (0, 1), &patience).unwrap_err();
    assert_eq!(error, NcclError::GivenUp { during: "joining" });
    assert!(began.elapsed() < LONG);

    // A rank that is there already.
    let library = fakes.open(&[]);
    let id = library.unique_id().unwrap();
    let _first = join(&library, id, (0, 1), &PATIENT).unwrap();
    let error = join(&library, id, (0, 1), &PATIENT).unwrap_err().to_string();
    assert_eq!(error, "NCCL ncclCommInitRankConfig: invalid usage (result 5)");
}

#[test]
fn a_rank_that_never_comes_is_waited_for_until_the_deadline() {
    let fakes = Fakes::new();
    let library = fakes.open(&[]);
    let error = join(&library, library.unique_id().unwrap(), (0, 2), &HASTY).unwrap_err();
    assert_eq!(error, NcclError::Deadline { during: "joining", limit: SHORT });
}

#[test]
fn an_error_of_one_rank_ends_the_group_everywhere_and_values_stay() {
    let fakes = Fakes::new();
    let (good, failing) = (fakes.open(&[]), fakes.open(&["ERROR_AFTER=2"]));
    let outcomes = group(&[&good, &failing, &good], |rank, joined| {
        let mut joined = joined.unwrap();
        for _ in 0..2 {
            let mut values = integers(rank, 5);
            joined.all_reduce(&mut values, &PATIENT).unwrap();
            assert_eq!(values, sums(3, 5));
        }
        let mut values = integers(rank, 5);
        let error = joined.all_reduce(&mut values, &PATIENT).unwrap_err().to_string();
        assert_eq!(values, integers(rank, 5));
        assert!(joined.is_over());
        assert_eq!(joined.all_reduce(&mut values, &PATIENT), Err(NcclError::Over));
        assert_eq!(joined.broadcast(&mut [1], 0, &PATIENT), Err(NcclError::Over));
        assert_eq!(joined.leave(&PATIENT), Err(NcclError::Over));
        error
    });
    let gone = "NCCL group: all-reduce failed: a member is gone (result 6)";
    let own = "NCCL group: all-reduce failed: a system error, by order of a test (result 2)";
    assert_eq!(outcomes, [gone, own, gone]);
}

#[test]
fn a_rank_that_stops_without_a_word_costs_the_others_their_deadline() {
    let fakes = Fakes::new();
    let (good, stuck) = (fakes.open(&["SILENT"]), fakes.open(&["SILENT", "STUCK_AFTER=0"]));
    let ended = AtomicBool::new(false);
    let outcomes = group(&[&good, &stuck], |rank, joined| {
        let mut joined = joined.unwrap();
        let mut values = [1];
        if rank == 0 {
            let error = joined.all_reduce(&mut values, &HASTY).unwrap_err();
            ended.store(true, Ordering::Relaxed);
            return error;
        }
        let given_up = || ended.load(Ordering::Relaxed);
        joined.all_reduce(&mut values, &Patience { limit: LONG, given_up: &given_up }).unwrap_err()
    });
    let during = "all-reduce";
    assert_eq!(outcomes, [NcclError::Deadline { during, limit: SHORT }, NcclError::GivenUp { during }]);
}

#[test]
fn an_abort_that_hangs_holds_up_nobody_for_long() {
    let fakes = Fakes::new();
    let stuck = fakes.open(&["STUCK_AFTER=0", "ABORT_STUCK"]);
    let mut joined = join(&stuck, stuck.unique_id().unwrap(), (0, 1), &PATIENT).unwrap();
    let began = Instant::now();
    let error = joined.all_reduce(&mut [1], &HASTY).unwrap_err();
    assert_eq!(error, NcclError::Deadline { during: "all-reduce", limit: SHORT });
    drop(joined);
    // The abort of the library takes ten minutes.
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

#[test]
fn after_a_loss_the_others_make_a_new_group() {
    let fakes = Fakes::new();
    let library = fakes.open(&[]);
    let second = library.unique_id().unwrap();
    let outcomes = group(&[&library; 3], |rank, joined| {
        let mut joined = joined.unwrap();
        if rank == 1 {
            return None;
        }
        let error = joined.all_reduce(&mut integers(rank, 9), &PATIENT).unwrap_err().to_string();
        assert!(error.ends_with("a member is gone (result 6)"), "{error}");
        let mut joined = join(&library, second, (rank / 2, 2), &PATIENT).unwrap();
        let mut values = integers(rank / 2, 9);
        joined.all_reduce(&mut values, &PATIENT).unwrap();
        joined.leave(&PATIENT).unwrap();
        Some(values)
    });
    assert_eq!(outcomes, [Some(sums(2, 9)), None, Some(sums(2, 9))]);
}
