//! The name of a blob: the BLAKE3 hash of its bytes.

use crate::WireError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// BLAKE3, 32 bytes; shown and parsed as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BlobHash(pub [u8; 32]);

impl BlobHash {
    /// The hash of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// As a field of a message.
    pub fn to_vec(self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl From<blake3::Hash> for BlobHash {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl TryFrom<&[u8]> for BlobHash {
    type Error = WireError;

    fn try_from(bytes: &[u8]) -> Result<Self, WireError> {
        let problem = || format!("expected 32 bytes, found {}", bytes.len());
        bytes.try_into().map(Self).map_err(|_| WireError::new("hash", problem()))
    }
}

impl fmt::Display for BlobHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlobHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobHash({self})")
    }
}

impl FromStr for BlobHash {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let wrong = || WireError::new("hash", format!("expected 64 hexadecimal digits, found `{text}`"));
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(|d| matches!(d, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(wrong());
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        Ok(Self(hash))
    }
}

impl TryFrom<String> for BlobHash {
    type Error = WireError;

    fn try_from(text: String) -> Result<Self, WireError> {
        text.parse()
    }
}

impl From<BlobHash> for String {
    fn from(hash: BlobHash) -> Self {
        hash.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_back_as_the_same_hash() {
        let hash = BlobHash::of(b"halfstep");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert_eq!(BlobHash::try_from(hash.to_vec().as_slice()), Ok(hash));
    }

    #[test]
    fn other_lengths_and_other_digits_are_refused() {
        let hash = BlobHash::of(b"");
        let text = hash.to_string();
        for wrong in ["", &text[1..], &text.to_uppercase(), &format!("{}é", &text[2..])] {
            assert!(wrong.parse::<BlobHash>().is_err(), "{wrong}");
        }
        let short = BlobHash::try_from(&hash.0[..31]).unwrap_err();
        assert_eq!(short.to_string(), "hash: expected 32 bytes, found 31");
    }
}
