//! Slices of sums: any split of shards over nodes and of rows over slices gives the same bits; damaged bytes are refused.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use halfstep_compute::random::Stream;
use halfstep_exec::{
    Agreement, LayerMeans, LayerStatistics, MeanSlice, Sampling, SliceForm, SumSlice, decode_means,
    decode_samples, decode_sums, encode_means, encode_samples, encode_sums, means, peak,
};
use halfstep_model::{Activation, Layer, LayerUse, Tensor, Unfold, WeightLayout};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;

const COLS: usize = 5;
const SHARDS: u32 = 6;
const SAMPLING: Sampling = Sampling { fraction: 1.0, keep_per_shard: 3, seed: 3 };

fn layer() -> Layer {
    let uses = LayerUse { node: 0, input: "x".into(), output: "y".into(), activation: Activation::Identity };
    Layer {
        name: "dense".into(),
        op_type: "MatMul".into(),
        weight: "w".into(),
        weight_shape: vec![COLS, 2],
        layout: WeightLayout::AsIs,
        rows: 2,
        cols: COLS,
        groups: 1,
        unfold: Unfold::Rows,
        bias: None,
        bias_scale: 1.0,
        output_scale: 1.0,
        uses: vec![uses],
    }
}

fn data(shard: u32, stream: u32) -> Tensor {
    let mut draw = Stream::new(7, u64::from(stream), shard);
    Tensor::f32(vec![4, COLS], (0..4 * COLS).map(|_| draw.normal_f32()).collect()).unwrap()
}

fn empty(differs: bool) -> LayerStatistics {
    let largest = |stream| (0..SHARDS).map(|s| peak(data(s, stream).as_f32().unwrap())).fold(0.0, f32::max);
    let agreed = Agreement { peak_fp: largest(0), peak_q: largest(1), positions: u64::from(SHARDS) * 4 };
    LayerStatistics::new(&layer(), 1, agreed, SAMPLING, !differs).unwrap()
}

/// What a node has after these shards.
fn node(shards: &[u32], differs: bool) -> LayerStatistics {
    let sums = empty(differs);
    for shard in shards {
        let (fp, q) = (data(*shard, 0), data(*shard, 1));
        let fed = if differs { (&fp, Some(&q)) } else { (&q, None) };
        sums.accumulate(&layer(), "x", *shard, fed.0, fed.1).unwrap();
    }
    sums
}

fn slice(node: &LayerStatistics, rows: Range<usize>) -> SumSlice {
    SumSlice { cols: COLS, rows: rows.clone(), uses: vec![node.slice(rows).unwrap()] }
}

fn form(differs: bool) -> SliceForm {
    SliceForm { cols: COLS, groups: 1, uses: 1, differs }
}

proptest! {
    #[test]
    fn any_split_of_shards_and_rows_gives_the_same_integers_and_means(
        owners in proptest::collection::vec(0usize..4, SHARDS as usize),
        order in Just((0..SHARDS).collect::<Vec<u32>>()).prop_shuffle(),
        first in 0usize..4,
        cut in 1usize..COLS,
        differs in any::<bool>(),
    ) {
        let all: Vec<u32> = (0..SHARDS).collect();
        let alone = node(&all, differs);
        let fleet: Vec<LayerStatistics> = (0..4)
            .map(|n| order.iter().copied().filter(|s| owners[*s as usize] == n).collect::<Vec<u32>>())
            .map(|shards| node(&shards, differs))
            .collect();
        let mut whole = LayerMeans::new(COLS, 1);
        for rows in [cut..COLS, 0..cut] {
            prop_assert!(whole.complete(3).is_err() && whole.slice(rows.clone()).is_none());
            let mut sum = slice(&fleet[first], rows.clone());
            for other in (0..4).filter(|n| *n != first) {
                let bytes = encode_sums(Some(&slice(&fleet[other], rows.clone())));
                let came = decode_sums(&bytes, &form(differs), rows.clone()).unwrap().unwrap();
                sum.add(&came).unwrap();
            }
            prop_assert_eq!(&sum, &slice(&alone, rows.clone()));
            let bytes = encode_means(&sum.means().unwrap());
            let came = decode_means(&bytes, &form(differs), rows.clone()).unwrap();
            whole.place(Arc::new(came.clone())).unwrap();
            prop_assert_eq!(whole.slice(rows), Some(came));
        }
        let before = whole.slice(0..COLS).unwrap();
        whole.complete(3).unwrap();
        whole.complete(3).unwrap();
        prop_assert_eq!(whole.slice(0..COLS), Some(before));
        let together = whole.into_groups().remove(0);
        let expected = means(&[Arc::new(alone)]).unwrap().remove(0);
        prop_assert_eq!((together.h, together.c, together.g), (expected.h, expected.c, expected.g));
    }
}

