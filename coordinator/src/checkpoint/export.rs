//! Writes a quantized checkpoint and reads it back.
//!
//! Not here: packing (`encode`), files (`writer`), the rename that makes all of it appear ([`Staging::publish`]).

use super::encode::{Encoded, encode, fingerprint};
use super::form::{Format, LayerForm, Part, check, parts};
use super::gguf;
use super::settings;
use super::side_by_side::Room;
use super::writer::WeightWriter;
use crate::CoordinatorError;
use crate::staging::Staging;
use halfstep_model::checkpoint::Checkpoint;
use halfstep_quant::Encodings;
use halfstep_quant::layouts::GptqVersion;
use std::collections::BTreeMap;
use std::fs::File;

/// Bytes of one weight file unless told otherwise.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Where the integers come from.
pub trait SolvedLayers: Sync {
    /// The layers that were solved.
    fn forms(&self) -> Vec<LayerForm>;

    /// Encodings and `[rows, cols]` integers of one of them; called once for each, by several threads, and none is kept.
    ///
    /// # Errors
    /// If they are not there or not what was committed.
    fn layer(&self, name: &str) -> Result<Option<(Encodings, Vec<i32>)>, CoordinatorError>;
}

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How weights are stored.
    pub format: Format,
    /// Most bytes of tensors in one weight file, unless a single tensor has more.
    pub shard_bytes: u64,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// What a user should know of it, for the report.
    pub notes: Vec<String>,
}

/// Writes the checkpoint into the staging folder: weights, `config.json`, and the original's other files; or one GGUF file.
///
/// Every tensor is read back, unpacked and compared with what was solved or copied.
///
/// # Errors
/// As [`check`]; `Storage`; `ReadBack` naming the layer or tensor that is not what it should be.
pub fn export(
    checkpoint: &Checkpoint,
    layers: &dyn SolvedLayers,
    options: Options,
    staging: &Staging,
) -> Result<Exported, CoordinatorError> {
    if options.format == Format::Gguf {
        return gguf::export(checkpoint, layers, staging);
    }
    let job = Job::new(checkpoint, layers, options)?;
    let (fingerprints, moved) = job.write(staging)?;
    staging.write("config.json", &settings::config(checkpoint, &job.forms, options.format)?)?;
    copy_companions(checkpoint, staging)?;
    job.read_back(staging, &fingerprints)?;
    Ok(Exported { notes: job.notes(moved) })
}

struct Job<'a> {
    checkpoint: &'a Checkpoint,
    layers: &'a dyn SolvedLayers,
    options: Options,
    forms: Vec<LayerForm>,
    version: GptqVersion,
}

impl<'a> Job<'a> {
    fn new(
        checkpoint: &'a Checkpoint,
        layers: &'a dyn SolvedLayers,
        options: Options,
    ) -> Result<Self, CoordinatorError> {
        let forms = layers.forms();
        check(checkpoint, &forms, options.format)?;
        let version = settings::gptq_version(&forms, options.format);
        Ok(Self { checkpoint, layers, options, forms, version })
    }

    /// Layers by the tensor that they take the place of.
    fn replaced(&self) -> BTreeMap<&str, &LayerForm> {
        self.forms.iter().map(|form| (form.weight.as_str(), form)).collect()
    }

    /// Writes all tensors; returns the fingerprints of the layers' weights, and how many weights their type moved.
    fn write(&self, staging: &Staging) -> Result<(Vec<blake3::Hash>, usize), CoordinatorError> {
        let replaced = self.replaced();
        let mut all = Vec::new();
        for name in self.checkpoint.names() {
            match replaced.get(name) {
                Some(form) => all.extend(parts(self.checkpoint, form, self.options.format)?),
                None => {
                    let info = self.checkpoint.expect(name)?;
                    all.push(Part { name: name.to_owned(), dtype: info.dtype, shape: info.shape.clone() });
                }
            }
        }
        let mut writer = WeightWriter::create(staging, all, self.options.shard_bytes)?;
        for name in self.checkpoint.names().filter(|name| !replaced.contains_key(name)) {
            writer.put(name, self.checkpoint.pieces(name)?.map(|piece| Ok(piece?)))?;
        }
        let (mut fingerprints, mut moved) = (vec![None; self.forms.len()], 0);
        let take = |index: usize, encoded: Encoded| {
            let form = &self.forms[index];
            for (part, bytes) in parts(self.checkpoint, form, self.options.format)?.iter().zip(&encoded.parts)
            {
                writer.put(&part.name, [Ok(bytes)])?;
            }
            fingerprints[index] = Some(encoded.weights);
            moved += encoded.moved;
            Ok(())
        };
        Room::now().each(&self.weights(), |index| self.encode(&self.forms[index]), take)?;
        writer.finish(staging)?;
        Ok((fingerprints.into_iter().flatten().collect(), moved))
    }

