//! [`Cuda`]: the device interface on one stream of one device.
//!
//! Calls queue work and return; only `download` and `refine_block`, which give the host numbers, wait for it. Every
//! argument is checked as the CPU checks it before an address leaves this file.
//!
//! Not here: argument order and grids (`kernels`), products (`blas`).
#![expect(unsafe_code, reason = "launches kernels and products on raw device addresses, checked here")]

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, CUfunction, CUmemPool_attribute};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, ValidAsZeroBits,
    result,
};

use super::blas::{Blas, Digits, RowDigits, WORKSPACE_BYTES};
use super::column_major::{ColumnMajor, int, leading};
use super::error::Subject;
use super::kernels::{self, Launch, PlaneState, RefineState, Size, StepState, Value};
use super::libraries::guarded;
use super::modules::Modules;
use super::probe::{Found, Gpu, Probe, probe};
use super::transfer::Staging;
use crate::activation::Activation;
use crate::cpu;
use crate::cpu::step::StepArgs;
use crate::device::{
    Device, DeviceError, MatMut, MatRef, Moments, PlaneBuffers, Product, RefineShape, StepBuffers,
    StepGradient, carry_flips,
};
use crate::shape::{self, area, length, span};

/// How the factors of products that only steer a search, and the rows of statistics, are read; all others take all bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// TF32: 11 bits, several times faster.
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
    precision: Precision,
    /// For errors.
    label: String,
    /// For the manifest.
    kind: String,
}

/// Small arrays that a lane keeps for its calls.
struct Scratch {
    indices: CudaSlice<u32>,
    counts: CudaSlice<u32>,
    total: CudaSlice<u64>,
    table: CudaSlice<f32>,
    /// What `table` holds.
    table_host: Vec<f32>,
}

/// One lane of a device: a stream of its own. Buffers belong to the lane that made them.
pub struct Cuda {
    pub(super) opened: Arc<Opened>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) blas: Blas,
    lane: u64,
    scratch: Mutex<Scratch>,
    /// Made when numbers are first brought to the host.
    pub(super) staging: Mutex<Option<Staging>>,
}

