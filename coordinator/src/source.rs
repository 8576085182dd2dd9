//! What nodes may fetch of one job from its coordinator: the plan, the model's graph and constants, calibration shards,
//! roundings.
//!
//! Each is a blob with a name; its hash is known after it was made once, so that a node which has it need not get it
//! again. Not here: how blobs travel (`service`), state that nodes hold.

use crate::artefacts::{ArtefactError, Artefacts};
use crate::dataset::{DType, Dataset, SampleSlice};
use crate::{CoordinatorError, Roundings, Subject};
use bytes::Bytes;
use halfstep_model::{Data, Tensor};
use halfstep_proto::{BlobHash, BlobName, rounding, tensors};
use halfstep_work::{
    ChunkId, FailureClass, InputTensor, LayerId, Plan, Rounding, ScalarKind, ShardId, SourceError,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};

/// A rounding is at most a layer's chunk; larger is not one.
pub(crate) const ROUNDING_BYTES_MAX: u64 = 1 << 30;

/// A blob with its name's hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// All of it.
    pub bytes: Bytes,
    /// Of the bytes.
    pub hash: BlobHash,
}

impl Blob {
    fn of(bytes: Bytes) -> Self {
        Self { hash: BlobHash::of(&bytes), bytes }
    }
}

/// The blobs of one job. Calls block; they read files and convert tensors.
pub struct JobSource {
    plan: Arc<Plan>,
    plan_blob: Blob,
    program: Blob,
    subject: Arc<Subject>,
    dataset: Dataset,
    artefacts: Arc<Artefacts>,
    hashes: RwLock<BTreeMap<String, BlobHash>>,
    committed: RwLock<Committed>,
}

#[derive(Default)]
struct Committed {
    roundings: BTreeMap<(LayerId, ChunkId), blake3::Hash>,
    given_up: BTreeSet<LayerId>,
}

impl JobSource {
    /// `dataset` has one array per model input, already of the input's type.
    ///
    /// # Errors
    /// `Internal` if the plan cannot be written.
    pub fn new(
        plan: Arc<Plan>,
        subject: Arc<Subject>,
        dataset: Dataset,
        artefacts: Arc<Artefacts>,
    ) -> Result<Self, SourceError> {
        let json = serde_json::to_vec(&*plan).map_err(|e| SourceError::new(FailureClass::Internal, e))?;
        Ok(Self {
            plan_blob: Blob::of(json.into()),
            program: Blob::of(subject.program()),
            plan,
            subject,
            dataset,
            artefacts,
            hashes: RwLock::default(),
            committed: RwLock::default(),
        })
    }

    /// Hash of the plan, a JSON blob.
    pub fn plan_hash(&self) -> BlobHash {
        self.plan_blob.hash
    }

    /// A committed rounding can be fetched from now on.
    pub(crate) fn commit(&self, layer: LayerId, chunk: ChunkId, hash: blake3::Hash) {
        let mut committed = self.committed.write().unwrap_or_else(PoisonError::into_inner);
        committed.roundings.insert((layer, chunk), hash);
    }

    /// The roundings of a layer are none from now on.
    pub(crate) fn give_up(&self, layer: LayerId) {
        self.committed.write().unwrap_or_else(PoisonError::into_inner).given_up.insert(layer);
    }

    /// The hash of a blob, if it is known without making it.
    pub fn known_hash(&self, name: &BlobName) -> Option<BlobHash> {
        match name {
            BlobName::Program => Some(self.program.hash),
            BlobName::Artefact(hash) => Some(*hash),
            BlobName::Constant(name) => self.hash_of(&constant_key(name)),
            BlobName::Inputs(shard) => self.hash_of(&inputs_key(*shard)),
            BlobName::Rounding { layer, chunk } => {
                let committed = self.committed.read().unwrap_or_else(PoisonError::into_inner);
                let given_up = committed.given_up.contains(layer);
                committed.roundings.get(&(*layer, *chunk)).filter(|_| !given_up).map(|hash| (*hash).into())
            }
            BlobName::Held(_) | BlobName::Probe(_) => None,
        }
    }

