//! Integers into bit fields and back: the dense stream of packed checkpoints and ONNX's 4-bit tensors.
//!
//! Dense: element `i` occupies bits `[i*b, i*b + b)` counted from bit 0 of word 0; fields may straddle words.
//! Not here: which axis a format packs along, which is the writers' business.

use crate::QuantError;
use crate::encodings::{check_length, element_count};

/// Packs `q + offset` into a dense LSB-first stream of `bits`-bit fields (2 to 8); unused last bits are 0.
///
/// `offset` makes the integers unsigned: `2^(bits-1)` for symmetric grids, 0 for asymmetric ones.
///
/// # Errors
/// `Bits` if the width is not 2 to 8, `OutOfRange` with the first integer that does not fit its field.
pub fn pack_dense(q: &[i32], bits: u8, offset: i32) -> Result<Vec<u32>, QuantError> {
    pack_lines(q, q.len(), bits, offset)
}

/// Packs every run of `line` integers into a stream of its own, as [`pack_dense`]: `[n, line]` becomes
/// `[n, dense_words(line)]`.
///
/// # Errors
/// As [`pack_dense`]; `Length` if the runs do not come out even.
pub fn pack_lines(q: &[i32], line: usize, bits: u8, offset: i32) -> Result<Vec<u32>, QuantError> {
    let max = field_max(bits)?;
    check_whole_lines(q.len(), line)?;
    check_fields(q, offset, max)?;
    let words_per_line = dense_words(line, bits);
    let mut words = vec![0; words_per_line * q.len().checked_div(line).unwrap_or(0)];
    for (q, words) in q.chunks_exact(line.max(1)).zip(words.chunks_exact_mut(words_per_line.max(1))) {
        pack_line(q, words, bits, offset);
    }
    Ok(words)
}

/// One stream; `words` are just enough.
fn pack_line(q: &[i32], words: &mut [u32], bits: u8, offset: i32) {
    let mut words = words.iter_mut();
    let mut put = |word| words.next().into_iter().for_each(|place| *place = word);
    let (mut buffer, mut filled) = (0_u64, 0_u32);
    for &value in q {
        // Not negative: the fields were checked.
        buffer |= u64::from(value.wrapping_add(offset).cast_unsigned()) << filled;
        filled += u32::from(bits);
        if filled >= 32 {
            put(buffer as u32);
            buffer >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        put(buffer as u32);
    }
}

/// Reads `count` fields of a dense stream and takes `offset` off again.
///
/// # Errors
/// `Bits` if the width is not 2 to 8, `Length` if the number of words is not the one `count` fields need.
pub fn unpack_dense(words: &[u32], bits: u8, count: usize, offset: i32) -> Result<Vec<i32>, QuantError> {
    unpack_lines(words, 1, count, bits, offset)
}

/// Reads `lines` streams of `line` fields each; the inverse of [`pack_lines`].
///
/// # Errors
/// As [`unpack_dense`].
pub fn unpack_lines(
    words: &[u32],
    lines: usize,
    line: usize,
    bits: u8,
    offset: i32,
) -> Result<Vec<i32>, QuantError> {
    let max = field_max(bits)?;
    let words_per_line = dense_words(line, bits);
    check_length("packed stream", words_per_line.saturating_mul(lines), words.len())?;
    // Every word holds at least four fields, so no more than the stream's own size is taken.
    let mut q = Vec::with_capacity(if words_per_line == 0 { 0 } else { lines * line });
    for words in words.chunks_exact(words_per_line.max(1)) {
        let (mut buffer, mut filled) = (0_u64, 0_u32);
        let mut rest = words.iter();
        q.extend((0..line).map(|_| {
            if filled < u32::from(bits) {
                buffer |= u64::from(rest.next().copied().unwrap_or(0)) << filled;
                filled += 32;
            }
            let field = (buffer as u32) & max;
            buffer >>= bits;
            filled -= u32::from(bits);
            field as i32 - offset
        }));
    }
    Ok(q)
}

/// `[rows, cols]` as `[cols, rows]`.
///
/// # Errors
/// `Length` if there are not `rows * cols` values.
pub fn transpose<T: Copy + Default>(values: &[T], rows: usize, cols: usize) -> Result<Vec<T>, QuantError> {
    /// Squares of this side stay in the nearest cache on both sides.
    const TILE: usize = 32;
    check_length("matrix", element_count(rows, cols)?, values.len())?;
    let mut out = vec![T::default(); values.len()];
    for row0 in (0..rows).step_by(TILE) {
        for col0 in (0..cols).step_by(TILE) {
            for row in row0..rows.min(row0 + TILE) {
                for col in col0..cols.min(col0 + TILE) {
                    out[col * rows + row] = values[row * cols + col];
                }
            }
        }
    }
    Ok(out)
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

fn check_whole_lines(count: usize, line: usize) -> Result<(), QuantError> {
    let whole = if line == 0 { 0 } else { count - count % line };
    check_length("list of integers in whole lines", whole, count)
}

fn check_fields(q: &[i32], offset: i32, max: u32) -> Result<(), QuantError> {
    let min = -i64::from(offset);
    let max = min + i64::from(max);
    match q.iter().position(|value| !(min..=max).contains(&i64::from(*value))) {
        Some(index) => Err(QuantError::OutOfRange { index, value: q[index].into(), min, max }),
        None => Ok(()),
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

    proptest! {
        #[test]
        fn lines_are_streams_of_their_own(
            bits in 2_u8..=8, lines in 0_usize..5, line in 1_usize..70, seed in any::<u32>(),
        ) {
            let q: Vec<i32> = (0..lines * line)
                .map(|i| (seed.wrapping_mul(i as u32 + 1).rotate_left(7) & ((1 << bits) - 1)) as i32 - 3)
                .collect();
            let words = pack_lines(&q, line, bits, 3).unwrap();
            let apart: Vec<u32> = q.chunks(line).flat_map(|q| pack_dense(q, bits, 3).unwrap()).collect();
            prop_assert_eq!(&words, &apart);
            prop_assert_eq!(&unpack_lines(&words, lines, line, bits, 3).unwrap(), &q);
            let turned = transpose(&q, lines, line).unwrap();
            prop_assert!((0..q.len()).all(|i| turned[(i % line) * lines + i / line] == q[i]));
            prop_assert_eq!(transpose(&turned, line, lines).unwrap(), q);
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
        assert!(unpack_lines(&[0], usize::MAX, usize::MAX, 8, 0).is_err());
        assert_eq!(unpack_lines(&[], usize::MAX, 0, 8, 0).unwrap(), Vec::<i32>::new());
        assert_eq!(pack_lines(&[], 0, 8, 0).unwrap(), Vec::<u32>::new());
        assert!(pack_lines(&[1, 2, 3], 2, 4, 0).is_err() && pack_lines(&[1], 0, 4, 0).is_err());
        assert!(transpose(&[1, 2, 3], 2, 2).is_err() && transpose::<u8>(&[], usize::MAX, 2).is_err());
        assert!(unpack_int4(&[0], 3).is_err());
    }
}
