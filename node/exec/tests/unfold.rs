//! Unfolding against its definition, one entry at a time.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use halfstep_exec::{ExecError, Unfolder};
use halfstep_model::{AutoPad, Data, Geometry, Tensor, Unfold};
use proptest::prelude::*;

fn counted(shape: &[usize]) -> Tensor {
    let len = shape.iter().product();
    // No zeros: padding must be told apart from data.
    Tensor::f32(shape.to_vec(), (1..=len).map(|i| i as f32).collect()).unwrap()
}

/// Column `(c, k)` of output cell `o`, by the definitions in `halfstep_model::Unfold`.
fn entry(unfold: &Unfold, x: &Tensor, group: usize, position: usize, column: usize) -> f32 {
    let (geometry, transposed) = match unfold {
        Unfold::Conv(g) => (g, false),
        Unfold::ConvTranspose(g) => (g, true),
        _ => unreachable!("convolutions only"),
    };
    let spatial = &x.shape[2..];
    let extents =
        if transposed { geometry.conv_transpose_extents(spatial) } else { geometry.conv_extents(spatial) };
    let extents = extents.unwrap();
    let output: Vec<usize> = extents.iter().map(|e| e.output).collect();
    let cells: usize = output.iter().product();
    let kernel: usize = geometry.kernel.iter().product();
    let (o, k) = (index(&output, position % cells), index(&geometry.kernel, column % kernel));
    let mut offset = 0;
    for d in 0..spatial.len() {
        let (o, k, pad) = (o[d] as i64, k[d] as i64, extents[d].pad_begin as i64);
        let (stride, dilation) = (geometry.strides[d] as i64, geometry.dilations[d] as i64);
        let i = if transposed {
            let reached = o + pad - k * dilation;
            if reached % stride != 0 {
                return 0.0;
            }
            reached / stride
        } else {
            o * stride + k * dilation - pad
        };
        if !(0..spatial[d] as i64).contains(&i) {
            return 0.0;
        }
        offset = offset * spatial[d] + i as usize;
    }
    let per_group = x.shape[1] / geometry.groups;
    let channel = group * per_group + column / kernel;
    let plane: usize = spatial.iter().product();
    x.as_f32().unwrap()[(position / cells * x.shape[1] + channel) * plane + offset]
}

fn index(shape: &[usize], flat: usize) -> Vec<usize> {
    let mut rest = flat;
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|d| {
            let i = rest % d;
            rest /= d;
            i
        })
        .collect();
    index.reverse();
    index
}

/// Kernel, stride, dilation, padding at both ends, input, output padding.
type Axis = (usize, usize, usize, usize, usize, usize, usize);

