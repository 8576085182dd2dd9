//! What a CUDA device computes and how fast, in one command: correctness first, then times beside floors of the same run.
//!
//! `gpu [--device cuda:0|cpu] [--quick] [--json FILE] [PART...]`; parts: check, floors, products, step, iteration, gram,
//! statistics, refine, solve, decoder. Needs no network and no toolchain; `HALFSTEP_CUDA_LIBRARIES` names folders of CUDA's libraries. With
//! `--device cpu --quick` it is its own dry run. Times are wall-clock around queued calls and one wait, best of several.
//!
//! Not here: whole jobs (`halfstep quantize`).
#![expect(clippy::print_stdout, reason = "a benchmark's result is what it prints")]

#[path = "../block.rs"]
mod block;
mod check;
mod decoder;
mod figures;
mod solving;
mod statistics;
mod times;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use figures::Figures;
use halfstep_compute::cuda::{Cuda, CudaBuffer, CudaPlace, Precision, open_libraries};
use halfstep_compute::decoder::Place;
use halfstep_compute::{Cpu, CpuBuffer, Device, DeviceError, Host};

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
    type Place = Host;
    fn place(&self) -> Result<Arc<Host>, DeviceError> {
        Ok(Arc::default())
    }
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
    type Place = CudaPlace;
    fn place(&self) -> Result<Arc<CudaPlace>, DeviceError> {
        CudaPlace::new([self]).map(Arc::new)
    }
}

/// What is asked for.
pub(crate) struct Asked {
    pub(crate) quick: bool,
    parts: Vec<String>,
}

impl Asked {
    fn part(&self, name: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|part| part == name)
    }
}

const PARTS: [&str; 10] =
    ["check", "floors", "products", "step", "iteration", "gram", "statistics", "refine", "solve", "decoder"];
const USAGE: &str = "usage: gpu [--device cuda:N|cpu] [--f32] [--quick] [--json FILE] \
                     [check|floors|products|step|iteration|gram|statistics|refine|solve|decoder]...";

struct Command {
    asked: Asked,
    /// None: the CPU.
    ordinal: Option<usize>,
    precision: Precision,
    json: Option<PathBuf>,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Command, String> {
    let asked = Asked { quick: false, parts: Vec::new() };
    let mut command = Command { asked, ordinal: Some(0), precision: Precision::Tf32, json: None };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word}: no value\n{USAGE}"));
        match word.as_str() {
            "--quick" => command.asked.quick = true,
            "--f32" => command.precision = Precision::F32,
            "--json" => command.json = Some(value()?.into()),
            "--device" => {
                let device = value()?;
                let number = device.strip_prefix("cuda:").map(str::parse::<usize>);
                command.ordinal = match (device.as_str(), number) {
                    ("cpu", _) => None,
                    (_, Some(Ok(ordinal))) => Some(ordinal),
                    _ => return Err(format!("`{device}` is no device\n{USAGE}")),
                };
            }
            part if PARTS.contains(&part) => command.asked.parts.push(word),
            other => return Err(format!("`{other}` is no part\n{USAGE}")),
        }
    }
    Ok(command)
}

fn run<D: Timed + statistics::Sums>(device: &D, asked: &Asked, figures: &mut Figures) -> Result<(), String> {
    let failed = |error: DeviceError| error.to_string();
    println!("device: {}", device.describe());
    if asked.part("check") {
        check::all(device, figures)?;
    }
    let floors = times::floors(device, asked, figures).map_err(failed)?;
    if asked.part("products") {
        times::products(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part("step") {
        times::step(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part("iteration") {
        times::iteration(device, asked, figures).map_err(failed)?;
        times::lanes(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part("gram") {
        times::gram(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part("statistics") {
        statistics::all(device, asked, floors, figures).map_err(failed)?;
    }
    if asked.part("refine") {
        times::refine(device, asked, figures).map_err(failed)?;
    }
    if asked.part("solve") {
        solving::solves(device, asked, figures)?;
    }
    if asked.part("decoder") {
        decoder::blocks(device, asked, floors, figures)?;
    }
    Ok(())
}

fn measure(command: &Command, figures: &mut Figures) -> Result<(), String> {
    let Some(ordinal) = command.ordinal else { return run(&Cpu, &command.asked, figures) };
    let folders = std::env::var_os("HALFSTEP_CUDA_LIBRARIES").unwrap_or_default();
    let folders: Vec<_> =
        std::env::split_paths(&folders).filter(|path| !path.as_os_str().is_empty()).collect();
    for file in open_libraries(&folders).map_err(|error| error.to_string())? {
        println!("opened: {}", file.display());
    }
    let begun = std::time::Instant::now();
    let device = Cuda::open(ordinal, command.precision).map_err(|error| error.to_string())?;
    println!("opened the device and compiled the kernels in {:.2} s", begun.elapsed().as_secs_f64());
    run(&device, &command.asked, figures)
}

fn main() -> ExitCode {
    let mut figures = Figures::default();
    let outcome = parse(std::env::args().skip(1)).and_then(|command| {
        let measured = measure(&command, &mut figures);
        let written = match &command.json {
            Some(path) => {
                std::fs::write(path, figures.json()).map_err(|error| format!("{}: {error}", path.display()))
            }
            None => Ok(()),
        };
        measured.and(written)
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}