    /// A blob by name; `None` for the rounding of a layer that keeps its weights.
    ///
    /// # Errors
    /// `PeerLost` for a rounding that is not committed yet, `Damaged` for a file that is not what was written,
    /// `BadInput` for what the user's files do not have, `Internal` for names that no job has.
    pub fn blob(&self, name: &BlobName) -> Result<Option<Blob>, SourceError> {
        match name {
            BlobName::Artefact(hash) if *hash == self.plan_blob.hash => Ok(Some(self.plan_blob.clone())),
            BlobName::Artefact(hash) => self.artefact(blake3::Hash::from_bytes(hash.0)).map(Some),
            BlobName::Program => Ok(Some(self.program.clone())),
            BlobName::Constant(name) => {
                self.tensors(constant_key(name), &[self.subject.constant(name)?]).map(Some)
            }
            BlobName::Inputs(shard) => {
                self.tensors(inputs_key(*shard), &inputs_of(&self.plan, &self.dataset, *shard)?).map(Some)
            }
            BlobName::Rounding { layer, chunk } => self.rounding(*layer, *chunk),
            BlobName::Held(_) | BlobName::Probe(_) => {
                Err(SourceError::new(FailureClass::PeerLost, "the coordinator holds no state of nodes"))
            }
        }
    }

    /// Whether a copy with this hash is current; a constant's hash is found without making the blob.
    ///
    /// # Errors
    /// `BadInput` for what the user's files do not have.
    pub fn is_current(&self, name: &BlobName, have: BlobHash) -> Result<bool, SourceError> {
        let BlobName::Constant(constant) = name else { return Ok(self.known_hash(name) == Some(have)) };
        let key = constant_key(constant);
        if let Some(known) = self.hash_of(&key) {
            return Ok(known == have);
        }
        let hash = tensors::hash(&self.subject.constant(constant)?)
            .map_err(|e| SourceError::new(FailureClass::Internal, e))?;
        self.hashes.write().unwrap_or_else(PoisonError::into_inner).insert(key, hash);
        Ok(hash == have)
    }

    fn hash_of(&self, key: &str) -> Option<BlobHash> {
        self.hashes.read().unwrap_or_else(PoisonError::into_inner).get(key).copied()
    }

    fn tensors(&self, key: String, all: &[InputTensor]) -> Result<Blob, SourceError> {
        let bytes = tensors::encode(all).map_err(|e| SourceError::new(FailureClass::Internal, e))?;
        let hash = self.hash_of(&key).unwrap_or_else(|| {
            let hash = BlobHash::of(&bytes);
            self.hashes.write().unwrap_or_else(PoisonError::into_inner).insert(key, hash);
            hash
        });
        Ok(Blob { bytes, hash })
    }

    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Option<Blob>, SourceError> {
        let hash = {
            let committed = self.committed.read().unwrap_or_else(PoisonError::into_inner);
            if committed.given_up.contains(&layer) {
                return Ok(None);
            }
            committed.roundings.get(&(layer, chunk)).copied()
        };
        let missing =
            || SourceError::new(FailureClass::PeerLost, format!("{layer} {chunk}: not committed yet"));
        self.artefact(hash.ok_or_else(missing)?).map(Some)
    }

    fn artefact(&self, hash: blake3::Hash) -> Result<Blob, SourceError> {
        let bytes = self.artefacts.read(&hash, ROUNDING_BYTES_MAX).map_err(|error| {
            let class = match error {
                ArtefactError::Damaged { .. } | ArtefactError::Missing { .. } => FailureClass::Damaged,
                _ => FailureClass::Storage,
            };
            SourceError::new(class, error)
        })?;
        Ok(Blob { bytes, hash: hash.into() })
    }
}

