//! What a CUDA device computes and how fast, in one command: correctness first, then times beside floors of the same run, then
//! whole jobs.
//!
//! Needs no network, no toolchain and no Python: this binary, and for whole jobs `halfstep` beside it. With `--device cpu --quick`
//! it is its own dry run. Times of kernels are wall-clock around queued calls and one wait, best of several; those of jobs are a
//! process's, from start to end.
//!
//! Not here: the jobs themselves; `halfstep quantize` runs them as it does for anybody.
#![expect(clippy::print_stdout, reason = "a benchmark's result is what it prints")]

mod asked;
#[path = "../block.rs"]
mod block;
mod blocks;
mod check;
mod checkpoint;
mod decoder;
mod figures;
mod halfstep;
mod memory;
mod models;
mod results;
mod solving;
mod statistics;
mod times;

use std::process::ExitCode;
use std::sync::Arc;

use asked::{Asked, Part, Where};
use figures::Figures;
use halfstep::Halfstep;
use halfstep_compute::cuda::{Cuda, CudaBuffer, CudaPlace, GridSearch, Precision, open_libraries};
use halfstep_compute::decoder::Place;
use halfstep_compute::{Cpu, CpuBuffer, Device, DeviceError, Host};
use halfstep_quant::{GridSpec, MseGrids, estimate};

/// So many parts of so many of the device's memory may be activations, as in a job.
const STAYING: (usize, usize) = (2, 5);

/// A device whose queue can be waited for and that moves memory.
pub(crate) trait Timed: Device {
    /// Returns when everything queued is done.
    fn wait(&self) -> Result<(), DeviceError>;
    /// Copies the whole of one array to another on the device.
    fn duplicate(&self, from: &Self::Buffer, to: &mut Self::Buffer) -> Result<(), DeviceError>;
    /// Another queue of the same device.
    fn another(&self) -> Result<Self, DeviceError>
    where
        Self: Sized;
    /// Scales, then zero points, of grids that are searched for where the device does that best.
    fn search(&self, spec: &GridSpec, w: &[f32], shape: (usize, usize)) -> Result<Vec<f32>, String>;
    /// What runs decoders there.
    type Place: Place;
    /// The same device as a place for decoders.
    fn place(&self) -> Result<Arc<Self::Place>, DeviceError>;
}

