//! NVRTC, loaded from where it can be found without a GPU or a driver: the ten functions that compile a source.
//!
//! Not here: which sources (`cuda_sources`); the product's own use of NVRTC (`halfstep_compute`).
#![allow(dead_code, unreachable_pub, reason = "a module of tests, of which each file uses a part")]
#![expect(unsafe_code, clippy::unwrap_used, clippy::print_stdout, reason = "calls a C library; tests")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::ptr::{null, null_mut};

use libloading::Library;

/// Lists every libnvrtc that Python packages brought along.
const WHEELS: &str = "import sys, glob; \
    print('\\n'.join(p for d in sys.path if d for p in glob.glob(d + '/nvidia/*/lib/libnvrtc.so*')))";

/// A loaded library.
pub struct Nvrtc {
    library: Library,
}

type Program = *mut c_void;

/// Where it may be, best first.
fn places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> =
        std::env::var_os("HALFSTEP_NVRTC").map(PathBuf::from).into_iter().collect();
    for version in ["13", "12"] {
        places.push(format!("libnvrtc.so.{version}").into());
        places.push(format!("/usr/local/cuda-{version}/lib64/libnvrtc.so.{version}").into());
    }
    places.push("/usr/local/cuda/lib64/libnvrtc.so".into());
    let python = std::env::var("HALFSTEP_PYTHON").unwrap_or_else(|_| "python3".into());
    if let Ok(output) = Command::new(python).args(["-c", WHEELS]).output() {
        // An empty name would be this very program.
        let found = String::from_utf8_lossy(&output.stdout);
        places.extend(found.lines().filter(|line| !line.is_empty()).map(PathBuf::from));
    }
    places
}

impl Nvrtc {
    /// The library, or `None` with the reason printed.
    pub fn find() -> Option<Self> {
        let places = places();
        // SAFETY: NVRTC's initialisers have no requirements; a path that the user names is theirs to vouch for.
        let library = places.iter().find_map(|place| unsafe { Library::new(place) }.ok());
        if library.is_none() {
            println!(
                "skipped: no libnvrtc in {places:?}; `pip install nvidia-cuda-nvrtc` or set HALFSTEP_NVRTC to the library"
            );
        }
        library.map(|library| Self { library })
    }

    fn call<T: Copy>(&self, name: &str) -> T {
        assert_eq!(size_of::<T>(), size_of::<*const c_void>(), "{name} is called through a function pointer");
        // SAFETY: every use below names a function of NVRTC's documented interface with its documented signature.
        unsafe { *self.library.get::<T>(name.as_bytes()).unwrap() }
    }

    /// Virtual architectures it knows, such as 90.
    pub fn architectures(&self) -> Vec<c_int> {
        let count: unsafe extern "C" fn(*mut c_int) -> c_int = self.call("nvrtcGetNumSupportedArchs");
        let list: unsafe extern "C" fn(*mut c_int) -> c_int = self.call("nvrtcGetSupportedArchs");
        let mut number = 0;
        // SAFETY: one integer is written.
        assert_eq!(unsafe { count(&mut number) }, 0);
        let mut architectures = vec![0; number as usize];
        // SAFETY: as many are written as the first call said.
        assert_eq!(unsafe { list(architectures.as_mut_ptr()) }, 0);
        architectures
    }

    /// Machine code of a source for an architecture, or the compiler's log; `name` is for the log.
    ///
    /// Not PTX: a driver older than this NVRTC would refuse that.
    pub fn machine_code(&self, name: &str, source: &str, architecture: c_int) -> Result<Vec<u8>, String> {
        Ok(self.translate(name, source, architecture)?.0)
    }

    /// What each kernel needs on a real architecture, in the assembler's words.
    pub fn resources(&self, name: &str, source: &str, architecture: c_int) -> Result<String, String> {
        Ok(self.translate(name, source, architecture)?.1)
    }

    /// Code and log.
    fn translate(&self, name: &str, source: &str, architecture: c_int) -> Result<(Vec<u8>, String), String> {
        let create: unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int = self.call("nvrtcCreateProgram");
        let compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int =
            self.call("nvrtcCompileProgram");
        let destroy: unsafe extern "C" fn(*mut Program) -> c_int = self.call("nvrtcDestroyProgram");
        let (source, name) = (CString::new(source).unwrap(), CString::new(name).unwrap());
        let options = [format!("--gpu-architecture=sm_{architecture}"), "--ptxas-options=-v".into()];
        let options = options.map(|option| CString::new(option).unwrap());
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = null_mut();
        // SAFETY: strings end in 0 and outlive the calls; there are no headers.
        let made = unsafe { create(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()) };
        assert_eq!(made, 0, "nvrtcCreateProgram");
        // SAFETY: the program was created above; options end in 0 and outlive the call.
        let compiled = unsafe { compile(program, pointers.len() as c_int, pointers.as_ptr()) };
        let (log, code) = (self.bytes(program, "ProgramLog"), self.bytes(program, "CUBIN"));
        // SAFETY: destroyed once and not used after.
        unsafe { destroy(&mut program) };
        if compiled == 0 { Ok((code, text(&log))) } else { Err(text(&log)) }
    }

    /// `nvrtcGet{what}`, after `nvrtcGet{what}Size`.
    fn bytes(&self, program: Program, what: &str) -> Vec<u8> {
        let size: unsafe extern "C" fn(Program, *mut usize) -> c_int =
            self.call(&format!("nvrtcGet{what}Size"));
        let get: unsafe extern "C" fn(Program, *mut c_char) -> c_int = self.call(&format!("nvrtcGet{what}"));
        let mut bytes = 0;
        // SAFETY: the program lives; one number is written.
        if unsafe { size(program, &mut bytes) } != 0 || bytes == 0 {
            return Vec::new();
        }
        let mut content = vec![0u8; bytes];
        // SAFETY: as many bytes are written as the call before said.
        unsafe { get(program, content.as_mut_ptr().cast()) };
        content
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}
