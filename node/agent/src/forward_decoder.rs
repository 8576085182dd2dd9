//! Language models run over windows of tokens, a block at a time: what `eval` measures.
//!
//! Of the weights one block is in memory at once, of the activations the residual stream of all windows. Logits are
//! made for a few tokens at a time, scored and dropped. Every window stands alone: its first token is not predicted,
//! each other is from those before it in the window.
//! Not here: choosing windows (`coordinator::dataset`), means and tables (`cli`).

use crate::ForwardError;
use crate::blocks::{Block, blocks};
use crate::devices::Devices;
use halfstep_exec::{ExecError, Session};
use halfstep_model::checkpoint::Checkpoint;
use halfstep_model::decoder::{
    CarryPrecision, Decoder, DescribeOptions, LENGTHS, LOGITS, Op, TOKENS, describe,
};
use halfstep_model::{Data, Tensor};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Tokens of the windows that run at once on a thread: products reach their speed, activations stay small.
const TOKENS_AT_ONCE: usize = 1024;
/// Logits of a thread at once, 32 MiB.
const LOGITS_AT_ONCE: usize = 8 << 20;

/// A checkpoint that can be run.
pub struct DecoderForward {
    checkpoint: Checkpoint,
    decoder: Decoder,
    blocks: Vec<Block>,
    devices: Arc<Devices>,
}

/// A model's last activations for every token that it predicts the next of, and the head that makes logits of them.
pub struct Predictions {
    head: Arc<dyn Session>,
    reads: String,
    vocabulary: usize,
    hidden: usize,
    batches: Vec<Predicted>,
}

/// What a model's predictions are worth, as sums over tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scores {
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Negative log likelihood of them, in nats.
    pub nll: f64,
    /// Of them, those that were the most likely.
    pub correct: u64,
    /// Kullback-Leibler divergence of the model from the reference, `sum p_ref log(p_ref / p)`, in nats; 0 without one.
    pub divergence: f64,
    /// Tokens for which model and reference have the same most likely one; 0 without a reference.
    pub agreed: u64,
}

/// Windows that run together.
struct Batch {
    tokens: Tensor,
    lengths: Option<Tensor>,
    rows: Option<Tensor>,
    windows: Vec<Vec<i64>>,
}

/// Rows that predict, and what came.
struct Predicted {
    /// `[next.len(), hidden]`.
    rows: Vec<f32>,
    next: Vec<usize>,
}

impl DecoderForward {
    /// Opens a checkpoint's folder, packed or plain, to be run on the CPU.
    ///
    /// # Errors
    /// What reading it or understanding its configuration says; a tensor that is missing or has another shape.
    pub fn open(folder: &Path) -> Result<Self, ForwardError> {
        let checkpoint = Checkpoint::open(folder)?;
        let decoder = describe(&checkpoint.plain_config(), DescribeOptions::default())?;
        let decoder = bind(decoder, &checkpoint)?;
        let blocks = blocks(&decoder).map_err(ForwardError::Input)?;
        Ok(Self { checkpoint, decoder, blocks, devices: Arc::new(Devices::cpu()) })
    }

    /// The same checkpoint, run on these devices; on the CPU if they have no kernel for one of its operators.
    #[must_use]
    pub fn on(self, devices: Arc<Devices>) -> Self {
        Self { devices, ..self }
    }

    /// Why it runs on the CPU though there are other devices.
    pub fn left_to_cpu(&self) -> Option<String> {
        self.devices.left_to_cpu(&self.decoder)
    }

    /// Rows of its embedding; token ids are below it.
    pub fn vocabulary(&self) -> usize {
        self.decoder.vocabulary
    }

    /// Tokens of the longest window it should be given, if there is a longest.
    pub fn longest(&self) -> Option<usize> {
        self.decoder.longest()
    }

