//! Bytes that a solve takes on a device, for whoever plans: from shapes alone.
//!
//! Not here: sums of products and shards (`exec`), what a device has.

use crate::{Settings, Start};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Once for all chunks of layers that share statistics: H, C and G, H's factor with what it is made of, H in half precision.
    pub shared: u64,
    /// For every chunk that is being solved.
    pub chunk: u64,
}

/// Arrays `[rows, cols]` of a chunk; see [`crate::Workspace`].
const ARRAYS: u64 = 9;
/// What differences, comparisons in f64 and products work in, at most, whatever the shape.
const WORKING: u64 = 128 << 20;

/// Of a chunk `[rows, cols]` with `groups` scales in a row; `differs`: C and G are not H.
pub fn footprint(rows: usize, cols: usize, groups: usize, differs: bool, settings: &Settings) -> Footprint {
    let [rows, cols, groups] = [rows, cols, groups].map(|size| size as u64);
    let f32s = |count: u64| count.saturating_mul(4);
    let matrix = f32s(cols.saturating_mul(cols));
    let matrices = if differs { 3 } else { 1 };
    // The factor, and the copy that its making uses up.
    let factors = if settings.start == Start::Gptq { 2 } else { 0 };
    let area = rows.saturating_mul(cols);
    let flips = rows.saturating_mul(cols.min(halfstep_compute::cpu::REFINE_BLOCK as u64));
    let fits = settings.scale_fits > 0;
    let normal = if fits { rows.saturating_mul(groups).saturating_mul(groups).saturating_mul(8) } else { 0 };
    // What AdaRound iterates with: H and errors in half precision.
    let halves = if settings.iterations > 0 { 2 } else { 0 };
    let working = WORKING.min(matrix.saturating_mul(4));
    Footprint {
        shared: matrix
            .saturating_mul(matrices + factors)
            .saturating_add(cols.saturating_mul(cols).saturating_mul(halves)),
        chunk: f32s(area.saturating_mul(ARRAYS).saturating_add(flips))
            .saturating_add(normal)
            .saturating_add(area.saturating_mul(halves))
            .saturating_add(working),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Workspace;
    use crate::workspace::Arrays;
    use halfstep_compute::{Cpu, CpuBuffer};

    #[test]
    fn a_chunk_takes_the_arrays_of_its_workspace_and_statistics_their_matrices() {
        let settings =
            Settings { start: Start::Nearest, scale_fits: 0, iterations: 0, ..Settings::default() };
        let (rows, cols) = (3, 300);
        let mut workspace = Workspace::<CpuBuffer>::new();
        let Arrays { low, delta, linear, target, soft, product, v, m1, m2, flips, host: _ } =
            workspace.arrays(&Cpu, rows, cols).unwrap();
        let held: usize = [low, delta, linear, target, soft, product, v, m1, m2, flips]
            .iter()
            .map(|array| array.len() * 4)
            .sum();
        let working = 300 * 300 * 4 * 4;
        let of = |differs, settings: &Settings| footprint(rows, cols, 2, differs, settings);
        assert_eq!(of(false, &settings), Footprint { shared: 360_000, chunk: held as u64 + working });
        let more = Settings { start: Start::Gptq, scale_fits: 1, ..settings };
        let normal = 3 * 2 * 2 * 8;
        assert_eq!(of(true, &more), Footprint { shared: 5 * 360_000, chunk: held as u64 + working + normal });
        let learned = of(false, &Settings { iterations: 9, ..settings });
        let halves = (2 * rows * cols) as u64;
        assert_eq!(learned, Footprint { shared: 540_000, chunk: held as u64 + working + halves });
        // Sizes from a plan that somebody else made.
        let huge = footprint(usize::MAX, usize::MAX, usize::MAX, true, &more);
        assert_eq!(huge, Footprint { shared: u64::MAX, chunk: u64::MAX });
    }
}
