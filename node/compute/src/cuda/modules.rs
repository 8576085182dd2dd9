//! The kernels of one open device, loaded.
//!
//! Not here: compiling them (`compile`), which there are (`kernels`).
#![expect(unsafe_code, reason = "the driver's calls for modules take raw images and give raw handles")]

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{CUfunction, CUmodule};
use cudarc::driver::{CudaContext, result};

use super::compile::image;
use super::error::sentence;
use super::kernels::{FILES, Kernel};

/// Loaded kernels, unloaded when dropped.
pub(super) struct Modules {
    context: Arc<CudaContext>,
    modules: Vec<CUmodule>,
    functions: [CUfunction; Kernel::ALL.len()],
}

// SAFETY: handles of modules and functions are the context's, not a thread's: any thread that has the context current may
// use them.
unsafe impl Send for Modules {}
// SAFETY: as above; they are only read.
unsafe impl Sync for Modules {}

impl Modules {
    /// Compiles and loads all files.
    ///
    /// # Errors
    /// A sentence with the file or kernel.
    pub(super) fn load(context: &Arc<CudaContext>, capability: (i32, i32)) -> Result<Self, String> {
        let functions = [std::ptr::null_mut(); Kernel::ALL.len()];
        let mut all = Self { context: Arc::clone(context), modules: Vec::new(), functions };
        context.bind_to_thread().map_err(sentence)?;
        for file in FILES {
            let image = image(file.name, file.source, capability)?;
            // SAFETY: the image is what NVRTC made, complete and, if text, closed by a 0.
            let module = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
            let module =
                module.map_err(|error| format!("{} does not load: {}", file.name, sentence(error)))?;
            all.modules.push(module);
            for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.file() == file) {
                let name = CString::new(kernel.name()).map_err(|error| error.to_string())?;
                // SAFETY: the module was loaded a few lines above.
                let function = unsafe { result::module::get_function(module, name) };
                all.functions[kernel as usize] = function
                    .map_err(|error| format!("{}: no `{}`: {}", file.name, kernel.name(), sentence(error)))?;
            }
        }
        Ok(all)
    }

    pub(super) fn function(&self, kernel: Kernel) -> CUfunction {
        self.functions[kernel as usize]
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        for module in self.modules.drain(..) {
            // SAFETY: loaded by `load`, unloaded once, and its functions go with it. A failure leaves it to the process's end.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}
