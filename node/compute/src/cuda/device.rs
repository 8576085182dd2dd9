//! [`Cuda`]: a lane of an open device, the arrays made on it, and launches of kernels with their addresses.
//!
//! An array is its lane's unless it is shared; whoever asks for an address is told if it is neither, or shorter than needed.
//!
//! Not here: what is computed (`interface`, `decoder`, `grams`, `moments`), argument order and grids (`kernels`), products (`blas`).
#![expect(unsafe_code, reason = "launches kernels on raw device addresses, checked here")]

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, CUfunction, CUmemPool_attribute};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, result,
};

use super::blas::{Blas, RowDigits, WORKSPACE_BYTES};
use super::error::Subject;
use super::kernels::{self, Launch, Size, Value};
use super::libraries::guarded;
use super::modules::Modules;
use super::probe::{Found, Gpu, Probe, probe};
use super::staging::Sending;
use super::transfer::Staging;
use crate::device::DeviceError;
use crate::shape::length;

/// How the factors of products that only steer a search, and the rows of statistics, are read; all others take all bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// 11 bits, several times faster: TF32, and half precision where H is multiplied.
    #[default]
    Tf32,
    /// All bits.
    F32,
}

/// One part in so many of a device's memory is kept for this process once it was used.
const KEPT_SHARE: usize = 4;

/// A device that is open, shared by its lanes.
pub(super) struct Opened {
    pub(super) context: Arc<CudaContext>,
    modules: Modules,
    pub(super) size: Size,
    pub(super) precision: Precision,
    /// For errors.
    label: String,
    /// For the manifest.
    pub(super) kind: String,
}

/// Small arrays that a lane keeps for its calls.
pub(super) struct Scratch {
    pub(super) indices: CudaSlice<u32>,
    pub(super) counts: CudaSlice<u32>,
    pub(super) total: CudaSlice<u64>,
    pub(super) most: CudaSlice<u32>,
    pub(super) table: CudaSlice<f32>,
    /// What `table` holds.
    pub(super) table_host: Vec<f32>,
}

/// One lane of a device: a stream of its own. Buffers belong to the lane that made them.
pub struct Cuda {
    pub(super) opened: Arc<Opened>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) blas: Blas,
    lane: u64,
    scratch: Mutex<Scratch>,
    /// Made when numbers are first brought to the host, by as many threads as do so at once.
    pub(super) staging: Mutex<Vec<Staging>>,
    /// Made when numbers are first sent from the host.
    pub(super) sending: Mutex<Sending>,
}

/// An array on a device.
pub struct CudaBuffer<T = f32> {
    /// One element more than nothing: there are no empty allocations.
    pub(super) slice: CudaSlice<T>,
    pub(super) len: usize,
    lane: u64,
    /// Complete, and read-only from then on, so that lanes need no order among each other.
    pub(super) shared: bool,
}

impl<T> Drop for CudaBuffer<T> {
    fn drop(&mut self) {
        // The array is freed right after, by whatever thread this is. One that cannot have the context frees nothing.
        let _ = self.slice.context().bind_to_thread();
    }
}

impl<T> std::fmt::Debug for CudaBuffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaBuffer").field("len", &self.len).field("lane", &self.lane).finish()
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cuda").field("device", &self.opened.label).field("lane", &self.lane).finish()
    }
}

impl Cuda {
    /// Opens a device: looks whether it can be used and compiles the kernels.
    ///
    /// # Errors
    /// `Failed` with what is missing, `OutOfMemory`.
    pub fn open(ordinal: usize, precision: Precision) -> Result<Self, DeviceError> {
        let label = format!("cuda:{ordinal}");
        let failed = |reason| DeviceError::Failed { device: label.clone(), reason };
        let found = probe();
        let gpu = found.device(ordinal).map_err(failed)?;
        // The probe asked for every library; a function that one of them lacks still panics.
        guarded(|| Self::open_probed(&found, gpu, precision)).unwrap_or_else(|panic| Err(failed(panic)))
    }