    /// Runs `windows`, token ids without padding, all blocks but the head.
    ///
    /// # Errors
    /// What reading weights or running says; `Input` for an empty window or an id outside the vocabulary.
    pub fn run(&self, windows: &[Vec<i64>], threads: usize) -> Result<Predictions, ForwardError> {
        let mut batches = batches(windows, self.decoder.vocabulary)?;
        let Some((head, body)) = self.blocks.split_last() else {
            return Err(ForwardError::Input("the model has no operators".into()));
        };
        for block in body {
            let session = self.load(block)?;
            each(threads, &mut batches, |batch| batch.advance(session.as_ref(), block))?;
        }
        let batches = each(threads, &mut batches, Batch::predicted)?;
        let hidden = batches.iter().find(|batch| !batch.next.is_empty());
        Ok(Predictions {
            head: self.load(head)?,
            reads: head.reads.clone().unwrap_or_default(),
            vocabulary: self.decoder.vocabulary,
            hidden: hidden.map_or(0, |batch| batch.rows.len() / batch.next.len()),
            batches,
        })
    }

    fn load(&self, block: &Block) -> Result<Arc<dyn Session>, ForwardError> {
        let nodes: Vec<usize> = block.nodes.clone().collect();
        let mut constants = |name: &str| self.checkpoint.tensor(name).map_err(ExecError::from);
        Ok(self.devices.load(&self.decoder, &nodes, CarryPrecision::F32, &mut constants)?.0)
    }
}

/// The decoder with its weights named as they are stored, all of them there, plain or packed.
fn bind(decoder: Decoder, checkpoint: &Checkpoint) -> Result<Decoder, ForwardError> {
    let is_packed = |name: &str| {
        let module = name.strip_suffix(".weight");
        let part =
            |part: &str| module.is_some_and(|module| checkpoint.info(&format!("{module}.{part}")).is_some());
        part("weight_packed") || part("qweight")
    };
    let linear = |node: &halfstep_model::decoder::DecoderNode| match &node.op {
        Op::Linear(linear) => Some((linear.weight.clone(), linear.weight_shape())),
        _ => None,
    };
    let packed: BTreeMap<String, Vec<usize>> =
        decoder.nodes.iter().filter_map(linear).filter(|(name, _)| is_packed(name)).collect();
    let shape = |name: &str| {
        checkpoint.info(name).map(|info| info.shape.clone()).or_else(|| packed.get(name).cloned())
    };
    let decoder = decoder.bind(shape)?;
    let constants: Vec<_> = decoder.nodes.iter().flat_map(|node| node.op.constants(&decoder)).collect();
    checkpoint.check(&constants)?;
    Ok(decoder)
}

impl Batch {
    fn advance(&mut self, session: &dyn Session, block: &Block) -> Result<(), ForwardError> {
        let mut inputs: Vec<(&str, &Tensor)> = Vec::new();
        match (&block.reads, &self.rows, &self.lengths) {
            (Some(reads), Some(rows), Some(lengths)) => {
                inputs.push((reads, rows));
                if block.reads_lengths {
                    inputs.push((LENGTHS, lengths));
                }
                self.rows = session.run(&inputs, &[&block.writes])?.pop();
            }
            _ => {
                inputs.push((TOKENS, &self.tokens));
                let mut found = session.run(&inputs, &[&block.writes, LENGTHS])?;
                (self.lengths, self.rows) = (found.pop(), found.pop());
            }
        }
        Ok(())
    }

    /// The rows of all tokens but the last of each window. The activations are dropped.
    fn predicted(&mut self) -> Result<Predicted, ForwardError> {
        let rows = self.rows.take();
        let tokens: usize = self.windows.iter().map(Vec::len).sum();
        let values =
            rows.as_ref().and_then(Tensor::as_f32).filter(|values| values.len() % tokens.max(1) == 0);
        let values = values.ok_or_else(|| ForwardError::Input("the last block wrote no rows".into()))?;
        let width = values.len() / tokens.max(1);
        let (mut kept, mut next, mut start) = (Vec::new(), Vec::new(), 0);
        for window in &self.windows {
            let predicting = window.len().saturating_sub(1);
            kept.extend_from_slice(&values[start * width..(start + predicting) * width]);
            // Ids were checked when the batches were made.
            next.extend(window.iter().skip(1).map(|id| usize::try_from(*id).unwrap_or(0)));
            start += window.len();
        }
        Ok(Predicted { rows: kept, next })
    }
}

