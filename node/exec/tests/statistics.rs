//! Statistics against sums in f64, and independence of order and split.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop")]

use halfstep_compute::random::Stream;
use halfstep_exec::{
    Agreement, ExecError, GroupMeans, LayerStatistics, Sampling, Unfolder, means, peak, sampled_positions,
};
use halfstep_model::{Activation, AutoPad, Geometry, Layer, LayerUse, Tensor, Unfold, WeightLayout};
use std::sync::Arc;

/// f32 sums of a few thousand products of size 1.
const TOLERANCE: f64 = 2e-5;

fn layer(groups: usize, per_group: usize, kernel: usize) -> Layer {
    let geometry = Geometry {
        kernel: vec![kernel; 2],
        strides: vec![1; 2],
        dilations: vec![1; 2],
        pads_begin: vec![kernel / 2; 2],
        pads_end: vec![kernel / 2; 2],
        auto_pad: AutoPad::NotSet,
        groups,
        output_padding: vec![0; 2],
    };
    Layer {
        name: "conv".into(),
        op_type: "Conv".into(),
        weight: "w".into(),
        weight_shape: vec![groups, per_group, kernel, kernel],
        layout: WeightLayout::AsIs,
        rows: groups,
        cols: per_group * kernel * kernel,
        groups,
        unfold: Unfold::Conv(geometry),
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

fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut stream = Stream::new(seed, 0, 0);
    let len = shape.iter().product();
    Tensor::f32(shape.to_vec(), (0..len).map(|_| stream.normal_f32()).collect()).unwrap()
}

struct Case {
    layer: Layer,
    /// Original and quantized stream of each shard.
    shards: Vec<(Tensor, Tensor)>,
}

impl Case {
    fn new(groups: usize, per_group: usize, kernel: usize) -> Self {
        let layer = layer(groups, per_group, kernel);
        let shape = |images| [images, groups * per_group, 7, 6];
        let shards = [2usize, 1, 3].iter().enumerate();
        let shards =
            shards.map(|(i, n)| (random(i as u64, &shape(*n)), random(99 + i as u64, &shape(*n)))).collect();
        Self { layer, shards }
    }

    fn agreement(&self, fraction: f32) -> Agreement {
        let largest = |pick: fn(&(Tensor, Tensor)) -> &Tensor| {
            self.shards.iter().map(|s| peak(pick(s).as_f32().unwrap())).fold(0.0, f32::max)
        };
        let positions = (0..self.shards.len()).map(|i| self.rows(i, fraction).len() as u64).sum();
        Agreement { peak_fp: largest(|s| &s.0), peak_q: largest(|s| &s.1), positions }
    }

    fn rows(&self, shard: usize, fraction: f32) -> Vec<usize> {
        let x = &self.shards[shard].0;
        let l = &self.layer;
        let total = Unfolder::new("x", &l.unfold, x, l.cols, l.groups).unwrap().positions();
        sampled_positions(total, fraction, shard as u32)
    }

    fn empty(&self, sampling: Sampling, same: bool) -> LayerStatistics {
        LayerStatistics::new(&self.layer, 5, self.agreement(sampling.fraction), sampling, same).unwrap()
    }

    fn run(&self, order: &[usize], sampling: Sampling, same: bool) -> Vec<GroupMeans> {
        let statistics = self.empty(sampling, same);
        for i in order {
            let (fp, q) = &self.shards[*i];
            statistics.accumulate(&self.layer, "x", *i as u32, fp, (!same).then_some(q)).unwrap();
        }
        means(&[Arc::new(statistics)]).unwrap()
    }

    /// `mean a_i b_j` in f64 over the sampled rows.
    fn oracle(&self, group: usize, fraction: f32, a_quantized: bool, b_quantized: bool) -> Vec<f64> {
        let l = &self.layer;
        let mut sums = vec![0.0; l.cols * l.cols];
        let mut count = 0.0;
        for (i, shard) in self.shards.iter().enumerate() {
            let rows = self.rows(i, fraction);
            let unfolded = |quantized| {
                let x = if quantized { &shard.1 } else { &shard.0 };
                let mut out = vec![0.0; rows.len() * l.cols];
                let unfolder = Unfolder::new("x", &l.unfold, x, l.cols, l.groups).unwrap();
                unfolder.gather(x.as_f32().unwrap(), group, &rows, &mut out).unwrap();
                out
            };
            let (a, b) = (unfolded(a_quantized), unfolded(b_quantized));
            for (a, b) in a.chunks(l.cols).zip(b.chunks(l.cols)) {
                count += 1.0;
                for (i, a) in a.iter().enumerate() {
                    for (j, b) in b.iter().enumerate() {
                        sums[i * l.cols + j] += f64::from(*a) * f64::from(*b);
                    }
                }
            }
        }
        sums.iter().map(|s| s / count).collect()
    }
}

fn assert_close(actual: &[f32], expected: &[f64], what: &str) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((f64::from(*a) - e).abs() <= TOLERANCE * (1.0 + e.abs()), "{what} {i}: {a} is not {e}");
    }
}

