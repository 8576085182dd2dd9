//! A CUDA device for tests: the first of this machine, else one that the host pretends to be (`../fake/cuda.cpp`).
//!
//! The pretended one runs the product's whole path: its look-ups, arguments, order of work, kernels and errors; it is slow, and
//! says nothing of speed or of the hardware's rounding. `HALFSTEP_TEST_DEVICE=cuda` keeps to real ones.

#![allow(dead_code, unreachable_pub, reason = "a module of tests, of which each file uses a part")]
#![expect(unsafe_code, reason = "loads a library built here")]
#![allow(clippy::panic, reason = "a device that should be there and is not fails the test")]

mod libraries;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use halfstep_compute::cuda::{Cuda, Precision, open_libraries};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// A lane of the first device; where there is none, says so once per test.
pub fn cuda() -> Option<Cuda> {
    cuda_of(Precision::Tf32)
}

/// The same, reading factors as given.
///
/// # Panics
/// If the host pretends and its device does not open: then nothing would be tested.
pub fn cuda_of(precision: Precision) -> Option<Cuda> {
    /// Whether the host pretends.
    static READY: OnceLock<Result<bool, String>> = OnceLock::new();
    let ready = READY.get_or_init(|| {
        let folders = std::env::var_os("HALFSTEP_CUDA_LIBRARIES").unwrap_or_default();
        let folders: Vec<PathBuf> =
            std::env::split_paths(&folders).filter(|p| !p.as_os_str().is_empty()).collect();
        open_libraries(&folders).map_err(|error| error.to_string())?;
        // Whether the driver is there is asked of the loader, not of the product: that would remember the answer.
        // SAFETY: the driver's initialisers have no requirements.
        let real = ["libcuda.so.1", "libcuda.so"].iter().any(|name| unsafe { Library::new(*name) }.is_ok());
        if real || std::env::var("HALFSTEP_TEST_DEVICE").is_ok_and(|kind| kind == "cuda") {
            return Ok(false);
        }
        pretend().map(|()| true)
    });
    match ready.clone().and_then(|_| Cuda::open(0, precision).map_err(|error| error.to_string())) {
        Ok(device) => Some(device),
        Err(reason) if *ready == Ok(true) => {
            panic!("the host pretends to be a device that does not open: {reason}")
        }
        Err(reason) => {
            println!("SKIPPED: {reason}");
            None
        }
    }
}

/// Whether the host pretends: then large shapes take too long.
pub fn is_fake(device: &Cuda) -> bool {
    halfstep_compute::Device::describe(device).contains("pretending")
}

/// Builds the fake and opens it under the names of CUDA's libraries.
fn pretend() -> Result<(), String> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find_map(|root| {
        let tests = root.join("node/compute/tests");
        tests.is_dir().then_some(tests)
    });
    let tests = tests.ok_or("the sources of the pretended device are not there")?;
    // It stays as long as the process: kernels are compiled when a device is opened.
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?.keep();
    libraries::build(&tests, &folder)?;
    for name in libraries::NAMES {
        // SAFETY: built just now from our own source; it runs nothing when loaded.
        let opened = unsafe { Library::open(Some(folder.join(name)), RTLD_NOW | RTLD_GLOBAL) };
        std::mem::forget(opened.map_err(|error| error.to_string())?);
    }
    Ok(())
}
