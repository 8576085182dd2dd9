//! Numbers on their way from a device to the host, through memory that the device writes to directly.
//!
//! While the host copies one part out, the device fills the next. Not here: numbers on their way to a device, which the driver
//! takes through such memory by itself.
#![expect(unsafe_code, reason = "queues copies into memory that is not read before their end")]

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaEvent, PinnedHostSlice, result};

use super::device::{Cuda, CudaBuffer, offset};
use crate::device::DeviceError;

/// Elements of a part: 8 MiB.
const PART: usize = 2 << 20;

/// Two parts of host memory that the device writes.
pub(super) struct Staging {
    parts: [PinnedHostSlice<f32>; 2],
}

impl Staging {
    /// Nothing where the system does not let a process have such memory.
    pub(super) fn new(device: &Cuda) -> Option<Self> {
        let context = &device.opened.context;
        // SAFETY: what they hold is read only behind what was written last.
        let part = || unsafe { context.alloc_pinned_with_flags::<f32>(PART, 0) }.ok();
        Some(Self { parts: [part()?, part()?] })
    }

    /// The first `len` numbers of `buffer`, once everything queued before is done.
    ///
    /// # Errors
    /// `Length` if there are fewer, `Failed`.
    pub(super) fn download(
        &mut self,
        device: &Cuda,
        buffer: &CudaBuffer,
        len: usize,
    ) -> Result<Vec<f32>, DeviceError> {
        let address = device.read("download", buffer, len)?;
        let result = self.parts_of(device, address, len);
        if result.is_err() {
            // Nothing may be on its way into memory that is used again.
            device.synchronize()?;
        }
        result
    }

    fn parts_of(&mut self, device: &Cuda, address: u64, len: usize) -> Result<Vec<f32>, DeviceError> {
        let mut host = Vec::with_capacity(len);
        let sizes = |number: usize| (len - number * PART).min(PART);
        let count = len.div_ceil(PART);
        let mut queued = if count > 0 { Some(self.queue(device, address, 0, sizes(0))?) } else { None };
        for number in 0..count {
            let arrived = queued.take();
            if number + 1 < count {
                let from = offset(address, (number + 1) * PART);
                queued = Some(self.queue(device, from, number + 1, sizes(number + 1))?);
            }
            if let Some(arrived) = arrived {
                arrived.synchronize().map_err(|error| device.driver(error))?;
            }
            let part = self.parts[number % 2].as_slice().map_err(|error| device.driver(error))?;
            host.extend_from_slice(&part[..sizes(number)]);
        }
        Ok(host)
    }

    /// Queues a copy of `len` numbers at `address` into the part for `number`; the event comes after it.
    fn queue(
        &mut self,
        device: &Cuda,
        address: u64,
        number: usize,
        len: usize,
    ) -> Result<CudaEvent, DeviceError> {
        let driver = |error| device.driver(error);
        device.opened.context.bind_to_thread().map_err(driver)?;
        let part = &mut self.parts[number % 2].as_mut_slice().map_err(driver)?[..len];
        // SAFETY: the caller has checked that the device's array holds what is copied. The host's memory lives until the
        // lane is dropped, which waits for its stream; it is not touched before the event below has come.
        unsafe { result::memcpy_dtoh_async(part, address, device.stream.cu_stream()) }.map_err(driver)?;
        device.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).map_err(driver)
    }
}
