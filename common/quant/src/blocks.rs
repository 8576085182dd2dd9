//! Blocks of 32 weights of a row, as GGUF stores them: a scale, perhaps a minimum, and the integers.
//!
//! Source: the block types of those names in ggml. A block's numbers are half precision, little-endian; nibble `j` of the
//! 16 bytes is weight `j`, the high one weight `j + 16`. Not here: names, dimensions and the file around the blocks.

use crate::encodings::{check_length, element_count};
use crate::{Encodings, Granularity, QuantError, Scheme};
use half::f16;

/// Weights of a block.
pub const BLOCK: usize = 32;
const HALF: usize = BLOCK / 2;

/// How a block holds its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// `scale * (q - 8)`, `q` in 0 to 15.
    Q4_0,
    /// `scale * q + minimum`, `q` in 0 to 15.
    Q4_1,
    /// `scale * q`, `q` in -128 to 127.
    Q8_0,
}

impl BlockType {
    /// The type that holds every such grid exactly, if scales are of [`crate::ScaleType::F16AndMinimum`].
    pub fn of(bits: u8, scheme: Scheme, granularity: Granularity) -> Option<Self> {
        match (granularity, bits, scheme.is_symmetric()) {
            (Granularity::PerGroup { group_size: BLOCK }, 4, true) => Some(Self::Q4_0),
            (Granularity::PerGroup { group_size: BLOCK }, 4, false) => Some(Self::Q4_1),
            (Granularity::PerGroup { group_size: BLOCK }, 8, true) => Some(Self::Q8_0),
            _ => None,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 2 + HALF,
            Self::Q4_1 => 4 + HALF,
            Self::Q8_0 => 2 + BLOCK,
        }
    }

    /// The blocks of `q` (`[rows, cols]`), row after row.
    ///
    /// # Errors
    /// Encodings that [`Encodings::validate`] refuses; `Block` for a grid of another type; `NotHalf` with the first scale or
    /// minimum that would be rounded; `Groups` if the last block of a row is shorter; `Length`; `OutOfRange` with the first
    /// integer off the grid.
    pub fn pack(self, encodings: &Encodings, q: &[i32]) -> Result<Vec<u8>, QuantError> {
        encodings.validate()?;
        let Encodings { bits, scheme, granularity, rows, cols, .. } = *encodings;
        if Self::of(bits, scheme, granularity) != Some(self) {
            return Err(QuantError::Block { block: format!("{self:?}"), bits, scheme, granularity });
        }
        if !cols.is_multiple_of(BLOCK) {
            return Err(QuantError::Groups { group_size: BLOCK, cols });
        }
        check_length("integer matrix", element_count(rows, cols)?, q.len())?;
        check_range(q, encodings.qmin(), encodings.qmax())?;
        let mut bytes = Vec::with_capacity(q.len() / BLOCK * self.bytes());
        for (index, block) in q.chunks_exact(BLOCK).enumerate() {
            let (scale, zero_point) = (encodings.scale[index], encodings.zero_point[index]);
            bytes.extend_from_slice(&half("scale", index, scale)?);
            if self == Self::Q4_1 {
                bytes.extend_from_slice(&half("minimum", index, (0 - zero_point) as f32 * scale)?);
            }
            match self {
                Self::Q8_0 => bytes.extend(block.iter().map(|q| *q as u8)),
                _ => {
                    let offset = if self == Self::Q4_0 { 8 } else { 0 };
                    let (low, high) = block.split_at(HALF);
                    let pairs = low.iter().zip(high);
                    bytes
                        .extend(pairs.map(|(low, high)| (low + offset) as u8 | ((high + offset) as u8) << 4));
                }
            }
        }
        Ok(bytes)
    }

