//! Numbers on their way to a device: a ring of page-locked memory, filled by the host while earlier parts are being copied.
//!
//! Parts go out on the lane's stream, in order with what uses them: rows of statistics, and whatever else is written to an array. Pageable
//! memory goes at a fifth of the bus's rate, all lanes one after the other. Not here: what is done with them (`grams`,
//! `decoder`).
#![expect(unsafe_code, reason = "copies from page-locked memory that the driver reads after the call")]

use std::sync::{Arc, MutexGuard, PoisonError};

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, DeviceRepr, DriverError, PinnedHostSlice, result};

use super::blas::RowDigits;
use super::device::{Cuda, CudaBuffer};
use crate::device::DeviceError;

/// f32 of a part: long enough for the bus, short enough for the host's cache.
const PART: usize = 1 << 20;
const PARTS: usize = 4;

/// A lane's ring; made once and used for all of its rows.
pub struct RowStaging {
    context: Arc<CudaContext>,
    parts: Vec<Part>,
    next: usize,
}

/// Page-locked memory for whatever a lane sends.
#[derive(Default)]
pub(super) enum Sending {
    /// Nothing was sent yet.
    #[default]
    Unused,
    Ring(RowStaging),
    /// The system does not let this process have memory that a device reads.
    Plain,
}

struct Part {
    memory: PinnedHostSlice<f32>,
    /// When the last copy out of it has ended.
    copied: CudaEvent,
}

impl Part {
    fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        // SAFETY: what is copied out of it is written before.
        let memory = unsafe { context.alloc_pinned_with_flags(PART, 0) }?;
        let copied = context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?;
        Ok(Self { memory, copied })
    }
}

impl Cuda {
    /// Sends values to the start of an array that holds as many; they have been read when this returns.
    ///
    /// # Errors
    /// `Failed`.
    pub(super) fn send(&self, values: &[f32], buffer: &mut CudaBuffer) -> Result<(), DeviceError> {
        let to = self.written("values", buffer, values.len())?;
        match &mut *self.sending() {
            // SAFETY: the array's length was checked above; it is this lane's.
            Sending::Ring(ring) => unsafe { ring.send(self, values, RowDigits::F32, to) },
            _ => self.stream.memcpy_htod(values, &mut buffer.slice).map_err(|error| self.driver(error)),
        }
    }

    /// [`Self::send`] of bfloat16.
    ///
    /// # Errors
    /// `Failed`.
    pub(super) fn send_halves(
        &self,
        halves: &[u16],
        buffer: &mut CudaBuffer<u16>,
    ) -> Result<(), DeviceError> {
        let to = self.written("values", buffer, halves.len())?;
        match &mut *self.sending() {
            // SAFETY: as above.
            Sending::Ring(ring) => unsafe { ring.send_halves(self, halves, to) },
            _ => self.stream.memcpy_htod(halves, &mut buffer.slice).map_err(|error| self.driver(error)),
        }
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        // It is whole at every step.
        let mut sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*sending, Sending::Unused) {
            *sending = self.staging().map_or(Sending::Plain, Sending::Ring);
        }
        sending
    }

    /// Page-locked memory for this lane's rows.
    ///
    /// # Errors
    /// `OutOfMemory` if the host has none, `Failed`.
    pub fn staging(&self) -> Result<RowStaging, DeviceError> {
        let context = &self.opened.context;
        let parts: Result<Vec<Part>, DriverError> = (0..PARTS).map(|_| Part::new(context)).collect();
        let subject = self.opened.subject(PARTS * PART * size_of::<f32>());
        let parts = parts.map_err(|error| subject.driver(error))?;
        Ok(RowStaging { context: Arc::clone(context), parts, next: 0 })
    }
}

