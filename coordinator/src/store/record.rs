//! One record on disk: magic, version and CRC-32C in front of its bytes, so that damage and other formats are told apart.
//!
//! ```text
//! 0..4  magic "HSR" and the kind's letter    4..8  version, u32    8..12  CRC-32C of what follows    12..  body
//! ```
//! Little-endian. Bodies are `wincode` (the format of bincode 1). Not here: what the records mean (`stored`).

use wincode::config::DefaultConfig;
use wincode::{SchemaReadOwned, SchemaWrite};

const HEADER: usize = 12;

/// What a record is, so that one cannot be read as another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A job.
    Job,
    /// A committed rounding.
    Rounding,
    /// A layer given up.
    GivenUp,
    /// The incarnation counter.
    Epoch,
    /// How far a job came.
    Counts,
}

impl Kind {
    fn magic(self) -> [u8; 4] {
        match self {
            Self::Job => *b"HSRJ",
            Self::Rounding => *b"HSRR",
            Self::GivenUp => *b"HSRG",
            Self::Epoch => *b"HSRE",
            Self::Counts => *b"HSRC",
        }
    }

    /// Version written; older ones would be converted when read.
    fn version(self) -> u32 {
        1
    }
}

/// A record that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Too short for a header.
    #[error("expected at least {HEADER} bytes, found {found}")]
    Short {
        /// Its length.
        found: usize,
    },
    /// Not this kind of record.
    #[error("expected magic {expected:?}, found {found:?}")]
    Magic {
        /// Of the kind asked for.
        expected: [u8; 4],
        /// What is there.
        found: [u8; 4],
    },
    /// Written by another version of Halfstep.
    #[error("expected version {expected}, found {found}: written by another version of Halfstep")]
    Version {
        /// What this build reads.
        expected: u32,
        /// What is there.
        found: u32,
    },
    /// Damaged.
    #[error("its checksum is {found:08x}, expected {expected:08x}: the record is damaged")]
    Checksum {
        /// As stored.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// The checksum holds, but the body says something that cannot be.
    #[error("{0}")]
    Body(String),
}

/// # Errors
/// `Body` if it cannot be written, for example because it is larger than the format allows.
pub(super) fn encode<T>(kind: Kind, body: &T) -> Result<Vec<u8>, RecordError>
where
    T: SchemaWrite<DefaultConfig, Src = T>,
{
    let body = wincode::serialize(body).map_err(|e| RecordError::Body(e.to_string()))?;
    let mut record = Vec::with_capacity(HEADER + body.len());
    record.extend_from_slice(&kind.magic());
    record.extend_from_slice(&kind.version().to_le_bytes());
    record.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    record.extend_from_slice(&body);
    Ok(record)
}

/// # Errors
/// Whatever is wrong with it first; never panics, whatever the bytes.
pub(super) fn decode<T>(kind: Kind, record: &[u8]) -> Result<T, RecordError>
where
    T: SchemaReadOwned<DefaultConfig, Dst = T>,
{
    let Some((header, body)) = record.split_at_checked(HEADER) else {
        return Err(RecordError::Short { found: record.len() });
    };
    let word = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
    let (magic, version) = (word(0), u32::from_le_bytes(word(4)));
    if magic != kind.magic() {
        return Err(RecordError::Magic { expected: kind.magic(), found: magic });
    }
    if version != kind.version() {
        return Err(RecordError::Version { expected: kind.version(), found: version });
    }
    let (expected, found) = (u32::from_le_bytes(word(8)), crc32c::crc32c(body));
    if expected != found {
        return Err(RecordError::Checksum { expected, found });
    }
    wincode::deserialize_exact(body).map_err(|e| RecordError::Body(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Vec<u8> {
        encode(Kind::GivenUp, &(7u32, "layer is gone".to_owned())).unwrap()
    }

    fn read(bytes: &[u8]) -> Result<(u32, String), RecordError> {
        decode(Kind::GivenUp, bytes)
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read(&record()).unwrap(), (7, "layer is gone".to_owned()));
    }

    #[test]
    fn the_layout_is_the_one_documented() {
        let mut expected = b"HSRG\x01\x00\x00\x00".to_vec();
        let body = b"\x07\x00\x00\x00\x0d\x00\x00\x00\x00\x00\x00\x00layer is gone";
        expected.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
        expected.extend_from_slice(body);
        assert_eq!(record(), expected);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_an_error() {
        let good = record();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bad).is_err(), "bit {bit}");
        }
        (0..good.len()).for_each(|len| assert!(read(&good[..len]).is_err(), "{len} bytes"));
        let long: Vec<u8> = good.iter().copied().chain([0]).collect();
        assert!(read(&long).is_err());
    }

    #[test]
    fn other_kinds_and_versions_are_named() {
        let kind = decode::<(u32, String)>(Kind::Job, &record()).unwrap_err();
        assert!(matches!(kind, RecordError::Magic { .. }), "{kind}");
        let mut newer = record();
        newer[4] = 2;
        let error = read(&newer).unwrap_err().to_string();
        assert_eq!(error, "expected version 1, found 2: written by another version of Halfstep");
    }
}
