//! Integers into bit fields and back: the dense stream of packed checkpoints and ONNX's 4-bit tensors.
//!
//! Dense: element `i` occupies bits `[i*b, i*b + b)` counted from bit 0 of word 0; fields may straddle words.
//! Not here: which axis a format packs along, which is the writers' business.

use crate::QuantError;
use crate::encodings::check_length;

/// Packs `q + offset` into a dense LSB-first stream of `bits`-bit fields (2 to 8); unused last bits are 0.
///
/// `offset` makes the integers unsigned: `2^(bits-1)` for symmetric grids, 0 for asymmetric ones.
///
/// # Errors
/// `Bits` if the width is not 2 to 8, `OutOfRange` with the first integer that does not fit its field.
pub fn pack_dense(q: &[i32], bits: u8, offset: i32) -> Result<Vec<u32>, QuantError> {
    let max = field_max(bits)?;
    let mut words = Vec::with_capacity(dense_words(q.len(), bits));
    let (mut buffer, mut filled) = (0_u64, 0_u32);
    for (index, &value) in q.iter().enumerate() {
        let field = unsigned_field(index, value, offset, max)?;
        buffer |= u64::from(field) << filled;
        filled += u32::from(bits);
        if filled >= 32 {
            words.push(buffer as u32);
            buffer >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        words.push(buffer as u32);
    }
    Ok(words)
}

/// Reads `count` fields of a dense stream and takes `offset` off again.
///
/// # Errors
/// `Bits` if the width is not 2 to 8, `Length` if the number of words is not the one `count` fields need.
pub fn unpack_dense(words: &[u32], bits: u8, count: usize, offset: i32) -> Result<Vec<i32>, QuantError> {
    let max = field_max(bits)?;
    check_length("packed stream", dense_words(count, bits), words.len())?;
    let (mut buffer, mut filled) = (0_u64, 0_u32);
    let mut rest = words.iter();
    let mut q = Vec::with_capacity(count);
    for _ in 0..count {
        if filled < u32::from(bits) {
            buffer |= u64::from(rest.next().copied().unwrap_or(0)) << filled;
            filled += 32;
        }
        q.push(((buffer as u32) & max) as i32 - offset);
        buffer >>= bits;
        filled -= u32::from(bits);
    }
    Ok(q)
}

/// Words that `count` fields of `bits` bits need.
pub fn dense_words(count: usize, bits: u8) -> usize {
    // In two parts so that no count overflows: 32 fields fill exactly `bits` words.
    (count / 32).saturating_mul(bits.into()) + ((count % 32) * usize::from(bits)).div_ceil(32)
}

/// Packs signed 4-bit integers (-8 to 7) as ONNX INT4 raw data: two per byte, low nibble first, odd count padded by 0.
///
/// # Errors
/// `OutOfRange` with the first integer that does not fit.
pub fn pack_int4(q: &[i32]) -> Result<Vec<u8>, QuantError> {
    pack_nibbles(q, -8)
}

/// Packs unsigned 4-bit integers (0 to 15) as ONNX UINT4 raw data; see [`pack_int4`].
///
/// # Errors
/// `OutOfRange` with the first integer that does not fit.
pub fn pack_uint4(q: &[i32]) -> Result<Vec<u8>, QuantError> {
    pack_nibbles(q, 0)
}

/// Reads `count` integers of ONNX INT4 raw data.
///
/// # Errors
/// `Length` if the number of bytes is not `ceil(count / 2)`.
pub fn unpack_int4(bytes: &[u8], count: usize) -> Result<Vec<i32>, QuantError> {
    // Sign extension of a nibble.
    Ok(unpack_uint4(bytes, count)?.into_iter().map(|u| (u ^ 8) - 8).collect())
}

/// Reads `count` integers of ONNX UINT4 raw data.
///
/// # Errors
/// `Length` if the number of bytes is not `ceil(count / 2)`.
pub fn unpack_uint4(bytes: &[u8], count: usize) -> Result<Vec<i32>, QuantError> {
    check_length("4-bit raw data", count.div_ceil(2), bytes.len())?;
    let nibbles = bytes.iter().flat_map(|b| [i32::from(b & 15), i32::from(b >> 4)]);
    Ok(nibbles.take(count).collect())
}

fn pack_nibbles(q: &[i32], min: i32) -> Result<Vec<u8>, QuantError> {
    if let Some(index) = q.iter().position(|v| !(min..=min + 15).contains(v)) {
        let (value, min) = (i64::from(q[index]), i64::from(min));
        return Err(QuantError::OutOfRange { index, value, min, max: min + 15 });
    }
    let nibble = |v: i32| (v & 15) as u8;
    Ok(q.chunks(2).map(|pair| nibble(pair[0]) | pair.get(1).map_or(0, |&v| nibble(v) << 4)).collect())
}

fn field_max(bits: u8) -> Result<u32, QuantError> {
    if (2..=8).contains(&bits) { Ok((1 << bits) - 1) } else { Err(QuantError::Bits { bits }) }
}

fn unsigned_field(index: usize, value: i32, offset: i32, max: u32) -> Result<u32, QuantError> {
    let field = i64::from(value) + i64::from(offset);
    match u32::try_from(field) {
        Ok(field) if field <= max => Ok(field),
        _ => {
            let min = -i64::from(offset);
            Err(QuantError::OutOfRange { index, value: value.into(), min, max: min + i64::from(max) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition itself, one bit at a time.
    fn pack_bit_by_bit(fields: &[u32], bits: u8) -> Vec<u32> {
        let total = fields.len() * usize::from(bits);
        let mut words = vec![0_u32; total.div_ceil(32)];
        for position in 0..total {
            let (field, bit) = (position / usize::from(bits), position % usize::from(bits));
            words[position / 32] |= (fields[field] >> bit & 1) << (position % 32);
        }
        words
    }

    proptest! {
        #[test]
        fn dense_stream_is_the_definition_and_round_trips(
            bits in 2_u8..=8,
            raw in proptest::collection::vec(any::<u32>(), 0..150),
        ) {
            let fields: Vec<u32> = raw.iter().map(|v| v & ((1 << bits) - 1)).collect();
            let offset = 1 << (bits - 1);
            let q: Vec<i32> = fields.iter().map(|&u| u as i32 - offset).collect();
            let words = pack_dense(&q, bits, offset).unwrap();
            prop_assert_eq!(&words, &pack_bit_by_bit(&fields, bits));
            prop_assert_eq!(words.len(), dense_words(q.len(), bits));
            prop_assert_eq!(unpack_dense(&words, bits, q.len(), offset).unwrap(), q);
        }

        #[test]
        fn nibbles_round_trip(raw in proptest::collection::vec(0_i32..16, 0..50)) {
            prop_assert_eq!(&unpack_uint4(&pack_uint4(&raw).unwrap(), raw.len()).unwrap(), &raw);
            let signed: Vec<i32> = raw.iter().map(|v| v - 8).collect();
            prop_assert_eq!(unpack_int4(&pack_int4(&signed).unwrap(), raw.len()).unwrap(), signed);
        }
    }

    #[test]
    fn nibble_layout_is_low_first_and_padded() {
        assert_eq!(pack_int4(&[1, -1, -8]).unwrap(), [0xf1, 0x08]);
        assert_eq!(pack_uint4(&[1, 15, 8]).unwrap(), [0xf1, 0x08]);
    }

    #[test]
    fn dense_word_by_hand() {
        // GPTQ v2's zero points of a symmetric 4-bit layer are this word.
        assert_eq!(pack_dense(&[0; 8], 4, 8).unwrap(), [0x8888_8888]);
        // Three bits: 0..=7 as 0o76543210, then 0..=2 and the straddling 3 (bits 30..=32 hold field 10 = 2).
        let q: Vec<i32> = (0..11).map(|i| i % 8).collect();
        let low = 0o76543210_u32 | (0o10 << 24) | (2 << 30);
        assert_eq!(pack_dense(&q, 3, 0).unwrap(), [low, 0]);
    }

    #[test]
    fn values_and_lengths_that_do_not_fit_are_refused() {
        assert_eq!(
            pack_dense(&[0, 8], 4, 8),
            Err(QuantError::OutOfRange { index: 1, value: 8, min: -8, max: 7 })
        );
        assert!(pack_dense(&[i32::MIN], 8, -5).is_err());
        assert_eq!(pack_int4(&[-9]), Err(QuantError::OutOfRange { index: 0, value: -9, min: -8, max: 7 }));
        assert!(pack_uint4(&[-1]).is_err() && pack_uint4(&[16]).is_err());
        assert_eq!(pack_dense(&[0], 9, 0), Err(QuantError::Bits { bits: 9 }));
        assert!(matches!(
            unpack_dense(&[0], 4, 9, 0),
            Err(QuantError::Length { expected: 2, actual: 1, .. })
        ));
        assert!(unpack_dense(&[], 4, usize::MAX, 0).is_err());
        assert!(unpack_int4(&[0], 3).is_err());
    }
}