    /// Of each layer.
    fn weights(&self) -> Vec<u64> {
        let of =
            |form: &LayerForm| self.checkpoint.info(&form.weight).map_or(0, |info| elements(&info.shape));
        self.forms.iter().map(of).collect()
    }

    fn encode(&self, form: &LayerForm) -> Result<Encoded, CoordinatorError> {
        let solved = self.layers.layer(&form.name)?.ok_or_else(|| CoordinatorError::ReadBack {
            subject: format!("layer `{}`", form.name),
            what: "it was listed as solved, but its integers are gone".into(),
        })?;
        encode(self.checkpoint, form, self.options.format, self.version, &solved)
    }

    fn read_back(&self, staging: &Staging, fingerprints: &[blake3::Hash]) -> Result<(), CoordinatorError> {
        let different =
            |subject: String, what: &str| CoordinatorError::ReadBack { subject, what: what.into() };
        let written = Checkpoint::open(&staging.path(""))?;
        let compare = |index: usize| {
            let form = &self.forms[index];
            let weight = written.tensor(&form.weight)?;
            let original = self.checkpoint.info(&form.weight).map(|info| &info.shape);
            let expected = fingerprints.get(index).copied();
            if original != Some(&weight.shape) || weight.as_f32().map(fingerprint) != expected {
                let subject = format!("layer `{}`", form.name);
                return Err(different(subject, "its weights differ from what was solved"));
            }
            Ok(())
        };
        Room::now().each(&self.weights(), compare, |_, ()| Ok(()))?;
        let replaced = self.replaced();
        for name in self.checkpoint.names().filter(|name| !replaced.contains_key(name)) {
            if !same(&written, self.checkpoint, name)? {
                return Err(different(format!("tensor `{name}`"), "it differs from the original"));
            }
        }
        Ok(())
    }

    fn notes(&self, moved: usize) -> Vec<String> {
        let mut notes = Vec::new();
        if moved > 0 {
            let dtype = self.checkpoint.dtype();
            notes.push(format!(
                "{moved} weights on the grid are stored as the nearest {dtype}: scale times integer has more digits"
            ));
        }
        if self.options.format == Format::Gptq && self.version == GptqVersion::V2 {
            notes.push(
                "written as gptq_v2: version 1 cannot hold zero point 0, which asymmetric grids may have"
                    .into(),
            );
        }
        notes
    }
}

/// How many there are.
pub(super) fn elements(shape: &[usize]) -> u64 {
    shape.iter().fold(1, |product, dim| product.saturating_mul(*dim as u64))
}

/// Whether both have the tensor, to the last bit.
fn same(one: &Checkpoint, other: &Checkpoint, name: &str) -> Result<bool, CoordinatorError> {
    if one.expect(name)? != other.expect(name)? {
        return Ok(false);
    }
    for (mine, theirs) in one.pieces(name)?.zip(other.pieces(name)?) {
        if mine? != theirs? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn copy_companions(checkpoint: &Checkpoint, staging: &Staging) -> Result<(), CoordinatorError> {
    for (name, from) in checkpoint.companions()? {
        let to = staging.path(&name);
        std::fs::copy(&from, &to).map_err(|e| CoordinatorError::storage(&from, "copy", e))?;
        let synced = File::open(&to).and_then(|file| file.sync_all());
        synced.map_err(|e| CoordinatorError::storage(&to, "write", e))?;
    }
    Ok(())
}
