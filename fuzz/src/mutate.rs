//! Blind mutation of bytes: flips, overwrites, varint edits, cuts, copies, splices.
//!
//! Not here: knowledge of any one format, beyond what most have: varints, decimal numbers, lengths in little endian
//! (`wire` goes one step further for protobuf).

use crate::random::Random;
use crate::wire;

/// Numbers at the edges of types and of common limits.
pub(crate) const INTERESTING: &[u64] = &[
    0,
    1,
    2,
    7,
    8,
    16,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// Texts that stand for numbers or values in headers and JSON.
const TEXTS: &[&str] = &[
    "0",
    "1",
    "-1",
    "255",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999",
    "1e308",
    "1e-45",
    "-0.0",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "[[1]]",
];

/// No input grows beyond this, in bytes.
const LENGTH_MAX: usize = 1 << 16;

/// One to eight mutations of `seed`; `other` is what splices and copies draw from.
pub(crate) fn mutated(seed: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut data = seed.to_vec();
    for _ in 0..1 << random.below(4) {
        data = match random.below(2) {
            0 => structured(&data, other, random),
            _ => bytes(&data, other, random),
        };
    }
    data.truncate(LENGTH_MAX);
    data
}

/// An edit inside a protobuf field if the bytes look like a message, any other edit if they do not.
fn structured(data: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let Some(mut fields) = wire::parse(data, 0) else { return bytes(data, other, random) };
    let donor = wire::parse(other, 0).unwrap_or_default();
    wire::mutate(&mut fields, &donor, random);
    wire::write(&fields)
}

/// One edit of plain bytes.
pub(crate) fn bytes(data: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut out = data.to_vec();
    let at = random.below(data.len());
    match random.below(12) {
        0 => flip(&mut out, at, random),
        1 => overwrite(&mut out, at, random),
        2 => varint(&mut out, at, random),
        3 => out.truncate(at),
        4 => {
            out.truncate(at);
            out.extend(&other[random.below(other.len())..]);
        }
        5 => {
            let copy = data[random.range(data.len())].to_vec();
            insert(&mut out, at, &copy);
        }
        6 => {
            let copy = other[random.range(other.len())].to_vec();
            insert(&mut out, at, &copy);
        }
        7 => drop(out.drain(random.range(data.len()))),
        8 => {
            let fresh: Vec<u8> = (0..1 + random.below(16)).map(|_| random.next() as u8).collect();
            insert(&mut out, at, &fresh);
        }
        9 => {
            // Overwrites with a copy of the same length, which keeps all lengths right.
            let copy = data[random.range(data.len())].to_vec();
            out.iter_mut().skip(at).zip(copy).for_each(|(slot, byte)| *slot = byte);
        }
        _ => number(&mut out, random),
    }
    out
}

fn insert(out: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    out.splice(at..at, bytes.iter().copied());
}

fn flip(out: &mut [u8], at: usize, random: &mut Random) {
    if let Some(byte) = out.get_mut(at) {
        *byte ^= 1 << random.below(8);
    }
}

/// An interesting number of 1, 2, 4 or 8 bytes in either byte order.
fn overwrite(out: &mut [u8], at: usize, random: &mut Random) {
    let width = 1 << random.below(4);
    let value = *random.pick(INTERESTING);
    let mut encoded = value.to_le_bytes()[..width].to_vec();
    if random.below(4) == 0 {
        encoded.reverse();
    }
    out.iter_mut().skip(at).zip(encoded).for_each(|(slot, byte)| *slot = byte);
}

/// Replaces what reads as a varint by another, which may be longer or shorter.
fn varint(out: &mut Vec<u8>, at: usize, random: &mut Random) {
    let mut rest = &out[at..];
    let Some(value) = wire::varint(&mut rest) else { return };
    let end = out.len() - rest.len();
    let changed = match random.below(4) {
        0 => value.wrapping_add(1),
        1 => value.wrapping_sub(1),
        2 => value << random.below(40),
        _ => *random.pick(INTERESTING),
    };
    let mut encoded = Vec::new();
    wire::put_varint(&mut encoded, changed);
    out.splice(at..end, encoded);
}

/// Replaces a run of decimal digits.
fn number(out: &mut Vec<u8>, random: &mut Random) {
    let from = random.below(out.len());
    let Some(start) = out.iter().skip(from).position(u8::is_ascii_digit).map(|p| p + from) else { return };
    let end = out.iter().skip(start).position(|b| !b.is_ascii_digit()).map_or(out.len(), |p| p + start);
    let text = random.pick(TEXTS);
    out.splice(start..end, text.bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_mutations_and_other_seeds_others() {
        let run = |seed| {
            let mut random = Random::new(seed);
            (0..100).map(|_| mutated(b"seed 123 of bytes", b"another one", &mut random)).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn empty_inputs_are_mutated_too() {
        let mut random = Random::new(3);
        assert!((0..1000).any(|_| !mutated(b"", b"", &mut random).is_empty()));
    }
}
