//! Which kernels there are, and the arguments and grid of each: pure, compared with the sources by a test.
//!
//! Not here: compiling (`compile`), running (`device`), what they compute (`cu/`).

use crate::cpu;
use crate::cpu::step::StepArgs;

pub(super) mod decoder;
pub(super) mod learn;
pub(super) mod magnitude;
pub(super) mod moments;
pub(super) mod objective;
pub(super) mod search;

/// Threads of most blocks.
const THREADS: u32 = 256;
/// Threads along x and y where a row is narrow.
const NARROW: (u32, u32) = (32, 8);
/// Widest row that is narrow.
const NARROW_WIDTH: u32 = 512;
/// Side of the tiles in which a triangle is mirrored.
const TILE: u32 = 32;

/// A file of kernels, embedded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct File {
    pub(super) name: &'static str,
    pub(super) source: &'static str,
}

macro_rules! file {
    ($name:literal) => {
        File { name: $name, source: include_str!(concat!("../../cu/", $name)) }
    };
}

/// All files that [`Kernel`]s are in.
pub(super) const FILES: [File; 16] = [
    file!("step.cu"),
    file!("refine.cu"),
    file!("rows.cu"),
    file!("activation.cu"),
    file!("norm.cu"),
    file!("rotary.cu"),
    file!("attention.cu"),
    file!("experts.cu"),
    file!("elementwise.cu"),
    file!("plane.cu"),
    file!("statistics.cu"),
    file!("moments.cu"),
    file!("dots.cu"),
    file!("objective.cu"),
    file!("softmax.cu"),
    file!("search.cu"),
];

/// The kernels that a device needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Kernel {
    StepDifference,
    StepGiven,
    StepHalves,
    ScaledHalves,
    RowScales,
    RefineRows4096,
    RefineRows8192,
    RefineRows14336,
    RefineRows29696,
    RefineBlock,
    SumCounts,
    GatherRows,
    MirrorLower,
    ActivationResidual,
    Gate,
    Activate,
    RmsNorm,
    LayerNorm,
    Rotate,
    Attention64,
    Attention128,
    Attention256,
    SoftmaxRows,
    Route,
    Chosen,
    Combine,
    Embed,
    Add,
    Softcap,
    FactorBlock,
    PlaneBlock,
    GatherColumns,
    FixedWorst,
    FixedAdd,
    MaxU64,
    ToBf16,
    FromBf16,
    PeakBits,
    MaxU32,
    Widen,
    SubtractRows,
    SetDiagonal,
    ColumnGaps,
    DifferenceDots,
    GroupDots,
    RoundingErrors,
    RowSums,
    SearchGrids,
    CopyRows,
    ScaleRows,
    RunDots,
}