const ALL: Sampling = Sampling { fraction: 1.0, keep_per_shard: 0, seed: 1 };

#[test]
fn sums_equal_f64_sums_for_dense_grouped_and_depthwise_layers() {
    for (groups, per_group, kernel) in [(1, 5, 3), (2, 3, 1), (6, 1, 3), (3, 1, 5), (1, 20, 3)] {
        for fraction in [1.0, 0.37] {
            let case = Case::new(groups, per_group, kernel);
            let sampling = Sampling { fraction, ..ALL };
            let found = case.run(&[0, 1, 2], sampling, false);
            assert_eq!(found.len(), groups);
            for (group, means) in found.iter().enumerate() {
                let what = format!("{groups} x {per_group} x {kernel}, fraction {fraction}, group {group}");
                assert_close(&means.h, &case.oracle(group, fraction, true, true), &what);
                assert_close(means.c.as_ref().unwrap(), &case.oracle(group, fraction, false, true), &what);
                assert_close(means.g.as_ref().unwrap(), &case.oracle(group, fraction, false, false), &what);
            }
        }
    }
}

#[test]
fn one_stream_for_both_is_stored_once() {
    let case = Case::new(2, 3, 3);
    let found = case.run(&[0, 1, 2], ALL, true);
    for (group, means) in found.iter().enumerate() {
        assert!(means.c.is_none() && means.g.is_none());
        assert_close(&means.h, &case.oracle(group, 1.0, false, false), "h");
    }
}

#[test]
fn the_order_of_shards_and_their_repetition_change_nothing() {
    let case = Case::new(2, 4, 3);
    let sampling = Sampling { fraction: 1.0, keep_per_shard: 7, seed: 3 };
    let expected = case.run(&[0, 1, 2], sampling, false);
    for order in [[2, 1, 0].as_slice(), &[1, 2, 0], &[1, 1, 0, 2, 0]] {
        assert_eq!(case.run(order, sampling, false), expected, "{order:?}");
    }
    assert_ne!(case.run(&[0, 1], sampling, false), expected);
}

#[test]
fn threads_that_race_give_the_same_bits() {
    let case = Case::new(3, 2, 3);
    let sampling = Sampling { fraction: 1.0, keep_per_shard: 4, seed: 3 };
    let statistics = case.empty(sampling, false);
    std::thread::scope(|scope| {
        for (i, (fp, q)) in case.shards.iter().enumerate() {
            let (statistics, layer) = (&statistics, &case.layer);
            scope.spawn(move || statistics.accumulate(layer, "x", i as u32, fp, Some(q)).unwrap());
        }
    });
    assert_eq!(means(&[Arc::new(statistics)]).unwrap(), case.run(&[0, 1, 2], sampling, false));
}