impl Roundings for JobSource {
    fn rounding(&self, layer: LayerId, chunk: ChunkId) -> Result<Arc<Rounding>, CoordinatorError> {
        let wrong = |what: String| CoordinatorError::ReadBack { subject: format!("{layer} {chunk}"), what };
        let blob = Self::rounding(self, layer, chunk).map_err(|e| wrong(e.to_string()))?;
        let blob = blob.ok_or_else(|| wrong("the layer was given up".into()))?;
        read_rounding(&self.plan, &blob.bytes).map(Arc::new).map_err(wrong)
    }
}

fn constant_key(name: &str) -> String {
    format!("constant {name}")
}

fn inputs_key(shard: ShardId) -> String {
    format!("inputs {shard}")
}

/// Reads a rounding back and checks that the plan has such a chunk.
///
/// # Errors
/// One sentence.
pub(crate) fn read_rounding(plan: &Plan, bytes: &[u8]) -> Result<Rounding, String> {
    let rounding = rounding::decode(bytes).map_err(|e| e.to_string())?;
    let (layer, chunk) = (rounding.layer, rounding.chunk);
    let entry = plan.layers.get(layer.index());
    let Some((entry, rows)) = entry.and_then(|entry| Some((entry, entry.chunks.get(chunk.index())?))) else {
        return Err(format!("rounding of {layer} {chunk}: the plan has no such chunk"));
    };
    let (rows, cols) = (rows.len(), entry.cols);
    let encodings = &rounding.encodings;
    if (encodings.rows, encodings.cols) != (rows, cols) {
        let (r, k) = (encodings.rows, encodings.cols);
        return Err(format!("rounding of {layer} {chunk}: expected [{rows}, {cols}], found [{r}, {k}]"));
    }
    Ok(rounding)
}

/// The samples of one shard.
pub(crate) fn inputs_of(
    plan: &Plan,
    dataset: &Dataset,
    shard: ShardId,
) -> Result<Vec<InputTensor>, SourceError> {
    let range = plan.shards.get(shard.index()).ok_or_else(|| {
        let shards = plan.shards.len();
        SourceError::new(FailureClass::Internal, format!("{shard}: the plan has {shards} shards"))
    })?;
    let slices = dataset.slice(range.clone()).map_err(|e| SourceError::new(FailureClass::BadInput, e))?;
    Ok(slices.into_iter().map(transit_slice).collect())
}

/// Samples as they travel to whoever computes.
pub fn transit_slice(slice: SampleSlice) -> InputTensor {
    let kind = match slice.dtype {
        DType::F32 => ScalarKind::F32,
        DType::F64 => ScalarKind::F64,
        DType::I64 => ScalarKind::I64,
        DType::I32 => ScalarKind::I32,
        DType::I8 => ScalarKind::I8,
        DType::U8 => ScalarKind::U8,
        DType::Bool => ScalarKind::Bool,
    };
    InputTensor { name: slice.name, kind, shape: slice.shape, bytes: slice.bytes.into() }
}

pub(crate) fn transit(name: &str, tensor: &Tensor) -> InputTensor {
    fn raw<const N: usize, T: Copy>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Bytes {
        let mut out = Vec::with_capacity(values.len() * N);
        values.iter().for_each(|v| out.extend_from_slice(&bytes(*v)));
        out.into()
    }
    let (kind, bytes) = match &tensor.data {
        Data::F32(v) => (ScalarKind::F32, raw(v, f32::to_le_bytes)),
        Data::F64(v) => (ScalarKind::F64, raw(v, f64::to_le_bytes)),
        Data::I64(v) => (ScalarKind::I64, raw(v, i64::to_le_bytes)),
        Data::I32(v) => (ScalarKind::I32, raw(v, i32::to_le_bytes)),
        Data::I8(v) => (ScalarKind::I8, raw(v, i8::to_le_bytes)),
        Data::U8(v) => (ScalarKind::U8, raw(v, u8::to_le_bytes)),
        Data::Bool(v) => (ScalarKind::Bool, raw(v, |b| [u8::from(b)])),
    };
    InputTensor { name: name.into(), kind, shape: tensor.shape.clone(), bytes }
}