impl Kernel {
    /// In the order of their numbers.
    pub(super) const ALL: [Self; 51] = [
        Self::StepDifference,
        Self::StepGiven,
        Self::StepHalves,
        Self::ScaledHalves,
        Self::RowScales,
        Self::RefineRows4096,
        Self::RefineRows8192,
        Self::RefineRows14336,
        Self::RefineRows29696,
        Self::RefineBlock,
        Self::SumCounts,
        Self::GatherRows,
        Self::MirrorLower,
        Self::ActivationResidual,
        Self::Gate,
        Self::Activate,
        Self::RmsNorm,
        Self::LayerNorm,
        Self::Rotate,
        Self::Attention64,
        Self::Attention128,
        Self::Attention256,
        Self::SoftmaxRows,
        Self::Route,
        Self::Chosen,
        Self::Combine,
        Self::Embed,
        Self::Add,
        Self::Softcap,
        Self::FactorBlock,
        Self::PlaneBlock,
        Self::GatherColumns,
        Self::FixedWorst,
        Self::FixedAdd,
        Self::MaxU64,
        Self::ToBf16,
        Self::FromBf16,
        Self::PeakBits,
        Self::MaxU32,
        Self::Widen,
        Self::SubtractRows,
        Self::SetDiagonal,
        Self::ColumnGaps,
        Self::DifferenceDots,
        Self::GroupDots,
        Self::RoundingErrors,
        Self::RowSums,
        Self::SearchGrids,
        Self::CopyRows,
        Self::ScaleRows,
        Self::RunDots,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::StepDifference => "adaround_step_difference",
            Self::StepGiven => "adaround_step_given",
            Self::StepHalves => "adaround_step_halves",
            Self::ScaledHalves => "scaled_halves",
            Self::RowScales => "row_scales",
            Self::RefineRows4096 => "refine_rows_4096",
            Self::RefineRows8192 => "refine_rows_8192",
            Self::RefineRows14336 => "refine_rows_14336",
            Self::RefineRows29696 => "refine_rows_29696",
            Self::RefineBlock => "refine_block",
            Self::SumCounts => "sum_counts",
            Self::GatherRows => "gather_rows",
            Self::MirrorLower => "mirror_lower",
            Self::ActivationResidual => "activation_residual",
            Self::Gate => "gate",
            Self::Activate => "activate",
            Self::RmsNorm => "rms_norm",
            Self::LayerNorm => "layer_norm",
            Self::Rotate => "rotate",
            Self::Attention64 => "attention_64",
            Self::Attention128 => "attention_128",
            Self::Attention256 => "attention_256",
            Self::SoftmaxRows => "softmax_rows",
            Self::Route => "route",
            Self::Chosen => "chosen",
            Self::Combine => "combine",
            Self::Embed => "embed",
            Self::Add => "add",
            Self::Softcap => "softcap",
            Self::FactorBlock => "factor_block",
            Self::PlaneBlock => "plane_block",
            Self::GatherColumns => "gather_columns",
            Self::FixedWorst => "fixed_worst",
            Self::FixedAdd => "fixed_add",
            Self::MaxU64 => "max_u64",
            Self::ToBf16 => "to_bf16",
            Self::FromBf16 => "from_bf16",
            Self::PeakBits => "peak_bits",
            Self::MaxU32 => "max_u32",
            Self::Widen => "widen",
            Self::SubtractRows => "subtract_rows",
            Self::SetDiagonal => "set_diagonal",
            Self::ColumnGaps => "column_gaps",
            Self::DifferenceDots => "difference_dots",
            Self::GroupDots => "group_dots",
            Self::RoundingErrors => "rounding_errors",
            Self::RowSums => "row_sums",
            Self::SearchGrids => "search_grids",
            Self::CopyRows => "copy_rows",
            Self::ScaleRows => "scale_rows",
            Self::RunDots => "run_dots",
        }
    }

    /// Where it is.
    pub(super) fn file(self) -> File {
        match self {
            Self::StepDifference
            | Self::StepGiven
            | Self::StepHalves
            | Self::ScaledHalves
            | Self::RowScales => FILES[0],
            Self::RefineRows4096
            | Self::RefineRows8192
            | Self::RefineRows14336
            | Self::RefineRows29696
            | Self::RefineBlock
            | Self::SumCounts => FILES[1],
            Self::GatherRows | Self::MirrorLower | Self::CopyRows | Self::ScaleRows => FILES[2],
            Self::ActivationResidual | Self::Gate | Self::Activate => FILES[3],
            Self::RmsNorm | Self::LayerNorm => FILES[4],
            Self::Rotate => FILES[5],
            Self::Attention64 | Self::Attention128 | Self::Attention256 => FILES[6],
            Self::Route | Self::Chosen | Self::Combine => FILES[7],
            Self::Embed | Self::Add | Self::Softcap | Self::ToBf16 | Self::FromBf16 => FILES[8],
            Self::FactorBlock | Self::PlaneBlock | Self::GatherColumns => FILES[9],
            Self::FixedWorst | Self::FixedAdd | Self::MaxU64 | Self::PeakBits | Self::MaxU32 => FILES[10],
            Self::Widen | Self::SubtractRows | Self::SetDiagonal | Self::ColumnGaps => FILES[11],
            Self::DifferenceDots | Self::GroupDots | Self::RunDots => FILES[12],
            Self::RoundingErrors | Self::RowSums => FILES[13],
            Self::SoftmaxRows => FILES[14],
            Self::SearchGrids => FILES[15],
        }
    }
}