fn batches(windows: &[Vec<i64>], vocabulary: usize) -> Result<Vec<Batch>, ForwardError> {
    let mut batches = Vec::new();
    let longest = windows.iter().map(Vec::len).max().unwrap_or(0).max(1);
    for group in windows.chunks((TOKENS_AT_ONCE / longest).max(1)) {
        let width = group.iter().map(Vec::len).max().unwrap_or(0);
        let mut ids = vec![-1; group.len() * width];
        for (window, row) in group.iter().zip(ids.chunks_exact_mut(width.max(1))) {
            let outside = |id: &i64| usize::try_from(*id).map_or(true, |id| id >= vocabulary);
            if let Some(id) = window.iter().find(|id| outside(id)) {
                return Err(ForwardError::Input(format!("token {id}, expected 0 to {}", vocabulary - 1)));
            }
            row[..window.len()].copy_from_slice(window);
        }
        let tokens = Tensor::new(vec![group.len(), width], Data::I64(ids))?;
        batches.push(Batch { tokens, lengths: None, rows: None, windows: group.to_vec() });
    }
    Ok(batches)
}

impl Predictions {
    /// Scores all predictions, against those of `reference` for the same windows if there is one.
    ///
    /// # Errors
    /// What running the head says; `Input` if the reference has another vocabulary or ran over other windows.
    pub fn score(&self, reference: Option<&Self>, threads: usize) -> Result<Scores, ForwardError> {
        if let Some(reference) = reference {
            self.comparable(reference).map_err(ForwardError::Input)?;
        }
        let at_once = (LOGITS_AT_ONCE / self.vocabulary.max(1)).clamp(1, TOKENS_AT_ONCE);
        let mut chunks = Vec::new();
        for (batch, predicted) in self.batches.iter().enumerate() {
            let starts = (0..predicted.next.len()).step_by(at_once);
            chunks.extend(starts.map(|start| (batch, start..(start + at_once).min(predicted.next.len()))));
        }
        let parts = each(threads, &mut chunks, |(batch, range)| {
            let next = &self.batches[*batch].next[range.clone()];
            let logits = self.logits(*batch, range.clone())?;
            let other = reference.map(|other| other.logits(*batch, range.clone())).transpose()?;
            Ok(score(next, &logits, other.as_deref()))
        })?;
        Ok(parts.into_iter().fold(Scores::default(), Scores::plus))
    }

    fn comparable(&self, other: &Self) -> Result<(), String> {
        if self.vocabulary != other.vocabulary {
            return Err(format!(
                "the reference predicts among {} tokens, the model among {}: they cannot be compared",
                other.vocabulary, self.vocabulary
            ));
        }
        let next =
            |all: &Self| all.batches.iter().flat_map(|batch| batch.next.clone()).collect::<Vec<usize>>();
        if self.batches.len() != other.batches.len() || next(self) != next(other) {
            return Err("the reference ran over other windows: they cannot be compared".into());
        }
        Ok(())
    }

    /// `[range, vocabulary]`.
    fn logits(&self, batch: usize, range: std::ops::Range<usize>) -> Result<Vec<f32>, ForwardError> {
        let rows = &self.batches[batch].rows[range.start * self.hidden..range.end * self.hidden];
        let rows = Tensor::f32(vec![range.len(), self.hidden], rows.to_vec())?;
        let found = self.head.run(&[(self.reads.as_str(), &rows)], &[LOGITS])?.pop();
        match found.map(|tensor| tensor.data) {
            Some(Data::F32(logits)) if logits.len() == range.len() * self.vocabulary => Ok(logits),
            _ => Err(ForwardError::Input(format!("the head wrote no logits of {} tokens", self.vocabulary))),
        }
    }
}

impl Scores {
    fn plus(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            nll: self.nll + other.nll,
            correct: self.correct + other.correct,
            divergence: self.divergence + other.divergence,
            agreed: self.agreed + other.agreed,
        }
    }
}

