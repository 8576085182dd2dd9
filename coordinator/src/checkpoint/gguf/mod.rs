//! A quantized language model as one GGUF file, which llama.cpp and what is built on it load.
//!
//! Layers in groups of 32 at 4 bits, or symmetric at 8, become blocks; everything else keeps its element type. The file is
//! written a tensor at a time and read back like the other formats. Not here: bytes of blocks
//! ([`halfstep_quant::blocks`]), places in the file (`writer`).

mod architecture;
mod file;
mod tokenizer;

use super::encode::{broken, check_solved, fingerprint};
use super::export::{Exported, SolvedLayers, elements};
use super::form::{Format, LayerForm, scale_type};
use super::side_by_side::Room;
use super::writer::WeightWriter;
use crate::CoordinatorError;
use crate::staging::Staging;
use architecture::{Architecture, Source, Tensor, alternate, architecture, refused};
use bytes::Bytes;
use file::{Described, Kind, Value, lay_out, length, read_header};
use halfstep_model::WeightLayout;
use halfstep_model::checkpoint::Checkpoint;
use halfstep_quant::blocks::{BLOCK, BlockType};
use halfstep_quant::{Encodings, QuantError};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// The file's name.
const FILE: &str = "model.gguf";
/// Bytes compared at once.
const PIECE_BYTES: usize = 1 << 20;

/// Whether the checkpoint with these layers can be written; asked before any work is done.
///
/// # Errors
/// `Configuration` naming what GGUF has no words for: the family, the tokenizer, a layer's grid; `Model`.
pub(super) fn check(checkpoint: &Checkpoint, layers: &[LayerForm]) -> Result<(), CoordinatorError> {
    Plan::new(checkpoint, layers).map(drop)
}

/// Writes the file and reads it back.
///
/// # Errors
/// As [`check`]; `Storage`; `ReadBack` naming what is not as it should be.
pub(super) fn export(
    checkpoint: &Checkpoint,
    layers: &dyn SolvedLayers,
    staging: &Staging,
) -> Result<Exported, CoordinatorError> {
    let forms = layers.forms();
    let plan = Plan::new(checkpoint, &forms)?;
    let fingerprints = plan.write(layers, staging)?;
    plan.read_back(staging, &fingerprints)?;
    Ok(Exported { notes: plan.notes })
}

/// What the file will hold.
struct Plan<'a> {
    checkpoint: &'a Checkpoint,
    entries: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
    /// The layer that a tensor holds, by the tensor's place in the list.
    layers: BTreeMap<usize, (&'a LayerForm, BlockType)>,
    notes: Vec<String>,
}

impl<'a> Plan<'a> {
    fn new(checkpoint: &'a Checkpoint, forms: &'a [LayerForm]) -> Result<Self, CoordinatorError> {
        let Architecture { mut entries, mut tensors, notes, vocabulary } = architecture(checkpoint)?;
        let mut layers = BTreeMap::new();
        for form in forms {
            let at = tensors.iter().position(|tensor| tensor.is(&form.weight));
            let at = at.ok_or_else(|| form.wrong("it has no place in a gguf file"))?;
            let block = block(form, &tensors[at].described.shape)?;
            tensors[at].described.kind = Kind::Blocks(block);
            layers.insert(at, (form, block));
        }
        let kinds = tensors.iter().filter(|tensor| tensor.described.shape.len() == 2);
        entries.push(("general.file_type".into(), Value::Count(most(kinds).file_type())));
        entries.extend(tokenizer::entries(checkpoint, vocabulary)?);
        Ok(Self { checkpoint, entries, tensors, layers, notes })
    }

    fn described(&self) -> Vec<Described> {
        self.tensors.iter().map(|tensor| tensor.described.clone()).collect()
    }