    fn open_probed(found: &Probe, gpu: &Gpu, precision: Precision) -> Result<Self, DeviceError> {
        let label = format!("cuda:{}", gpu.ordinal);
        let subject = Subject { device: &label, asked: 0, free: None };
        let driver = |error| subject.driver(error);
        let context = CudaContext::new(gpu.ordinal).map_err(driver)?;
        // SAFETY: cudarc's events order uses on several streams. Here every buffer is used on the stream it was made on,
        // which `Cuda::own` checks.
        unsafe { context.disable_event_tracking() };
        // Threads that wait leave their core to those that compute.
        context.set_blocking_synchronize().map_err(driver)?;
        keep_freed(&context).map_err(driver)?;
        let multiprocessors =
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).map_err(driver)?;
        let opened = Opened {
            modules: Modules::load(&context, gpu.capability).map_err(|reason| subject.failed(reason))?,
            size: Size { multiprocessors: multiprocessors.unsigned_abs() },
            precision,
            kind: kind(found, gpu, precision),
            context,
            label: label.clone(),
        };
        Self::on(Arc::new(opened))
    }

    /// Another lane of the same device, for another thread.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    pub fn lane(&self) -> Result<Self, DeviceError> {
        Self::on(Arc::clone(&self.opened))
    }

    fn on(opened: Arc<Opened>) -> Result<Self, DeviceError> {
        static LANES: AtomicU64 = AtomicU64::new(0);
        let subject = opened.subject(WORKSPACE_BYTES);
        let stream = opened.context.new_stream().map_err(|error| subject.driver(error))?;
        let blas = Blas::new(&stream).map_err(|error| subject.blas(error))?;
        let scratch = Scratch::new(&stream).map_err(|error| subject.driver(error))?;
        let lane = LANES.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            stream,
            blas,
            lane,
            scratch: Mutex::new(scratch),
            staging: Mutex::default(),
            sending: Mutex::default(),
            opened,
        })
    }

    /// Bytes free and in all on the device.
    ///
    /// # Errors
    /// `Failed`.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.opened.context.mem_get_info().map_err(|error| self.opened.subject(0).driver(error))
    }

    /// Gives memory that was freed, and is kept for what is allocated next, back to the system: other processes may use it.
    ///
    /// # Errors
    /// `Failed`.
    pub fn give_back(&self) -> Result<(), DeviceError> {
        // Arrays are freed when their lanes get there.
        self.opened.context.synchronize().map_err(|error| self.driver(error))?;
        give_back(&self.opened.context).map_err(|error| self.driver(error))
    }

    /// How rows of any f32 are multiplied for statistics: with as many bits as gradients.
    pub fn row_digits(&self) -> RowDigits {
        match self.opened.precision {
            Precision::Tf32 => RowDigits::Tf32,
            Precision::F32 => RowDigits::F32,
        }
    }

    /// Copies the whole of `from` to the start of `to`.
    ///
    /// # Errors
    /// `Length` if it does not fit, `Failed`.
    pub fn copy(&self, from: &CudaBuffer, to: &mut CudaBuffer) -> Result<(), DeviceError> {
        self.read("copy from", from, 0)?;
        self.written("copy to", to, from.len)?;
        if from.len == 0 {
            return Ok(());
        }
        let copied = self.stream.memcpy_dtod(&from.slice.slice(..from.len), &mut to.slice);
        copied.map_err(|error| self.driver(error))
    }

    /// Waits for everything queued on this lane.
    ///
    /// # Errors
    /// `Failed` if any of it failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.stream.synchronize().map_err(|error| self.driver(error))
    }

    /// The device's context, shared by its lanes.
    pub(super) fn context(&self) -> Arc<CudaContext> {
        Arc::clone(&self.opened.context)
    }

    pub(super) fn driver(&self, error: DriverError) -> DeviceError {
        self.opened.subject(0).driver(error)
    }

    pub(super) fn scratch(&self) -> MutexGuard<'_, Scratch> {
        // Its arrays are replaced whole; what they hold is written before it is used.
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses buffers of other lanes, whose uses nothing would order, unless they are shared ones of this device.
    pub(super) fn own<T>(&self, operand: &'static str, buffer: &CudaBuffer<T>) -> Result<(), DeviceError> {
        let same_device = buffer.slice.ordinal() == self.opened.context.ordinal();
        if buffer.lane == self.lane || (buffer.shared && same_device) {
            return Ok(());
        }
        let reason =
            format!("{operand}: the buffer is lane {}'s, expected lane {}'s", buffer.lane, self.lane);
        Err(self.opened.subject(0).failed(reason))
    }

    /// Makes an array readable from all lanes of the device, once everything queued is done; nobody writes it again.
    pub(super) fn publish<T>(&self, buffer: &mut CudaBuffer<T>) -> Result<(), DeviceError> {
        self.own("share", buffer)?;
        self.synchronize()?;
        buffer.shared = true;
        Ok(())
    }

    /// The address of the first of at least `len` elements.
    pub(super) fn read<T>(
        &self,
        operand: &'static str,
        buffer: &CudaBuffer<T>,
        len: usize,
    ) -> Result<u64, DeviceError> {
        self.own(operand, buffer)?;
        length(operand, buffer.len, len)?;
        Ok(buffer.slice.device_ptr(&self.stream).0)
    }

    pub(super) fn written<T>(
        &self,
        operand: &'static str,
        buffer: &mut CudaBuffer<T>,
        len: usize,
    ) -> Result<u64, DeviceError> {
        if buffer.shared {
            let reason = format!("{operand}: the buffer is shared, expected one that may be written");
            return Err(self.opened.subject(0).failed(reason));
        }
        self.own(operand, buffer)?;
        length(operand, buffer.len, len)?;
        Ok(buffer.slice.device_ptr_mut(&self.stream).0)
    }

    /// Memory for at least one element, contents unknown.
    pub(super) fn allocate<T: DeviceRepr>(&self, len: usize) -> Result<CudaBuffer<T>, DeviceError> {
        let asked = len.saturating_mul(size_of::<T>());
        let full = || DeviceError::OutOfMemory {
            device: self.opened.label.clone(),
            asked,
            free: self.memory().ok().map(|(free, _)| free),
        };
        if asked > isize::MAX as usize {
            return Err(full());
        }
        // SAFETY: whoever calls this fills it before it is read.
        let allocate = || unsafe { self.stream.alloc::<T>(len.max(1)) };
        let slice = allocate().or_else(|_| {
            // Memory freed on a stream comes back when the stream gets there.
            self.opened.context.synchronize()?;
            allocate()
        });
        match slice {
            Ok(slice) => Ok(CudaBuffer { slice, len, lane: self.lane, shared: false }),
            Err(error) => match self.driver(error) {
                DeviceError::OutOfMemory { .. } => Err(full()),
                other => Err(other),
            },
        }
    }

    pub(super) fn launch<const N: usize>(&self, launch: Launch<N>) -> Result<(), DeviceError> {
        self.launch_deep(launch, 1)
    }

    /// A launch whose grid is repeated `depth` times along z.
    pub(super) fn launch_deep<const N: usize>(
        &self,
        mut launch: Launch<N>,
        depth: u32,
    ) -> Result<(), DeviceError> {
        let mut pointers: [*mut c_void; N] = [std::ptr::null_mut(); N];
        for (pointer, (_, value)) in pointers.iter_mut().zip(&mut launch.arguments) {
            *pointer = match value {
                Value::U32(value) => std::ptr::from_mut(value).cast(),
                Value::F32(value) => std::ptr::from_mut(value).cast(),
                Value::F64(value) => std::ptr::from_mut(value).cast(),
                Value::U64(value) | Value::Read(value) | Value::Write(value) => {
                    std::ptr::from_mut(value).cast()
                }
            };
        }
        let ((grid_x, grid_y), (block_x, block_y)) = (launch.grid, launch.block);
        self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
        let function: CUfunction = self.opened.modules.function(launch.kernel);
        // SAFETY: `pointers` are to as many values as the kernel has parameters, of their types, which a test compares with
        // the source; they are read before the call returns. Addresses come from `read`, `written` and `factor`, which check
        // that the arrays hold what the kernel touches; arrays that are written are borrowed mutably, so none overlap.
        let launched = unsafe {
            result::launch_kernel(
                function,
                (grid_x, grid_y, depth),
                (block_x, block_y, 1),
                0,
                self.stream.cu_stream(),
                &mut pointers,
            )
        };
        launched.map_err(|error| self.driver(error))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What is queued uses this lane's arrays and the device's kernels.
        let _ = self.stream.synchronize();
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // Other processes find the memory free that this one kept for its next arrays.
        let _ = give_back(&self.context);
    }
}

