//! On a device: everything between blocks is one product, everything inside is multiplied by the blocks' inverses.
//!
//! The factor stays on the device for all chunks of a layer. No step waits for the host but the last download.
//! Not here: the order of columns, more damping (`super`), the kernels (`compute`).

use halfstep_compute::cpu::PLANE_BLOCK;
use halfstep_compute::{Device, DeviceError, MatMut, MatRef, PlaneBuffers, Product};

use crate::workspace::Arrays;

/// Columns of a stripe of the trailing update: products are square enough, and little above the diagonal is computed.
const STRIPE: usize = 2048;

/// A lower factor, columns in their order, with the inverses of its diagonal blocks.
#[derive(Debug)]
pub(super) struct Lower<B> {
    /// `[n, n]`; what is above the diagonal means nothing.
    lower: B,
    /// `[n, PLANE_BLOCK]`.
    inverses: B,
    /// Where each column stands in the order.
    places: Vec<u32>,
}

fn blocks(n: usize) -> impl DoubleEndedIterator<Item = (usize, usize)> {
    (0..n.div_ceil(PLANE_BLOCK)).map(move |block| (block * PLANE_BLOCK, n.min((block + 1) * PLANE_BLOCK)))
}

impl<B: Send + Sync> Lower<B> {
    /// Factors `damped` (`[n, n]`, symmetric) plus `extra` on its diagonal, columns in `order`. `None` if it is not positive definite.
    pub(super) fn new<D: Device<Buffer = B>>(
        device: &D,
        damped: &B,
        order: &[u32],
        extra: f32,
    ) -> Result<Option<Self>, DeviceError> {
        let n = order.len();
        let area = n.saturating_mul(n);
        let (mut lower, mut a) = (device.zeros(area)?, device.zeros(area)?);
        device.gather_rows(damped, n, order, &mut lower)?;
        device.gather_columns(&lower, n, order, &mut a)?;
        let mut inverses = device.zeros(n.saturating_mul(PLANE_BLOCK))?;
        for (start, end) in blocks(n) {
            device.factor_block(n, start..end, extra, &a, &mut lower, &mut inverses)?;
            if end < n {
                let (width, below) = (end - start, end * n + start);
                device.matmul(
                    Product::new(n - end, width, width),
                    MatRef::new(&a, n).at(below),
                    MatRef::transposed(&inverses, PLANE_BLOCK).at(start * PLANE_BLOCK),
                    MatMut::new(&mut lower, n).at(below),
                )?;
                update(device, &lower, &mut a, n, start..end)?;
            }
        }
        let mut found = vec![0.0; n * PLANE_BLOCK];
        device.download(&inverses, &mut found)?;
        // A block that fails leaves NaN in its inverse.
        if found.iter().any(|value| !value.is_finite()) {
            return Ok(None);
        }
        device.share(&mut lower)?;
        device.share(&mut inverses)?;
        let mut places = vec![0; n];
        order.iter().zip(0..).for_each(|(column, place)| places[*column as usize] = place);
        Ok(Some(Self { lower, inverses, places }))
    }

    /// The choice (1.0: ceil) of every weight, `[rows, n]`, of chunks' `low` and `delta`, `[rows, n]` each, in the layer's own order
    /// of columns; the linear term in `arrays` is there if it is not 0.
    pub(super) fn choose<D: Device<Buffer = B>>(
        &self,
        device: &D,
        order: &[u32],
        rows: usize,
        (low_host, delta_host): (&[f32], &[f32]),
        has_linear: bool,
        arrays: &mut Arrays<B>,
    ) -> Result<Vec<f32>, DeviceError> {
        let n = order.len();
        let Arrays { low, delta, linear, target, soft: errors, product: offset, v: up, m1: scratch, .. } =
            arrays;
        let mut put = |host: &[f32], out: &mut B| {
            device.write(host, scratch)?;
            device.gather_columns(scratch, rows, order, out)
        };
        put(low_host, low)?;
        put(delta_host, delta)?;
        if has_linear {
            device.gather_columns(linear, rows, order, target)?;
            self.solve(device, rows, target, offset)?;
        } else {
            device.clear(rows * n, offset)?;
        }
        for (start, end) in blocks(n).rev() {
            if end < n {
                device.matmul(
                    Product { beta: 1.0, ..Product::new(rows, end - start, n - end) },
                    MatRef::new(errors, n).at(end),
                    MatRef::new(&self.lower, n).at(end * n + start),
                    MatMut::new(offset, n).at(start),
                )?;
            }
            let buffers = PlaneBuffers { low, delta, offset };
            device.plane_block(rows, n, start..end, &self.lower, buffers, up, errors)?;
        }
        device.gather_columns(up, rows, &self.places, scratch)?;
        let mut choices = vec![0.0; rows * n];
        device.download(scratch, &mut choices)?;
        Ok(choices)
    }

    /// `y` with `L y' = b'` per row, both `[rows, n]`; `b` is used up.
    fn solve<D: Device<Buffer = B>>(
        &self,
        device: &D,
        rows: usize,
        b: &mut B,
        y: &mut B,
    ) -> Result<(), DeviceError> {
        let n = self.places.len();
        for (start, end) in blocks(n) {
            let width = end - start;
            device.matmul(
                Product::new(rows, width, width),
                MatRef::new(b, n).at(start),
                MatRef::transposed(&self.inverses, PLANE_BLOCK).at(start * PLANE_BLOCK),
                MatMut::new(y, n).at(start),
            )?;
            if end < n {
                device.matmul(
                    Product { alpha: -1.0, beta: 1.0, ..Product::new(rows, n - end, width) },
                    MatRef::new(y, n).at(start),
                    MatRef::transposed(&self.lower, n).at(end * n + start),
                    MatMut::new(b, n).at(end),
                )?;
            }
        }
        Ok(())
    }
}

/// `a -= panel panel'` behind the columns `block` of `lower`, on and below the diagonal (and a little above).
fn update<D: Device>(
    device: &D,
    lower: &D::Buffer,
    a: &mut D::Buffer,
    n: usize,
    block: std::ops::Range<usize>,
) -> Result<(), DeviceError> {
    for from in (block.end..n).step_by(STRIPE) {
        let to = n.min(from + STRIPE);
        let panel = from * n + block.start;
        device.matmul(
            Product { alpha: -1.0, beta: 1.0, ..Product::new(n - from, to - from, block.len()) },
            MatRef::new(lower, n).at(panel),
            MatRef::transposed(lower, n).at(panel),
            MatMut::new(a, n).at(from * n + from),
        )?;
    }
    Ok(())
}
