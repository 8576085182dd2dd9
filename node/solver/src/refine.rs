//! Refinement: exact coordinate descent over {floor, ceil} on the damped quadratic.
//!
//! Columns go in blocks: inside a block the device decides weight by weight, outside one product carries the flips into the
//! residual, so most of a sweep is products. The result is a local optimum: no single flip improves any row beyond the
//! kernel's tolerance. Rows that are done cost a comparison per weight.
//!
//! Not here: the kernel (`compute`), which start to refine.

use halfstep_compute::{Device, DeviceError, MatMut, MatRef, Product, RefineShape, cpu};

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
    let count = quadratic.rows * quadratic.cols;
    let (mut product, mut target) = (vec![0.0; count], vec![0.0; count]);
    device.download(&arrays.product, &mut product)?;
    device.download(&arrays.target, &mut target)?;
    product.iter_mut().zip(&target).for_each(|(product, target)| *product -= target);
    device.write(&product, &mut arrays.product)
}

/// One pass over all columns; returns the number of flips.
fn sweep<D: Device>(
    device: &D,
    quadratic: &Quadratic<'_, D::Buffer>,
    arrays: &mut Arrays<D::Buffer>,
) -> Result<u64, DeviceError> {
    let (rows, cols) = (quadratic.rows, quadratic.cols);
    let Arrays { delta, product, v, flips, .. } = arrays;
    let h = &quadratic.prepared.damped;
    let mut total = 0;
    for start in (0..cols).step_by(cpu::REFINE_BLOCK) {
        let block = start..cols.min(start + cpu::REFINE_BLOCK);
        let width = block.len();
        let flipped = device.refine_block(&RefineShape { rows, cols, block }, h, product, delta, v, flips)?;
        if flipped > 0 {
            device.matmul(
                Product { beta: 1.0, ..Product::new(rows, cols, width) },
                MatRef::new(flips, width),
                MatRef::new(h, cols).at(start * cols),
                MatMut::new(product, cols),
            )?;
        }
        total += flipped;
    }
    Ok(total)
}