#[test]
fn samples_are_rows_of_both_streams_at_the_same_positions() {
    let case = Case::new(2, 3, 1);
    let sampling = Sampling { fraction: 1.0, keep_per_shard: 10, seed: 3 };
    let found = case.run(&[2, 0, 1], sampling, false);
    for (group, means) in found.iter().enumerate() {
        let rows = &means.samples;
        assert_eq!((rows.x_fp.len(), rows.x_q.len()), (3 * 10 * 3, 3 * 10 * 3));
        for (sample, (x_fp, x_q)) in rows.x_fp.chunks(3).zip(rows.x_q.chunks(3)).enumerate() {
            let (fp, q) = &case.shards[sample / 10];
            let find = |x: &Tensor, row: &[f32]| {
                let unfolder = Unfolder::new("x", &case.layer.unfold, x, 3, 2).unwrap();
                let mut all = vec![0.0; unfolder.positions() * 3];
                unfolder.block(x.as_f32().unwrap(), group, 0..unfolder.positions(), &mut all).unwrap();
                all.chunks(3).position(|r| r == row).expect("a kept row is a row of its shard")
            };
            assert_eq!(find(fp, x_fp), find(q, x_q));
        }
        let distinct: std::collections::BTreeSet<Vec<u32>> =
            rows.x_fp.chunks(3).map(|r| r.iter().map(|x| x.to_bits()).collect()).collect();
        assert_eq!(distinct.len(), 30, "no position is drawn twice");
    }
}

#[test]
fn shared_weights_mean_over_all_uses() {
    let case = Case::new(1, 3, 1);
    let (a, b) = (case.empty(ALL, false), case.empty(ALL, false));
    for (i, (fp, q)) in case.shards.iter().enumerate() {
        a.accumulate(&case.layer, "x", i as u32, fp, Some(q)).unwrap();
        b.accumulate(&case.layer, "x", i as u32, fp, Some(fp)).unwrap();
    }
    let found = means(&[Arc::new(a), Arc::new(b)]).unwrap().remove(0);
    let mean = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(b).map(|(a, b)| (a + b) / 2.0).collect::<Vec<f64>>();
    let target = case.oracle(0, 1.0, false, false);
    assert_close(&found.h, &mean(case.oracle(0, 1.0, true, true), target.clone()), "h");
    assert_close(&found.c.unwrap(), &mean(case.oracle(0, 1.0, false, true), target.clone()), "c");
    assert_close(&found.g.unwrap(), &target, "g");
}

#[test]
fn inputs_without_finite_sums_fail_the_layer_by_name() {
    let case = Case::new(1, 3, 1);
    for bad in [f32::NAN, f32::INFINITY, 1e30] {
        for (peak_fp, peak_q) in [(bad, 1.0), (1.0, bad)] {
            let agreed = Agreement { peak_fp, peak_q, positions: 10 };
            let error = LayerStatistics::new(&case.layer, 0, agreed, ALL, false).unwrap_err();
            let ExecError::NonFinite { name, peak } = &error else { panic!("{error}") };
            assert_eq!((name.as_str(), peak.to_bits()), ("conv", bad.to_bits()));
        }
    }
}

#[test]
fn a_shard_beyond_the_agreed_peak_is_refused() {
    let case = Case::new(1, 3, 1);
    let agreed = Agreement { peak_fp: 1e-3, peak_q: 1e-3, positions: 1 };
    let statistics = LayerStatistics::new(&case.layer, 0, agreed, ALL, true).unwrap();
    let (fp, _) = &case.shards[0];
    assert!(matches!(statistics.accumulate(&case.layer, "x", 0, fp, None), Err(ExecError::Internal(_))));
    let statistics = case.empty(ALL, false);
    let other = random(1, &[9, 3, 7, 6]);
    assert!(matches!(
        statistics.accumulate(&case.layer, "x", 0, fp, Some(&other)),
        Err(ExecError::Tensor { .. })
    ));
    assert!(matches!(statistics.accumulate(&case.layer, "x", 0, fp, None), Err(ExecError::Internal(_))));
}
