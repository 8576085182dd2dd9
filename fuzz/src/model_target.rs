//! The ONNX target: reads a model and takes it through all that planning and export do.
//!
//! Beside panics it looks for rewrites that spoil a model: what was read must still be readable after each of them.
//! Not here: running the graph.

use std::collections::BTreeMap;

use anyhow::Result;
use bytes::Bytes;
use halfstep_model::{Cut, Layer, Model, cut, extract, fold_batch_norms, list_layers, normalize, skeleton};

/// Reads, normalizes, folds, lists, cuts, extracts, decodes, strips.
pub(crate) fn run(data: &[u8]) -> Result<()> {
    let Ok(mut model) = Model::from_bytes(Bytes::copy_from_slice(data)) else { return Ok(()) };
    describe(&model);
    normalize(&mut model);
    model.recheck().expect("a normalized model is still a model");
    if fold_batch_norms(&mut model).is_err() {
        return Ok(());
    }
    model.recheck().expect("a folded model is still a model");
    describe(&model);
    let Ok((layers, _)) = list_layers(&model) else { return Ok(()) };
    layers.iter().for_each(|layer| use_layer(&model, layer));
    for selected in [vec![true; layers.len()], every_other(layers.len())] {
        if let Ok(cut) = cut(&model, &layers, &selected) {
            extract_all(&model, &cut);
        }
    }
    Ok(())
}

fn every_other(count: usize) -> Vec<bool> {
    (0..count).map(|i| i % 2 == 0).collect()
}

/// Everything that can be asked of a model as it is.
fn describe(model: &Model) {
    drop((model.inputs(), model.outputs(), model.opset(), model.index()));
    for tensor in &model.graph().initializer {
        if let Ok(tensor) = model.tensor(tensor.name()) {
            assert_eq!(tensor.shape.iter().product::<usize>(), tensor.len());
        }
    }
    Model::from_bytes(skeleton(model)).expect("a skeleton of a model is a model");
}

/// The weight as a matrix and back.
fn use_layer(model: &Model, layer: &Layer) {
    let Ok(tensor) = model.tensor(&layer.weight) else { return };
    let Some(values) = tensor.as_f32() else { return };
    let matrix = layer.layout.to_matrix(&tensor.shape, values).expect("a listed layer has a matrix");
    assert_eq!(layer.rows.checked_mul(layer.cols), Some(matrix.len()));
    let back = layer.layout.from_matrix(&tensor.shape, &matrix).expect("the matrix came from this shape");
    assert!(back.iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits()), "matrix form loses weights");
}

/// Extracts every segment; each must be a model again.
fn extract_all(model: &Model, cut: &Cut) {
    for segment in &cut.segments {
        let part = extract(model, &segment.nodes, &segment.inputs, &segment.outputs, &BTreeMap::new());
        if let Ok(part) = part {
            Model::from_bytes(part).expect("a segment is a model");
        }
    }
}
