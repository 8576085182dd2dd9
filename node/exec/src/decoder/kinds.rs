//! What every tensor of a decoder is, found by following its operators; graphs that do not fit together are refused.
//!
//! Not here: tensors themselves (`check`).

use crate::ExecError;
use halfstep_model::decoder::{Attend, Decoder, DecoderNode, LENGTHS, Op, TOKENS};
use std::collections::HashMap;

/// Shape and meaning of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `[n, T]` i64, ids.
    Tokens,
    /// `[n]` i64.
    Lengths,
    /// `[rows, width]` f32.
    Rows { width: usize, whose: Whose },
}

/// Which tokens have a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// Every token of the batch.
    All,
    /// Those that a router gave to one expert; `router`: its node.
    Expert { router: usize, expert: usize },
}

/// Kinds of all tensors by name.
///
/// # Errors
/// `Load`, naming the first node whose inputs do not fit its operator.
pub(super) fn kinds(decoder: &Decoder) -> Result<HashMap<&str, Kind>, ExecError> {
    let mut known = Known { kinds: HashMap::from([(TOKENS, Kind::Tokens)]), writers: HashMap::new() };
    for (index, node) in decoder.nodes.iter().enumerate() {
        let outputs = known.outputs(decoder, node).map_err(|reason| refuse(node, reason))?;
        if outputs.len() != node.outputs.len() {
            let reason = format!("{} outputs, expected {}", node.outputs.len(), outputs.len());
            return Err(refuse(node, reason));
        }
        for (name, kind) in node.outputs.iter().zip(outputs) {
            known.kinds.insert(name, kind);
            known.writers.insert(name, index);
        }
    }
    Ok(known.kinds)
}

/// The error of a node that cannot be run.
pub(super) fn refuse(node: &DecoderNode, reason: String) -> ExecError {
    let op_type = format!("{:?}", node.op).split(['(', ' ', '{']).next().unwrap_or_default().to_owned();
    ExecError::Load { engine: super::session::NAME.into(), node: node.name.clone(), op_type, reason }
}

struct Known<'a> {
    kinds: HashMap<&'a str, Kind>,
    writers: HashMap<&'a str, usize>,
}

impl<'a> Known<'a> {
    fn kind(&self, node: &DecoderNode, input: usize) -> Result<Kind, String> {
        let name = node.inputs.get(input).ok_or_else(|| format!("input {input} is not there"))?;
        self.kinds.get(name.as_str()).copied().ok_or_else(|| format!("reads `{name}`, which nothing writes"))
    }

    /// Width and rows of an f32 input.
    fn rows(&self, node: &DecoderNode, input: usize) -> Result<(usize, Whose), String> {
        match self.kind(node, input)? {
            Kind::Rows { width, whose } => Ok((width, whose)),
            other => Err(format!("`{}` is {other:?}, expected rows of numbers", node.inputs[input])),
        }
    }

    /// Rows of an input that must have a certain width.
    fn wide(&self, node: &DecoderNode, input: usize, expected: usize) -> Result<Whose, String> {
        match self.rows(node, input)? {
            (width, whose) if width == expected => Ok(whose),
            (width, _) => Err(format!("`{}` is {width} wide, expected {expected}", node.inputs[input])),
        }
    }