    /// Writes all; returns the fingerprints of the layers' weights, in the order of the file.
    fn write(
        &self,
        layers: &dyn SolvedLayers,
        staging: &Staging,
    ) -> Result<BTreeMap<usize, blake3::Hash>, CoordinatorError> {
        let described = self.described();
        let (header, offsets) = lay_out(&self.entries, &described);
        let bytes = length(&offsets, &described, header.len() as u64);
        let places =
            described.iter().zip(offsets).map(|(tensor, at)| (tensor.name.clone(), at, tensor.bytes()));
        let mut writer = WeightWriter::laid_out(staging, FILE, &header, places, bytes)?;
        let kept = self.tensors.iter().enumerate().filter(|(index, _)| !self.layers.contains_key(index));
        for (_, tensor) in kept {
            writer.put(&tensor.described.name, self.kept(tensor)?)?;
        }
        let solved: Vec<(usize, &LayerForm, BlockType)> =
            self.layers.iter().map(|(index, (form, block))| (*index, *form, *block)).collect();
        let weights: Vec<u64> =
            solved.iter().map(|(index, ..)| elements(&self.tensors[*index].described.shape)).collect();
        let mut fingerprints = BTreeMap::new();
        let work = |number: usize| {
            let (index, form, block) = solved[number];
            let gone = || broken(form, "it was listed as solved, but its integers are gone".into());
            self.encode(form, block, &self.tensors[index], layers.layer(&form.name)?.ok_or_else(gone)?)
        };
        let take = |number: usize, (bytes, weights): (Vec<u8>, blake3::Hash)| {
            let index = solved[number].0;
            fingerprints.insert(index, weights);
            writer.put(&self.tensors[index].described.name, [Ok(bytes)])
        };
        Room::now().each(&weights, work, take)?;
        writer.finish(staging)?;
        Ok(fingerprints)
    }

    /// A layer's blocks, and the fingerprint of its weights, rows as in the file.
    fn encode(
        &self,
        form: &LayerForm,
        block: BlockType,
        tensor: &Tensor,
        (encodings, q): (Encodings, Vec<i32>),
    ) -> Result<(Vec<u8>, blake3::Hash), CoordinatorError> {
        let kind = scale_type(self.checkpoint, Format::Gguf);
        check_solved(form, &tensor.described.shape, kind, &encodings)?;
        let (encodings, q) = match tensor.heads() {
            Some(heads) => {
                in_order(encodings, &q, &alternate(tensor.described.shape[0], heads).collect::<Vec<_>>())?
            }
            None => (encodings, q),
        };
        Ok((block.pack(&encodings, &q)?, fingerprint(&encodings.dequantize(&q)?)))
    }

    /// The bytes of a tensor that is kept, in pieces.
    fn kept<'b>(
        &'b self,
        tensor: &'b Tensor,
    ) -> Result<Box<dyn Iterator<Item = Result<Bytes, CoordinatorError>> + 'b>, CoordinatorError> {
        let one = |bytes: Bytes| Ok(Box::new(std::iter::once(Ok(bytes))) as Box<dyn Iterator<Item = _>>);
        let (name, heads) = match &tensor.source {
            Source::Numbers(numbers) => return one(little(numbers.iter().copied())),
            Source::Stored { name, heads } => (name, *heads),
        };
        let (stored, shape) = (self.checkpoint.expect(name)?, &tensor.described.shape);
        let vector = shape.len() == 1;
        if !vector && heads.is_none() {
            return Ok(Box::new(self.checkpoint.pieces(name)?.map(|piece| Ok(piece?))));
        }
        let rows = shape.first().copied().unwrap_or(0);
        let order: Vec<usize> = heads.map_or((0..rows).collect(), |heads| alternate(rows, heads).collect());
        if vector {
            let values = self.checkpoint.tensor(name)?;
            let values = values.as_f32().ok_or_else(|| refused(format!("tensor `{name}`")))?;
            return one(little(order.iter().map(|row| values[*row])));
        }
        let (_, _, bytes) = self.checkpoint.stored(name)?;
        let line = stored.bytes / rows.max(1);
        one(order.iter().flat_map(|row| &bytes[row * line..(row + 1) * line]).copied().collect())
    }

    fn read_back(
        &self,
        staging: &Staging,
        fingerprints: &BTreeMap<usize, blake3::Hash>,
    ) -> Result<(), CoordinatorError> {
        let path = staging.path(FILE);
        let different = |subject: &str, what: &str| CoordinatorError::ReadBack {
            subject: format!("tensor `{subject}`"),
            what: what.into(),
        };
        let found = read_header(&path, &self.entries)?;
        if found.len() != self.tensors.len() {
            return Err(different(FILE, "the file has more or fewer tensors than were written"));
        }
        let compare = |index: usize| {
            let (tensor, (described, offset)) = (&self.tensors[index], &found[index]);
            let name = &tensor.described.name;
            if *described != tensor.described {
                return Err(different(name, "the file describes another in its place"));
            }
            let mut file = File::open(&path).map_err(|e| CoordinatorError::storage(&path, "open", e))?;
            let read = |e| CoordinatorError::storage(&path, "read", e);
            file.seek(SeekFrom::Start(*offset)).map_err(read)?;
            let same = match self.layers.get(&index) {
                Some((_, block)) => {
                    // No more than was written: the description is the writer's.
                    let mut bytes = vec![0; described.bytes() as usize];
                    file.read_exact(&mut bytes).map_err(read)?;
                    Some(&fingerprint(&block.dequantize(&bytes)?)) == fingerprints.get(&index)
                }
                None => follows(&mut file, self.kept(tensor)?)?,
            };
            match same {
                true => Ok(()),
                false => Err(different(name, "it differs from what was solved or copied")),
            }
        };
        let weights: Vec<u64> = self.tensors.iter().map(|tensor| elements(&tensor.described.shape)).collect();
        Room::now().each(&weights, compare, |_, ()| Ok(()))
    }
}

