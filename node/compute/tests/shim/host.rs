//! A CUDA device for tests where there is none: this host behind the driver's interface (`driver.cpp`).
//!
//! Not here: the kernels one by one (`Family`, which also checks that no order of threads matters).
#![allow(unreachable_pub, reason = "a module of tests")]
#![expect(unsafe_code, reason = "opens libraries that were built here")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The three libraries: the part of the source, and the name the loader looks for.
const LIBRARIES: [(&str, &str); 3] =
    [("DRIVER", "libcuda.so"), ("NVRTC", "libnvrtc.so"), ("BLAS", "libcublas.so")];

/// Makes this host a CUDA device for the rest of the process, unless the machine has a driver.
///
/// # Errors
/// Why it is none: there is no compiler, or what it says.
pub fn device_or_host() -> Result<(), String> {
    static DONE: OnceLock<Result<(), String>> = OnceLock::new();
    DONE.get_or_init(|| {
        // SAFETY: the driver's initialisers have no requirements.
        let real = unsafe { libloading::Library::new("libcuda.so.1") };
        if real.is_ok() { Ok(()) } else { build_and_open() }
    })
    .clone()
}

/// Folder of `driver.cpp` and `shim.h`.
fn sources() -> PathBuf {
    Path::new(file!()).parent().map_or_else(PathBuf::new, |here| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|root| root.join(here).exists());
        root.unwrap_or(Path::new("")).join(here)
    })
}

fn build_and_open() -> Result<(), String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let version = Command::new(&compiler).arg("--version").output();
    version.map_err(|error| format!("no C++ compiler `{compiler}` to be a device with: {error}"))?;
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host-device");
    std::fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    // One path for all tests: compiled kernels are kept under a name made of it.
    let sources = sources().canonicalize().map_err(|error| format!("driver.cpp: {error}"))?;
    for (part, name) in LIBRARIES {
        // Other tests may build the same at the same time.
        let own = cache.join(format!("{name}.{}", std::process::id()));
        let quoted = |name: &str, value: &Path| format!("-D{name}=\"{}\"", value.display());
        let output = Command::new(&compiler)
            .args([
                "-std=c++17",
                "-O2",
                "-ffp-contract=off",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-fPIC",
                "-shared",
            ])
            .arg(format!("-DHALFSTEP_{part}"))
            .arg(quoted("HALFSTEP_SHIM", &sources.join("shim.h")))
            .arg(quoted("HALFSTEP_CACHE", &cache))
            .arg(quoted("HALFSTEP_CXX", Path::new(&compiler)))
            .arg(format!("-Wl,-soname,{name}"))
            .args(["-o".as_ref(), own.as_os_str(), sources.join("driver.cpp").as_os_str()])
            .output()
            .map_err(|error| format!("{compiler}: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        open(&own)?;
        std::fs::remove_file(&own).map_err(|error| format!("{}: {error}", own.display()))?;
    }
    Ok(())
}

/// Keeps a library open, so that whoever looks for its name later finds it.
#[cfg(unix)]
fn open(file: &Path) -> Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: it was built just now from our own source and does nothing when opened.
    let library = unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) };
    std::mem::forget(library.map_err(|error| error.to_string())?);
    Ok(())
}

#[cfg(not(unix))]
fn open(_file: &Path) -> Result<(), String> {
    Err("the host is a device on Unix only".into())
}
