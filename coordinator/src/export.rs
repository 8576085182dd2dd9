//! Writes the results, reads them back through the readers a user would use, and only then lets them appear.

use crate::config::EncodingsVersion;
use crate::manifest::{FileRecord, Manifest};
use crate::memory::peak_resident_bytes;
use crate::report::grouped;
use crate::staging::Staging;
use crate::{Assembled, AssembledLayer, CoordinatorError, JobConfig, Report};
use halfstep_model::{Model, Unfold, WeightLayout, qdq};
use halfstep_quant::aimet::{self, ParamEncoding, Version};
use halfstep_work::JobId;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const MODEL: &str = "model.onnx";
const QDQ: &str = "model.qdq.onnx";
const REPORT: &str = "report.json";
const TIMING: &str = "timing.json";
const MANIFEST: &str = "manifest.json";

/// One input file and how the manifest calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Where it lies on this machine.
    pub path: PathBuf,
    /// As the user named it.
    pub shown: PathBuf,
}

/// Where results come from, for the manifest.
#[derive(Clone, Copy)]
pub struct Origin<'a> {
    /// The job.
    pub job: JobId,
    /// Device kind and ONNX engine that computed it.
    pub kind: &'a (String, String),
    /// Model and calibration files.
    pub inputs: &'a [Input],
}

/// Writes everything into `config.output`; returns the files' names and adds notes to the report.
///
/// `timing`: seconds by phase and layer; the only output that differs between two runs, and the only one the
/// manifest does not hash.
///
/// # Errors
/// `Storage`, `Configuration` for the folder; `ReadBack` if what was written is not what was solved. Nothing is
/// visible then.
pub fn export(
    config: &JobConfig,
    model: &Model,
    assembled: &mut Assembled,
    of: &Origin<'_>,
    timing: &serde_json::Value,
) -> Result<Vec<PathBuf>, CoordinatorError> {
    let staging = Staging::new(&config.output, config.force)?;
    let on_grid = on_grid(model, assembled)?;
    on_grid.write(staging.path(MODEL))?;
    check_on_grid(&staging.path(MODEL), &on_grid, &assembled.layers)?;
    let notes = write_qdq(&staging, &on_grid, assembled)?;
    assembled.report.notes.extend(grouped(notes));
    for (index, version) in config.encodings.iter().enumerate() {
        let name =
            if index == 0 { "model.encodings".into() } else { format!("model.{}.encodings", version.text()) };
        if let Some(note) = write_encodings(&staging, &name, *version, assembled)? {
            assembled.report.notes.push(note);
        }
    }
    let files = write_records(&staging, &assembled.report, config, of, timing)?;
    staging.publish()?;
    Ok(files)
}

/// Report, manifest and timing, beside outputs that are there; returns the names of all files.
pub(crate) fn write_records(
    staging: &Staging,
    report: &Report,
    config: &JobConfig,
    of: &Origin<'_>,
    timing: &serde_json::Value,
) -> Result<Vec<PathBuf>, CoordinatorError> {
    staging.write(REPORT, &json(report)?)?;
    write_manifest(staging, config, of)?;
    let mut timing = timing.clone();
    if let Some(entries) = timing.as_object_mut() {
        entries.insert("peak_resident_bytes".into(), peak_resident_bytes().into());
    }
    staging.write(TIMING, &json(&timing)?)?;
    Ok(staging.files()?.into_iter().map(PathBuf::from).collect())
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, CoordinatorError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|e| CoordinatorError::ReadBack { subject: "json".into(), what: e.to_string() })?;
    text.push(b'\n');
    Ok(text)
}

fn on_grid(model: &Model, assembled: &Assembled) -> Result<Model, CoordinatorError> {
    let mut model = model.clone();
    for entry in &assembled.layers {
        qdq::set_on_grid(&mut model, &entry.layer, &entry.q, &entry.encodings)?;
    }
    Ok(model)
}

/// Every weight must be its integer on its grid, every other constant what it was.
fn check_on_grid(path: &Path, written: &Model, layers: &[AssembledLayer]) -> Result<(), CoordinatorError> {
    let read = Model::read(path)?;
    for entry in layers {
        let stored = read.tensor(&entry.layer.weight)?;
        let different = |what: String| CoordinatorError::ReadBack {
            subject: format!("layer `{}`", entry.layer.name),
            what,
        };
        let values = stored.as_f32().ok_or_else(|| different("its weights are not f32".into()))?;
        let weights =
            entry.layer.layout.to_matrix(&stored.shape, values).map_err(|e| different(e.to_string()))?;
        let expected = entry.encodings.dequantize(&entry.q)?;
        if let Some(index) = first_difference(&weights, &expected) {
            return Err(different(format!(
                "weight {index} is {}, expected {}",
                weights[index], expected[index]
            )));
        }
    }
    for initializer in &written.graph().initializer {
        let name = initializer.name();
        if read.initializer(name).is_none() || read.tensor(name)? != written.tensor(name)? {
            return Err(CoordinatorError::ReadBack {
                subject: format!("constant `{name}`"),
                what: "it differs from what was written".into(),
            });
        }
    }
    Ok(())
}

fn first_difference(a: &[f32], b: &[f32]) -> Option<usize> {
    if a.len() != b.len() {
        return Some(0);
    }
    a.iter().zip(b).position(|(x, y)| x.to_bits() != y.to_bits() && x != y)
}