#[test]
fn a_shard_merged_twice_counts_once() {
    assert_eq!(slice(&node(&[0, 1, 1, 0], true), 0..COLS), slice(&node(&[1, 0], true), 0..COLS));
}

#[test]
fn slices_of_other_forms_are_refused() {
    let full = slice(&node(&[0], true), 0..COLS);
    for other in [slice(&node(&[1], true), 0..2), slice(&node(&[1], false), 0..COLS)] {
        assert!(full.clone().add(&other).is_err());
    }
    let part = slice(&node(&[0], true), 0..2).means().unwrap();
    let mut whole = LayerMeans::new(COLS, 1);
    assert!(whole.complete(3).is_err());
    whole.place(Arc::new(part.clone())).unwrap();
    assert!(whole.complete(3).is_err());
    let beyond = MeanSlice { rows: COLS..COLS + 2, ..part.clone() };
    let short = MeanSlice { rows: 2..4, ..part.clone() };
    let other = slice(&node(&[0], false), 2..4).means().unwrap();
    for wrong in [&part, &beyond, &short, &other] {
        assert!(whole.place(Arc::new(wrong.clone())).is_err(), "{:?}", wrong.rows);
    }
    assert!(whole.has(&(0..2)) && !whole.has(&(1..3)));
    assert!(node(&[0], true).slice(3..COLS + 1).is_err());
}

#[test]
fn samples_come_back_for_exactly_the_shards_asked_for() {
    let kept = vec![node(&[1, 4], true).kept()];
    let bytes = encode_samples(&kept);
    assert_eq!(decode_samples(&bytes, &form(true), &[1, 4]).unwrap(), kept);
    for shards in [[1, 3].as_slice(), &[1], &[1, 4, 5]] {
        assert!(decode_samples(&bytes, &form(true), shards).is_err(), "{shards:?}");
    }
}

#[test]
fn a_layer_without_finite_inputs_has_no_slice() {
    assert_eq!(decode_sums(&encode_sums(None), &form(true), 0..COLS).unwrap(), None);
}

/// Whatever is cut off, added or changed in the head: an error or other numbers, never a panic or a huge allocation.
#[test]
fn damaged_bytes_are_refused() {
    let one = node(&[0, 1], true);
    let sums = encode_sums(Some(&slice(&one, 0..COLS)));
    let mean = encode_means(&slice(&one, 0..COLS).means().unwrap());
    let samples = encode_samples(&[one.kept()]);
    let decode = |what: usize, bytes: &[u8]| match what {
        0 => decode_sums(bytes, &form(true), 0..COLS).map(|_| ()),
        1 => decode_means(bytes, &form(true), 0..COLS).map(|_| ()),
        _ => decode_samples(bytes, &form(true), &[0, 1]).map(|_| ()),
    };
    for (what, good) in [sums, mean, samples].iter().enumerate() {
        assert!(decode(what, good).is_ok());
        for len in 0..good.len() {
            assert!(decode(what, &good[..len]).is_err(), "{what}: {len} bytes");
        }
        assert!(decode(what, &[good.as_ref(), b"x"].concat()).is_err());
        for at in 0..good.len() {
            let mut bad = good.to_vec();
            bad[at] ^= 0x80;
            let refused = decode(what, &bad).is_err();
            assert!(refused || at >= 12, "{what}: byte {at}");
        }
    }
}
