//! NCCL itself on as many devices as there are, one thread each; skipped, with the reason, where there is none.
//!
//! `HALFSTEP_CUDA_LIBRARIES` names folders of CUDA's libraries and NCCL's, as for the binary. Prints how long sums take.
//! Not here: every way to fail (`cuda_nccl`, over a library that does as it is told).

#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]
#![expect(clippy::print_stdout, reason = "says why a test was skipped, and what was measured")]

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use halfstep_compute::cuda::{
    Communicator, Cuda, Memory, Nccl, NcclError, Patience, Place, Precision, UniqueId, open_libraries, probe,
};

const PATIENT: Patience<'_> = Patience { limit: Duration::from_secs(60), given_up: &|| false };
const HASTY: Patience<'_> = Patience { limit: Duration::from_secs(3), given_up: &|| false };

/// NCCL wants no device in two groups that are made at once.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Machine {
    library: Arc<Nccl>,
    devices: Vec<Cuda>,
    _alone: MutexGuard<'static, ()>,
}

fn machine(devices_min: usize) -> Option<Machine> {
    let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let found = || {
        let folders = std::env::var_os("HALFSTEP_CUDA_LIBRARIES").unwrap_or_default();
        let folders: Vec<PathBuf> =
            std::env::split_paths(&folders).filter(|p| !p.as_os_str().is_empty()).collect();
        open_libraries(&folders).map_err(|error| error.to_string())?;
        let found = probe();
        found.usable()?;
        let library = Nccl::find().map_err(|error| error.to_string())?;
        let ordinals = found.devices.iter().map(|gpu| gpu.ordinal);
        let devices: Result<Vec<Cuda>, _> =
            ordinals.map(|ordinal| Cuda::open(ordinal, Precision::Tf32)).collect();
        let devices = devices.map_err(|error| error.to_string())?;
        match devices.len() < devices_min {
            true => Err(format!("{} devices, expected {devices_min} or more", devices.len())),
            false => Ok((library, devices)),
        }
    };
    match found() {
        Ok((library, devices)) => Some(Machine { library, devices, _alone: alone }),
        Err(reason) => {
            println!("SKIPPED: {reason}");
            None
        }
    }
}

impl Machine {
    fn join(&self, id: UniqueId, rank: usize, patience: &Patience<'_>) -> Result<Communicator, NcclError> {
        let place = Place { rank, size: self.devices.len() };
        Communicator::join(&self.library, id, place, Memory::on(&self.devices[rank])?, patience)
    }

    /// `work` on every device, each in a group of all.
    fn all<T: Send>(&self, work: impl Fn(usize, Communicator) -> T + Sync) -> Vec<T> {
        let id = self.library.unique_id().unwrap();
        thread::scope(|scope| {
            let work = &work;
            let rank = |rank| scope.spawn(move || work(rank, self.join(id, rank, &PATIENT).unwrap()));
            let ranks: Vec<_> = (0..self.devices.len()).map(rank).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }
}

/// All 64 bits, other ones for every rank.
fn integer(rank: usize, index: usize) -> i64 {
    ((index as u64 + 1) * (rank as u64 + 3)).wrapping_mul(0x9E37_79B9_7F4A_7C15) as i64
}

fn integers(rank: usize, len: usize) -> Vec<i64> {
    (0..len).map(|index| integer(rank, index)).collect()
}

fn sum(size: usize, index: usize) -> i64 {
    (0..size).fold(0, |sum: i64, rank| sum.wrapping_add(integer(rank, index)))
}

#[test]
fn sums_over_devices_are_exact_and_groups_end_in_good_order() {
    let Some(machine) = machine(1) else { return };
    let size = machine.devices.len();
    println!("NCCL {}, {size} devices", machine.library.version());
    for len in [1, 1000, 1 << 19, 1 << 23] {
        let seconds = machine.all(|rank, mut group| {
            let mut values = integers(rank, len);
            group.all_reduce(&mut values, &PATIENT).unwrap();
            assert!(values.iter().enumerate().all(|(index, value)| *value == sum(size, index)));
            // Again, now that buffers and connections are there.
            let began = Instant::now();
            group.all_reduce(&mut values, &PATIENT).unwrap();
            let seconds = began.elapsed().as_secs_f64();
            let mut part = vec![0; len];
            group.reduce_scatter(&integers(rank, len * size), &mut part, &PATIENT).unwrap();
            let of_part = part.iter().zip(len * rank..);
            assert!(of_part.into_iter().all(|(value, index)| *value == sum(size, index)));
            let mut bytes = vec![rank as u8; 1021];
            group.broadcast(&mut bytes, size - 1, &PATIENT).unwrap();
            assert!(bytes.iter().all(|byte| *byte == size as u8 - 1));
            group.leave(&PATIENT).unwrap();
            seconds
        });
        let slowest = seconds.into_iter().fold(0.0, f64::max);
        let bytes = len * size_of::<i64>();
        println!(
            "all-reduce of {bytes} bytes, host to host: {:.3} ms, {:.2} GB/s",
            slowest * 1e3,
            bytes as f64 / slowest / 1e9
        );
    }
}

#[test]
fn a_device_that_never_joins_and_one_that_never_adds_are_waited_for_until_the_deadline() {
    let Some(machine) = machine(2) else { return };
    let began = Instant::now();
    let alone = machine.join(machine.library.unique_id().unwrap(), 0, &HASTY);
    assert!(matches!(alone, Err(NcclError::Deadline { during: "joining", .. })), "{alone:?}");
    println!("joining alone was given up after {:.1?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    let began = Instant::now();
    let outcomes = machine.all(|rank, mut group| {
        let mut values = integers(rank, 1000);
        if rank == 0 {
            // The others get no answer as long as this one is in the group and does nothing.
            thread::sleep(HASTY.limit * 2);
            return None;
        }
        let outcome = group.all_reduce(&mut values, &HASTY);
        assert!(group.is_over());
        assert_eq!(values, integers(rank, 1000), "a failed sum leaves what was given");
        outcome.err()
    });
    println!("a missing sum was given up after {:.1?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    for outcome in outcomes.into_iter().skip(1) {
        assert!(matches!(outcome, Some(NcclError::Deadline { .. })), "{outcome:?}");
    }
    // The devices are as good as new.
    let sums = machine.all(|rank, mut group| {
        let mut values = integers(rank, 10);
        group.all_reduce(&mut values, &PATIENT).unwrap();
        values
    });
    let size = machine.devices.len();
    assert!(sums.iter().all(|values| values.iter().enumerate().all(|(i, value)| *value == sum(size, i))));
}
