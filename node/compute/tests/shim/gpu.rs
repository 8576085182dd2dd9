//! The same launches on a GPU, by the driver's interface; asked for with `HALFSTEP_TEST_KERNELS_ON=gpu`.
//!
//! Not here: the product's own driver calls (`halfstep_compute`), which these tests are to be independent of.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr::{null_mut, without_provenance_mut};

use libloading::Library;

use super::nvrtc::Nvrtc;
use super::{Grid, Placed};

type Handle = *mut c_void;

/// The first device, and a module of one source on it.
pub struct Module {
    driver: Library,
    context: usize,
    module: usize,
}

/// A driver's answer that is not 0.
fn succeed(what: &str, code: c_int) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{what}: CUDA error {code}")) }
}

/// Architecture of the device, such as 90.
const MAJOR: c_int = 75;
const MINOR: c_int = 76;

impl Module {
    /// Compiles `source` for the first device and loads it.
    pub fn load(name: &str, source: &str) -> Result<Self, String> {
        // SAFETY: the driver's initialisers have no requirements.
        let driver = unsafe { Library::new("libcuda.so.1") }.map_err(|error| error.to_string())?;
        let mut this = Self { driver, context: 0, module: 0 };
        let (mut device, mut version) = (0, [0; 2]);
        let mut context: Handle = null_mut();
        // SAFETY: signatures as documented; every pointer is to a local of the type that is written.
        unsafe {
            let init: unsafe extern "C" fn(c_uint) -> c_int = this.function("cuInit");
            let get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int = this.function("cuDeviceGet");
            let attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int =
                this.function("cuDeviceGetAttribute");
            let retain: unsafe extern "C" fn(*mut Handle, c_int) -> c_int =
                this.function("cuDevicePrimaryCtxRetain");
            succeed("cuInit", init(0))?;
            succeed("cuDeviceGet", get(&mut device, 0))?;
            succeed("major", attribute(&mut version[0], MAJOR, device))?;
            succeed("minor", attribute(&mut version[1], MINOR, device))?;
            succeed("cuDevicePrimaryCtxRetain", retain(&mut context, device))?;
        }
        this.context = context.addr();
        let nvrtc = Nvrtc::find().ok_or("no NVRTC")?;
        let code = nvrtc.machine_code(name, source, 10 * version[0] + version[1])?;
        this.enter()?;
        let mut module: Handle = null_mut();
        // SAFETY: the code is complete and outlives the call, which copies it.
        unsafe {
            let load: unsafe extern "C" fn(*mut Handle, *const c_void) -> c_int =
                this.function("cuModuleLoadData");
            succeed("cuModuleLoadData", load(&mut module, code.as_ptr().cast()))?;
        }
        this.module = module.addr();
        Ok(this)
    }

    fn function<T: Copy>(&self, name: &str) -> T {
        assert_eq!(size_of::<T>(), size_of::<*const c_void>(), "{name} is called through a function pointer");
        // SAFETY: every use names a function of the driver's documented interface with its documented signature.
        unsafe { *self.driver.get::<T>(name.as_bytes()).unwrap() }
    }

    /// Makes the context this thread's.
    fn enter(&self) -> Result<(), String> {
        let set: unsafe extern "C" fn(Handle) -> c_int = self.function("cuCtxSetCurrent");
        // SAFETY: the context was retained above and is never released.
        succeed("cuCtxSetCurrent", unsafe { set(without_provenance_mut(self.context)) })
    }

    /// Launches a kernel. `values`: each argument in eight bytes, where `arrays[i]` is not given; else it becomes the array's
    /// address on the device, and the array's memory, guards included, is copied there before and back after.
    pub fn launch(
        &self,
        kernel: &str,
        grid: Grid,
        values: &mut [u64],
        arrays: &mut [Option<Placed>],
        same: &[Option<usize>],
    ) -> Result<(), String> {
        self.enter()?;
        let mut copies = Vec::new();
        for array in arrays.iter_mut() {
            copies.push(array.as_ref().map(|array| self.copy_in(array)).transpose()?);
        }
        let place =
            |at: usize| copies[at].zip(arrays[at].as_ref()).map(|(copy, array)| copy + array.start as u64);
        for (at, value) in values.iter_mut().enumerate() {
            if let Some(address) = place(same[at].unwrap_or(at)) {
                *value = address;
            }
        }
        self.run(kernel, grid, values)?;
        for (copy, array) in copies.iter().zip(arrays.iter_mut()) {
            if let (Some(copy), Some(array)) = (copy, array) {
                self.copy_out(*copy, array)?;
            }
        }
        Ok(())
    }

    fn copy_in(&self, array: &Placed) -> Result<u64, String> {
        let mut address = 0u64;
        // SAFETY: as many bytes are allocated as are copied from a live slice.
        unsafe {
            let allocate: unsafe extern "C" fn(*mut u64, usize) -> c_int = self.function("cuMemAlloc_v2");
            let copy: unsafe extern "C" fn(u64, *const c_void, usize) -> c_int =
                self.function("cuMemcpyHtoD_v2");
            succeed("cuMemAlloc", allocate(&mut address, array.all().len()))?;
            succeed("cuMemcpyHtoD", copy(address, array.all().as_ptr().cast(), array.all().len()))?;
        }
        Ok(address)
    }

    fn copy_out(&self, address: u64, array: &mut Placed) -> Result<(), String> {
        let bytes = array.all_mut();
        // SAFETY: the allocation has as many bytes as the live slice; it is freed once and not used after.
        unsafe {
            let copy: unsafe extern "C" fn(*mut c_void, u64, usize) -> c_int =
                self.function("cuMemcpyDtoH_v2");
            let free: unsafe extern "C" fn(u64) -> c_int = self.function("cuMemFree_v2");
            succeed("cuMemcpyDtoH", copy(bytes.as_mut_ptr().cast(), address, bytes.len()))?;
            succeed("cuMemFree", free(address))
        }
    }

    fn run(&self, kernel: &str, grid: Grid, values: &mut [u64]) -> Result<(), String> {
        type Launch = unsafe extern "C" fn(
            Handle,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            Handle,
            *mut Handle,
            *mut Handle,
        ) -> c_int;
        let name = CString::new(kernel).unwrap();
        let mut pointers: Vec<Handle> =
            values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let ([x, y, z], [a, b, c]) = (grid.blocks, grid.threads);
        let mut function: Handle = null_mut();
        // SAFETY: the module is loaded in the current context; each argument lies in eight bytes, at least as many as the
        // kernel takes, and arrays are alive until the synchronisation below.
        unsafe {
            let get: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> c_int =
                self.function("cuModuleGetFunction");
            let launch: Launch = self.function("cuLaunchKernel");
            let wait: unsafe extern "C" fn() -> c_int = self.function("cuCtxSynchronize");
            succeed(
                "cuModuleGetFunction",
                get(&mut function, without_provenance_mut(self.module), name.as_ptr()),
            )?;
            let launched =
                launch(function, x, y, z, a, b, c, 0, null_mut(), pointers.as_mut_ptr(), null_mut());
            succeed("cuLaunchKernel", launched)?;
            succeed("cuCtxSynchronize", wait())
        }
    }
}