impl Timed for Cpu {
    fn wait(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn duplicate(&self, from: &CpuBuffer, to: &mut CpuBuffer) -> Result<(), DeviceError> {
        to.copy_from_slice(from);
        Ok(())
    }
    fn another(&self) -> Result<Self, DeviceError> {
        Ok(Self)
    }
    fn search(&self, spec: &GridSpec, w: &[f32], (rows, cols): (usize, usize)) -> Result<Vec<f32>, String> {
        let found = estimate(spec, w, rows, cols, None).map_err(|error| error.to_string())?;
        Ok(listed(&found.scale, &found.zero_point))
    }
    type Place = Host;
    fn place(&self) -> Result<Arc<Host>, DeviceError> {
        Ok(Arc::default())
    }
}

fn listed(scale: &[f32], zero_point: &[i32]) -> Vec<f32> {
    scale.iter().copied().chain(zero_point.iter().map(|zero| *zero as f32)).collect()
}

impl Timed for Cuda {
    fn wait(&self) -> Result<(), DeviceError> {
        self.synchronize()
    }
    fn duplicate(&self, from: &CudaBuffer, to: &mut CudaBuffer) -> Result<(), DeviceError> {
        self.copy(from, to)
    }
    fn another(&self) -> Result<Self, DeviceError> {
        self.lane()
    }
    fn search(&self, spec: &GridSpec, w: &[f32], (rows, cols): (usize, usize)) -> Result<Vec<f32>, String> {
        let grids = MseGrids::new(spec, w, rows, cols, None).map_err(|error| error.to_string())?;
        let grids = grids.ok_or("not a search by squared error")?;
        let ((qmin, qmax), symmetric, width) = (grids.integers(), grids.is_symmetric(), grids.width());
        let search = GridSearch { qmin, qmax, symmetric, width };
        let found = self.search_grids((rows, cols), search, w, grids.importance());
        let (scale, zero_point) = found.map_err(|error| error.to_string())?;
        Ok(listed(&scale, &zero_point))
    }
    type Place = CudaPlace;
    fn place(&self) -> Result<Arc<CudaPlace>, DeviceError> {
        let place = CudaPlace::new([self])?;
        place.let_stay(STAYING)?;
        Ok(Arc::new(place))
    }
}

/// Parts that run kernels in this process.
fn kernels<D: Timed + statistics::Sums>(
    device: &D,
    asked: &Asked,
    figures: &mut Figures,
) -> Result<(), String> {
    let failed = |error: DeviceError| error.to_string();
    println!("device: {}", device.describe());
    if asked.part(Part::Check) {
        check::all(device, figures)?;
    }
    let floors = times::floors(device, asked, figures).map_err(failed)?;
    if asked.part(Part::Products) {
        times::products(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part(Part::Step) {
        times::step(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part(Part::Iteration) {
        times::iteration(device, asked, floors, figures).map_err(failed)?;
        times::lanes(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part(Part::Gram) {
        times::gram(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part(Part::Statistics) {
        statistics::all(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part(Part::Refine) {
        times::refine(device, asked, figures).map_err(failed)?;
    }
    if asked.part(Part::Solve) {
        solving::solves(device, asked, figures)?;
    }
    if asked.part(Part::Decoder) {
        decoder::blocks(device, asked, floors, figures)?;
    }
    Ok(())
}

/// The same on the device that is asked for, which is given back afterwards: jobs find its memory free.
fn on_device(asked: &Asked, figures: &mut Figures) -> Result<(), String> {
    let Where::Cuda(ordinal) = asked.device else { return kernels(&Cpu, asked, figures) };
    let folders = std::env::var_os("HALFSTEP_CUDA_LIBRARIES").unwrap_or_default();
    let folders: Vec<_> =
        std::env::split_paths(&folders).filter(|path| !path.as_os_str().is_empty()).collect();
    for file in open_libraries(&folders).map_err(|error| error.to_string())? {
        println!("opened: {}", file.display());
    }
    let precision = if asked.f32 { Precision::F32 } else { Precision::Tf32 };
    let begun = std::time::Instant::now();
    let device = Cuda::open(ordinal, precision).map_err(|error| error.to_string())?;
    println!("opened the device and compiled the kernels in {:.2} s", begun.elapsed().as_secs_f64());
    kernels(&device, asked, figures)
}

/// Parts that run whole jobs in processes of their own.
fn jobs(asked: &Asked, figures: &mut Figures) {
    match Halfstep::find(asked) {
        Err(why) => figures.fail(why),
        Ok(halfstep) => {
            if asked.part(Part::Models) {
                models::models(&halfstep, asked, figures);
                figures.write(asked);
            }
            if asked.part(Part::Blocks) {
                blocks::blocks(&halfstep, asked, figures);
            }
        }
    }
}

fn measure(asked: &Asked, figures: &mut Figures) {
    if asked.kernels() {
        on_device(asked, figures).unwrap_or_else(|why| figures.fail(why));
        figures.write(asked);
    }
    if asked.part(Part::Models) || asked.part(Part::Blocks) {
        jobs(asked, figures);
    }
    figures.say("failures", figures.failures().len() as f64, "", "");
    figures.write(asked);
}

fn main() -> ExitCode {
    let asked = Asked::parse_or_exit();
    let mut figures = Figures::default();
    // That the file cannot be written should not be found out at the end.
    figures.write(&asked);
    if figures.failures().is_empty() {
        measure(&asked, &mut figures);
    }
    figures.failures().iter().for_each(|why| println!("FAILED: {why}"));
    if figures.failures().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
