//! Numbers on their way from a device to the host, through memory that the device writes to directly.
//!
//! While the host copies one part out, the device fills the next; threads that share a lane do so side by side. Not here: numbers on their way to a device (`staging`).
#![expect(unsafe_code, reason = "queues copies into memory that is not read before their end")]

use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, DeviceRepr, PinnedHostSlice, result};

use super::device::{Cuda, CudaBuffer};
use crate::device::DeviceError;
use crate::shape::length;

/// Bytes of a part.
const PART: usize = 8 << 20;

/// What any bits are a number of.
pub(super) trait Number: DeviceRepr + Copy + Default {}

impl Number for u16 {}
impl Number for u32 {}
impl Number for f32 {}
impl Number for f64 {}
impl Number for i64 {}
impl Number for u64 {}

/// Two parts of host memory that the device writes.
pub(super) struct Staging {
    parts: [PinnedHostSlice<u64>; 2],
}

impl Cuda {
    /// Some numbers of an array, once everything queued before is done.
    ///
    /// # Errors
    /// `Length` if there are fewer, `Failed`.
    pub(super) fn bring<T: Number>(
        &self,
        operand: &'static str,
        buffer: &CudaBuffer<T>,
        range: Range<usize>,
    ) -> Result<Vec<T>, DeviceError> {
        length(operand, range.end, range.start)?;
        let mut host = Vec::with_capacity(range.len());
        self.bring_parts(operand, buffer, range, &mut |part| host.extend_from_slice(part))?;
        Ok(host)
    }

    /// Gives `take` the numbers in their order, some at a time.
    ///
    /// # Errors
    /// As [`Self::bring`].
    pub(super) fn bring_parts<T: Number>(
        &self,
        operand: &'static str,
        buffer: &CudaBuffer<T>,
        range: Range<usize>,
        take: &mut dyn FnMut(&[T]),
    ) -> Result<(), DeviceError> {
        let address = self.read(operand, buffer, range.end)? + (range.start * size_of::<T>()) as u64;
        let idle = self.idle_staging().pop();
        let mut staging = idle.or_else(|| Staging::new(self));
        let result = match &mut staging {
            Some(staging) => staging.parts(self, address, range.len(), take),
            // The system does not let this process have memory that a device writes.
            None => self.bring_plainly(buffer, range, take),
        };
        if result.is_err() {
            // Nothing may be on its way into memory that is used again.
            self.synchronize()?;
        }
        self.idle_staging().extend(staging);
        result
    }

    fn idle_staging(&self) -> MutexGuard<'_, Vec<Staging>> {
        // Each is whole or not there.
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bring_plainly<T: Number>(
        &self,
        buffer: &CudaBuffer<T>,
        range: Range<usize>,
        take: &mut dyn FnMut(&[T]),
    ) -> Result<(), DeviceError> {
        let mut host = vec![T::default(); range.len()];
        if !host.is_empty() {
            let copied = self.stream.memcpy_dtoh(&buffer.slice.slice(range), &mut host[..]);
            copied.map_err(|error| self.driver(error))?;
        }
        self.synchronize()?;
        take(&host);
        Ok(())
    }
}

impl Staging {
    fn new(device: &Cuda) -> Option<Self> {
        let context = &device.opened.context;
        // SAFETY: what they hold is read only behind what was written last.
        let part = || unsafe { context.alloc_pinned_with_flags::<u64>(PART / size_of::<u64>(), 0) }.ok();
        Some(Self { parts: [part()?, part()?] })
    }

    fn parts<T: Number>(
        &mut self,
        device: &Cuda,
        address: u64,
        len: usize,
        take: &mut dyn FnMut(&[T]),
    ) -> Result<(), DeviceError> {
        let per_part = PART / size_of::<T>();
        let sizes = |number: usize| (len - number * per_part).min(per_part);
        let from = |number: usize| address + (number * PART) as u64;
        let count = len.div_ceil(per_part);
        let mut queued = if count > 0 { Some(self.queue::<T>(device, from(0), 0, sizes(0))?) } else { None };
        for number in 0..count {
            let arrived = queued.take();
            if number + 1 < count {
                queued = Some(self.queue::<T>(device, from(number + 1), number + 1, sizes(number + 1))?);
            }
            if let Some(arrived) = arrived {
                arrived.synchronize().map_err(|error| device.driver(error))?;
            }
            let part = self.parts[number % 2].as_slice().map_err(|error| device.driver(error))?;
            // SAFETY: any bits are numbers of these types, whose alignment is at most a u64's.
            let numbers = unsafe { part.align_to::<T>() }.1;
            take(&numbers[..sizes(number)]);
        }
        Ok(())
    }

    /// Queues a copy of `len` numbers at `address` into the part for `number`; the event comes after it.
    fn queue<T: Number>(
        &mut self,
        device: &Cuda,
        address: u64,
        number: usize,
        len: usize,
    ) -> Result<CudaEvent, DeviceError> {
        let driver = |error| device.driver(error);
        device.opened.context.bind_to_thread().map_err(driver)?;
        let part = self.parts[number % 2].as_mut_slice().map_err(driver)?;
        // SAFETY: any bits are numbers of these types, whose alignment is at most a u64's.
        let part = &mut unsafe { part.align_to_mut::<T>() }.1[..len];
        // SAFETY: the caller has checked that the device's array holds what is copied. The host's memory lives until the
        // lane is dropped, which waits for its stream; it is not touched before the event below has come.
        unsafe { result::memcpy_dtoh_async(part, address, device.stream.cu_stream()) }.map_err(driver)?;
        device.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).map_err(driver)
    }
}
