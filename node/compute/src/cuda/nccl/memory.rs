//! What a group sends from and receives into: 64-bit integers on a device, or in this process's own memory.
//!
//! NCCL itself knows only devices. Host memory is for libraries that stand in for it in tests: with it a group is over
//! with an operation as soon as it says so, since there is no stream.
//!
//! Not here: NCCL's calls (`communicator`).

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut};

use super::NcclError;
use crate::cuda::Cuda;
use crate::cuda::error::sentence;

/// See the module.
pub struct Memory(Kind);

enum Kind {
    Device { context: Arc<CudaContext>, stream: Arc<CudaStream>, words: CudaSlice<i64> },
    Host { words: Vec<i64> },
}

/// A point in what is queued.
pub(super) enum Mark {
    Event(CudaEvent),
    Passed,
}

fn failed(error: cudarc::driver::DriverError) -> NcclError {
    NcclError::Memory { reason: sentence(error) }
}

impl Memory {
    /// On the device of a lane, with a stream of its own.
    ///
    /// # Errors
    /// `Memory`.
    pub fn on(device: &Cuda) -> Result<Self, NcclError> {
        let context = device.context();
        let stream = context.new_stream().map_err(failed)?;
        let words = stream.alloc_zeros(1).map_err(failed)?;
        Ok(Self(Kind::Device { context, stream, words }))
    }

    /// In this process. Not for NCCL itself, which fails on it.
    pub fn host() -> Self {
        Self(Kind::Host { words: Vec::new() })
    }

    /// Makes the device current on this thread.
    pub(super) fn bind(&self) -> Result<(), NcclError> {
        match &self.0 {
            Kind::Device { context, .. } => context.bind_to_thread().map_err(failed),
            Kind::Host { .. } => Ok(()),
        }
    }

    /// Room for `len` integers, of which the first are `values`; nothing may be queued.
    pub(super) fn fill(&mut self, values: &[i64], len: usize) -> Result<(), NcclError> {
        let len = len.max(values.len());
        match &mut self.0 {
            Kind::Device { stream, words, .. } => {
                if words.len() < len {
                    *words = stream.alloc_zeros(len.next_power_of_two()).map_err(failed)?;
                }
                stream.memcpy_htod(values, words).map_err(failed)
            }
            Kind::Host { words } => {
                words.clear();
                words.extend_from_slice(values);
                words.resize(len, 0);
                Ok(())
            }
        }
    }

    /// Reads `values.len()` integers from the place `at` on; nothing may be queued.
    pub(super) fn read(&mut self, at: usize, values: &mut [i64]) -> Result<(), NcclError> {
        let end = at.saturating_add(values.len());
        let short = |len| NcclError::Size {
            subject: "end of what is read",
            expected: format!("{len} at most"),
            actual: end,
        };
        match &mut self.0 {
            Kind::Device { stream, words, .. } => {
                let part = words.try_slice(at..end).ok_or_else(|| short(words.len()))?;
                stream.memcpy_dtoh(&part, values).map_err(failed)?;
                stream.synchronize().map_err(failed)
            }
            Kind::Host { words } => {
                let part = words.get(at..end).ok_or_else(|| short(words.len()))?;
                values.copy_from_slice(part);
                Ok(())
            }
        }
    }

    /// The address of the first integer, and the stream to queue on.
    pub(super) fn place(&mut self) -> (u64, *mut c_void) {
        match &mut self.0 {
            Kind::Device { stream, words, .. } => {
                (words.device_ptr_mut(stream).0, stream.cu_stream().cast::<c_void>())
            }
            Kind::Host { words } => (words.as_mut_ptr() as u64, std::ptr::null_mut()),
        }
    }

    /// The end of what is queued now.
    pub(super) fn mark(&self) -> Result<Mark, NcclError> {
        match &self.0 {
            Kind::Device { stream, .. } => stream.record_event(None).map(Mark::Event).map_err(failed),
            Kind::Host { .. } => Ok(Mark::Passed),
        }
    }
}

impl Mark {
    /// Whether everything before it is done. Does not wait.
    pub(super) fn is_passed(&self) -> Result<bool, NcclError> {
        match self {
            Self::Event(event) => event.try_is_complete().map_err(failed),
            Self::Passed => Ok(true),
        }
    }
}
