//! What solves, sums of statistics and language models' segments run on: the CPU, or lanes of CUDA devices. Everything else a
//! node computes on the CPU.
//!
//! A thread takes a [`Lane`] for a task and gives it back; a segment is loaded where it will run ([`Devices::load`]). Those are
//! the two places where a device's type is chosen. A layer's statistics are put on each device once, for all of its chunks
//! ([`OnDevices`]).
//! Not here: devices themselves (`compute`), solving (`solver`), sums (`exec`).

use halfstep_compute::cuda::{
    Cuda, CudaBuffer, CudaPlace, GridSearch, Precision, RowDigits, RowStaging, probe,
};
use halfstep_compute::{Cpu, CpuBuffer, Device, DeviceError};
use halfstep_exec::{DecoderSession, ExecError, Session, Summing, without_kernel};
use halfstep_model::Tensor;
use halfstep_model::decoder::{CarryPrecision, Decoder};
use halfstep_quant::{Encodings, GridSpec, MseGrids, QuantError, ScaleType, estimate};
use halfstep_solver::{Prepared, RowProblem, Settings, Solution, SolveError, Step, Workspace, solve_fitted};
use halfstep_work::{Failure, FailureClass};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::failure;
use crate::lazy::Lazy;
use crate::room::ProductRooms;

/// Solves of fewer multiplications per iteration than this are done on the CPU.
const SMALL: usize = 1 << 20;
/// What a weight costs besides its products, in multiplications.
const WEIGHT: usize = 64;

/// Whether launching an iteration on a device takes longer than computing it on the CPU. Decided by the shape alone, so that
/// a chunk is solved in the same place every time.
fn is_small(rows: usize, cols: usize) -> bool {
    rows.saturating_mul(cols).saturating_mul(cols.saturating_add(WEIGHT)) < SMALL
}

/// Statistics of fewer columns than this are summed on the CPU, where a row of them takes less than its way to a device.
pub(crate) const SUMMED_ON_CPU: usize = 256;

/// One part in so many of the devices' memory may be products of shards, beside sums, weights and what is being computed.
pub(crate) const PRODUCTS_SHARE: usize = 4;

/// So many parts of so many of a device's memory may be activations that stay there from their capture until they are summed and
/// read by the next segment.
const STAY_SHARE: (usize, usize) = (2, 5);

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
        /// One of each device, never empty; others are made from it, and the device's sums are kept on it.
        first: Vec<Arc<Cuda>>,
        ordinals: Vec<usize>,
        name: String,
        /// Lanes made so far.
        made: AtomicUsize,
        /// The same devices, for segments.
        place: Arc<CudaPlace>,
    },
}

/// Devices for one thread at a time, and the memory of the solves it has done.
#[derive(Default)]
pub(crate) struct Lane {
    cpu: Workspace<CpuBuffer>,
    cuda: Option<CudaLane>,
}

