//! Statistics summed on a CUDA device against those summed on the CPU; on machines without one the host pretends to be one.
//!
//! Inputs are small integers, of which every sum is exact on any device: integers must be equal. Not here: real numbers
//! (`compute`).
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]
#![expect(clippy::print_stdout, reason = "says why a test was skipped")]

#[path = "../../compute/tests/device/mod.rs"]
mod device;

use std::sync::{Arc, Mutex, PoisonError};

use halfstep_compute::Device;
use halfstep_compute::cuda::{Cuda, CudaBuffer, RowDigits, RowStaging};
use halfstep_compute::random::Stream;
use halfstep_exec::{Agreement, Carried, ExecError, LayerStatistics, Sampling, Summing, UseSlice};
use halfstep_model::decoder::CarryPrecision;
use halfstep_model::{Activation, AutoPad, Geometry, Layer, LayerUse, Tensor, Unfold, WeightLayout};

/// Tests that fill the device's memory, and those that need some.
static MEMORY: Mutex<()> = Mutex::new(());

const PEAK: f32 = 8.0;

fn layer(unfold: Unfold, cols: usize, groups: usize) -> Layer {
    Layer {
        name: "layer".into(),
        op_type: "any".into(),
        weight: "w".into(),
        weight_shape: vec![groups, cols],
        layout: WeightLayout::AsIs,
        rows: groups,
        cols,
        groups,
        unfold,
        bias: None,
        bias_scale: 1.0,
        output_scale: 1.0,
        uses: vec![LayerUse {
            node: 0,
            input: "x".into(),
            output: "y".into(),
            activation: Activation::Identity,
        }],
    }
}

fn conv(channels: usize, groups: usize) -> Layer {
    let geometry = Geometry {
        kernel: vec![3; 2],
        strides: vec![1; 2],
        dilations: vec![1; 2],
        pads_begin: vec![1; 2],
        pads_end: vec![1; 2],
        auto_pad: AutoPad::NotSet,
        groups,
        output_padding: vec![0; 2],
    };
    layer(Unfold::Conv(geometry), channels / groups * 9, groups)
}

fn integers(shape: &[usize], seed: u64) -> Tensor {
    let mut stream = Stream::new(seed, 0, 0);
    let values = (0..shape.iter().product()).map(|_| stream.index(15) as f32 - 7.0).collect();
    Tensor::f32(shape.to_vec(), values).unwrap()
}

/// A layer with three shards of both streams.
struct Case {
    layer: Layer,
    shards: Vec<(Tensor, Tensor)>,
    sampling: Sampling,
    same: bool,
}

impl Case {
    fn new(layer: Layer, shape: impl Fn(usize) -> Vec<usize>, fraction: f32, same: bool) -> Self {
        let shard = |n: &usize| (integers(&shape(*n), *n as u64), integers(&shape(*n), 100 + *n as u64));
        let sampling = Sampling { fraction, keep_per_shard: 3, seed: 1 };
        Self { layer, shards: [2, 1, 3].iter().map(shard).collect(), sampling, same }
    }

    fn all() -> Vec<(&'static str, Self)> {
        let linear = || layer(Unfold::Rows, 70, 1);
        vec![
            ("linear", Self::new(linear(), |n| vec![n, 900, 70], 1.0, false)),
            ("linear, one stream", Self::new(linear(), |n| vec![n, 31, 70], 1.0, true)),
            ("sampled", Self::new(linear(), |n| vec![n, 33, 70], 0.4, false)),
            ("convolution", Self::new(conv(5, 1), |n| vec![n, 5, 9, 7], 1.0, false)),
            ("grouped", Self::new(conv(6, 3), |n| vec![n, 6, 9, 7], 0.7, false)),
            ("without rows", Self::new(linear(), |n| vec![n, 0, 70], 1.0, false)),
            ("linear, nothing kept", Self::new(linear(), |n| vec![n, 900, 70], 1.0, false).keeping_nothing()),
            (
                "one stream, nothing kept",
                Self::new(linear(), |n| vec![31 * n, 70], 1.0, true).keeping_nothing(),
            ),
            (
                "convolution, nothing kept",
                Self::new(conv(5, 1), |n| vec![n, 5, 9, 7], 1.0, false).keeping_nothing(),
            ),
        ]
    }

    fn keeping_nothing(self) -> Self {
        Self { sampling: Sampling { keep_per_shard: 0, ..self.sampling }, ..self }
    }

    /// A shard as carries of that precision hold it.
    fn carried(&self, shard: usize, precision: CarryPrecision) -> (Carried, Option<Carried>) {
        let carried = |tensor: &Tensor| Carried::new(Arc::new(tensor.clone()), precision);
        let (x, q) = &self.shards[shard];
        (carried(x), (!self.same).then(|| carried(q)))
    }

    fn empty(&self) -> LayerStatistics {
        let agreed = Agreement { peak_fp: PEAK, peak_q: PEAK, positions: 1 << 20 };
        LayerStatistics::new(&self.layer, 5, agreed, self.sampling, self.same).unwrap()
    }

    fn add(&self, statistics: &LayerStatistics, shard: usize, summing: Summing<'_>) -> Result<(), ExecError> {
        self.add_carried(statistics, shard, summing, CarryPrecision::F32)
    }