/// An array on a device.
pub struct CudaBuffer<T = f32> {
    /// One element more than nothing: there are no empty allocations.
    pub(super) slice: CudaSlice<T>,
    pub(super) len: usize,
    lane: u64,
    /// Complete, and read-only from then on, so that lanes need no order among each other.
    shared: bool,
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
        Ok(Self { stream, blas, lane, scratch: Mutex::new(scratch), staging: Mutex::default(), opened })
    }

    /// Bytes free and in all on the device.
    ///
    /// # Errors
    /// `Failed`.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.opened.context.mem_get_info().map_err(|error| self.opened.subject(0).driver(error))
    }

    /// How rows of any f32 are multiplied for statistics: as the factors of gradients are.
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

    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        // Its arrays are replaced whole; what they hold is written before it is used.
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses buffers of other lanes, whose uses nothing would order, unless they are shared ones of this device.
    fn own<T>(&self, operand: &'static str, buffer: &CudaBuffer<T>) -> Result<(), DeviceError> {
        let same_device = buffer.slice.ordinal() == self.opened.context.ordinal();
        if buffer.lane == self.lane || (buffer.shared && same_device) {
            return Ok(());
        }
        let reason =
            format!("{operand}: the buffer is lane {}'s, expected lane {}'s", buffer.lane, self.lane);
        Err(self.opened.subject(0).failed(reason))
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

    /// The address of a stored factor of `rows` by `cols`.
    fn factor(
        &self,
        operand: &'static str,
        mat: &MatRef<'_, CudaBuffer>,
        rows: usize,
        cols: usize,
    ) -> Result<u64, DeviceError> {
        let (rows, cols) = if mat.transposed { (cols, rows) } else { (rows, cols) };
        let span = span(operand, mat.buffer.len, mat.offset, mat.stride, rows, cols)?;
        Ok(offset(self.read(operand, mat.buffer, 0)?, span.start))
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

    fn multiply(
        &self,
        product: Product,
        digits: Digits,
        a: MatRef<'_, CudaBuffer>,
        b: MatRef<'_, CudaBuffer>,
        out: MatMut<'_, CudaBuffer>,
    ) -> Result<(), DeviceError> {
        let Product { m, n, k, alpha, beta } = product;
        let (left, right) = (self.factor("matmul a", &a, m, k)?, self.factor("matmul b", &b, k, n)?);
        let range = span("matmul out", out.buffer.len, out.offset, out.stride, m, n)?;
        let result = offset(self.written("matmul out", out.buffer, 0)?, range.start);
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
        let multiplied = if k == 0 {
            let shape = (int("matmul rows", m)?, int("matmul columns", n)?, leading(out.stride, n)?);
            // SAFETY: the span was checked above; `out` is borrowed mutably.
            unsafe { self.blas.scale(shape, beta, result) }
        } else {
            let args =
                ColumnMajor::new(product, (a.stride, a.transposed), (b.stride, b.transposed), out.stride)?;
            // SAFETY: the spans were checked above; `out` is borrowed mutably, so it is neither factor.
            unsafe { self.blas.product(&args, digits, (alpha, beta), right, left, result) }
        };
        multiplied.map_err(|error| self.opened.subject(WORKSPACE_BYTES).blas(error))
    }

    /// Makes `slot` at least `len` long; what it held is lost.
    fn grow<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        slot: &mut CudaSlice<T>,
        len: usize,
    ) -> Result<(), DeviceError> {
        if slot.len() >= len {
            return Ok(());
        }
        let larger = self.stream.alloc_zeros::<T>(len.next_power_of_two());
        *slot = larger.map_err(|error| {
            let asked = len.next_power_of_two().saturating_mul(size_of::<T>());
            self.opened.subject(asked).driver(error)
        })?;
        Ok(())
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What is queued uses this lane's arrays and the device's kernels.
        let _ = self.stream.synchronize();
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

/// A block of `n` columns as kernels take it: `n`, its start and width.
fn columns(n: usize, block: &Range<usize>) -> Result<(u32, u32, u32), DeviceError> {
    Ok((count("plane columns", n)?, count("plane block", block.start)?, count("plane block", block.len())?))
}

/// An activation as the kernels know it: its number and two parameters.
pub(super) fn row_of_table(activation: Activation, bias: f32) -> [f32; 4] {
    let (kind, a, b) = match activation {
        Activation::Identity => (0, 0.0, 0.0),
        Activation::Relu => (1, 0.0, 0.0),
        Activation::Clip { min, max } => (2, min, max),
        Activation::LeakyRelu { slope } | Activation::PRelu { slope } => (3, slope, 0.0),
        Activation::Sigmoid => (4, 0.0, 0.0),
        Activation::Tanh => (5, 0.0, 0.0),
        Activation::HardSwish => (6, 0.0, 0.0),
        Activation::Silu => (7, 0.0, 0.0),
        Activation::Gelu => (8, 0.0, 0.0),
        Activation::GeluTanh => (9, 0.0, 0.0),
    };
    [kind as f32, a, b, bias]
}

/// The table of [`kernels::activation_residual`] and its entries: one if all rows are alike.
fn table_of(activations: &[Activation], bias: &[f32], rows: usize) -> impl Iterator<Item = [f32; 4]> {
    let entries = if activations.len() == 1 && bias.is_empty() { 1 } else { rows };
    (0..entries).map(move |row| {
        let activation = activations[row.min(activations.len() - 1)];
        row_of_table(activation, bias.get(row).copied().unwrap_or(0.0))
    })
}

impl Device for Cuda {
    type Buffer = CudaBuffer;
    const IS_HOST: bool = false;

    fn describe(&self) -> String {
        self.opened.kind.clone()
    }

    fn zeros(&self, len: usize) -> Result<CudaBuffer, DeviceError> {
        let mut buffer = self.allocate(len)?;
        self.stream.memset_zeros(&mut buffer.slice).map_err(|error| self.driver(error))?;
        Ok(buffer)
    }

    fn upload(&self, host: &[f32]) -> Result<CudaBuffer, DeviceError> {
        let mut buffer = self.allocate(host.len())?;
        self.write(host, &mut buffer)?;
        Ok(buffer)
    }

    fn share(&self, buffer: &mut CudaBuffer) -> Result<(), DeviceError> {
        self.own("share", buffer)?;
        self.synchronize()?;
        buffer.shared = true;
        Ok(())
    }

    fn write(&self, host: &[f32], buffer: &mut CudaBuffer) -> Result<(), DeviceError> {
        self.written("write", buffer, host.len())?;
        if host.is_empty() {
            return Ok(());
        }
        // The host's memory is not pinned: it has been read when this returns.
        self.stream.memcpy_htod(host, &mut buffer.slice).map_err(|error| self.driver(error))
    }

    fn download(&self, buffer: &CudaBuffer, host: &mut [f32]) -> Result<(), DeviceError> {
        let (len, mut done) = (host.len(), 0);
        self.bring_parts("download", buffer, 0..len, &mut |part| {
            host[done..done + part.len()].copy_from_slice(part);
            done += part.len();
        })
    }

    fn matmul(
        &self,
        product: Product,
        a: MatRef<'_, CudaBuffer>,
        b: MatRef<'_, CudaBuffer>,
        out: MatMut<'_, CudaBuffer>,
    ) -> Result<(), DeviceError> {
        self.multiply(product, Digits::Full, a, b, out)
    }

    fn matmul_rough(
        &self,
        product: Product,
        a: MatRef<'_, CudaBuffer>,
        b: MatRef<'_, CudaBuffer>,
        out: MatMut<'_, CudaBuffer>,
    ) -> Result<(), DeviceError> {
        let digits = match self.opened.precision {
            Precision::Tf32 => Digits::Rough,
            Precision::F32 => Digits::Full,
        };
        self.multiply(product, digits, a, b, out)
    }

    fn gram(&self, x: &CudaBuffer, n: usize, k: usize, g: &mut CudaBuffer) -> Result<(), DeviceError> {
        let x = self.read("gram x", x, area(n, k))?;
        let g = self.written("gram g", g, area(k, k))?;
        if k == 0 {
            return Ok(());
        }
        let (samples, side) = (int("gram samples", n)?, int("gram columns", k)?);
        if n > 0 {
            self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
            // SAFETY: both lengths were checked above; `g` is borrowed mutably, so it is not `x`.
            unsafe { self.blas.gram_lower(samples, side, x, g) }
                .map_err(|error| self.opened.subject(WORKSPACE_BYTES).blas(error))?;
        }
        self.launch(kernels::mirror_lower(side.unsigned_abs(), g))
    }

    fn adaround_step(
        &self,
        args: &StepArgs,
        buffers: StepBuffers<'_, CudaBuffer>,
    ) -> Result<(), DeviceError> {
        let len = buffers.len;
        let gradient = match buffers.gradient {
            StepGradient::Difference { product, target } => {
                (self.read("step product", product, len)?, Some(self.read("step target", target, len)?))
            }
            StepGradient::Given { gradient } => (self.read("step gradient", gradient, len)?, None),
        };
        let state = StepState {
            lo: self.read("step lo", buffers.lo, len)?,
            delta: self.read("step delta", buffers.delta, len)?,
            v: self.written("step v", buffers.v, len)?,
            m1: self.written("step m1", buffers.m1, len)?,
            m2: self.written("step m2", buffers.m2, len)?,
            soft: self.written("step soft", buffers.soft, len)?,
        };
        let size = self.opened.size;
        match gradient {
            _ if len == 0 => Ok(()),
            (product, Some(target)) => {
                self.launch(kernels::step_difference(size, len, product, target, state, args))
            }
            (gradient, None) => self.launch(kernels::step_given(size, len, gradient, state, args)),
        }
    }

    fn refine_block(
        &self,
        refine: &RefineShape,
        h: &CudaBuffer,
        residual: &CudaBuffer,
        delta: &CudaBuffer,
        up: &mut CudaBuffer,
        flips: &mut CudaBuffer,
    ) -> Result<u64, DeviceError> {
        shape::refine_block(refine)?;
        let counted = count("refine rows", refine.rows)?;
        let mut scratch = self.scratch();
        let Scratch { counts, total, .. } = &mut *scratch;
        self.grow(counts, refine.rows)?;
        let mine = counts.device_ptr_mut(&self.stream).0;
        self.queue_refinement(refine, h, residual, delta, up, flips, mine)?;
        match refine.rows == 0 || refine.block.is_empty() {
            true => Ok(0),
            false => self.total(counted, counts, total),
        }
    }

    /// Without a wait between blocks: flips are counted at the end, and products of blocks without any change nothing.
    fn refine_sweep(
        &self,
        rows: usize,
        cols: usize,
        h: &CudaBuffer,
        residual: &mut CudaBuffer,
        delta: &CudaBuffer,
        up: &mut CudaBuffer,
        flips: &mut CudaBuffer,
    ) -> Result<u64, DeviceError> {
        let blocks = cols.div_ceil(cpu::REFINE_BLOCK);
        let counted = count("refine rows of all blocks", area(rows, blocks))?;
        if counted == 0 {
            return Ok(0);
        }
        let mut scratch = self.scratch();
        let Scratch { counts, total, .. } = &mut *scratch;
        self.grow(counts, area(rows, blocks))?;
        for number in 0..blocks {
            let start = number * cpu::REFINE_BLOCK;
            let shape = RefineShape { rows, cols, block: start..cols.min(start + cpu::REFINE_BLOCK) };
            let mine = offset(counts.device_ptr_mut(&self.stream).0, number * rows);
            self.queue_refinement(&shape, h, residual, delta, up, flips, mine)?;
            carry_flips(self, &shape, h, flips, residual)?;
        }
        self.total(counted, counts, total)
    }

    fn subtract(&self, len: usize, a: &mut CudaBuffer, b: &CudaBuffer) -> Result<(), DeviceError> {
        let (a, b) = (self.written("subtract a", a, len)?, self.read("subtract b", b, len)?);
        if len == 0 {
            return Ok(());
        }
        let len = int("subtract length", len)?;
        self.opened.context.bind_to_thread().map_err(|error| self.driver(error))?;
        // SAFETY: both lengths were checked above; `a` is borrowed mutably, so it is not `b`.
        unsafe { self.blas.subtract(len, a, b) }
            .map_err(|error| self.opened.subject(WORKSPACE_BYTES).blas(error))
    }

    fn gather_rows(
        &self,
        source: &CudaBuffer,
        k: usize,
        indices: &[u32],
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let out = self.written("gather out", out, area(indices.len(), k))?;
        if k == 0 || indices.is_empty() {
            return Ok(());
        }
        let limit = source.len / k;
        for &index in indices {
            shape::row("gather source", index, limit)?;
        }
        let source = self.read("gather source", source, 0)?;
        let (rows, width) = (count("gather indices", indices.len())?, count("gather columns", k)?);
        let mut scratch = self.scratch();
        let indices = self.place_indices(&mut scratch, indices)?;
        self.launch(kernels::gather_rows(self.opened.size, rows, width, source, indices, out))
    }

    fn gather_columns(
        &self,
        source: &CudaBuffer,
        rows: usize,
        order: &[u32],
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        let width = order.len();
        let source = self.read("gather source", source, area(rows, width))?;
        let out = self.written("gather out", out, area(rows, width))?;
        for &column in order {
            shape::row("gather order", column, width)?;
        }
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let (rows, width) = (count("gather rows", rows)?, count("gather columns", width)?);
        let mut scratch = self.scratch();
        let order = self.place_indices(&mut scratch, order)?;
        self.launch(kernels::gather_columns(self.opened.size, rows, width, source, order, out))
    }

    fn factor_block(
        &self,
        n: usize,
        block: Range<usize>,
        extra: f32,
        a: &CudaBuffer,
        lower: &mut CudaBuffer,
        inverses: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        shape::plane_block(n, &block)?;
        let a = self.read("factor a", a, area(n, n))?;
        let lower = self.written("factor lower", lower, area(n, n))?;
        let inverses = self.written("factor inverses", inverses, area(n, cpu::PLANE_BLOCK))?;
        if block.is_empty() {
            return Ok(());
        }
        self.launch(kernels::factor_block(columns(n, &block)?, extra, a, lower, inverses))
    }

    fn plane_block(
        &self,
        rows: usize,
        n: usize,
        block: Range<usize>,
        factor: &CudaBuffer,
        buffers: PlaneBuffers<'_, CudaBuffer>,
        up: &mut CudaBuffer,
        errors: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        shape::plane_block(n, &block)?;
        let len = area(rows, n);
        let state = PlaneState {
            factor: self.read("plane factor", factor, area(n, n))?,
            low: self.read("plane low", buffers.low, len)?,
            delta: self.read("plane delta", buffers.delta, len)?,
            offset: self.read("plane offset", buffers.offset, len)?,
            up: self.written("plane up", up, len)?,
            errors: self.written("plane errors", errors, len)?,
        };
        if rows == 0 || block.is_empty() {
            return Ok(());
        }
        let rows = count("plane rows", rows)?;
        self.launch(kernels::plane_block(self.opened.size, rows, columns(n, &block)?, state))
    }

    fn multiply_moments(
        &self,
        rows: usize,
        cols: usize,
        w: &CudaBuffer,
        plus: Moments<'_, CudaBuffer>,
        minus: Option<&CudaBuffer>,
        out: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        self.moment_products(rows, cols, w, plus, minus, out)
    }

    fn exact_differences(
        &self,
        rows: usize,
        cols: usize,
        errors: (&CudaBuffer, &CudaBuffer),
        h: Moments<'_, CudaBuffer>,
        gap: Option<(&CudaBuffer, &CudaBuffer)>,
    ) -> Result<Vec<f64>, DeviceError> {
        self.differences(rows, cols, errors, h, gap)
    }

    fn normal_equations(
        &self,
        rows: usize,
        cols: usize,
        width: usize,
        levels: &CudaBuffer,
        h: &CudaBuffer,
        scratch: &mut CudaBuffer,
    ) -> Result<Vec<f64>, DeviceError> {
        self.normals((rows, cols, width), levels, h, scratch)
    }

    fn column_gaps(
        &self,
        cols: usize,
        a: &CudaBuffer,
        b: &CudaBuffer,
    ) -> Result<(Vec<f32>, bool), DeviceError> {
        self.gaps(cols, a, b)
    }

    fn set_diagonal(
        &self,
        n: usize,
        diagonal: &CudaBuffer,
        matrix: &mut CudaBuffer,
    ) -> Result<(), DeviceError> {
        self.replace_diagonal(n, diagonal, matrix)
    }

    fn all_finite(&self, len: usize, values: &CudaBuffer) -> Result<bool, DeviceError> {
        self.finite(len, values)
    }

    fn activation_residual(
        &self,
        activations: &[Activation],
        bias: &[f32],
        rows: usize,
        cols: usize,
        z: &mut CudaBuffer,
        target: &CudaBuffer,
    ) -> Result<(), DeviceError> {
        shape::per_row(activations, bias, rows)?;
        let len = area(rows, cols);
        let z = self.written("activation z", z, len)?;
        let target = self.read("activation target", target, len)?;
        if len == 0 {
            return Ok(());
        }
        let (row_count, cols) = (count("activation rows", rows)?, count("activation columns", cols)?);
        let mut scratch = self.scratch();
        let entries = self.tabulate(&mut scratch, activations, bias, rows)?;
        let table = scratch.table.device_ptr(&self.stream).0;
        let size = self.opened.size;
        self.launch(kernels::activation_residual(size, row_count, cols, entries, table, z, target))
    }
}

impl Cuda {
    /// Decides a block of columns; flips of each row are counted at `counts`.
    fn queue_refinement(
        &self,
        refine: &RefineShape,
        h: &CudaBuffer,
        residual: &CudaBuffer,
        delta: &CudaBuffer,
        up: &mut CudaBuffer,
        flips: &mut CudaBuffer,
        counts: u64,
    ) -> Result<(), DeviceError> {
        let RefineShape { rows, cols, ref block } = *refine;
        let len = area(rows, cols);
        let state = RefineState {
            h: self.read("refine h", h, area(cols, cols))?,
            residual: self.read("refine residual", residual, len)?,
            delta: self.read("refine delta", delta, len)?,
            up: self.written("refine up", up, len)?,
            flips: self.written("refine flips", flips, area(rows, block.len()))?,
            counts,
        };
        if rows == 0 || block.is_empty() {
            return Ok(());
        }
        let (rows, cols) = (count("refine rows", rows)?, count("refine columns", cols)?);
        let (start, width) = (count("refine block", block.start)?, count("refine block", block.len())?);
        self.launch(kernels::refine_block(self.opened.size, rows, cols, start, width, state))
    }

    /// Puts indices on the device; where they are until the next call.
    fn place_indices(&self, scratch: &mut Scratch, indices: &[u32]) -> Result<u64, DeviceError> {
        self.grow(&mut scratch.indices, indices.len())?;
        self.stream.memcpy_htod(indices, &mut scratch.indices).map_err(|error| self.driver(error))?;
        Ok(scratch.indices.device_ptr(&self.stream).0)
    }

    /// The sum of counts, waited for.
    fn total(
        &self,
        counted: u32,
        counts: &CudaSlice<u32>,
        total: &mut CudaSlice<u64>,
    ) -> Result<u64, DeviceError> {
        let counts = counts.device_ptr(&self.stream).0;
        self.launch(kernels::sum_counts(counted, counts, total.device_ptr_mut(&self.stream).0))?;
        let mut sum = [0u64];
        self.stream.memcpy_dtoh(total, &mut sum).map_err(|error| self.driver(error))?;
        self.synchronize()?;
        Ok(sum[0])
    }

    /// Puts the table of activations on the device unless it is there already; returns its entries.
    fn tabulate(
        &self,
        scratch: &mut Scratch,
        activations: &[Activation],
        bias: &[f32],
        rows: usize,
    ) -> Result<u32, DeviceError> {
        let same = table_of(activations, bias, rows).flatten().map(f32::to_bits);
        if !same.eq(scratch.table_host.iter().map(|value| value.to_bits())) {
            // Unknown until the copy is queued.
            scratch.table_host.clear();
            let table: Vec<f32> = table_of(activations, bias, rows).flatten().collect();
            self.grow(&mut scratch.table, table.len())?;
            self.stream.memcpy_htod(&table, &mut scratch.table).map_err(|error| self.driver(error))?;
            scratch.table_host = table;
        }
        count("activations", scratch.table_host.len() / 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_alike_share_an_entry() {
        let table =
            |activations: &[Activation], bias: &[f32]| table_of(activations, bias, 2).collect::<Vec<_>>();
        let leaky = Activation::LeakyRelu { slope: 0.5 };
        assert_eq!(table(&[leaky], &[]), [[3.0, 0.5, 0.0, 0.0]]);
        assert_eq!(table(&[leaky], &[1.0, 2.0]), [[3.0, 0.5, 0.0, 1.0], [3.0, 0.5, 0.0, 2.0]]);
        let clip = Activation::Clip { min: -1.0, max: 6.0 };
        assert_eq!(table(&[clip, Activation::Gelu], &[]), [[2.0, -1.0, 6.0, 0.0], [8.0, 0.0, 0.0, 0.0]]);
    }

    #[test]
    fn a_machine_without_the_device_says_what_is_missing() {
        let Err(error) = Cuda::open(99, Precision::Tf32) else { panic!("there is no device 99") };
        assert!(matches!(error, DeviceError::Failed { .. }), "{error}");
        assert!(error.to_string().starts_with("cuda:99: "), "{error}");
    }
}
