//! Launches of the kernels of `statistics.cu` that find the largest magnitude.
//!
//! Not here: what is done with it (`cuda::magnitude`).

use super::{Kernel, Launch, Size, THREADS, Value};

/// Blocks of [`peak_bits`], and so the length of its result.
pub(in crate::cuda) fn peak_blocks(size: Size, len: usize) -> u32 {
    size.flat(len).0
}

pub(in crate::cuda) fn peak_bits(size: Size, len: usize, x: u64, partial: u64) -> Launch<3> {
    Launch {
        kernel: Kernel::PeakBits,
        grid: (peak_blocks(size, len), 1),
        block: (THREADS, 1),
        arguments: [
            ("len", Value::U64(len as u64)),
            ("x", Value::Read(x)),
            ("partial", Value::Write(partial)),
        ],
    }
}

pub(in crate::cuda) fn max_u32(count: u32, values: u64, out: u64) -> Launch<3> {
    Launch {
        kernel: Kernel::MaxU32,
        grid: (1, 1),
        block: (THREADS, 1),
        arguments: [
            ("count", Value::U32(count)),
            ("values", Value::Read(values)),
            ("out", Value::Write(out)),
        ],
    }
}
