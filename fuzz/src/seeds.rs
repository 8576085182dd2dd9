//! Well-formed inputs that mutation starts from.
//!
//! Models are the goldens of `common/model`; the rest is made here, small, one input per branch of its parser.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use halfstep_quant::aimet::{ParamEncoding, Version, to_json};
use halfstep_quant::{Encodings, Granularity, GridSpec, RangeEstimator, Scheme};
use halfstep_work::{
    KeptLayer, LayerId, LayerPlan, Objective, Plan, Propagation, SegmentId, SolverSettings, StagePlan,
    StartPoint,
};
use serde_json::Value;
use zip::write::SimpleFileOptions;

/// The golden ONNX files.
pub(crate) fn models() -> Result<Vec<Vec<u8>>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../common/model/tests/goldens");
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("no goldens in {}", folder.display()))? {
        files.push(entry?.path());
    }
    files.retain(|file| file.extension().is_some_and(|end| end == "onnx"));
    files.sort();
    files.iter().map(|file: &PathBuf| Ok(fs::read(file)?)).collect()
}

/// One array per element kind and order.
pub(crate) fn npy() -> Result<Vec<Vec<u8>>> {
    let kinds = ["<f4", ">f4", "<f8", "<f2", "<i8", ">i2", "<i4", "<u4", "<u2", "|u1", "|b1", "|i1"];
    let mut seeds: Vec<Vec<u8>> = kinds.iter().map(|kind| array(kind, 1, false, &[4, 3])).collect();
    seeds.push(array("<f4", 1, true, &[2, 3, 4]));
    seeds.push(array("<f4", 2, false, &[5]));
    seeds.push(array("<f4", 3, true, &[3, 1, 2, 2]));
    Ok(seeds)
}

/// Archives with and without compression and labels.
pub(crate) fn npz() -> Result<Vec<Vec<u8>>> {
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let deflated = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    [("<f4", "<i8", stored), ("<f4", "|b1", deflated), (">f2", "<i4", stored.large_file(true))]
        .into_iter()
        .map(|(data, labels, options)| {
            let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
            zip.start_file("x.npy", options)?;
            zip.write_all(&array(data, 1, false, &[4, 3]))?;
            zip.start_file("y.npy", options)?;
            let shape: &[usize] = if labels == "|b1" { &[4, 3] } else { &[4] };
            zip.write_all(&array(labels, 1, false, shape))?;
            Ok(zip.finish()?.into_inner())
        })
        .collect()
}

/// A `.npy` file of zeros.
fn array(kind: &str, version: u8, fortran: bool, shape: &[usize]) -> Vec<u8> {
    let dims: String = shape.iter().map(|dim| format!("{dim}, ")).collect();
    let order = if fortran { "True" } else { "False" };
    let text = format!("{{'descr': '{kind}', 'fortran_order': {order}, 'shape': ({dims}), }}\n");
    let mut file = b"\x93NUMPY".to_vec();
    file.extend([version, 0]);
    match version {
        1 => file.extend((text.len() as u16).to_le_bytes()),
        _ => file.extend((text.len() as u32).to_le_bytes()),
    }
    file.extend(text.as_bytes());
    let width = kind.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(1);
    file.extend(vec![0; shape.iter().product::<usize>() * width]);
    file
}

/// Encodings files of all versions, schemes and granularities that each can say.
pub(crate) fn aimet() -> Result<Vec<Vec<u8>>> {
    let mut seeds = Vec::new();
    for version in [Version::V0_6_1, Version::V1_0_0, Version::V2_0_0] {
        for scheme in [Scheme::Symmetric, Scheme::Asymmetric] {
            for granularity in
                [Granularity::PerTensor, Granularity::PerChannel, Granularity::PerGroup { group_size: 2 }]
            {
                // Blocks have no words in 0.6.1.
                let file =
                    to_json(version, &[param("w", scheme, granularity), param("v", scheme, granularity)]);
                seeds.extend(file.ok().map(|file: Value| file.to_string().into_bytes()));
            }
        }
    }
    Ok(seeds)
}

fn param(name: &str, scheme: Scheme, granularity: Granularity) -> ParamEncoding {
    let (rows, cols) = (3, 4);
    let entries = match granularity {
        Granularity::PerTensor => 1,
        Granularity::PerChannel => rows,
        Granularity::PerGroup { group_size } => rows * cols / group_size,
    };
    let zero_point = if scheme.is_symmetric() { 0 } else { 3 };
    ParamEncoding {
        name: name.to_owned(),
        encodings: Encodings {
            bits: 4,
            scheme,
            granularity,
            rows,
            cols,
            scale: vec![0.25; entries],
            zero_point: vec![zero_point; entries],
        },
        tensor_axis: 0,
        tensor_rank: 2,
        kernel_positions: 1,
    }
}

/// One plan of two layers.
pub(crate) fn plans() -> Result<Vec<Vec<u8>>> {
    let layer = |id: u32, rows: usize, granularity: Granularity| LayerPlan {
        id: LayerId(id),
        name: format!("layer{id}"),
        op_type: "Conv".to_owned(),
        rows,
        cols: 9,
        groups: 1,
        grid: GridSpec {
            bits: 4,
            scheme: Scheme::Symmetric,
            granularity,
            range: RangeEstimator::Percentile { percentile: 99.5 },
        },
        chunks: vec![0..2, 2..rows],
        statistics_of: None,
        slices: vec![0..5, 5..9],
        stage: SegmentId(id),
    };
    let solver = SolverSettings {
        objective: Objective::Gram,
        iterations: 100,
        learning_rate: 0.01,
        beta: (20.0, 2.0),
        warm_start: 0.2,
        lambda: 0.01,
        batch: 32,
        damping: 0.01,
        start: StartPoint::Gptq,
        refine_sweeps: 2,
        scale_fits: 0,
        seed: 1,
        positions_per_shard: 64,
        positions_fraction: 1.0,
    };
    let plan = Plan {
        layers: vec![
            layer(0, 4, Granularity::PerChannel),
            layer(1, 5, Granularity::PerGroup { group_size: 3 }),
        ],
        kept: vec![KeptLayer { name: "k".into(), op_type: "Gemm".into(), reason: "asked for".into() }],
        stages: vec![StagePlan { solve: vec![LayerId(0)] }, StagePlan { solve: vec![LayerId(1)] }],
        shards: vec![0..8, 8..13],
        batch: 4,
        propagation: Propagation::Sequential,
        solver,
        ranges: vec![0..1, 1..2],
    };
    Ok(vec![serde_json::to_vec(&plan)?, serde_json::to_vec_pretty(&plan)?])
}