impl Opened {
    pub(super) fn subject(&self, asked: usize) -> Subject<'_> {
        Subject { device: &self.label, asked, free: None }
    }
}

impl Scratch {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, DriverError> {
        Ok(Self {
            indices: stream.alloc_zeros(1)?,
            counts: stream.alloc_zeros(1)?,
            total: stream.alloc_zeros(1)?,
            most: stream.alloc_zeros(1)?,
            table: stream.alloc_zeros(1)?,
            table_host: Vec::new(),
        })
    }
}

/// Lets the device keep memory that was freed, up to a share of it, for what is allocated next: a decoder's run makes and
/// drops gigabytes, and memory that goes back to the system costs more to get than its kernels take.
fn keep_freed(context: &CudaContext) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut kept = (context.total_mem()? / KEPT_SHARE) as u64;
    // SAFETY: the pool is that of a device that is open; this attribute is a 64-bit integer.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut kept).cast())
    }
}

/// Gives what was freed and kept back to the system.
fn give_back(context: &CudaContext) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    context.bind_to_thread()?;
    // SAFETY: the pool is that of a device that is open.
    unsafe { result::mem_pool::trim_to(result::device::get_default_mem_pool(context.cu_device())?, 0) }
}

/// Everything that decides the bits.
fn kind(found: &Probe, gpu: &Gpu, precision: Precision) -> String {
    let version = |found: &Found| match found {
        Found::Version(version) => version.clone(),
        Found::Missing(_) => "none".into(),
    };
    let (major, minor) = gpu.capability;
    let digits = match precision {
        Precision::Tf32 => "tf32",
        Precision::F32 => "f32",
    };
    format!(
        "cuda {} sm_{major}{minor} {digits}, driver {}, cuBLAS {}, NVRTC {}, kernels {:08x}",
        gpu.name,
        version(&found.driver),
        version(&found.blas),
        version(&found.compiler),
        kernels::sources_hash()
    )
}

/// The address of an f32 further on.
pub(super) fn offset(address: u64, elements: usize) -> u64 {
    address + (elements * size_of::<f32>()) as u64
}

/// A count that kernels take in 32 bits.
pub(super) fn count(operand: &'static str, value: usize) -> Result<u32, DeviceError> {
    let limit = u32::MAX as usize + 1;
    u32::try_from(value).map_err(|_| DeviceError::Index { operand, index: value, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_the_device_says_what_is_missing() {
        let Err(error) = Cuda::open(99, Precision::Tf32) else { panic!("there is no device 99") };
        assert!(matches!(error, DeviceError::Failed { .. }), "{error}");
        assert!(error.to_string().starts_with("cuda:99: "), "{error}");
    }
}