/// `logits` and `reference` are `[next.len(), vocabulary]`.
fn score(next: &[usize], logits: &[f32], reference: Option<&[f32]>) -> Scores {
    let width = logits.len() / next.len().max(1);
    let mut sum = Scores::default();
    for (row, next) in next.iter().enumerate() {
        let of = |all| row_of(all, row, width);
        let own = of(logits);
        let (top, normaliser) = (top(own), log_sum_exp(own));
        sum.tokens += 1;
        sum.nll += normaliser - f64::from(own[*next]);
        sum.correct += u64::from(top == *next);
        if let Some(all) = reference {
            let other = of(all);
            sum.divergence += divergence(other, own) + normaliser - log_sum_exp(other);
            sum.agreed += u64::from(self::top(other) == top);
        }
    }
    sum
}

fn row_of(all: &[f32], row: usize, width: usize) -> &[f32] {
    all.chunks_exact(width.max(1)).nth(row).unwrap_or_default()
}

/// The first of the largest.
fn top(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, index| if logits[index] > logits[best] { index } else { best })
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    f64::from(largest) + sum.ln()
}

/// `sum p (x - y)` with `p` the softmax of `x`: the divergence but for the normalisers.
fn divergence(x: &[f32], y: &[f32]) -> f64 {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (mut weight, mut sum) = (0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        let p = f64::from((x - largest).exp());
        weight += p;
        sum += p * (f64::from(*x) - f64::from(*y));
    }
    sum / weight
}

/// `work` on every item, on so many threads; results in the order of items.
fn each<T: Send, R: Send>(
    threads: usize,
    items: &mut [T],
    work: impl Fn(&mut T) -> Result<R, ForwardError> + Sync,
) -> Result<Vec<R>, ForwardError> {
    let threads = threads.clamp(1, items.len().max(1));
    let queue = Mutex::new(items.iter_mut().enumerate());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let worker = || {
        let mut done = Vec::new();
        while let Some((index, item)) = next() {
            match work(item) {
                Ok(result) => done.push((index, result)),
                Err(error) => {
                    // Nobody needs the rest.
                    queue.lock().unwrap_or_else(PoisonError::into_inner).by_ref().for_each(drop);
                    return Err(error);
                }
            }
        }
        Ok(done)
    };
    let parts = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
    });
    let mut all = Vec::new();
    for part in parts {
        all.extend(part.map_err(|_| ForwardError::Input("a worker stopped early".into()))??);
    }
    all.sort_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_the_plain_formulas() {
        let (x, y) = ([1.0f32, -2.0, 0.5, 3.0], [0.0f32, 1.0, -1.0, 2.0]);
        let softmax = |logits: &[f32]| {
            let all: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp()).collect();
            let sum: f64 = all.iter().sum();
            all.into_iter().map(|e| e / sum).collect::<Vec<f64>>()
        };
        let (p, q) = (softmax(&y), softmax(&x));
        let expect: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let found = score(&[2], &x, Some(&y));
        assert!((found.nll + q[2].ln()).abs() < 1e-6, "{found:?}");
        assert!((found.divergence - expect).abs() < 1e-6, "{found:?} {expect}");
        assert_eq!((found.tokens, found.correct, found.agreed), (1, 0, 1));
        let same = score(&[3], &x, Some(&x));
        assert_eq!((same.correct, same.divergence), (1, 0.0));
    }

    #[test]
    fn results_are_in_the_order_of_items_and_the_first_error_ends_the_work() {
        let mut items: Vec<usize> = (0..50).collect();
        assert_eq!(each(3, &mut items, |n| Ok(*n * 2)).unwrap(), (0..100).step_by(2).collect::<Vec<_>>());
        let failed = each(2, &mut items, |n| match *n {
            7 => Err(ForwardError::Input("seven".into())),
            n => Ok(n),
        });
        assert_eq!(failed.unwrap_err().to_string(), "seven");
        assert!(each(2, &mut [] as &mut [usize], |n| Ok(*n)).unwrap().is_empty());
    }
}
