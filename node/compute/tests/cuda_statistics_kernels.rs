//! The statistics' CUDA kernels, run on the host, against what they are to compute, bit for bit.
//!
//! Not here: exponents and peaks among shards (`exec`).

mod shim;

use std::sync::LazyLock;

use halfstep_compute::random::Stream;
use shim::values::{assert_same, uniform};
use shim::{Arg, Array, Family, Grid, by_rows, flat, fresh, input, poisoned, size};

static STATISTICS: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("statistics"));
static UNFOLD: LazyLock<Option<Family>> = LazyLock::new(|| Family::load("unfold"));

const ONE: Grid = Grid { blocks: [1; 3], threads: [256, 1, 1] };

fn blocks(count: u32) -> Grid {
    Grid { blocks: [count, 1, 1], ..ONE }
}

/// The largest magnitude by both kernels, with `count` blocks in the first.
fn peak(family: &Family, x: &[f32], count: u32) -> f32 {
    let partial = Arg::Out(Array::U32(vec![u32::MAX; count as usize]));
    let partial =
        family.outputs("peak_bits", &[blocks(count)], &[Arg::U64(x.len() as u64), input(x), partial]);
    let arguments = [Arg::U32(count), Arg::In(partial[0].clone()), Arg::Out(Array::U32(vec![7]))];
    match &family.outputs("max_u32", &[ONE], &arguments)[0] {
        Array::U32(bits) => f32::from_bits(bits[0]),
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn peaks_are_the_largest_magnitudes_and_nan_is_larger() {
    let (Some(family), mut stream) = (&*STATISTICS, fresh()) else { return };
    for len in [1, 3, 4, 255, 257, 2051] {
        let mut x = uniform(&mut stream, len, -1.0, 1.0);
        for count in [1, 2, 300] {
            let at = stream.index(len as u32) as usize;
            x[at] = -3.5;
            assert_eq!(peak(family, &x, count), 3.5, "length {len}, {count} blocks");
            x[at] = f32::NEG_INFINITY;
            assert_eq!(peak(family, &x, count), f32::INFINITY);
            x[at] = f32::NAN;
            assert!(peak(family, &x, count).is_nan());
            x[at] = 0.0;
        }
    }
    assert_eq!(peak(family, &[0.0, -0.0], 1), 0.0);
}

/// Kept entries, in order.
fn kept(k: usize, lower: bool) -> Vec<usize> {
    (0..k * k).filter(|at| !lower || at % k <= at / k).collect()
}

fn matrix(stream: &mut Stream, k: usize) -> Vec<f32> {
    let mut matrix = uniform(stream, k * k, -2.0, 2.0);
    // Halves, which are rounded away from 0, and sizes at which a double is an integer.
    for (value, special) in matrix.iter_mut().zip([0.5, -0.5, 2.5, 1e-30, -0.0]) {
        *value = special;
    }
    matrix
}

#[test]
fn fixed_point_sums_are_those_of_the_definition() {
    let (Some(family), mut stream) = (&*STATISTICS, fresh()) else { return };
    for k in [1, 2, 5, 31, 32, 33, 67] {
        for lower in [false, true] {
            for exponent in [-40, 0, 3, 20, 59] {
                let factor = 2f64.powi(exponent);
                let (matrix, kept) = (matrix(&mut stream, k), kept(k, lower));
                let before: Vec<i64> =
                    kept.iter().map(|_| i64::from(stream.next_u32()) << 20 >> stream.index(40)).collect();
                let rounded = kept.iter().map(|at| (f64::from(matrix[*at]) * factor).round() as i64);
                let want: Vec<i64> = before.iter().zip(rounded).map(|(sum, value)| sum + value).collect();
                let head = [size(k), Arg::U32(u32::from(lower)), Arg::F64(factor)];
                let what = format!("k {k}, lower {lower}, exponent {exponent}");

                let tail = [input(&matrix), Arg::Out(Array::I64(before.clone()))];
                let sums = family.outputs("fixed_add", &by_rows(k), &[&head[..], &tail].concat()).remove(0);
                assert_eq!(sums, Array::I64(want.clone()), "{what}");

                let tail = [Arg::In(sums.clone()), Arg::Out(Array::I64(before.clone()))];
                let len = Arg::U64(kept.len() as u64);
                let merged = family.outputs("fixed_merge", &flat(kept.len()), &[&[len], &tail[..]].concat());
                let both: Vec<i64> = before.iter().zip(&want).map(|(a, b)| a + b).collect();
                assert_eq!(merged[0], Array::I64(both), "{what}: merged");

                let back = [size(k), Arg::U32(u32::from(lower)), Arg::F64(factor.recip()), Arg::F64(37.0)];
                let tail = [Arg::In(sums), poisoned(k * k)];
                let means = family.outputs("fixed_mean", &by_rows(k), &[&back[..], &tail].concat()).remove(0);
                let mut expected = vec![f32::NAN; k * k];
                for (at, sum) in kept.iter().zip(&want) {
                    expected[*at] = (*sum as f64 / factor / 37.0) as f32;
                }
                assert_same(&format!("{what}: means"), &means.f32(), &expected);
            }
        }
    }
}

/// The largest scaled magnitude of the kept entries.
fn worst(family: &Family, k: usize, lower: bool, factor: f64, matrix: &[f32]) -> f64 {
    let count = (k / 2).max(1) as u32;
    let partial = Arg::Out(Array::U64(vec![u64::MAX; count as usize]));
    let arguments = [size(k), Arg::U32(u32::from(lower)), Arg::F64(factor), input(matrix), partial];
    let partial = family.outputs("fixed_worst", &[blocks(count)], &arguments).remove(0);
    let arguments = [Arg::U32(count), Arg::In(partial), Arg::Out(Array::U64(vec![7]))];
    match &family.outputs("max_u64", &[ONE], &arguments)[0] {
        Array::U64(bits) => f64::from_bits(bits[0]),
        other => unreachable!("{other:?}"),
    }
}

#[test]
fn the_worst_entry_is_found_among_those_kept() {
    let (Some(family), mut stream) = (&*STATISTICS, fresh()) else { return };
    for k in [1, 2, 33, 300] {
        let mut matrix = uniform(&mut stream, k * k, -1.0, 1.0);
        let last = k * (k - 1);
        matrix[last] = -5.0;
        for lower in [false, true] {
            assert_eq!(worst(family, k, lower, 8.0, &matrix), 40.0, "k {k}");
        }
        if k > 1 {
            // Above the diagonal.
            matrix[k - 1] = f32::NAN;
            assert_eq!(worst(family, k, true, 8.0, &matrix), 40.0, "k {k}");
            assert!(worst(family, k, false, 8.0, &matrix).is_nan(), "k {k}");
        }
        matrix[last] = f32::INFINITY;
        assert_eq!(worst(family, k, true, 8.0, &matrix), f64::INFINITY, "k {k}");
    }
}

#[test]
fn planes_become_rows() {
    let (Some(family), mut stream) = (&*UNFOLD, fresh()) else { return };
    for (lead, groups, cols, cells) in
        [(1, 1, 1, 1), (2, 1, 31, 33), (3, 2, 32, 32), (2, 3, 65, 7), (40, 1, 3, 1)]
    {
        let x = uniform(&mut stream, lead * groups * cols * cells, -1.0, 1.0);
        let all = lead * cells;
        for (first, count) in [(0, all), (all / 3, all - all / 3), (all - 1, 1)] {
            for group in 0..groups {
                let entry = |n: usize| {
                    let (p, column) = (first + n / cols, n % cols);
                    x[((p / cells * groups + group) * cols + column) * cells + p % cells]
                };
                let want: Vec<f32> = (0..count * cols).map(entry).collect();
                let tiles = [count.div_ceil(32) as u32, cols.div_ceil(32) as u32, 1];
                let grid = Grid { blocks: tiles, threads: [32, 8, 1] };
                let sizes = [size(count), size(cols), size(cells), size(groups), size(group)];
                let tail = [input(&x), poisoned(want.len())];
                let arguments = [&[Arg::U64(first as u64)], &sizes[..], &tail].concat();
                let got = family.outputs("unfold_planes", &[grid], &arguments).remove(0);
                assert_same(&format!("[{lead}, {groups} * {cols}, {cells}] from {first}"), &got.f32(), &want);
            }
        }
    }
}

/// One dimension of a convolution.
#[derive(Clone, Copy)]
struct Axis {
    input: usize,
    kernel: usize,
    stride: usize,
    dilation: usize,
    pad: usize,
}

impl Axis {
    const NONE: Self = Self { input: 1, kernel: 1, stride: 1, dilation: 1, pad: 0 };

    fn output(self) -> usize {
        (self.input + 2 * self.pad - self.dilation * (self.kernel - 1) - 1) / self.stride + 1
    }

    /// The input cell of an output cell and a kernel cell.
    fn source(self, o: usize, k: usize) -> Option<usize> {
        (o * self.stride + k * self.dilation).checked_sub(self.pad).filter(|cell| *cell < self.input)
    }

    fn table(self) -> Vec<u32> {
        let cell = |n: usize| self.source(n / self.kernel, n % self.kernel);
        (0..self.output() * self.kernel).map(|n| cell(n).map_or(u32::MAX, |cell| cell as u32)).collect()
    }
}

/// The entry of row `p` and column `column`, by definition.
fn window(
    axes: &[Axis; 3],
    channels: usize,
    per_group: usize,
    group: usize,
    x: &[f32],
    p: usize,
    column: usize,
) -> f32 {
    let [z, y, w] = axes;
    let (ox, oy) = (p % w.output(), p / w.output() % y.output());
    let (oz, image) = (p / w.output() / y.output() % z.output(), p / w.output() / y.output() / z.output());
    let (kx, ky) = (column % w.kernel, column / w.kernel % y.kernel);
    let (kz, channel) = (column / w.kernel / y.kernel % z.kernel, column / w.kernel / y.kernel / z.kernel);
    let plane = image * channels + group * per_group + channel;
    match (z.source(oz, kz), y.source(oy, ky), w.source(ox, kx)) {
        (Some(a), Some(b), Some(c)) => x[((plane * z.input + a) * y.input + b) * w.input + c],
        _ => 0.0,
    }
}

#[test]
fn windows_become_rows() {
    let (Some(family), mut stream) = (&*UNFOLD, fresh()) else { return };
    let axis = |input, kernel, stride, dilation, pad| Axis { input, kernel, stride, dilation, pad };
    let cases = [
        (1, 1, 1, [Axis::NONE; 3]),
        (2, 3, 1, [Axis::NONE, axis(7, 3, 1, 1, 1), axis(5, 3, 1, 1, 1)]),
        (3, 4, 2, [Axis::NONE, axis(9, 3, 2, 2, 2), axis(11, 5, 3, 1, 4)]),
        (2, 6, 3, [axis(4, 2, 1, 1, 1), axis(3, 3, 2, 1, 1), axis(6, 2, 2, 3, 0)]),
        (2, 37, 1, [Axis::NONE, Axis::NONE, axis(19, 7, 1, 1, 3)]),
    ];
    for (images, channels, groups, axes) in cases {
        let per_group = channels / groups;
        let cells: usize = axes.iter().map(|axis| axis.input).product();
        let x = uniform(&mut stream, images * channels * cells, -1.0, 1.0);
        let cols = per_group * axes.iter().map(|axis| axis.kernel).product::<usize>();
        let all = images * axes.iter().map(|axis| axis.output()).product::<usize>();
        for (first, count) in [(0, all), (all / 3, all - all / 3), (all - 1, 1)] {
            for group in 0..groups {
                let entry =
                    |n: usize| window(&axes, channels, per_group, group, &x, first + n / cols, n % cols);
                let want: Vec<f32> = (0..count * cols).map(entry).collect();
                let across = cols.div_ceil(256) as u32;
                let grids =
                    [count.div_ceil(16) as u32, 1].map(|down| Grid { blocks: [across, down, 1], ..ONE });
                let mut arguments = vec![Arg::U64(first as u64)];
                arguments.extend([size(count), size(group), size(channels), size(per_group)]);
                arguments.extend(axes.map(|axis| size(axis.input)));
                arguments.extend(axes.map(|axis| size(axis.output())));
                arguments.extend(axes.map(|axis| size(axis.kernel)));
                arguments.extend(axes.map(|axis| shim::indices(&axis.table())));
                arguments.extend([input(&x), poisoned(want.len())]);
                let got = family.outputs("unfold_windows", &grids, &arguments).remove(0);
                assert_same(&format!("{images} images, {channels} channels"), &got.f32(), &want);
            }
        }
    }
}