fn write_qdq(
    staging: &Staging,
    on_grid: &Model,
    assembled: &Assembled,
) -> Result<Vec<String>, CoordinatorError> {
    let weights: Vec<qdq::RoundedLayer<'_>> = assembled
        .layers
        .iter()
        .map(|l| qdq::RoundedLayer { layer: &l.layer, encodings: &l.encodings, q: &l.q })
        .collect();
    let (model, notes) = qdq::to_qdq(on_grid, &weights)?;
    model.write(staging.path(QDQ))?;
    let read = Model::read(staging.path(QDQ))?;
    for initializer in &model.graph().initializer {
        if read.initializer(initializer.name()) != Some(initializer) {
            return Err(CoordinatorError::ReadBack {
                subject: format!("{QDQ}, constant `{}`", initializer.name()),
                what: "it differs from what was written".into(),
            });
        }
    }
    Ok(notes)
}

fn aimet_version(version: EncodingsVersion) -> Version {
    match version {
        EncodingsVersion::V0_6_1 => Version::V0_6_1,
        EncodingsVersion::V1_0_0 => Version::V1_0_0,
        EncodingsVersion::V2_0_0 => Version::V2_0_0,
    }
}

fn param(entry: &AssembledLayer) -> ParamEncoding {
    let kernel_positions = match &entry.layer.unfold {
        Unfold::Conv(g) | Unfold::ConvTranspose(g) => g.kernel.iter().product(),
        Unfold::Rows | Unfold::Columns => 1,
    };
    ParamEncoding {
        name: entry.layer.weight.clone(),
        encodings: entry.encodings.clone(),
        tensor_axis: match entry.layer.layout {
            WeightLayout::AsIs => 0,
            WeightLayout::Transposed | WeightLayout::ConvTranspose { .. } => 1,
        },
        tensor_rank: entry.layer.weight_shape.len(),
        kernel_positions,
    }
}

/// Layers that the version has no words for are left out of the file and named in the note.
fn write_encodings(
    staging: &Staging,
    name: &str,
    version: EncodingsVersion,
    assembled: &Assembled,
) -> Result<Option<String>, CoordinatorError> {
    let version = aimet_version(version);
    let mut params = Vec::new();
    let mut left_out = Vec::new();
    for entry in &assembled.layers {
        let param = param(entry);
        match aimet::to_json(version, std::slice::from_ref(&param)) {
            Ok(_) => params.push(param),
            Err(reason) => left_out.push(format!("`{}` ({reason})", entry.layer.name)),
        }
    }
    staging.write(name, &json(&aimet::to_json(version, &params)?)?)?;
    check_encodings(&staging.path(name), &params)?;
    Ok((!left_out.is_empty())
        .then(|| format!("{name}: version {version} cannot express {}", left_out.join(", "))))
}

fn check_encodings(path: &Path, params: &[ParamEncoding]) -> Result<(), CoordinatorError> {
    let bytes = std::fs::read(path).map_err(|e| CoordinatorError::storage(path, "read back", e))?;
    let wrong = |what: String| CoordinatorError::ReadBack { subject: path.display().to_string(), what };
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    let (_, read) = aimet::from_json(&value)?;
    for param in params {
        let found = read
            .iter()
            .find(|p| p.name == param.name)
            .ok_or_else(|| wrong(format!("`{}` is missing", param.name)))?;
        let e = &param.encodings;
        let back = found.to_encodings(e.rows, e.cols, param.tensor_axis, param.kernel_positions)?;
        if back.scale != e.scale || back.zero_point != e.zero_point || back.bits != e.bits {
            return Err(wrong(format!("the encodings of `{}` differ from what was solved", param.name)));
        }
    }
    Ok(())
}

fn write_manifest(staging: &Staging, config: &JobConfig, of: &Origin<'_>) -> Result<(), CoordinatorError> {
    let outputs: Result<Vec<_>, _> =
        staging.files()?.into_iter().map(|name| FileRecord::of(&staging.path(&name), name)).collect();
    let inputs: Result<Vec<_>, _> =
        of.inputs.iter().map(|input| FileRecord::of(&input.path, input.shown.clone())).collect();
    let manifest = Manifest {
        version: 1,
        halfstep: env!("CARGO_PKG_VERSION").into(),
        job: of.job.to_string(),
        device: of.kind.0.clone(),
        engine: of.kind.1.clone(),
        seed: config.solver.seed,
        configuration: configuration(config)?,
        inputs: inputs?,
        outputs: outputs?,
    };
    staging.write(MANIFEST, &json(&manifest)?)
}

fn configuration(config: &JobConfig) -> Result<BTreeMap<String, serde_json::Value>, CoordinatorError> {
    fn value(item: &impl Serialize) -> Result<serde_json::Value, CoordinatorError> {
        serde_json::to_value(item)
            .map_err(|e| CoordinatorError::ReadBack { subject: "configuration".into(), what: e.to_string() })
    }
    Ok(BTreeMap::from([
        ("grid".into(), value(&config.grid)?),
        ("rules".into(), value(&config.rules)?),
        ("solver".into(), value(&config.solver)?),
        ("propagation".into(), value(&config.propagation)?),
        ("partition".into(), value(&config.partition)?),
        ("samples".into(), value(&config.dataset.samples)?),
        ("shard_size".into(), value(&config.shard_size)?),
        ("fold_batch_norm".into(), value(&config.fold_batch_norm)?),
        ("encodings".into(), value(&config.encodings)?),
    ]))
}