impl Tensor {
    fn is(&self, stored: &str) -> bool {
        matches!(&self.source, Source::Stored { name, .. } if name == stored)
    }

    fn heads(&self) -> Option<usize> {
        match &self.source {
            Source::Stored { heads, .. } => *heads,
            Source::Numbers(_) => None,
        }
    }
}

/// The blocks that hold such a layer.
fn block(form: &LayerForm, shape: &[usize]) -> Result<BlockType, CoordinatorError> {
    let grid = &form.grid;
    let block = BlockType::of(grid.bits, grid.scheme, grid.granularity).ok_or_else(|| {
        let (bits, scheme, granularity) = (grid.bits, grid.scheme, grid.granularity);
        form.wrong(format!(
            "gguf has no {bits} bits {scheme} {granularity}, expected groups of {BLOCK}, and 4 bits, or 8 bits symmetric"
        ))
    })?;
    match shape {
        [_, cols] if form.layout == WeightLayout::AsIs && cols.is_multiple_of(BLOCK) => Ok(block),
        _ => Err(form.wrong(format!(
            "gguf cannot hold weight `{}` of shape {shape:?}, expected a multiple of {BLOCK} inputs",
            form.weight
        ))),
    }
}

/// The type that most elements have.
fn most<'t>(tensors: impl Iterator<Item = &'t Tensor>) -> Kind {
    let mut elements: Vec<(Kind, usize)> = Vec::new();
    for Tensor { described: Described { kind, shape, .. }, .. } in tensors {
        let count = shape.iter().product::<usize>();
        match elements.iter_mut().find(|entry| entry.0 == *kind) {
            Some(entry) => entry.1 = entry.1.saturating_add(count),
            None => elements.push((*kind, count)),
        }
    }
    // Blocks, where there are any: they are what the file is named for.
    let blocks = |kind: Kind| matches!(kind, Kind::Blocks(_));
    elements
        .into_iter()
        .max_by_key(|(kind, count)| (blocks(*kind), *count))
        .map_or(Kind::F32, |entry| entry.0)
}

/// The layer with its rows in another order.
fn in_order(encodings: Encodings, q: &[i32], order: &[usize]) -> Result<(Encodings, Vec<i32>), QuantError> {
    let lines = |values: &[i32], width: usize| -> Vec<i32> {
        order.iter().flat_map(|row| &values[row * width..(row + 1) * width]).copied().collect()
    };
    encodings.validate()?;
    let groups = encodings.groups_per_row();
    let expected = encodings.rows * encodings.cols;
    if q.len() != expected || order.len() != encodings.rows {
        return Err(QuantError::Length { what: "integer matrix", expected, actual: q.len() });
    }
    let scale =
        order.iter().flat_map(|row| &encodings.scale[row * groups..(row + 1) * groups]).copied().collect();
    let zero_point = lines(&encodings.zero_point, groups);
    let q = lines(q, encodings.cols);
    Ok((Encodings { scale, zero_point, ..encodings }, q))
}

fn little(numbers: impl Iterator<Item = f32>) -> Bytes {
    numbers.flat_map(f32::to_le_bytes).collect()
}

/// Whether the file goes on with exactly these bytes.
fn follows(
    file: &mut File,
    expected: impl Iterator<Item = Result<Bytes, CoordinatorError>>,
) -> Result<bool, CoordinatorError> {
    let mut buffer = vec![0; PIECE_BYTES];
    for piece in expected {
        for part in piece?.chunks(PIECE_BYTES) {
            let found = &mut buffer[..part.len()];
            file.read_exact(found).map_err(|e| CoordinatorError::storage(FILE, "read", e))?;
            if found != part {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
