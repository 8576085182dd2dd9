//! Refinement: exact coordinate descent over {floor, ceil} on the damped quadratic.
//!
//! Sweeps are the device's: on a CPU columns go in blocks, and most of a sweep is products; on a GPU flips are carried along
//! whole rows one by one. The result is a local optimum: no single flip improves any row beyond the
//! kernel's tolerance. Rows that are done cost a comparison per weight.
//!
//! Not here: the kernel (`compute`), which start to refine.

use halfstep_compute::{Device, DeviceError};

use crate::quadratic::Quadratic;
use crate::workspace::{Arrays, Step, Watch};

/// Improves `up` in place by at most `sweeps` sweeps; returns how many were run. The chunk must be loaded.
pub(crate) fn refine<D: Device>(
    device: &D,
    quadratic: &Quadratic<'_, D::Buffer>,
    sweeps: u32,
    up: &mut [f32],
    arrays: &mut Arrays<D::Buffer>,
    watch: Watch<'_>,
) -> Result<u32, DeviceError> {
    let (mut done, mut flipped) = (0, false);
    device.write(up, &mut arrays.v)?;
    while done < sweeps {
        // The residual drifts by as many rounding errors as there are flips: after some, look again with a new one.
        quadratic.look(device, arrays)?;
        device.subtract(quadratic.rows * quadratic.cols, &mut arrays.product, &arrays.target)?;
        let (ran, flips) = descend(device, quadratic, sweeps - done, arrays, watch)?;
        done += ran;
        if flips == 0 {
            break;
        }
        flipped = true;
    }
    if flipped {
        device.download(&arrays.v, up)?;
    }
    Ok(done)
}

/// Sweeps until nothing flips, at most `sweeps`; returns how many sweeps and flips there were.
fn descend<D: Device>(
    device: &D,
    quadratic: &Quadratic<'_, D::Buffer>,
    sweeps: u32,
    arrays: &mut Arrays<D::Buffer>,
    watch: Watch<'_>,
) -> Result<(u32, u64), DeviceError> {
    let (rows, cols, h) = (quadratic.rows, quadratic.cols, &quadratic.prepared.damped);
    let Arrays { delta, product, v, flips, .. } = arrays;
    let (mut ran, mut total) = (0, 0);
    while ran < sweeps {
        let done = device.descend(sweeps - ran, rows, cols, h, product, delta, v, flips)?;
        watch(Step::Iterate);
        ran += done.sweeps;
        total += done.flips;
        if done.settled {
            break;
        }
    }
    Ok((ran, total))
}
