//! What this machine can solve on: the report of `devices`, and the devices that a node opens.
//!
//! Not here: looking and opening (`agent`, `compute`).

use std::path::PathBuf;

use halfstep_agent::cuda::{Found, Gpu, Nccl, Precision, open_libraries, probe};
use halfstep_agent::{DeviceChoice, Devices, Exchange};
use serde::Serialize;

use crate::config::DeviceConfig;
use crate::exit::CliError;
use crate::render::Table;
use crate::values::{ByteSize, DeviceArg, GradientsArg};

/// What there is, for people and programs.
#[derive(Debug, Serialize)]
pub(crate) struct DevicesReport {
    /// The CPU as manifests name it.
    cpu: String,
    cuda: CudaReport,
}

#[derive(Debug, Serialize)]
struct CudaReport {
    usable: bool,
    /// The first thing that is missing.
    reason: Option<String>,
    driver: LibraryReport,
    cublas: LibraryReport,
    nvrtc: LibraryReport,
    /// For groups of nodes; nothing else needs it.
    nccl: LibraryReport,
    devices: Vec<GpuReport>,
    /// Libraries opened from folders the user named.
    libraries: Vec<PathBuf>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum LibraryReport {
    Version(String),
    Missing(String),
}

#[derive(Debug, Serialize)]
struct GpuReport {
    device: String,
    name: String,
    memory_bytes: u64,
    compute_capability: String,
    usable: bool,
}

/// Looks at this machine.
///
/// # Errors
/// Bad configuration if a folder that the user named is of no use.
pub(crate) fn report(folders: &[PathBuf]) -> Result<DevicesReport, CliError> {
    let libraries = libraries(folders)?;
    let found = probe();
    let gpu = |gpu: &Gpu| GpuReport {
        device: format!("cuda:{}", gpu.ordinal),
        name: gpu.name.clone(),
        memory_bytes: gpu.memory_bytes,
        compute_capability: format!("{}.{}", gpu.capability.0, gpu.capability.1),
        usable: found.device(gpu.ordinal).is_ok(),
    };
    Ok(DevicesReport {
        cpu: Devices::cpu().describe(),
        cuda: CudaReport {
            usable: found.usable().is_ok(),
            reason: found.usable().err(),
            driver: library(&found.driver),
            cublas: library(&found.blas),
            nvrtc: library(&found.compiler),
            nccl: nccl(),
            devices: found.devices.iter().map(gpu).collect(),
            libraries,
        },
    })
}

fn library(found: &Found) -> LibraryReport {
    match found {
        Found::Version(version) => LibraryReport::Version(version.clone()),
        Found::Missing(reason) => LibraryReport::Missing(reason.clone()),
    }
}

fn nccl() -> LibraryReport {
    match Nccl::find() {
        Ok(nccl) => LibraryReport::Version(nccl.version()),
        Err(error) => LibraryReport::Missing(format!("{error} (only `node --nccl` needs it)")),
    }
}

fn libraries(folders: &[PathBuf]) -> Result<Vec<PathBuf>, CliError> {
    open_libraries(folders).map_err(|error| {
        CliError::configuration(error).hint(
            "name the folders of libcublas.so and libnvrtc.so, as in .../site-packages/nvidia/cublas/lib",
        )
    })
}

/// The report as text.
pub(crate) fn text(report: &DevicesReport) -> String {
    let cuda = &report.cuda;
    let mut table = Table::new(&["<device", "<name", "memory", "compute", "<use"]);
    table.row(["cpu".into(), report.cpu.clone(), String::new(), String::new(), "yes".into()]);
    for gpu in &cuda.devices {
        table.row([
            gpu.device.clone(),
            gpu.name.clone(),
            ByteSize(gpu.memory_bytes).to_string(),
            gpu.compute_capability.clone(),
            if gpu.usable { "yes" } else { "no" }.into(),
        ]);
    }
    let mut out = table.to_string();
    let libraries =
        [("driver", &cuda.driver), ("cuBLAS", &cuda.cublas), ("NVRTC", &cuda.nvrtc), ("NCCL", &cuda.nccl)];
    for (name, library) in libraries {
        out += &match library {
            LibraryReport::Version(version) => format!("{name}: {version}\n"),
            LibraryReport::Missing(reason) => format!("{reason}\n"),
        };
    }
    for file in &cuda.libraries {
        out += &format!("opened: {}\n", file.display());
    }
    out += &match &cuda.reason {
        None => "CUDA can be used: --device auto does\n".to_owned(),
        Some(reason) => format!("CUDA cannot be used: {reason}\n"),
    };
    out
}

/// Memory of the smallest CUDA device that a job may run on here; nothing if there is none.
pub(crate) fn memory(config: &DeviceConfig) -> Result<Option<u64>, CliError> {
    libraries(&config.libraries)?;
    let found = probe();
    let chosen = |gpu: &&Gpu| match &config.device {
        DeviceArg::Auto => true,
        DeviceArg::Cpu => false,
        DeviceArg::Cuda(ordinals) => ordinals.is_empty() || ordinals.contains(&gpu.ordinal),
    };
    Ok(found.devices.iter().filter(chosen).map(|gpu| gpu.memory_bytes).min())
}

/// Opens what a run or node solves on.
///
/// # Errors
/// Bad configuration if a chosen device or a named folder cannot be used.
pub(crate) fn open(config: &DeviceConfig) -> Result<Devices, CliError> {
    libraries(&config.libraries)?;
    let choice = match &config.device {
        DeviceArg::Auto => DeviceChoice::Auto,
        DeviceArg::Cpu => DeviceChoice::Cpu,
        DeviceArg::Cuda(ordinals) => DeviceChoice::Cuda(ordinals.clone()),
    };
    let precision = match config.gradients {
        GradientsArg::Tf32 => Precision::Tf32,
        GradientsArg::F32 => Precision::F32,
    };
    Devices::open(&choice, precision).map_err(|why| {
        CliError::configuration(format!("device `{}`: {why}", config.device))
            .hint("`halfstep devices` shows what was found; `--device cpu` needs none of it")
    })
}

/// What a node adds up statistics with.
///
/// # Errors
/// Bad configuration if NCCL or a device for it is missing.
pub(crate) fn exchange(devices: &Devices) -> Result<Exchange, CliError> {
    // Only in the binary that the fault tests build: a library that stands in for NCCL, on a machine without devices.
    #[cfg(feature = "failpoints")]
    if std::env::var_os("HALFSTEP_NCCL_HOST_MEMORY").is_some() {
        let library = Nccl::find().map_err(CliError::configuration)?;
        return Ok(Exchange::in_host_memory(library));
    }
    Exchange::over(devices).map_err(|why| {
        CliError::configuration(format!("--nccl: {why}")).hint(
            "`halfstep devices` shows what was found; name NCCL's folder with --cuda-libraries, as in .../site-packages/nvidia/nccl/lib",
        )
    })
}

/// What a node says of its devices when it starts; nothing where there is only the CPU.
pub(crate) fn line(devices: &Devices) -> Option<String> {
    devices.title().map(|title| format!("Solving on {title}")).or_else(|| devices.note.clone())
}

/// Who works on a job: threads, and devices besides the CPU.
pub(crate) fn workers(threads: String, devices: &Devices) -> String {
    match (devices.title(), &devices.note) {
        (Some(title), _) => format!("{threads}, {title}"),
        (None, Some(note)) => format!("{threads}, {note}"),
        (None, None) => threads,
    }
}
