//! A guess at the protobuf structure of bytes, so that edits deep inside keep the lengths around them right.
//!
//! Without it nearly every insertion breaks an outer length and the decoder stops at the door. A length-delimited
//! payload that parses as fields is taken for a message; a wrong guess is harmless, it is written back as it was
//! (up to varints that were longer than needed).
//! Not here: message types, validity.

use crate::mutate::{INTERESTING, bytes as mutate_bytes};
use crate::random::Random;

/// Deeper payloads stay bytes.
const DEPTH_MAX: usize = 24;

/// A field: its tag (number and wire type) and value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Field {
    tag: u64,
    value: Value,
}

#[derive(Debug, Clone, PartialEq)]
enum Value {
    Varint(u64),
    Fixed(Vec<u8>),
    Bytes(Vec<u8>),
    Message(Vec<Field>),
}

/// The fields of a message, or `None` if the bytes are none.
pub(crate) fn parse(data: &[u8], depth: usize) -> Option<Vec<Field>> {
    let (mut rest, mut fields) = (data, Vec::new());
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        if tag >> 3 == 0 {
            return None;
        }
        let value = match tag & 7 {
            0 => Value::Varint(varint(&mut rest)?),
            1 => Value::Fixed(take(&mut rest, 8)?.to_vec()),
            5 => Value::Fixed(take(&mut rest, 4)?.to_vec()),
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                let payload = take(&mut rest, length)?;
                let message = if depth < DEPTH_MAX && length > 1 { parse(payload, depth + 1) } else { None };
                message.map_or_else(|| Value::Bytes(payload.to_vec()), Value::Message)
            }
            _ => return None,
        };
        fields.push(Field { tag, value });
    }
    Some(fields)
}

/// The bytes of the fields.
pub(crate) fn write(fields: &[Field]) -> Vec<u8> {
    let mut out = Vec::new();
    for field in fields {
        put_varint(&mut out, field.tag);
        match &field.value {
            Value::Varint(value) => put_varint(&mut out, *value),
            Value::Fixed(bytes) => out.extend(bytes),
            Value::Bytes(bytes) => put_delimited(&mut out, bytes),
            Value::Message(inner) => put_delimited(&mut out, &write(inner)),
        }
    }
    out
}

/// One edit of one field at any depth; `donor` supplies fields from elsewhere.
pub(crate) fn mutate(fields: &mut Vec<Field>, donor: &[Field], random: &mut Random) {
    let at = random.below(fields.len());
    if let Some(Field { value: Value::Message(inner), .. }) = fields.get_mut(at)
        && !inner.is_empty()
        && random.below(8) > 0
    {
        let donor = donor.iter().find_map(|field| match &field.value {
            Value::Message(message) if random.below(3) == 0 => Some(message.as_slice()),
            _ => None,
        });
        let own = inner.clone();
        return mutate(inner, donor.unwrap_or(&own), random);
    }
    match random.below(8) {
        0 if !fields.is_empty() => drop(fields.remove(at)),
        1 if !fields.is_empty() => fields.insert(random.below(fields.len()), fields[at].clone()),
        2 if !donor.is_empty() => fields.insert(at, random.pick(donor).clone()),
        3 if !fields.is_empty() => {
            let other = random.below(fields.len());
            fields.swap(at, other);
        }
        4 if !fields.is_empty() && !donor.is_empty() => {
            // The same field from elsewhere, if there is one: references to other names, other sizes.
            let same = donor.iter().filter(|field| field.tag == fields[at].tag).collect::<Vec<_>>();
            if !same.is_empty() {
                fields[at] = (*random.pick(&same)).clone();
            }
        }
        _ => fields.iter_mut().skip(at).take(1).for_each(|field| change(&mut field.value, random)),
    }
}

fn change(value: &mut Value, random: &mut Random) {
    match value {
        Value::Varint(v) => {
            *v = match random.below(4) {
                0 => *random.pick(INTERESTING),
                1 => v.wrapping_add(1),
                2 => v.wrapping_sub(1),
                _ => random.next() >> random.below(64),
            }
        }
        Value::Fixed(bytes) => {
            let at = random.below(bytes.len());
            bytes[at] = random.next() as u8;
        }
        Value::Bytes(bytes) => *bytes = mutate_bytes(bytes, &[], random),
        Value::Message(inner) => inner.clear(),
    }
}

/// Takes a varint off the front: at most 10 bytes.
pub(crate) fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for (i, byte) in rest.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f).checked_shl(7 * i as u32)?;
        if byte & 0x80 == 0 {
            *rest = &rest[i + 1..];
            return Some(value);
        }
    }
    None
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_delimited(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(count)?;
    *rest = tail;
    Some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_seed_is_written_back_byte_for_byte() {
        let seeds = crate::seeds::models().unwrap();
        assert!(seeds.len() > 20);
        for seed in seeds {
            assert_eq!(write(&parse(&seed, 0).unwrap()), seed);
        }
    }

    #[test]
    fn varints_at_the_edges_survive() {
        for value in [0, 1, 127, 128, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(varint(&mut out.as_slice()), Some(value));
        }
        assert_eq!(varint(&mut [0x80u8; 11].as_slice()), None);
    }
}