    fn add_carried(
        &self,
        statistics: &LayerStatistics,
        shard: usize,
        summing: Summing<'_>,
        precision: CarryPrecision,
    ) -> Result<(), ExecError> {
        let (x, q) = self.carried(shard, precision);
        statistics.merge(statistics.products(summing, &self.layer, "x", shard as u32, &x, q.as_ref())?)
    }

    fn rows(&self) -> usize {
        self.layer.cols * self.layer.groups
    }

    fn on_cpu(&self) -> UseSlice {
        let statistics = self.empty();
        (0..3).for_each(|shard| self.add(&statistics, shard, Summing::Cpu).unwrap());
        statistics.slice(0..self.rows()).unwrap()
    }
}

struct Lane {
    device: Cuda,
    staging: RowStaging,
    home: Arc<Cuda>,
}

impl Lane {
    fn new() -> Option<Self> {
        let device = device::cuda()?;
        let (staging, home) = (device.staging().unwrap(), Arc::new(device.lane().unwrap()));
        Some(Self { device, staging, home })
    }

    fn summing(&mut self, digits: RowDigits) -> Summing<'_> {
        Summing::Cuda { lane: &self.device, staging: &mut self.staging, home: &self.home, digits }
    }
}

#[test]
fn a_device_sums_what_the_cpu_sums_in_any_order_and_beside_it() {
    let _mine = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut lane) = Lane::new() else { return };
    for (what, case) in Case::all() {
        let expected = case.on_cpu();
        let ways = [
            (RowDigits::F32, CarryPrecision::F32),
            (RowDigits::Tf32, CarryPrecision::F32),
            (RowDigits::Tf32, CarryPrecision::Bf16),
            (RowDigits::Bf16, CarryPrecision::F32),
            (RowDigits::Bf16, CarryPrecision::Bf16),
        ];
        for (digits, precision) in ways {
            let statistics = case.empty();
            for shard in [2, 0, 2, 1] {
                case.add_carried(&statistics, shard, lane.summing(digits), precision).unwrap();
            }
            let rows = case.rows();
            assert!(statistics.slice(0..rows).unwrap() == expected, "{what}, {digits:?} from {precision:?}");
            let kept = statistics.kept();
            let alone = case.empty();
            (0..3).for_each(|shard| case.add(&alone, shard, Summing::Cpu).unwrap());
            assert!(kept == alone.kept(), "{what}: sample rows");
            for part in [0..1, rows / 3..rows - 1] {
                assert_eq!(statistics.slice(part.clone()).unwrap(), alone.slice(part).unwrap(), "{what}");
            }
        }
        let mixed = case.empty();
        case.add(&mixed, 1, Summing::Cpu).unwrap();
        case.add(&mixed, 0, lane.summing(RowDigits::Bf16)).unwrap();
        case.add(&mixed, 2, Summing::Cpu).unwrap();
        assert!(mixed.slice(0..case.rows()).unwrap() == expected, "{what}: some here, some there");
    }
}

#[test]
fn products_beyond_the_agreed_peak_are_refused() {
    let _mine = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut lane) = Lane::new() else { return };
    let case = Case::new(layer(Unfold::Rows, 70, 1), |n| vec![n, 31, 70], 1.0, true);
    let agreed = Agreement { peak_fp: 1e-3, peak_q: 1e-3, positions: 1 };
    let statistics = LayerStatistics::new(&case.layer, 5, agreed, case.sampling, true).unwrap();
    let refused = case.add(&statistics, 0, lane.summing(RowDigits::F32)).unwrap_err();
    assert!(refused.to_string().contains("expected at most 2^62"), "{refused}");
    assert!(statistics.slice(0..70).unwrap().sums.iter().all(|sum| *sum == 0));
}

/// All of the device's memory but less than `left` bytes.
fn fill(device: &Cuda, left: usize) -> Vec<CudaBuffer> {
    let mut held = Vec::new();
    let mut len = 1 << 36;
    while len * 4 >= left {
        match device.zeros(len) {
            Ok(buffer) => held.push(buffer),
            Err(_) => len /= 2,
        }
    }
    device.synchronize().unwrap();
    held
}

#[test]
fn a_device_without_room_refuses_products_and_leaves_sums_to_the_host() {
    let _mine = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(mut lane) = Lane::new() else { return };
    // Wide enough that no left-over of the driver's holds its arrays.
    let case = Case::new(layer(Unfold::Rows, 1500, 1), |n| vec![n, 3, 1500], 1.0, false);
    let expected = case.on_cpu();
    let statistics = case.empty();
    let (x, q) = case.carried(0, CarryPrecision::F32);
    let products =
        statistics.products(lane.summing(RowDigits::Bf16), &case.layer, "x", 0, &x, q.as_ref()).unwrap();
    let full = fill(&lane.home, 1 << 21);
    let refused = case.add(&statistics, 1, lane.summing(RowDigits::Bf16)).unwrap_err();
    assert!(
        matches!(refused, ExecError::Device(halfstep_compute::DeviceError::OutOfMemory { .. })),
        "{refused}"
    );
    statistics.merge(products).unwrap();
    drop(full);
    for shard in [1, 2] {
        case.add(&statistics, shard, lane.summing(RowDigits::Bf16)).unwrap();
    }
    assert!(statistics.slice(0..1500).unwrap() == expected);
}