/// Why there is no grid.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EstimateError {
    /// The weights, or what was asked for.
    #[error(transparent)]
    Quant(#[from] QuantError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

struct CudaLane {
    device: Cuda,
    /// Which of the node's devices, from 0.
    number: usize,
    workspace: Workspace<CudaBuffer>,
    /// Made when rows are first summed.
    staging: Option<RowStaging>,
    home: Arc<Cuda>,
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
                    Err(why) => Self { note: Some(format!("computing on the CPU: {why}")), ..Self::cpu() },
                })
            }
        }
    }

    /// Number and bytes in use, by whatever process, of each CUDA device; what cannot be asked is left out.
    pub(crate) fn memory_used(&self) -> Vec<(usize, usize)> {
        let Solvers::Cuda { first, ordinals, .. } = &self.solvers else { return Vec::new() };
        let used = |(device, ordinal): (&Arc<Cuda>, &usize)| {
            let (free, total) = device.memory().ok()?;
            Some((*ordinal, total - free))
        };
        first.iter().zip(ordinals).filter_map(used).collect()
    }

    /// Room for products: so much of the host's memory, and a share of that of the devices.
    pub(crate) fn product_rooms(&self, host: usize) -> ProductRooms {
        let devices = match &self.solvers {
            Solvers::Cpu => None,
            Solvers::Cuda { first, .. } => {
                // A device that cannot be asked now says why when it is used.
                let totals = first.iter().filter_map(|device| Some(device.memory().ok()?.1));
                Some((SUMMED_ON_CPU, totals.sum::<usize>() / PRODUCTS_SHARE))
            }
        };
        ProductRooms::new(host, devices)
    }

    /// Whether activations may stay on the devices from now on.
    pub(crate) fn let_stay(&self, stays: bool) {
        if let Solvers::Cuda { place, .. } = &self.solvers
            && let Err(error) = place.let_stay(if stays { STAY_SHARE } else { (0, 1) })
        {
            // They go by way of the host; a device that fails says so when it is used.
            tracing::debug!(%error, "activations do not stay on the devices");
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
        let mut first: Vec<Arc<Cuda>> = Vec::new();
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
            first.push(Arc::new(device));
        }
        let place =
            Arc::new(CudaPlace::new(first.iter().map(Arc::as_ref)).map_err(|error| error.to_string())?);
        let solvers = Solvers::Cuda { first, ordinals, name, made: AtomicUsize::new(0), place };
        Ok(Self { solvers, idle: Mutex::default(), note: None })
    }

    /// What decides the bits a node computes: the CPU, and the device that solves and sums if it is another.
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

    /// Some nodes of a decoder, ready to run: on the CUDA devices, if there are any and kernels for all of the decoder, else on
    /// the CPU, which takes all digits of factors. Decided by the decoder, so that all of its segments run in one place on every node. Also the bytes of the
    /// weights.
    ///
    /// # Errors
    /// Those of [`DecoderSession::load_at`].
    pub(crate) fn load(
        &self,
        decoder: &Decoder,
        nodes: &[usize],
        factors: CarryPrecision,
        constants: &mut dyn FnMut(&str) -> Result<Tensor, ExecError>,
    ) -> Result<(Arc<dyn Session>, usize), ExecError> {
        match &self.solvers {
            Solvers::Cuda { place, .. } if without_kernel(decoder).is_none() => {
                let session = DecoderSession::load_at(Arc::clone(place), decoder, nodes, factors, constants)?;
                let bytes = session.bytes();
                Ok((Arc::new(session), bytes))
            }
            _ => {
                let session = DecoderSession::load(decoder, nodes, constants)?;
                let bytes = session.bytes();
                Ok((Arc::new(session), bytes))
            }
        }
    }

    /// Why a decoder runs on the CPU though there are other devices.
    pub(crate) fn left_to_cpu(&self, decoder: &Decoder) -> Option<String> {
        let why = without_kernel(decoder).filter(|_| matches!(self.solvers, Solvers::Cuda { .. }));
        why.map(|why| format!("the model runs on the CPU: {why}"))
    }

    /// Does something on a lane. `subject` is whose trouble it is if there is none.
    ///
    /// # Errors
    /// `OutOfMemory`, `Hung` if a device fails, or what the work says.
    pub(crate) fn with<T>(
        &self,
        subject: &str,
        work: impl FnOnce(&mut Lane) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut lane = self.take().map_err(|error| failure::device(subject, &error))?;
        let done = work(&mut lane);
        // A lane whose work failed may have more queued: it ends with the lane. Where memory was short, so do the idle ones.
        match &done {
            Ok(_) => self.give_back(lane),
            Err(failed) if failed.class == FailureClass::OutOfMemory => self.release(),
            Err(_) => {}
        }
        done
    }

    /// The first CUDA device, for what is done on one alone.
    pub(crate) fn first_cuda(&self) -> Option<&Cuda> {
        match &self.solvers {
            Solvers::Cpu => None,
            Solvers::Cuda { first, .. } => first.first().map(Arc::as_ref),
        }
    }

    /// A lane, used before if there is one.
    fn take(&self) -> Result<Lane, DeviceError> {
        if let Some(lane) = self.idle().pop() {
            return Ok(lane);
        }
        match &self.solvers {
            Solvers::Cpu => Ok(Lane::default()),
            Solvers::Cuda { first, made, .. } => {
                let number = made.fetch_add(1, Ordering::Relaxed) % first.len();
                let home = Arc::clone(&first[number]);
                let (device, workspace) = (home.lane()?, Workspace::new());
                let cuda = CudaLane { device, number, workspace, staging: None, home };
                Ok(Lane { cuda: Some(cuda), ..Lane::default() })
            }
        }
    }

    fn give_back(&self, lane: Lane) {
        self.idle().push(lane);
    }

    /// Forgets the memory of solves and runs: a job is over, or memory is short.
    pub(crate) fn release(&self) {
        self.idle().clear();
        if let Solvers::Cuda { place, first, .. } = &self.solvers {
            place.release();
            // A device that fails says so when it is used.
            first.iter().for_each(|device| drop(device.give_back()));
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Lane>> {
        // A list is whole at every step.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lane {
    /// What sums the products of rows of `cols` values: decided by the job and the kind of device alone, so that all of a
    /// layer's sums are made in the same way.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    pub(crate) fn summing(
        &mut self,
        cols: usize,
        carries: CarryPrecision,
    ) -> Result<Summing<'_>, DeviceError> {
        let Some(CudaLane { device, staging, home, .. }) =
            self.cuda.as_mut().filter(|_| cols >= SUMMED_ON_CPU)
        else {
            return Ok(Summing::Cpu);
        };
        let staging = match staging {
            Some(made) => made,
            None => staging.insert(device.staging()?),
        };
        let digits = match carries {
            CarryPrecision::F32 => device.row_digits(),
            CarryPrecision::Bf16 => RowDigits::Bf16,
        };
        Ok(Summing::Cuda { lane: device, staging, home, digits })
    }

    /// [`estimate`], on the device that will solve these rows: the same encodings.
    ///
    /// # Errors
    /// Those of the weights; of the device.
    pub(crate) fn estimate(
        &self,
        spec: &GridSpec,
        w: &[f32],
        (rows, cols): (usize, usize),
        importance: Option<&[f32]>,
    ) -> Result<Encodings, EstimateError> {
        let cuda = self.cuda.as_ref().filter(|_| !is_small(rows, cols));
        if let Some(CudaLane { device, .. }) = cuda
            && let Some(grids) = MseGrids::new(spec, w, rows, cols, importance)?
        {
            let ((qmin, qmax), symmetric, width) = (grids.integers(), grids.is_symmetric(), grids.width());
            let search = GridSearch { qmin, qmax, symmetric, width };
            match device.search_grids((rows, cols), search, w, grids.importance()) {
                Ok((scale, zero_point)) => return Ok(grids.encodings(scale, zero_point)?),
                // The CPU finds the same.
                Err(DeviceError::OutOfMemory { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(estimate(spec, w, rows, cols, importance)?)
    }

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
            Some(CudaLane { device, number, workspace, .. }) => {
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
