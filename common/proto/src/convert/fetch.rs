//! What can be fetched from a data plane, by name.

use super::{NAME_MAX, at_most, job_from_wire, job_to_wire, present};
use crate::data::PROBE_MAX;
use crate::{BlobHash, WireError, wire};
use halfstep_work::{ChunkId, JobId, LayerId, ShardId, Wanted};

/// One blob of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobName {
    /// Anything stored under its hash.
    Artefact(BlobHash),
    /// The model's graph without its large constants.
    Program,
    /// One constant of the model (`tensors::encode`).
    Constant(String),
    /// Calibration samples of one shard (`tensors::encode`).
    Inputs(ShardId),
    /// The committed rounding of one chunk (`rounding::encode`), or none.
    Rounding {
        /// The layer.
        layer: LayerId,
        /// The chunk.
        chunk: ChunkId,
    },
    /// State that a node holds.
    Held(Wanted),
    /// So many bytes of no meaning and of no job, from a node: to see how fast they come.
    Probe(u32),
}

/// A request for one blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Whose.
    pub job: JobId,
    /// Which.
    pub name: BlobName,
    /// Byte to start from.
    pub offset: u64,
    /// Hash of a copy the caller has.
    pub have: Option<BlobHash>,
}

impl Fetch {
    /// A request for all of a blob.
    pub fn new(job: JobId, name: BlobName) -> Self {
        Self { job, name, offset: 0, have: None }
    }
}

impl From<Fetch> for wire::FetchRequest {
    fn from(fetch: Fetch) -> Self {
        use wire::fetch_request::Name;
        let name = match fetch.name {
            BlobName::Artefact(hash) => Name::Artefact(hash.to_vec()),
            BlobName::Program => Name::Program(wire::Empty {}),
            BlobName::Constant(name) => Name::Constant(name),
            BlobName::Inputs(shard) => Name::Inputs(shard.0),
            BlobName::Rounding { layer, chunk } => {
                Name::Rounding(wire::RoundingName { layer: layer.0, chunk: chunk.0 })
            }
            BlobName::Held(wanted) => Name::Held((&wanted).into()),
            BlobName::Probe(bytes) => Name::Probe(bytes),
        };
        Self {
            job: job_to_wire(fetch.job),
            name: Some(name),
            offset: fetch.offset,
            have: fetch.have.map(BlobHash::to_vec).unwrap_or_default(),
        }
    }
}

impl TryFrom<wire::FetchRequest> for Fetch {
    type Error = WireError;

    fn try_from(fetch: wire::FetchRequest) -> Result<Self, WireError> {
        use wire::fetch_request::Name;
        let name = match present(fetch.name, "name of a blob")? {
            Name::Artefact(hash) => BlobName::Artefact(BlobHash::try_from(hash.as_slice())?),
            Name::Program(_) => BlobName::Program,
            Name::Constant(name) => {
                at_most("name of a constant, in bytes", name.len(), NAME_MAX)?;
                BlobName::Constant(name)
            }
            Name::Inputs(shard) => BlobName::Inputs(ShardId(shard)),
            Name::Rounding(r) => BlobName::Rounding { layer: LayerId(r.layer), chunk: ChunkId(r.chunk) },
            Name::Held(wanted) => BlobName::Held(wanted.try_into()?),
            Name::Probe(bytes) => {
                at_most("bytes of a probe", bytes as usize, PROBE_MAX as usize)?;
                BlobName::Probe(bytes)
            }
        };
        let have = match fetch.have.as_slice() {
            [] => None,
            hash => Some(hash.try_into()?),
        };
        Ok(Self { job: job_from_wire(&fetch.job)?, name, offset: fetch.offset, have })
    }
}