/// A number for the sources: results of other sources may have other bits.
pub(super) const fn sources_hash() -> u32 {
    // FNV-1a, folded.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut file = 0;
    while file < FILES.len() {
        let bytes = FILES[file].source.as_bytes();
        let mut at = 0;
        while at < bytes.len() {
            hash = (hash ^ bytes[at] as u64).wrapping_mul(0x0000_0100_0000_01b3);
            at += 1;
        }
        file += 1;
    }
    (hash ^ (hash >> 32)) as u32
}

/// An argument's value. Addresses are the device's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    U32(u32),
    U64(u64),
    F32(f32),
    F64(f64),
    /// Of an array that is read.
    Read(u64),
    /// Of an array that is written.
    Write(u64),
}

/// An argument, by the name it has in the source.
pub(super) type Argument = (&'static str, Value);

/// Everything that a launch is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch<const N: usize> {
    pub(super) kernel: Kernel,
    /// Blocks along x, y.
    pub(super) grid: (u32, u32),
    /// Threads along x, y.
    pub(super) block: (u32, u32),
    pub(super) arguments: [Argument; N],
}

/// What grids are fitted to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) multiprocessors: u32,
}

impl Size {
    /// One thread for every four of `len` elements, at most what the device holds.
    fn flat(self, len: usize) -> (u32, u32) {
        (at_most(len.div_ceil(4 * THREADS as usize), 16 * self.multiprocessors), 1)
    }

    /// Threads that share rows of `width`, and blocks that take `rows`.
    fn rows(self, rows: u32, width: u32) -> ((u32, u32), (u32, u32)) {
        let block = if width <= NARROW_WIDTH { NARROW } else { (THREADS, 1) };
        ((at_most(rows.div_ceil(block.1) as usize, 32 * self.multiprocessors), 1), block)
    }

    /// A warp for every row.
    fn warps(self, rows: u32) -> (u32, u32) {
        (at_most(rows.div_ceil(THREADS / 32) as usize, 32 * self.multiprocessors), 1)
    }
}

/// At least one block, at most `most`.
fn at_most(blocks: usize, most: u32) -> u32 {
    u32::try_from(blocks).unwrap_or(u32::MAX).clamp(1, most.max(1))
}

/// Addresses of what a step reads and writes besides its gradient.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepState {
    pub(super) lo: u64,
    pub(super) delta: u64,
    pub(super) v: u64,
    pub(super) m1: u64,
    pub(super) m2: u64,
    pub(super) soft: u64,
}

impl StepState {
    fn arguments(self) -> [Argument; 6] {
        [
            ("lo", Value::Read(self.lo)),
            ("delta", Value::Read(self.delta)),
            ("v", Value::Write(self.v)),
            ("m1", Value::Write(self.m1)),
            ("m2", Value::Write(self.m2)),
            ("soft", Value::Write(self.soft)),
        ]
    }
}

fn constants(args: &StepArgs) -> [Argument; 9] {
    [
        ("learning_rate", Value::F32(args.learning_rate)),
        ("beta1", Value::F32(args.beta1)),
        ("beta2", Value::F32(args.beta2)),
        ("eps", Value::F32(args.eps)),
        ("bias1", Value::F32(args.bias1)),
        ("bias2", Value::F32(args.bias2)),
        ("lambda", Value::F32(args.lambda)),
        ("beta", Value::F32(args.beta)),
        ("grad_scale", Value::F32(args.grad_scale)),
    ]
}

pub(super) fn step_difference(
    size: Size,
    len: usize,
    product: u64,
    target: u64,
    state: StepState,
    args: &StepArgs,
) -> Launch<18> {
    let [lo, delta, v, m1, m2, soft] = state.arguments();
    let [rate, beta1, beta2, eps, bias1, bias2, lambda, beta, scale] = constants(args);
    let len_argument = ("len", Value::U64(len as u64));
    let (product, target) = (("product", Value::Read(product)), ("target", Value::Read(target)));
    Launch {
        kernel: Kernel::StepDifference,
        grid: size.flat(len),
        block: (THREADS, 1),
        arguments: [
            len_argument,
            product,
            target,
            lo,
            delta,
            v,
            m1,
            m2,
            soft,
            rate,
            beta1,
            beta2,
            eps,
            bias1,
            bias2,
            lambda,
            beta,
            scale,
        ],
    }
}