    /// The weights of whole blocks, computed in f32 as readers of the format do.
    ///
    /// # Errors
    /// `Length` if the last block is not whole.
    pub fn dequantize(self, bytes: &[u8]) -> Result<Vec<f32>, QuantError> {
        check_length("run of blocks", bytes.len() / self.bytes() * self.bytes(), bytes.len())?;
        let mut weights = Vec::with_capacity(bytes.len() / self.bytes() * BLOCK);
        for block in bytes.chunks_exact(self.bytes()) {
            let number = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
            let scale = number(0);
            match self {
                Self::Q8_0 => weights.extend(block[2..].iter().map(|q| scale * f32::from(*q as i8))),
                Self::Q4_0 => nibbles(&block[2..], |q| scale * (f32::from(q) - 8.0), &mut weights),
                Self::Q4_1 => {
                    let minimum = number(2);
                    nibbles(&block[4..], |q| scale * f32::from(q) + minimum, &mut weights);
                }
            }
        }
        Ok(weights)
    }
}

fn nibbles(bytes: &[u8], value: impl Fn(u8) -> f32, weights: &mut Vec<f32>) {
    weights.extend(bytes.iter().map(|byte| value(byte & 15)));
    weights.extend(bytes.iter().map(|byte| value(byte >> 4)));
}

fn half(what: &'static str, block: usize, value: f32) -> Result<[u8; 2], QuantError> {
    let stored = f16::from_f32(value);
    if stored.to_f32() == value {
        return Ok(stored.to_le_bytes());
    }
    Err(QuantError::NotHalf { what, block, value })
}

