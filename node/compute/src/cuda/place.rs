//! CUDA devices as a place where decoders run: lanes for threads, weights on every device.
//!
//! A thread gets a lane of the device with the fewest at work; a device lends a few at once, so that one computes while others
//! move numbers, and memory holds what they need. Not here: operators (`decoder`).

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use half::bf16;

use super::decoder::{CudaFactor, CudaLane, CudaTable};
use super::device::{Cuda, CudaBuffer, Precision};
use super::halves::StayRoom;
use crate::cpu::RotaryTable;
use crate::decoder::Place;
use crate::device::{Device, DeviceError};

/// Lanes of a device at work at once.
const LANES_MAX: usize = 8;

/// See the module.
pub struct CudaPlace {
    /// A lane of each device, for weights, and what may stay there.
    first: Vec<(Arc<Cuda>, Arc<StayRoom>)>,
    lent: Mutex<Lent>,
    returned: Condvar,
}

struct Lent {
    /// Lanes nobody uses, and of which device.
    idle: Vec<(usize, CudaLane)>,
    /// Per device.
    at_work: Vec<usize>,
}

impl CudaPlace {
    /// A place of these devices, of one kind; others may go on using them.
    ///
    /// # Errors
    /// `OutOfMemory`, `Failed`.
    pub fn new<'a>(devices: impl IntoIterator<Item = &'a Cuda>) -> Result<Self, DeviceError> {
        let one = |device: &Cuda| Ok((Arc::new(device.lane()?), Arc::default()));
        let first = devices.into_iter().map(one).collect::<Result<Vec<_>, DeviceError>>()?;
        let lent = Lent { idle: Vec::new(), at_work: vec![0; first.len()] };
        Ok(Self { first, lent: Mutex::new(lent), returned: Condvar::new() })
    }

    /// Lets what runs are asked for stay on the devices, up to `share` of their memory: so many parts of so many.
    ///
    /// # Errors
    /// `Failed`.
    pub fn let_stay(&self, share: (usize, usize)) -> Result<(), DeviceError> {
        self.first.iter().try_for_each(|(device, room)| room.let_stay(device, share))
    }

    /// Drops lanes that nobody uses, with the memory they keep.
    pub fn release(&self) {
        self.lent().idle.clear();
    }

    fn lent(&self) -> MutexGuard<'_, Lent> {
        // Lists and counts are whole at every step.
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device that lends one more lane, waited for, and one of its lanes if there is one.
    fn take(&self) -> Result<(Busy<'_>, Option<CudaLane>), DeviceError> {
        let mut lent = self.lent();
        loop {
            let free = lent.at_work.iter().copied().enumerate().min_by_key(|(_, at_work)| *at_work);
            let Some((device, at_work)) = free else {
                return Err(DeviceError::Failed { device: "cuda".into(), reason: "no device".into() });
            };
            if at_work < LANES_MAX {
                lent.at_work[device] += 1;
                let found = lent.idle.iter().position(|(of, _)| *of == device);
                let lane = found.map(|at| lent.idle.swap_remove(at).1);
                return Ok((Busy { place: self, device }, lane));
            }
            lent = self.returned.wait(lent).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A lane's place at work, given up whatever happens.
struct Busy<'a> {
    place: &'a CudaPlace,
    device: usize,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.place.lent().at_work[self.device] -= 1;
        self.place.returned.notify_one();
    }
}

impl Place for CudaPlace {
    type Lane = CudaLane;

    fn devices(&self) -> usize {
        self.first.len()
    }

    /// cuBLAS takes them either way.
    fn wants_turned_weights(&self) -> bool {
        false
    }

    fn keep(&self, values: Vec<f32>) -> Result<Vec<CudaBuffer>, DeviceError> {
        self.first.iter().map(|(device, _)| shared(device, &values)).collect()
    }

    fn keep_factor(&self, values: Vec<f32>, halves: bool) -> Result<Vec<CudaFactor>, DeviceError> {
        // Rounded on the host, which has half to send then. Devices of a place are of one kind.
        let rough = self.first.iter().all(|(device, _)| device.opened.precision == Precision::Tf32);
        let rounded = (halves && rough && !values.is_empty())
            .then(|| values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<u16>>());
        let on = |(device, _): &(Arc<Cuda>, _)| match &rounded {
            Some(halves) => Ok(CudaFactor::Halves(shared_halves(device, halves)?)),
            None => Ok(CudaFactor::Full(shared(device, &values)?)),
        };
        self.first.iter().map(on).collect()
    }

    fn table(
        &self,
        device: usize,
        frequencies: &[f32],
        factor: f32,
        positions: usize,
    ) -> Result<CudaTable, DeviceError> {
        let limit = self.first.len();
        let on = self.first.get(device);
        let (on, _) = on.ok_or(DeviceError::Index { operand: "device", index: device, limit })?;
        let table = RotaryTable::new(frequencies, factor, positions);
        let (pairs, cos, sin) = table.parts();
        Ok(CudaTable { cos: shared(on, cos)?, sin: shared(on, sin)?, pairs, positions })
    }

    fn with<T, E: From<DeviceError>>(
        &self,
        work: impl FnOnce(usize, &mut CudaLane) -> Result<T, E>,
    ) -> Result<T, E> {
        let (busy, lane) = self.take()?;
        let mut lane = match lane {
            Some(lane) => lane,
            None => CudaLane::new(&self.first[busy.device].0, &self.first[busy.device].1)?,
        };
        let done = work(busy.device, &mut lane)?;
        // A lane on which something failed is not used again.
        self.lent().idle.push((busy.device, lane));
        Ok(done)
    }
}

/// The same of bfloat16.
fn shared_halves(device: &Cuda, halves: &[u16]) -> Result<CudaBuffer<u16>, DeviceError> {
    let mut buffer = device.allocate(halves.len())?;
    device.send_halves(halves, &mut buffer)?;
    device.publish(&mut buffer)?;
    Ok(buffer)
}

/// An array that all lanes of its device read.
fn shared(device: &Cuda, values: &[f32]) -> Result<CudaBuffer, DeviceError> {
    let mut buffer = device.upload(values)?;
    device.share(&mut buffer)?;
    Ok(buffer)
}