pub(super) fn step_given(
    size: Size,
    len: usize,
    gradient: u64,
    state: StepState,
    args: &StepArgs,
) -> Launch<17> {
    let [lo, delta, v, m1, m2, soft] = state.arguments();
    let [rate, beta1, beta2, eps, bias1, bias2, lambda, beta, scale] = constants(args);
    let (len_argument, gradient) = (("len", Value::U64(len as u64)), ("gradient", Value::Read(gradient)));
    Launch {
        kernel: Kernel::StepGiven,
        grid: size.flat(len),
        block: (THREADS, 1),
        arguments: [
            len_argument,
            gradient,
            lo,
            delta,
            v,
            m1,
            m2,
            soft,
            rate,
            beta1,
            beta2,
            eps,
            bias1,
            bias2,
            lambda,
            beta,
            scale,
        ],
    }
}

/// Threads that share a row in refinement of whole rows.
const SPAN: u32 = 512;

/// Addresses of what refinement of whole rows reads and writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct DescentState {
    pub(super) h: u64,
    pub(super) residual: u64,
    pub(super) delta: u64,
    pub(super) up: u64,
    pub(super) counts: u64,
    pub(super) ran: u64,
}

/// Whole rows until they are settled; nothing for rows wider than any kernel's.
pub(super) fn refine_rows(
    size: Size,
    rows: u32,
    cols: u32,
    sweeps: u32,
    state: DescentState,
) -> Option<Launch<9>> {
    let kernel = match cols {
        0..=4096 => Kernel::RefineRows4096,
        4097..=8192 => Kernel::RefineRows8192,
        8193..=14336 => Kernel::RefineRows14336,
        14337..=29696 => Kernel::RefineRows29696,
        _ => return None,
    };
    Some(Launch {
        kernel,
        grid: (at_most(rows as usize, 32 * size.multiprocessors), 1),
        block: (SPAN, 1),
        arguments: [
            ("rows", Value::U32(rows)),
            ("cols", Value::U32(cols)),
            ("sweeps", Value::U32(sweeps)),
            ("h", Value::Read(state.h)),
            ("residual", Value::Write(state.residual)),
            ("delta", Value::Read(state.delta)),
            ("up", Value::Write(state.up)),
            ("counts", Value::Write(state.counts)),
            ("ran", Value::Write(state.ran)),
        ],
    })
}

/// Addresses of what refinement of a block of columns reads and writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct RefineState {
    pub(super) h: u64,
    pub(super) residual: u64,
    pub(super) delta: u64,
    pub(super) up: u64,
    pub(super) flips: u64,
    pub(super) counts: u64,
}

/// `start` and `width` are the block's.
pub(super) fn refine_block(
    size: Size,
    rows: u32,
    cols: u32,
    start: u32,
    width: u32,
    state: RefineState,
) -> Launch<10> {
    Launch {
        kernel: Kernel::RefineBlock,
        grid: size.warps(rows),
        block: (THREADS, 1),
        arguments: [
            ("rows", Value::U32(rows)),
            ("cols", Value::U32(cols)),
            ("start", Value::U32(start)),
            ("width", Value::U32(width)),
            ("h", Value::Read(state.h)),
            ("residual", Value::Read(state.residual)),
            ("delta", Value::Read(state.delta)),
            ("up", Value::Write(state.up)),
            ("flips", Value::Write(state.flips)),
            ("counts", Value::Write(state.counts)),
        ],
    }
}

pub(super) fn sum_counts(rows: u32, counts: u64, total: u64) -> Launch<3> {
    Launch {
        kernel: Kernel::SumCounts,
        grid: (1, 1),
        block: (THREADS, 1),
        arguments: [
            ("rows", Value::U32(rows)),
            ("counts", Value::Read(counts)),
            ("total", Value::Write(total)),
        ],
    }
}