    fn outputs(&self, decoder: &Decoder, node: &'a DecoderNode) -> Result<Vec<Kind>, String> {
        let one = |width, whose| Ok(vec![Kind::Rows { width, whose }]);
        match &node.op {
            Op::Embed(_) => match self.kind(node, 0)? {
                Kind::Tokens if decoder.hidden == 0 => Err("hidden is 0, expected at least 1".into()),
                Kind::Tokens => {
                    Ok(vec![Kind::Rows { width: decoder.hidden, whose: Whose::All }, Kind::Lengths])
                }
                other => Err(format!("`{}` is {other:?}, expected `{TOKENS}`", node.inputs[0])),
            },
            Op::Norm(norm) => match self.rows(node, 0)? {
                (width, whose) if norm.width > 0 && width.is_multiple_of(norm.width) => one(width, whose),
                (width, _) => Err(format!("a row of {width} is not a multiple of {}", norm.width)),
            },
            Op::Linear(linear) => one(linear.rows, self.wide(node, 0, linear.cols)?),
            Op::Attend(attend) => self.attend(node, attend),
            Op::Gate(_) if node.inputs.len() == 1 => match self.rows(node, 0)? {
                (width, whose) if width.is_multiple_of(2) => one(width / 2, whose),
                (width, _) => Err(format!("a row of {width} has no two halves")),
            },
            Op::Gate(_) | Op::Add => {
                let (width, whose) = self.rows(node, 0)?;
                match self.wide(node, 1, width)? {
                    other if other == whose => one(width, whose),
                    other => Err(format!("rows of {whose:?} and of {other:?}, expected the same")),
                }
            }
            Op::Activate(_) | Op::Softcap { .. } => {
                let (width, whose) = self.rows(node, 0)?;
                one(width, whose)
            }
            Op::Route(route) => match (self.wide(node, 0, route.experts)?, route.top_k) {
                (Whose::All, 1..) if route.top_k <= route.experts => one(route.experts, Whose::All),
                (whose, k) => Err(format!("top {k} of {} for {whose:?}", route.experts)),
            },
            Op::Select(select) => {
                let (width, rows) = self.rows(node, 0)?;
                let (experts, weights) = self.rows(node, 1)?;
                if (rows, weights) != (Whose::All, Whose::All) || select.expert >= experts {
                    return Err(format!("expert {} of {experts} among {rows:?}", select.expert));
                }
                one(width, self.whose(node, 1, select.expert, select.all_tokens))
            }
            Op::Combine { all_tokens } => self.combine(node, *all_tokens),
        }
    }

    /// The rows of an expert, by the router's weights that `input` names.
    fn whose(&self, node: &DecoderNode, input: usize, expert: usize, all_tokens: bool) -> Whose {
        let router = node.inputs.get(input).and_then(|name| self.writers.get(name.as_str())).copied();
        match (all_tokens, router) {
            (false, Some(router)) => Whose::Expert { router, expert },
            _ => Whose::All,
        }
    }

    fn attend(&self, node: &DecoderNode, attend: &Attend) -> Result<Vec<Kind>, String> {
        let Attend { heads, kv_heads, head_dim, .. } = *attend;
        if heads == 0 || kv_heads == 0 || head_dim == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(format!("{heads} heads of {head_dim} on {kv_heads}"));
        }
        let widths = heads.checked_mul(head_dim).zip(kv_heads.checked_mul(head_dim));
        let (q, kv) = widths.ok_or_else(|| format!("{heads} heads of {head_dim} are too many"))?;
        let expected = match node.inputs.len() {
            2 => vec![q.checked_add(kv).and_then(|n| n.checked_add(kv)).unwrap_or(usize::MAX)],
            4 => vec![q, kv, kv],
            n => return Err(format!("{n} inputs, expected 2 or 4")),
        };
        for (input, width) in expected.iter().enumerate() {
            if self.wide(node, input, *width)? != Whose::All {
                return Err(format!("`{}` are an expert's rows", node.inputs[input]));
            }
        }
        match self.kind(node, expected.len())? {
            Kind::Lengths => Ok(vec![Kind::Rows { width: q, whose: Whose::All }]),
            other => Err(format!("its last input is {other:?}, expected `{LENGTHS}`")),
        }
    }

    fn combine(&self, node: &DecoderNode, all_tokens: bool) -> Result<Vec<Kind>, String> {
        let experts = node.inputs.len() - 1;
        if experts == 0 || self.wide(node, 0, experts)? != Whose::All {
            return Err(format!("{experts} experts"));
        }
        let (width, _) = self.rows(node, 1)?;
        for expert in 0..experts {
            let (found, expected) =
                (self.wide(node, 1 + expert, width)?, self.whose(node, 0, expert, all_tokens));
            if found != expected {
                return Err(format!(
                    "`{}` has rows of {found:?}, expected {expected:?}",
                    node.inputs[1 + expert]
                ));
            }
        }
        Ok(vec![Kind::Rows { width, whose: Whose::All }])
    }
}
