//! What solves run on: the CPU, or lanes of CUDA devices. Everything else a node computes on the CPU.
//!
//! A thread takes a [`Lane`] for a solve and gives it back; that is the one place where a device's type is chosen. A
//! layer's statistics are put on each device once, for all of its chunks ([`OnDevices`]).
//! Not here: devices themselves (`compute`), solving (`solver`).

use halfstep_compute::cuda::{Cuda, CudaBuffer, Precision, probe};
use halfstep_compute::{Cpu, CpuBuffer, Device, DeviceError};
use halfstep_quant::{Encodings, ScaleType};
use halfstep_solver::{Prepared, RowProblem, Settings, Solution, SolveError, Step, Workspace, solve_fitted};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::lazy::Lazy;

/// Solves of fewer multiplications per iteration than this are done on the CPU.
const SMALL: usize = 1 << 20;
/// What a weight costs besides its products, in multiplications.
const WEIGHT: usize = 64;

/// Whether launching an iteration on a device takes longer than computing it on the CPU. Decided by the shape alone, so that
/// a chunk is solved in the same place every time.
fn is_small(rows: usize, cols: usize) -> bool {
    rows.saturating_mul(cols).saturating_mul(cols.saturating_add(WEIGHT)) < SMALL
}

/// Which devices a user wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// All CUDA devices that can be used, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// These CUDA devices; none named: all.
    Cuda(Vec<usize>),
}

/// The devices of a node.
pub struct Devices {
    solvers: Solvers,
    /// Lanes that nobody uses, with their memory.
    idle: Mutex<Vec<Lane>>,
    /// Why it is not what it might have been.
    pub note: Option<String>,
}

enum Solvers {
    Cpu,
    Cuda {
        /// One of each device, never empty; others are made from it.
        first: Vec<Cuda>,
        ordinals: Vec<usize>,
        name: String,
        /// Lanes made so far.
        made: AtomicUsize,
    },
}

/// Devices for one thread at a time, and the memory of the solves it has done.
#[derive(Default)]
pub(crate) struct Lane {
    cpu: Workspace<CpuBuffer>,
    cuda: Option<CudaLane>,
}

struct CudaLane {
    device: Cuda,
    /// Which of the node's devices, from 0.
    number: usize,
    workspace: Workspace<CudaBuffer>,
}

/// A layer's statistics on whatever devices have solved a chunk of it, group by group.
#[derive(Default)]
pub(crate) struct OnDevices {
    made: Mutex<HashMap<Place, Arc<Lazy<OnDevice>>>>,
}

/// A group and a device: 0 is the CPU, then CUDA's.
type Place = (usize, usize);

enum OnDevice {
    Cpu(Box<Prepared<CpuBuffer>>),
    Cuda(Box<Prepared<CudaBuffer>>),
}

impl OnDevices {
    fn slot(&self, group: usize, device: usize) -> Arc<Lazy<OnDevice>> {
        // A map is whole at every step.
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(made.entry((group, device)).or_default())
    }
}

impl Devices {
    /// The CPU alone.
    pub fn cpu() -> Self {
        Self { solvers: Solvers::Cpu, idle: Mutex::default(), note: None }
    }

    /// Opens what is chosen. `Auto` never fails: where a device is there but cannot be used, `note` says why.
    ///
    /// # Errors
    /// What keeps a chosen device from being used, as a sentence.
    pub fn open(choice: &DeviceChoice, precision: Precision) -> Result<Self, String> {
        match choice {
            DeviceChoice::Cpu => Ok(Self::cpu()),
            DeviceChoice::Cuda(ordinals) => Self::cuda(ordinals, precision),
            DeviceChoice::Auto => {
                let found = probe();
                if found.devices.is_empty() {
                    return Ok(Self::cpu());
                }
                let usable = found.devices.iter().map(|gpu| gpu.ordinal);
                let usable: Vec<usize> = usable.filter(|ordinal| found.device(*ordinal).is_ok()).collect();
                Ok(match found.usable().and_then(|()| Self::cuda(&usable, precision)) {
                    Ok(devices) => devices,
                    Err(why) => Self { note: Some(format!("solving on the CPU: {why}")), ..Self::cpu() },
                })
            }
        }
    }

    fn cuda(ordinals: &[usize], precision: Precision) -> Result<Self, String> {
        let found = probe();
        found.usable()?;
        let mut ordinals: Vec<usize> = match ordinals {
            [] => found.devices.iter().map(|gpu| gpu.ordinal).collect(),
            some => some.to_vec(),
        };
        ordinals.sort_unstable();
        ordinals.dedup();
        let name = found.device(ordinals[0])?.name.clone();
        let mut first: Vec<Cuda> = Vec::new();
        for ordinal in &ordinals {
            found.device(*ordinal)?;
            let device = Cuda::open(*ordinal, precision).map_err(|error| error.to_string())?;
            if let Some(other) = first.first().filter(|other| other.describe() != device.describe()) {
                return Err(format!(
                    "device {ordinal} is a {}, but device {} a {}; results are bit-identical within one kind only",
                    device.describe(),
                    ordinals[0],
                    other.describe()
                ));
            }
            first.push(device);
        }
        let solvers = Solvers::Cuda { first, ordinals, name, made: AtomicUsize::new(0) };
        Ok(Self { solvers, idle: Mutex::default(), note: None })
    }