pub(super) fn gather_rows(
    size: Size,
    count: u32,
    width: u32,
    source: u64,
    indices: u64,
    out: u64,
) -> Launch<5> {
    let (grid, block) = size.rows(count, width);
    Launch {
        kernel: Kernel::GatherRows,
        grid,
        block,
        arguments: [
            ("count", Value::U32(count)),
            ("width", Value::U32(width)),
            ("source", Value::Read(source)),
            ("indices", Value::Read(indices)),
            ("out", Value::Write(out)),
        ],
    }
}

pub(super) fn mirror_lower(k: u32, g: u64) -> Launch<2> {
    let tiles = k.div_ceil(TILE);
    Launch {
        kernel: Kernel::MirrorLower,
        grid: (tiles, tiles),
        block: (TILE, THREADS / TILE),
        arguments: [("k", Value::U32(k)), ("g", Value::Write(g))],
    }
}

pub(super) fn activation_residual(
    size: Size,
    rows: u32,
    cols: u32,
    entries: u32,
    table: u64,
    z: u64,
    target: u64,
) -> Launch<6> {
    let (grid, block) = size.rows(rows, cols);
    Launch {
        kernel: Kernel::ActivationResidual,
        grid,
        block,
        arguments: [
            ("rows", Value::U32(rows)),
            ("cols", Value::U32(cols)),
            ("entries", Value::U32(entries)),
            ("table", Value::Read(table)),
            ("z", Value::Write(z)),
            ("target", Value::Read(target)),
        ],
    }
}

/// Columns `start..start + width` of `n`, at most 64.
pub(super) fn factor_block(
    (n, start, width): (u32, u32, u32),
    extra: f32,
    a: u64,
    lower: u64,
    inverses: u64,
) -> Launch<7> {
    Launch {
        kernel: Kernel::FactorBlock,
        grid: (1, 1),
        block: (cpu::PLANE_BLOCK as u32, 1),
        arguments: [
            ("n", Value::U32(n)),
            ("start", Value::U32(start)),
            ("width", Value::U32(width)),
            ("extra", Value::F32(extra)),
            ("a", Value::Read(a)),
            ("lower", Value::Write(lower)),
            ("inverses", Value::Write(inverses)),
        ],
    }
}

/// Addresses of what a block of the nearest plane reads and writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlaneState {
    pub(super) factor: u64,
    pub(super) low: u64,
    pub(super) delta: u64,
    pub(super) offset: u64,
    pub(super) up: u64,
    pub(super) errors: u64,
}

/// Columns `start..start + width` of `n`, at most 64.
pub(super) fn plane_block(
    size: Size,
    rows: u32,
    (n, start, width): (u32, u32, u32),
    state: PlaneState,
) -> Launch<10> {
    Launch {
        kernel: Kernel::PlaneBlock,
        grid: size.warps(rows),
        block: (THREADS, 1),
        arguments: [
            ("rows", Value::U32(rows)),
            ("n", Value::U32(n)),
            ("start", Value::U32(start)),
            ("width", Value::U32(width)),
            ("factor", Value::Read(state.factor)),
            ("low", Value::Read(state.low)),
            ("delta", Value::Read(state.delta)),
            ("offset", Value::Read(state.offset)),
            ("up", Value::Write(state.up)),
            ("errors", Value::Write(state.errors)),
        ],
    }
}

pub(super) fn gather_columns(
    size: Size,
    rows: u32,
    width: u32,
    source: u64,
    order: u64,
    out: u64,
) -> Launch<5> {
    let (grid, block) = size.rows(rows, width);
    Launch {
        kernel: Kernel::GatherColumns,
        grid,
        block,
        arguments: [
            ("rows", Value::U32(rows)),
            ("width", Value::U32(width)),
            ("source", Value::Read(source)),
            ("order", Value::Read(order)),
            ("out", Value::Write(out)),
        ],
    }
}

/// Which entries of which matrix meet the fixed point, and its factor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    /// Side of the matrix.
    pub(super) k: u32,
    /// The lower triangle alone.
    pub(super) lower: bool,
    /// `2^exponent`.
    pub(super) factor: f64,
}

impl Kept {
    fn arguments(self) -> [Argument; 3] {
        [
            ("k", Value::U32(self.k)),
            ("lower", Value::U32(u32::from(self.lower))),
            ("factor", Value::F64(self.factor)),
        ]
    }
}

