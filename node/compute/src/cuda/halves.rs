//! bfloat16 that stay on a device between a decoder's runs, instead of going to the host and coming back.
//!
//! They are complete when they are made and read-only from then on, by any lane of the device. A place lets so many bytes stay on each
//! of its devices; who gets no room goes by way of the host as before, with the same bits.
//! Not here: who keeps them (`exec::carry`), what they are rows of.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use half::bf16;

use super::device::{Cuda, CudaBuffer};
use super::kernels::decoder as launches;
use crate::device::DeviceError;

/// One part in so many of a device's memory is left to others, whatever may stay.
const SPARED: usize = 8;

/// bfloat16 on a device.
pub struct CudaHalves {
    halves: CudaBuffer<u16>,
    peak: f32,
    /// By which they go to the host.
    home: Arc<Cuda>,
    _room: Taken,
}

impl std::fmt::Debug for CudaHalves {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaHalves").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl CudaHalves {
    /// The first `len` numbers of an array of `lane`, rounded to bfloat16 (ties to even; a NaN stays one). Nothing if there is no
    /// room for them.
    ///
    /// # Errors
    /// `Length`, `Failed`.
    pub(super) fn of(
        lane: &Cuda,
        home: &Arc<Cuda>,
        room: &Arc<StayRoom>,
        array: &CudaBuffer,
        len: usize,
    ) -> Result<Option<Self>, DeviceError> {
        let from = lane.read("halves", array, len)?;
        let Some(taken) = room.take(lane, len.saturating_mul(size_of::<u16>())) else { return Ok(None) };
        let mut halves = match lane.allocate::<u16>(len) {
            Ok(halves) => halves,
            Err(DeviceError::OutOfMemory { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let to = lane.written("halves", &mut halves, len)?;
        if len > 0 {
            lane.launch(launches::to_bf16(lane.opened.size, len, from, to))?;
        }
        // Rounding keeps the order of magnitudes: that of the largest is the largest.
        let peak = bf16::from_f32(f32::from_bits(lane.largest_magnitude(len, array)?)).to_f32();
        lane.publish(&mut halves)?;
        Ok(Some(Self { halves, peak, home: Arc::clone(home), _room: taken }))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.halves.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.halves.len == 0
    }

    /// Largest absolute value; NaN if any is.
    pub fn peak(&self) -> f32 {
        self.peak
    }

    /// The host's copy.
    ///
    /// # Errors
    /// `Failed`.
    pub fn download(&self) -> Result<Vec<u16>, DeviceError> {
        self.home.bring("halves", &self.halves, 0..self.halves.len)
    }

    /// Where they are, if a lane of that device asks.
    pub(super) fn on(&self, lane: &Cuda) -> Option<&CudaBuffer<u16>> {
        let same = self.home.opened.context.ordinal() == lane.opened.context.ordinal();
        same.then_some(&self.halves)
    }

    /// Whether lanes of this lane's device read them as they lie.
    pub fn is_on(&self, lane: &Cuda) -> bool {
        self.on(lane).is_some()
    }
}

/// How much may stay on one device.
#[derive(Debug, Default)]
pub(super) struct StayRoom {
    /// Bytes that may; a share of the device's memory.
    limit: RwLock<Limit>,
    used: AtomicUsize,
}

#[derive(Debug, Default, Clone, Copy)]
struct Limit {
    bytes: usize,
    /// Bytes of the device that are free however much stays.
    spared: usize,
}

impl StayRoom {
    /// Lets one part in `share` of the device's memory stay; nothing for 0. What is there already is not moved.
    ///
    /// # Errors
    /// `Failed`.
    pub(super) fn let_stay(&self, device: &Cuda, (parts, of): (usize, usize)) -> Result<(), DeviceError> {
        let total = device.memory()?.1;
        let bytes = (total / of.max(1)).saturating_mul(parts);
        *self.limit.write().unwrap_or_else(PoisonError::into_inner) = Limit { bytes, spared: total / SPARED };
        Ok(())
    }

    fn take(self: &Arc<Self>, device: &Cuda, bytes: usize) -> Option<Taken> {
        let limit = *self.limit.read().unwrap_or_else(PoisonError::into_inner);
        let more = |used: usize| used.checked_add(bytes).filter(|all| *all <= limit.bytes);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        let taken = Taken { room: Arc::clone(self), bytes };
        let free = device.memory().map_or(0, |(free, _)| free);
        (free >= bytes.saturating_add(limit.spared)).then_some(taken)
    }
}

/// Bytes that stay until this is dropped.
#[derive(Debug)]
struct Taken {
    room: Arc<StayRoom>,
    bytes: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.room.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