    /// What decides the bits a node computes: the CPU, and the device that solves if it is another.
    pub fn describe(&self) -> String {
        match &self.solvers {
            Solvers::Cpu => Cpu.describe(),
            Solvers::Cuda { first, .. } => format!("{} + {}", Cpu.describe(), first[0].describe()),
        }
    }

    /// For people: nothing for the CPU alone.
    pub fn title(&self) -> Option<String> {
        match &self.solvers {
            Solvers::Cpu => None,
            Solvers::Cuda { ordinals, name, .. } => {
                let numbers: Vec<String> = ordinals.iter().map(usize::to_string).collect();
                Some(format!("cuda:{} ({name})", numbers.join(",")))
            }
        }
    }

    /// The first CUDA device, for what is done on one alone.
    pub(crate) fn first_cuda(&self) -> Option<&Cuda> {
        match &self.solvers {
            Solvers::Cpu => None,
            Solvers::Cuda { first, .. } => first.first(),
        }
    }

    /// A lane, used before if there is one.
    pub(crate) fn take(&self) -> Result<Lane, DeviceError> {
        if let Some(lane) = self.idle().pop() {
            return Ok(lane);
        }
        match &self.solvers {
            Solvers::Cpu => Ok(Lane::default()),
            Solvers::Cuda { first, made, .. } => {
                let number = made.fetch_add(1, Ordering::Relaxed) % first.len();
                let cuda = CudaLane { device: first[number].lane()?, number, workspace: Workspace::new() };
                Ok(Lane { cuda: Some(cuda), ..Lane::default() })
            }
        }
    }

    pub(crate) fn give_back(&self, lane: Lane) {
        self.idle().push(lane);
    }

    /// Forgets the memory of solves: a job is over, or memory is short.
    pub(crate) fn release(&self) {
        self.idle().clear();
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Lane>> {
        // A list is whole at every step.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lane {
    /// [`solve_fitted`], the statistics of the problem's group put on the device by the first who needs them there.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn solve(
        &mut self,
        layer: &OnDevices,
        group: usize,
        problem: &RowProblem<'_>,
        settings: &Settings,
        stored: ScaleType,
        watch: &mut dyn FnMut(Step),
    ) -> Result<(Encodings, Solution), SolveError> {
        let Self { cpu, cuda } = self;
        match cuda.as_mut().filter(|_| !is_small(problem.rows, problem.cols)) {
            Some(CudaLane { device, number, workspace }) => {
                let made = layer
                    .slot(group, 1 + *number)
                    .get_or_make(|| prepare(device, problem, settings, OnDevice::Cuda))?;
                let OnDevice::Cuda(prepared) = &*made else { return Err(SolveError::Unprepared) };
                solve_fitted(device, prepared, problem, settings, stored, workspace, watch)
            }
            None => {
                let made =
                    layer.slot(group, 0).get_or_make(|| prepare(&Cpu, problem, settings, OnDevice::Cpu))?;
                let OnDevice::Cpu(prepared) = &*made else { return Err(SolveError::Unprepared) };
                solve_fitted(&Cpu, prepared, problem, settings, stored, cpu, watch)
            }
        }
    }
}

fn prepare<D: Device>(
    device: &D,
    problem: &RowProblem<'_>,
    settings: &Settings,
    wrap: fn(Box<Prepared<D::Buffer>>) -> OnDevice,
) -> Result<Arc<OnDevice>, SolveError> {
    let prepared = Prepared::new(device, &problem.statistics, problem.cols, settings)?;
    Ok(Arc::new(wrap(Box::new(prepared))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_that_was_given_back_is_taken_again() {
        let devices = Devices::cpu();
        let lane = devices.take().unwrap();
        devices.give_back(lane);
        assert_eq!(devices.idle().len(), 1);
        let _lane = devices.take().unwrap();
        assert_eq!(devices.idle().len(), 0);
    }

    #[test]
    fn depthwise_convolutions_are_small_and_linear_layers_are_not() {
        for (rows, cols, small) in
            [(1, 9, true), (128, 25, true), (16, 144, true), (64, 576, false), (128, 1024, false)]
        {
            assert_eq!(is_small(rows, cols), small, "[{rows}, {cols}]");
        }
        assert!(!is_small(usize::MAX, usize::MAX));
    }

    #[test]
    fn what_is_chosen_and_not_there_is_said_and_auto_goes_on() {
        let Err(why) = Devices::open(&DeviceChoice::Cuda(vec![99]), Precision::Tf32) else {
            panic!("there is no device 99")
        };
        assert!(!why.is_empty());
        let devices = Devices::open(&DeviceChoice::Auto, Precision::Tf32).unwrap();
        assert!(devices.describe().starts_with(&Cpu.describe()));
        assert_eq!(Devices::open(&DeviceChoice::Cpu, Precision::F32).unwrap().title(), None);
    }
}