/// Blocks of [`fixed_worst`], and so the length of its result.
pub(super) fn worst_blocks(size: Size, k: u32) -> u32 {
    at_most(k as usize, 32 * size.multiprocessors)
}

pub(super) fn fixed_worst(size: Size, kept: Kept, matrix: u64, partial: u64) -> Launch<5> {
    let [k, lower, factor] = kept.arguments();
    Launch {
        kernel: Kernel::FixedWorst,
        grid: (worst_blocks(size, kept.k), 1),
        block: (THREADS, 1),
        arguments: [k, lower, factor, ("matrix", Value::Read(matrix)), ("partial", Value::Write(partial))],
    }
}

pub(super) fn fixed_add(size: Size, kept: Kept, matrix: u64, sums: u64) -> Launch<5> {
    let (grid, block) = size.rows(kept.k, kept.k);
    let [k, lower, factor] = kept.arguments();
    Launch {
        kernel: Kernel::FixedAdd,
        grid,
        block,
        arguments: [k, lower, factor, ("matrix", Value::Read(matrix)), ("sums", Value::Write(sums))],
    }
}

pub(super) fn max_u64(count: u32, values: u64, out: u64) -> Launch<3> {
    Launch {
        kernel: Kernel::MaxU64,
        grid: (1, 1),
        block: (THREADS, 1),
        arguments: [
            ("count", Value::U32(count)),
            ("values", Value::Read(values)),
            ("out", Value::Write(out)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const SIZE: Size = Size { multiprocessors: 4 };

    /// A kernel's parameters as its source declares them: type and name.
    fn declared(kernel: Kernel) -> Vec<(String, String)> {
        let source = kernel.file().source;
        let head = format!(" {}(", kernel.name());
        let start = source
            .match_indices(&head)
            .find(|(at, _)| source[..*at].rsplit('}').next().unwrap().contains("__global__"));
        let start =
            start.unwrap_or_else(|| panic!("{}: no kernel `{}`", kernel.file().name, kernel.name())).0;
        let list = &source[start + head.len()..];
        let list = &list[..list.find(')').unwrap()];
        let parameter = |text: &str| {
            let text = text.replace("__restrict__", " ");
            let (kind, name) = text.trim().rsplit_once([' ', '*']).unwrap();
            let pointer = if text.contains('*') { "*" } else { "" };
            (format!("{}{pointer}", kind.trim().trim_end_matches('*').trim()), name.to_owned())
        };
        list.split(',').map(parameter).collect()
    }

    /// The most threads of a block that a kernel's source allows.
    fn bound(kernel: Kernel) -> u32 {
        let source = kernel.file().source;
        let head = format!(") {}(", kernel.name());
        let (before, _) = source.split_once(&head).unwrap();
        let bound = before.rsplit("__launch_bounds__(").next().unwrap().split(',').next().unwrap().trim();
        let defined = source.lines().find_map(|line| line.strip_prefix(&format!("#define {bound} ")));
        defined.unwrap_or(bound).split_whitespace().next().unwrap().parse().unwrap()
    }

    pub(super) fn check<const N: usize>(launch: Launch<N>) {
        let declared = declared(launch.kernel);
        let names: Vec<&str> = declared.iter().map(|(_, name)| name.as_str()).collect();
        let given: Vec<&str> = launch.arguments.iter().map(|(name, _)| *name).collect();
        assert_eq!(given, names, "{:?}", launch.kernel);
        for ((kind, name), (_, value)) in declared.iter().zip(launch.arguments) {
            let expected: &[&str] = match value {
                Value::U32(_) => &["u32"],
                Value::U64(_) => &["u64"],
                Value::F32(_) => &["float"],
                Value::F64(_) => &["double"],
                Value::Read(_) => {
                    &["const float*", "const u16*", "const u32*", "const u64*", "const double*"]
                }
                Value::Write(_) => &["float*", "u16*", "u32*", "u64*", "i64*", "double*"],
            };
            assert!(
                expected.contains(&kind.as_str()),
                "{:?}: `{name}` is {kind}, given {value:?}",
                launch.kernel
            );
        }
        let threads = launch.block.0 * launch.block.1;
        assert!(threads <= bound(launch.kernel), "{:?}: {threads} threads", launch.kernel);
        assert!(launch.grid.0 > 0 && launch.grid.1 > 0);
    }

    #[test]
    fn arguments_stand_in_the_order_and_with_the_types_of_the_sources() {
        let args = StepArgs::adam(0.1);
        let state = StepState { lo: 1, delta: 2, v: 3, m1: 4, m2: 5, soft: 6 };
        check(step_difference(SIZE, 10, 7, 8, state, &args));
        check(step_given(SIZE, 10, 7, state, &args));
        let refine = RefineState { h: 1, residual: 2, delta: 3, up: 4, flips: 5, counts: 6 };
        check(refine_block(SIZE, 3, 5, 1, 2, refine));
        let descent = DescentState { h: 1, residual: 2, delta: 3, up: 4, counts: 5, ran: 6 };
        for cols in [0, 4096, 4097, 8192, 8193, 14_336, 14_337, 29_696] {
            check(refine_rows(SIZE, 3, cols, 9, descent).unwrap());
        }
        assert!(refine_rows(SIZE, 3, 29_697, 9, descent).is_none());
        check(sum_counts(3, 1, 2));
        check(gather_rows(SIZE, 3, 5, 1, 2, 3));
        check(mirror_lower(33, 1));
        check(activation_residual(SIZE, 3, 5, 1, 1, 2, 3));
        check(factor_block((100, 64, 36), 0.5, 1, 2, 3));
        let plane = PlaneState { factor: 1, low: 2, delta: 3, offset: 4, up: 5, errors: 6 };
        check(plane_block(SIZE, 3, (100, 64, 36), plane));
        check(gather_columns(SIZE, 3, 5, 1, 2, 3));
        let kept = Kept { k: 3, lower: true, factor: 4.0 };
        check(fixed_worst(SIZE, kept, 1, 2));
        check(fixed_add(SIZE, kept, 1, 2));
        check(max_u64(3, 1, 2));
        let tile = moments::Tile { rows: 3, width: 5, top: 1, left: 2, stride: 9 };
        let source = moments::Source { plus: 1, diagonal: 2, minus: 0, factor: -1.0 };
        check(moments::widen(SIZE, tile, source, 4));
        check(moments::subtract_rows(SIZE, tile, source, 4));
        check(moments::set_diagonal(SIZE, 3, 1, 2));
        check(moments::column_gaps(3, 1, 2, 3, 4));
        check(moments::difference_dots(SIZE, tile, (1, 2), 3, 4));
        let groups = moments::Groups { rows: 3, cols: 9, width: 4, groups: 3, group: 2, end: 9 };
        check(moments::group_dots(SIZE, groups, 1, 2, 3));
        check(objective::rounding_errors(SIZE, 10, 1, 2, 3, 4));
        check(objective::row_sums(SIZE, 3, 5, [1, 2, 3, 4, 5], 6));
        check(magnitude::peak_bits(SIZE, 10, 1, 2));
        check(magnitude::max_u32(3, 1, 2));
    }

    #[test]
    fn every_kernel_has_its_number_and_stands_in_its_file() {
        for (number, kernel) in Kernel::ALL.into_iter().enumerate() {
            assert_eq!(kernel as usize, number);
            assert!(!declared(kernel).is_empty());
        }
    }

    #[test]
    fn grids_cover_small_and_huge_shapes_within_the_device() {
        assert_eq!(SIZE.flat(1), (1, 1));
        assert_eq!(SIZE.flat(1025), (2, 1));
        assert_eq!(SIZE.flat(usize::MAX), (64, 1));
        assert_eq!(SIZE.rows(17, 512), ((3, 1), NARROW));
        assert_eq!(SIZE.rows(17, 513), ((17, 1), (256, 1)));
        assert_eq!(SIZE.rows(u32::MAX, 1), ((128, 1), NARROW));
        assert_eq!(SIZE.warps(9), (2, 1));
        assert_eq!(mirror_lower(33, 0).grid, (2, 2));
        assert_eq!((worst_blocks(SIZE, 1), worst_blocks(SIZE, u32::MAX)), (1, 128));
    }
}