fn geometry() -> impl Strategy<Value = (Geometry, Vec<usize>, bool)> {
    let axis = (1usize..6, 1usize..4, 1usize..3, 0usize..3, 0usize..3, 1usize..9, 0usize..2);
    let pad = prop_oneof![
        3 => Just(AutoPad::NotSet),
        1 => Just(AutoPad::SameUpper),
        1 => Just(AutoPad::SameLower),
        1 => Just(AutoPad::Valid)
    ];
    (proptest::collection::vec(axis, 1..4), 1usize..4, 1usize..4, 1usize..4, pad, any::<bool>()).prop_map(
        |(axes, groups, per_group, images, auto_pad, transposed)| {
            let pick = |f: fn(&Axis) -> usize| axes.iter().map(f).collect();
            let geometry = Geometry {
                kernel: pick(|a| a.0),
                strides: pick(|a| a.1),
                dilations: pick(|a| a.2),
                pads_begin: pick(|a| a.3),
                pads_end: pick(|a| a.4),
                auto_pad,
                groups,
                output_padding: if transposed { pick(|a| a.6) } else { vec![0; axes.len()] },
            };
            let mut shape = vec![images, groups * per_group];
            shape.extend::<Vec<usize>>(pick(|a| a.5));
            (geometry, shape, transposed)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn blocks_of_any_convolution_hold_what_the_definition_says(
        (geometry, shape, transposed) in geometry(),
        cut in any::<prop::sample::Index>(),
    ) {
        let groups = geometry.groups;
        let cols = shape[1] / groups * geometry.kernel.iter().product::<usize>();
        let extents = if transposed { geometry.conv_transpose_extents(&shape[2..]) } else { geometry.conv_extents(&shape[2..]) };
        let unfold = if transposed { Unfold::ConvTranspose(geometry) } else { Unfold::Conv(geometry) };
        let x = counted(&shape);
        let unfolder = Unfolder::new("x", &unfold, &x, cols, groups);
        let Ok(extents) = extents else {
            prop_assert!(unfolder.is_err());
            return Ok(());
        };
        let unfolder = unfolder.unwrap();
        let positions = shape[0] * extents.iter().map(|e| e.output).product::<usize>();
        prop_assert_eq!(unfolder.positions(), positions);
        let group = cut.index(groups);
        let middle = cut.index(positions);
        let values = x.as_f32().unwrap();
        let mut rows = vec![f32::NAN; positions * cols];
        let (first, second) = rows.split_at_mut(middle * cols);
        unfolder.block(values, group, 0..middle, first).unwrap();
        unfolder.block(values, group, middle..positions, second).unwrap();
        for (at, value) in rows.iter().enumerate() {
            let expected = entry(&unfold, &x, group, at / cols, at % cols);
            prop_assert_eq!(*value, expected, "position {} column {}", at / cols, at % cols);
        }
        let chosen: Vec<usize> = (0..positions).rev().step_by(3).collect();
        let mut gathered = vec![f32::NAN; chosen.len() * cols];
        unfolder.gather(values, group, &chosen, &mut gathered).unwrap();
        for (row, position) in gathered.chunks(cols).zip(&chosen) {
            prop_assert_eq!(row, &rows[position * cols..][..cols]);
        }
    }
}

#[test]
fn rows_and_columns_of_products() {
    let x = counted(&[2, 3, 4]);
    let values = x.as_f32().unwrap();
    let rows = Unfolder::new("x", &Unfold::Rows, &x, 4, 1).unwrap();
    assert_eq!(rows.positions(), 6);
    assert_eq!(rows.borrow(values, 1..3).unwrap(), &values[4..12]);
    let mut out = vec![0.0; 8];
    rows.block(values, 0, 1..3, &mut out).unwrap();
    assert_eq!(out, values[4..12]);

    let columns = Unfolder::new("x", &Unfold::Columns, &x, 3, 1).unwrap();
    assert_eq!(columns.positions(), 8);
    assert!(columns.borrow(values, 1..3).is_none());
    let mut out = vec![0.0; 9];
    columns.block(values, 0, 3..6, &mut out).unwrap();
    assert_eq!(out, [4.0, 8.0, 12.0, 13.0, 17.0, 21.0, 14.0, 18.0, 22.0]);
}

#[test]
fn large_planes_pass_through_whole_tiles() {
    // 35 channels by 50 cells: whole 16 x 16 tiles, and rests on both sides.
    let x = counted(&[3, 70, 50]);
    let geometry = Geometry {
        kernel: vec![1],
        strides: vec![1],
        dilations: vec![1],
        pads_begin: vec![0],
        pads_end: vec![0],
        auto_pad: AutoPad::NotSet,
        groups: 2,
        output_padding: vec![0],
    };
    let unfold = Unfold::Conv(geometry);
    let unfolder = Unfolder::new("x", &unfold, &x, 35, 2).unwrap();
    let mut rows = vec![0.0; 120 * 35];
    unfolder.block(x.as_f32().unwrap(), 1, 17..137, &mut rows).unwrap();
    for (at, value) in rows.iter().enumerate() {
        assert_eq!(*value, entry(&unfold, &x, 1, 17 + at / 35, at % 35));
    }
}

#[test]
fn inputs_that_do_not_belong_to_the_layer_are_refused_by_name() {
    let x = counted(&[2, 3, 4]);
    for (unfold, cols, groups) in [
        (Unfold::Rows, 3, 1),
        (Unfold::Rows, 4, 2),
        (Unfold::Columns, 4, 1),
        (Unfold::Rows, 0, 1),
        (Unfold::Rows, 4, 0),
    ] {
        let error = Unfolder::new("pixels", &unfold, &x, cols, groups).unwrap_err();
        assert!(matches!(&error, ExecError::Tensor { name, .. } if name == "pixels"), "{error}");
    }
    let integers = Tensor::new(vec![1, 4], Data::I64(vec![1; 4])).unwrap();
    let error = Unfolder::new("ids", &Unfold::Rows, &integers, 4, 1).unwrap_err();
    assert!(error.to_string().contains("`ids`"), "{error}");
    let unfolder = Unfolder::new("x", &Unfold::Rows, &x, 4, 1).unwrap();
    let values = x.as_f32().unwrap();
    let mut out = [0.0; 8];
    assert!(unfolder.block(values, 0, 5..7, &mut out).is_err(), "past the last position");
    assert!(unfolder.block(values, 1, 0..2, &mut out).is_err(), "no such group");
    assert!(unfolder.block(values, 0, 0..3, &mut out).is_err(), "no room");
    assert!(unfolder.block(&values[1..], 0, 0..1, &mut out).is_err(), "another tensor");
}
