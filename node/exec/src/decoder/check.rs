//! Tensors that come from outside: are they what their names promise?
//!
//! Not here: what they should be (`kinds`).

use super::kinds::{Kind, Whose};
use super::operators::Input;
use crate::ExecError;
use halfstep_model::Tensor;
use halfstep_model::decoder::{LENGTHS, TOKENS};

/// A `Tensor` error.
pub(super) fn wrong(name: &str, expected: impl Into<String>, actual: impl Into<String>) -> ExecError {
    ExecError::Tensor { name: name.to_owned(), expected: expected.into(), actual: actual.into() }
}

/// What a tensor is, for messages.
pub(super) fn describe(tensor: &Tensor) -> String {
    format!("{} {:?}", tensor.dtype(), tensor.shape)
}

/// The sequences of a batch, as far as its inputs say.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Tokens of all sequences.
    pub(super) tokens: Option<usize>,
}

impl Batch {
    /// Checks an input and that it has a row for each token that others have.
    pub(super) fn admit(
        &mut self,
        name: &str,
        kind: Kind,
        input: Input<'_>,
        vocabulary: usize,
    ) -> Result<(), ExecError> {
        match (kind, input) {
            (Kind::Tokens, Input::Tensor(tensor)) => {
                let lengths = lengths_of(tensor, vocabulary)?;
                self.agree(name, total(name, &lengths)?)
            }
            (Kind::Lengths, Input::Tensor(tensor)) => {
                let lengths = as_lengths(name, tensor)?;
                self.agree(name, total(name, lengths)?)
            }
            (Kind::Tokens | Kind::Lengths, Input::Halves(_) | Input::OnDevice(_)) => {
                Err(wrong(name, "integers", input.describe()))
            }
            (Kind::Rows { width, whose }, _) => {
                let fits = |rows: &usize, columns: &usize| {
                    *columns == width
                        && rows.checked_mul(width).is_some_and(|len| input.floats() == Some(len))
                };
                match input.dims() {
                    [rows, columns] if fits(rows, columns) => match whose {
                        Whose::All => self.agree(name, *rows),
                        _ => Ok(()),
                    },
                    _ => Err(wrong(name, format!("f32 [rows, {width}]"), input.describe())),
                }
            }
        }
    }

    fn agree(&mut self, name: &str, rows: usize) -> Result<(), ExecError> {
        match *self.tokens.get_or_insert(rows) {
            tokens if tokens == rows => Ok(()),
            tokens => Err(wrong(name, format!("{tokens} tokens, as other inputs have"), format!("{rows}"))),
        }
    }
}

/// Lengths of the sequences in `[n, T]` ids, -1 behind a sequence's end.
pub(super) fn lengths_of(tokens: &Tensor, vocabulary: usize) -> Result<Vec<i64>, ExecError> {
    let shape = || wrong(TOKENS, "int64 [sequences, positions]", describe(tokens));
    let (Some(ids), [n, width]) = (tokens.as_i64(), tokens.shape.as_slice()) else { return Err(shape()) };
    if n.checked_mul(*width) != Some(ids.len()) {
        return Err(shape());
    }
    if *width == 0 {
        return if *n == 0 { Ok(Vec::new()) } else { Err(empty(0)) };
    }
    let sequences = ids.chunks_exact(*width).enumerate();
    sequences.map(|(sequence, ids)| length_of(sequence, ids, vocabulary)).collect()
}

fn empty(sequence: usize) -> ExecError {
    wrong(TOKENS, "at least one id in every sequence", format!("none in sequence {sequence}"))
}

fn length_of(sequence: usize, ids: &[i64], vocabulary: usize) -> Result<i64, ExecError> {
    let length = ids.iter().position(|id| *id == -1).unwrap_or(ids.len());
    if length == 0 {
        return Err(empty(sequence));
    }
    let outside = |id: &i64| usize::try_from(*id).map_or(true, |id| id >= vocabulary);
    if let Some(position) = ids[..length].iter().position(outside) {
        return Err(wrong(
            TOKENS,
            format!("ids from 0 to {}, and -1 behind a sequence's end", vocabulary.saturating_sub(1)),
            format!("{} at position {position} of sequence {sequence}", ids[position]),
        ));
    }
    if let Some(after) = ids[length..].iter().position(|id| *id != -1) {
        return Err(wrong(
            TOKENS,
            "nothing but -1 behind a sequence's end",
            format!("{} at position {} of sequence {sequence}", ids[length + after], length + after),
        ));
    }
    Ok(length as i64)
}

fn as_lengths<'a>(name: &str, tensor: &'a Tensor) -> Result<&'a [i64], ExecError> {
    match (tensor.as_i64(), tensor.shape.as_slice()) {
        (Some(lengths), [n]) if *n == lengths.len() => Ok(lengths),
        _ => Err(wrong(name, "int64 [sequences]", describe(tensor))),
    }
}

/// Tokens of all sequences; each has at least one.
fn total(name: &str, lengths: &[i64]) -> Result<usize, ExecError> {
    let sum = lengths.iter().try_fold(0usize, |sum, length| {
        usize::try_from(*length).ok().filter(|length| *length > 0).and_then(|length| sum.checked_add(length))
    });
    sum.ok_or_else(|| {
        let bad = lengths.iter().position(|length| *length <= 0);
        wrong(name, format!("`{LENGTHS}` of at least 1"), format!("sequence {bad:?} of {}", lengths.len()))
    })
}
