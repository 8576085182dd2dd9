//! The largest magnitude of an array on a device.
//!
//! Not here: argument order and grids (`kernels::magnitude`).

use super::device::{Cuda, CudaBuffer};
use super::kernels::magnitude as kernels;
use crate::device::DeviceError;

/// The bits of f32 infinity: what is not finite has no less.
const INFINITE: u32 = 0x7f80_0000;

impl Cuda {
    /// See [`crate::Device::all_finite`].
    pub(super) fn finite(&self, len: usize, values: &CudaBuffer) -> Result<bool, DeviceError> {
        Ok(self.largest_magnitude(len, values)? < INFINITE)
    }

    /// The largest of the first `len` magnitudes, as bits of an f32; those of a NaN are larger than all others.
    pub(super) fn largest_magnitude(&self, len: usize, values: &CudaBuffer) -> Result<u32, DeviceError> {
        let values = self.read("finite values", values, len)?;
        if len == 0 {
            return Ok(0);
        }
        let size = self.opened.size;
        let blocks = kernels::peak_blocks(size, len);
        let mut partial = self.allocate::<u32>(blocks as usize)?;
        let mut peak = self.allocate::<u32>(1)?;
        let to = self.written("finite partial", &mut partial, blocks as usize)?;
        self.launch(kernels::peak_bits(size, len, values, to))?;
        let out = self.written("finite peak", &mut peak, 1)?;
        self.launch(kernels::max_u32(blocks, to, out))?;
        Ok(self.bring("finite peak", &peak, 0..1)?[0])
    }
}