fn check_range(q: &[i32], min: i32, max: i32) -> Result<(), QuantError> {
    match q.iter().position(|value| !(min..=max).contains(value)) {
        Some(index) => {
            Err(QuantError::OutOfRange { index, value: q[index].into(), min: min.into(), max: max.into() })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScaleType;
    use proptest::prelude::*;

    const TYPES: [(BlockType, u8, Scheme); 3] = [
        (BlockType::Q4_0, 4, Scheme::Symmetric),
        (BlockType::Q4_1, 4, Scheme::Asymmetric),
        (BlockType::Q8_0, 8, Scheme::Symmetric),
    ];
    const G32: Granularity = Granularity::PerGroup { group_size: BLOCK };

    fn encodings(bits: u8, scheme: Scheme, rows: usize, scale: Vec<f32>, zero_point: Vec<i32>) -> Encodings {
        let cols = scale.len() / rows * BLOCK;
        Encodings { bits, scheme, granularity: G32, rows, cols, scale, zero_point }
    }

    /// Bytes drawn at random; the weights by PyPI's `gguf` 0.19, in units of the scale, 0.05859375.
    const KNOWN: [(&str, i32, [i32; BLOCK]); 3] = [
        (
            "802bb8abeeab14cef599cc052535d5cec0ad",
            0,
            [
                0, 3, 6, 3, -4, 6, -3, 1, 4, -3, -3, -3, -3, 6, -8, 5, 3, 2, 6, 2, -7, 4, 7, 1, 4, -8, -6,
                -5, 5, 4, 4, 2,
            ],
        ),
        (
            "802ba0b5760457a17c472a49ed10c2fa0a67ce0d",
            6,
            [
                0, -2, 1, -5, 6, 1, 4, 3, 7, -6, -4, 4, 4, 1, 8, 7, 1, -6, -1, 4, 1, -2, -4, -2, 8, -5, 6, 9,
                -6, 0, 6, -6,
            ],
        ),
        (
            "802b264785762462c423399232b39168ce358d21b527970bb48a4200a5627b0c90b8",
            0,
            [
                38, 71, -123, 118, 36, 98, -60, 35, 57, -110, 50, -77, -111, 104, -50, 53, -115, 33, -75, 39,
                -105, 11, -76, -118, 66, 0, -91, 98, 123, 12, -112, -72,
            ],
        ),
    ];

    #[test]
    fn blocks_are_those_of_the_formats_own_library() {
        for ((kind, bits, scheme), (hex, zero_point, levels)) in TYPES.into_iter().zip(KNOWN) {
            let scale = 0.058_593_75;
            let encodings = encodings(bits, scheme, 1, vec![scale], vec![zero_point]);
            let q: Vec<i32> = levels.iter().map(|level| level + zero_point).collect();
            let bytes = kind.pack(&encodings, &q).unwrap();
            let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(text, hex, "{kind:?}");
            let weights = kind.dequantize(&bytes).unwrap();
            assert_eq!(weights, levels.map(|level| level as f32 * scale), "{kind:?}");
        }
    }

    proptest! {
        /// To the last bit, although the readers of asymmetric blocks add a minimum where the grid has a zero point.
        #[test]
        fn blocks_hold_exactly_what_the_grid_says(
            which in 0_usize..3, rows in 1_usize..4, groups in 1_usize..4, seed in any::<u32>(), size in -20_i32..8,
        ) {
            let (kind, bits, scheme) = TYPES[which];
            let any = |i: usize| seed.wrapping_add(i as u32).wrapping_mul(0x9e37_79b9).rotate_left(11) >> 8;
            let (min, max) = scheme.integer_range(bits);
            let value = |i: usize| min + (any(i) % (max - min + 1) as u32) as i32;
            let count = rows * groups;
            let scale = (0..count).map(|i| (1.0 + any(i) as f32 / (1 << 24) as f32) * (size as f32).exp2());
            let zero = |i: usize| if scheme.is_symmetric() { 0 } else { value(i) };
            let mut encodings = encodings(bits, scheme, rows, scale.collect(), (0..count).map(zero).collect());
            encodings.store_scales_as(ScaleType::F16AndMinimum);
            let q: Vec<i32> = (0..count * BLOCK).map(value).collect();
            let bytes = kind.pack(&encodings, &q).unwrap();
            prop_assert_eq!(bytes.len(), count * kind.bytes());
            prop_assert_eq!(kind.dequantize(&bytes).unwrap(), encodings.dequantize(&q).unwrap());
        }
    }

    #[test]
    fn what_a_block_cannot_hold_is_refused() {
        let good = encodings(4, Scheme::Asymmetric, 1, vec![0.25], vec![3]);
        let q = vec![1; BLOCK];
        assert!(BlockType::Q4_1.pack(&good, &q).is_ok());
        let error = |kind: BlockType, encodings: &Encodings, q: &[i32]| {
            kind.pack(encodings, q).unwrap_err().to_string()
        };
        assert!(error(BlockType::Q4_0, &good, &q).contains("no grid of 4 bits asymmetric per-group:32"));
        assert!(error(BlockType::Q4_1, &good, &q[1..]).contains("31 elements, expected 32"));
        assert!(error(BlockType::Q4_1, &good, &[16; BLOCK]).contains("integer 0 is 16"));
        let fine = Encodings { scale: vec![0.1], ..good.clone() };
        assert!(error(BlockType::Q4_1, &fine, &q).contains("scale of block 0 is 0.1"));
        // Ten digits: half precision has the scale, but not three times it.
        let long = Encodings { scale: vec![1023.0 / 512.0], ..good.clone() };
        assert!(error(BlockType::Q4_1, &long, &q).contains("minimum of block 0 is -5.99"));
        let odd = Encodings { cols: 48, scale: vec![0.25; 2], zero_point: vec![3; 2], ..good };
        assert!(error(BlockType::Q4_1, &odd, &[1; 48]).contains("does not divide the 48 columns"));
        assert!(BlockType::Q8_0.dequantize(&[0; 35]).is_err());
        for (bits, scheme, granularity) in [
            (4, Scheme::Symmetric, Granularity::PerChannel),
            (4, Scheme::Symmetric, Granularity::PerGroup { group_size: 64 }),
            (3, Scheme::Symmetric, G32),
            (8, Scheme::Asymmetric, G32),
        ] {
            assert_eq!(BlockType::of(bits, scheme, granularity), None, "{bits} {scheme} {granularity}");
        }
    }
}
