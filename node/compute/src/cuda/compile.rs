//! Kernels compiled on the spot, for exactly the device found, once per process.
//!
//! NVRTC makes machine code where it knows the device; where the device is newer than the compiler, the newest portable
//! code it can make, which the driver translates. Not here: which kernels there are (`kernels`).
#![expect(unsafe_code, reason = "NVRTC's calls for machine code have no safe form")]

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::nvrtc::{result, sys};

/// Something the driver loads: machine code, or portable code with a 0 at its end.
pub(super) type Image = Arc<Vec<u8>>;

type Known = BTreeMap<(&'static str, (i32, i32)), Image>;

/// Compiles a file of kernels for a compute capability; the second time it is remembered.
///
/// # Errors
/// The compiler's log, or what it says of itself.
pub(super) fn image(file: &'static str, source: &str, capability: (i32, i32)) -> Result<Image, String> {
    static KNOWN: Mutex<Known> = Mutex::new(BTreeMap::new());
    // Held while compiling: others that want the same wait instead of doing it again.
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(image) = known.get(&(file, capability)) {
        return Ok(Arc::clone(image));
    }
    let image = Arc::new(compile(file, source, capability)?);
    known.insert((file, capability), Arc::clone(&image));
    Ok(image)
}

fn compile(file: &str, source: &str, capability: (i32, i32)) -> Result<Vec<u8>, String> {
    let program = Program::new(file, source)?;
    let target = Target::of(capability, &supported()?)?;
    program.compile(&target)?;
    match target.machine {
        true => program.take(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN),
        false => program.take(sys::nvrtcGetPTXSize, sys::nvrtcGetPTX),
    }
}

/// What to compile for.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    /// Machine code; else portable code.
    machine: bool,
    architecture: i32,
}

impl Target {
    /// The device's own architecture, or the newest that is older.
    fn of((major, minor): (i32, i32), supported: &[i32]) -> Result<Self, String> {
        let own = major * 10 + minor;
        let newest = supported.iter().copied().filter(|architecture| *architecture <= own).max();
        match newest {
            Some(architecture) => Ok(Self { machine: architecture == own, architecture }),
            None => Err(format!(
                "compute capability {major}.{minor} is unknown to NVRTC, which supports {supported:?}"
            )),
        }
    }

    fn option(&self) -> String {
        let kind = if self.machine { "sm" } else { "compute" };
        format!("--gpu-architecture={kind}_{}", self.architecture)
    }
}

/// Architectures that the compiler knows, as 90 for 9.0.
fn supported() -> Result<Vec<i32>, String> {
    let mut count: c_int = 0;
    // SAFETY: writes one integer to where it is told.
    let status = unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) };
    status.result().map_err(|error| format!("NVRTC: {error:?}"))?;
    let mut all = vec![0 as c_int; count.unsigned_abs() as usize];
    // SAFETY: writes as many integers as it has just said, which is how many there is room for.
    let status = unsafe { sys::nvrtcGetSupportedArchs(all.as_mut_ptr()) };
    status.result().map_err(|error| format!("NVRTC: {error:?}"))?;
    Ok(all)
}

/// NVRTC's program, destroyed when dropped.
struct Program {
    handle: sys::nvrtcProgram,
    file: String,
}

impl Program {
    fn new(file: &str, source: &str) -> Result<Self, String> {
        let text = |text: &str| CString::new(text).map_err(|error| format!("{file}: {error}"));
        let handle = result::create_program(&text(source)?, Some(&text(file)?))
            .map_err(|error| format!("NVRTC: {file}: {error:?}"))?;
        Ok(Self { handle, file: file.to_owned() })
    }

    fn compile(&self, target: &Target) -> Result<(), String> {
        // SAFETY: the handle is a program's, not yet destroyed.
        let compiled = unsafe { result::compile_program(self.handle, &[target.option()]) };
        compiled.map_err(|error| {
            let log = self.take(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_owned();
            format!("NVRTC: {} for {}: {error:?}\n{log}", self.file, target.option())
        })
    }

    /// What the compiler made, by the two calls that tell its size and give it.
    fn take(
        &self,
        size: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        get: unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult,
    ) -> Result<Vec<u8>, String> {
        let failed = |error| format!("NVRTC: {}: {error:?}", self.file);
        let mut bytes = 0usize;
        // SAFETY: the handle is a program's, not yet destroyed; one integer is written.
        unsafe { size(self.handle, &raw mut bytes) }.result().map_err(failed)?;
        let mut made = vec![0u8; bytes];
        // SAFETY: as above; as many bytes are written as the compiler has just said.
        unsafe { get(self.handle, made.as_mut_ptr().cast()) }.result().map_err(failed)?;
        Ok(made)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the handle is a program's and is not used again. A failure leaves a few bytes unfreed.
        let _ = unsafe { result::destroy_program(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::kernels::FILES;
    use crate::cuda::libraries::{Library, open_libraries};

    #[test]
    fn a_device_gets_its_own_code_or_the_newest_older() {
        let known = [75, 80, 86, 90];
        let target = |capability| Target::of(capability, &known);
        assert_eq!(target((9, 0)).unwrap().option(), "--gpu-architecture=sm_90");
        assert_eq!(target((8, 9)).unwrap().option(), "--gpu-architecture=compute_86");
        assert_eq!(target((12, 0)).unwrap().option(), "--gpu-architecture=compute_90");
        assert!(target((5, 2)).unwrap_err().contains("5.2 is unknown to NVRTC"));
    }

    /// The compiler, from the folders that `HALFSTEP_CUDA_LIBRARIES` names or the system's.
    fn compiler_is_there() -> bool {
        let folders = std::env::var_os("HALFSTEP_CUDA_LIBRARIES").unwrap_or_default();
        let folders: Vec<_> =
            std::env::split_paths(&folders).filter(|path| !path.as_os_str().is_empty()).collect();
        let opened = open_libraries(&folders);
        let there = Library::Nvrtc.is_present();
        if !there {
            println!("SKIPPED: no NVRTC; {opened:?}");
        }
        there
    }

    #[test]
    fn kernels_become_machine_code_for_devices_and_portable_code_for_newer_ones() {
        if !compiler_is_there() {
            return;
        }
        for file in FILES {
            for capability in [(8, 0), (9, 0), (12, 0)] {
                let machine = image(file.name, file.source, capability).unwrap();
                assert!(machine.starts_with(b"\x7fELF"), "{} for {capability:?}", file.name);
            }
            let portable = image(file.name, file.source, (99, 0)).unwrap();
            let text = String::from_utf8_lossy(&portable);
            assert!(text.contains(".version") && text.ends_with('\0'), "{}", file.name);
        }
    }

    #[test]
    fn mistakes_come_back_as_the_compilers_log() {
        if !compiler_is_there() {
            return;
        }
        let error =
            compile("wrong.cu", "extern \"C\" __global__ void f() { undeclared = 1; }", (9, 0)).unwrap_err();
        assert!(error.starts_with("NVRTC: wrong.cu for --gpu-architecture=sm_90"), "{error}");
        assert!(error.contains("\"undeclared\" is undefined"), "{error}");
    }
}