impl RowStaging {
    /// Queues a copy of `values` to the device; they have been read when this returns.
    ///
    /// # Errors
    /// `Failed`, also where a value is no bfloat16 and should be.
    ///
    /// # Safety
    /// At `to` there is room for as many numbers of that kind, on the device of `lane`, unused but by its stream.
    pub(super) unsafe fn send(
        &mut self,
        lane: &Cuda,
        values: &[f32],
        digits: RowDigits,
        to: u64,
    ) -> Result<(), DeviceError> {
        match digits {
            RowDigits::F32 | RowDigits::Tf32 => {
                let copied = |values: &[f32], part: &mut [f32]| {
                    part.copy_from_slice(values);
                    true
                };
                // SAFETY: the caller's promise.
                unsafe { self.send_as(lane, values, to, copied) }
            }
            // SAFETY: as above.
            RowDigits::Bf16 => unsafe { self.send_as(lane, values, to, upper_halves) },
        }
    }

    /// [`Self::send`] of bfloat16.
    ///
    /// # Errors
    /// `Failed`.
    ///
    /// # Safety
    /// The same.
    pub(super) unsafe fn send_halves(
        &mut self,
        lane: &Cuda,
        halves: &[u16],
        to: u64,
    ) -> Result<(), DeviceError> {
        let copied = |halves: &[u16], part: &mut [u16]| {
            part.copy_from_slice(halves);
            true
        };
        // SAFETY: the caller's promise.
        unsafe { self.send_as(lane, halves, to, copied) }
    }

    /// `fill` writes what is sent for some of the values; false if one of them cannot be.
    ///
    /// # Safety
    /// Of [`Self::send`].
    unsafe fn send_as<T, S: DeviceRepr>(
        &mut self,
        lane: &Cuda,
        values: &[T],
        to: u64,
        mut fill: impl FnMut(&[T], &mut [S]) -> bool,
    ) -> Result<(), DeviceError> {
        let driver = |error| lane.driver(error);
        self.context.bind_to_thread().map_err(driver)?;
        let per_part = PART * size_of::<f32>() / size_of::<S>();
        for (number, values) in values.chunks(per_part).enumerate() {
            let part = &mut self.parts[self.next];
            self.next = (self.next + 1) % PARTS;
            part.copied.synchronize().map_err(driver)?;
            let memory = part.memory.as_mut_slice().map_err(driver)?;
            // SAFETY: any bits are f32 or u16, the only types sent; f32 are aligned for both.
            let memory = &mut unsafe { memory.align_to_mut::<S>() }.1[..values.len()];
            if !fill(values, memory) {
                let reason = "rows: a value is no bfloat16, expected none of a job that keeps those";
                return Err(lane.opened.subject(0).failed(reason.into()));
            }
            let to = to + (number * per_part * size_of::<S>()) as u64;
            // SAFETY: the caller's promise; the memory is not written again before `copied`.
            unsafe { result::memcpy_htod_async(to, memory, lane.stream.cu_stream()) }.map_err(driver)?;
            part.copied.record(&lane.stream).map_err(driver)?;
        }
        Ok(())
    }
}

impl Drop for RowStaging {
    fn drop(&mut self) {
        for part in &self.parts {
            // A device that failed reads nothing any more.
            let _ = part.copied.synchronize();
        }
    }
}

/// Writes the bfloat16 that the values are; whether all of them are.
fn upper_halves(values: &[f32], halves: &mut [u16]) -> bool {
    let mut lost = 0;
    for (half, value) in halves.iter_mut().zip(values) {
        let bits = value.to_bits();
        *half = (bits >> 16) as u16;
        lost |= bits & 0xffff;
    }
    lost == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_those_of_bfloat16_and_what_would_be_lost_is_seen() {
        let mut halves = [7; 4];
        assert!(upper_halves(&[1.0, -2.5, 0.0, f32::INFINITY], &mut halves));
        assert_eq!(halves, [0x3f80, 0xc020, 0, 0x7f80]);
        assert!(!upper_halves(&[1.0, 1.0 + f32::EPSILON], &mut halves));
    }
}
