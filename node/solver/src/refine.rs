//! Refinement: exact coordinate descent over {floor, ceil} on the damped quadratic.
//!
//! Columns go in blocks: inside a block the device decides weight by weight, outside one product carries the flips into the
//! residual, so most of a sweep is products. The result is a local optimum: no single flip improves any row beyond the
//! kernel's tolerance. Rows that are done cost a comparison per weight.
//!
//! Not here: the kernel (`compute`), which start to refine.

use halfstep_compute::{Device, DeviceError};

use crate::grid::Cells;
use crate::quadratic::Quadratic;
use crate::workspace::{Arrays, Step, Watch};

/// Improves `up` in place by at most `sweeps` sweeps; returns how many were run. The chunk must be loaded.
pub(crate) fn refine<D: Device>(
    device: &D,
    quadratic: &Quadratic<'_, D::Buffer>,
    cells: &Cells,
    sweeps: u32,
    up: &mut [f32],
    arrays: &mut Arrays<D::Buffer>,
    watch: Watch<'_>,
) -> Result<u32, DeviceError> {
    let mut done = 0;
    while done < sweeps {
        residual(device, quadratic, cells, up, arrays)?;
        let (ran, flips) = descend(device, quadratic, sweeps - done, arrays, watch)?;
        done += ran;
        if flips == 0 {
            break;
        }
        // The residual has drifted by as many rounding errors as there were flips: look again with a new one.
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
    let mut total = 0;
    for ran in 1..=sweeps {
        let flips = sweep(device, quadratic, arrays)?;
        watch(Step::Iterate);
        total += flips;
        if flips == 0 {
            return Ok((ran, total));
        }
    }
    Ok((sweeps, total))
}

/// `product = errors * H + b` and `v = up` on the device.
fn residual<D: Device>(
    device: &D,
    quadratic: &Quadratic<'_, D::Buffer>,
    cells: &Cells,
    up: &[f32],
    arrays: &mut Arrays<D::Buffer>,
) -> Result<(), DeviceError> {
    quadratic.place(device, cells, up, arrays)?;
    device.write(up, &mut arrays.v)?;
    device.subtract(quadratic.rows * quadratic.cols, &mut arrays.product, &arrays.target)
}

/// One pass over all columns; returns the number of flips.
fn sweep<D: Device>(
    device: &D,
    quadratic: &Quadratic<'_, D::Buffer>,
    arrays: &mut Arrays<D::Buffer>,
) -> Result<u64, DeviceError> {
    let (rows, cols, h) = (quadratic.rows, quadratic.cols, &quadratic.prepared.damped);
    let Arrays { delta, product, v, flips, .. } = arrays;
    device.refine_sweep(rows, cols, h, product, delta, v, flips)
}
