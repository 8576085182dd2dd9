//! `eval` of language models: perplexity, next-token accuracy, divergence from a reference, on windows of text.
//!
//! Not here: running a model (`agent`), cutting text (`coordinator`), ONNX networks (`eval`).

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use halfstep_agent::{DecoderForward, Devices, ForwardError, Predictions, Scores, is_checkpoint};
use halfstep_coordinator::dataset::Dataset;
use halfstep_coordinator::dataset::tokens::{self, TokenOptions, tokenizer_file};

use crate::answers::{EvalRequest, PerplexityReport, PerplexityRow};
use crate::config::DeviceConfig;
use crate::exit::CliError;
use crate::values::GradientsArg;
use crate::{devices, engine};

/// Field of text where none is named.
const TEXT_FIELD: &str = "text";

/// Whether the models are folders of language models.
///
/// # Errors
/// Usage if some are and some are not.
pub(crate) fn is_asked(request: &EvalRequest) -> Result<bool, CliError> {
    let all: Vec<&Path> = models(request).collect();
    let folders = all.iter().filter(|path| is_checkpoint(path)).count();
    match folders {
        0 => Ok(false),
        n if n == all.len() => Ok(true),
        n => Err(CliError::usage(format!(
            "{n} of {} models are folders of language models, expected all or none",
            all.len()
        ))),
    }
}

fn models(request: &EvalRequest) -> impl Iterator<Item = &Path> {
    request.reference.iter().chain(&request.models).map(|path| path.as_path())
}

/// Measures language models; the reference, if any, is the first row.
///
/// # Errors
/// Bad input if a model or the data cannot be used; bad configuration if a device cannot.
pub(crate) fn perplexity(request: &EvalRequest) -> Result<PerplexityReport, CliError> {
    let threads = request.threads.unwrap_or_else(engine::cores);
    let first = models(request).next().ok_or_else(|| CliError::usage("no model given"))?;
    let data = tokens::open(&request.data.path, &options(request, first)?).map_err(CliError::bad_input)?;
    let windows = windows(&data)?;
    // What is measured takes all bits.
    let (device, folders) = (request.device.clone(), request.cuda_libraries.clone());
    let devices = Arc::new(devices::open(&DeviceConfig::new(device, Some(GradientsArg::F32), folders))?);
    let mut rows = Vec::new();
    let reference = match &request.reference {
        Some(path) => {
            let begun = Instant::now();
            let predictions = predictions(path, &devices, &windows, threads)?;
            let scores = predictions.score(None, threads).map_err(|error| refused(path, error))?;
            rows.push(row(path, &windows, scores, false, begun)?);
            Some(predictions)
        }
        None => None,
    };
    for path in &request.models {
        let begun = Instant::now();
        let predictions = predictions(path, &devices, &windows, threads)?;
        let scores = predictions.score(reference.as_ref(), threads).map_err(|error| refused(path, error))?;
        rows.push(row(path, &windows, scores, reference.is_some(), begun)?);
    }
    let notes = data.notes().iter().cloned().chain(place(first, &devices)?).collect();
    Ok(PerplexityReport { notes, rows })
}

/// What the model was computed on, unless that is the CPU as anybody would expect.
fn place(model: &Path, devices: &Arc<Devices>) -> Result<Option<String>, CliError> {
    let forward = DecoderForward::open(model).map_err(|error| refused(model, error))?;
    let left = forward.on(Arc::clone(devices)).left_to_cpu();
    let title = || devices.title().map(|title| format!("computed on {title}"));
    Ok(left.or_else(title).or_else(|| devices.note.clone()))
}

fn options(request: &EvalRequest, model: &Path) -> Result<TokenOptions, CliError> {
    let own = model.join("tokenizer.json");
    let given = request.text.tokenizer.as_deref().map(tokenizer_file);
    let forward = DecoderForward::open(model).map_err(|error| refused(model, error))?;
    Ok(TokenOptions {
        tokenizer: given.or_else(|| own.exists().then_some(own)),
        vocabulary: forward.vocabulary(),
        positions: forward.longest(),
        sequence_length: request.text.sequence_length,
        samples: request.data.samples,
        seed: request.seed,
        field: request.text.text_field.clone().unwrap_or_else(|| TEXT_FIELD.into()),
    })
}

/// Ids of every window, without padding.
fn windows(data: &Dataset) -> Result<Vec<Vec<i64>>, CliError> {
    let slices = data.slice(0..data.samples()).map_err(CliError::bad_input)?;
    let Some(slice) = slices.first() else { return Err(CliError::internal("no array of tokens")) };
    let width = slice.shape.get(1).copied().unwrap_or(1).max(1);
    let ids: Vec<i64> = slice.bytes.as_chunks().0.iter().map(|id| i64::from_le_bytes(*id)).collect();
    Ok(ids.chunks(width).map(|row| row.iter().copied().take_while(|id| *id >= 0).collect()).collect())
}

fn predictions(
    path: &Path,
    devices: &Arc<Devices>,
    windows: &[Vec<i64>],
    threads: usize,
) -> Result<Predictions, CliError> {
    let forward = DecoderForward::open(path).map_err(|error| refused(path, error))?;
    forward.on(Arc::clone(devices)).run(windows, threads).map_err(|error| refused(path, error))
}

fn refused(path: &Path, error: ForwardError) -> CliError {
    CliError::bad_input(format!("model `{}`: {error}", path.display()))
}

fn row(
    path: &Path,
    windows: &[Vec<i64>],
    scores: Scores,
    compared: bool,
    begun: Instant,
) -> Result<PerplexityRow, CliError> {
    if scores.tokens == 0 {
        return Err(CliError::bad_input("data: no window has a second token, which would be predicted"));
    }
    let mean = |sum: f64| sum / scores.tokens as f64;
    Ok(PerplexityRow {
        model: path.into(),
        method: "chunked",
        windows: windows.len(),
        sequence_length: windows.iter().map(Vec::len).max().unwrap_or(0),
        tokens: scores.tokens,
        perplexity: mean(scores.nll).exp(),
        top1: mean(scores.correct as f64),
        kl: compared.then(|| mean(scores.divergence)),
        agreement: compared.then(|| mean(scores.agreed as f64)),
        seconds: begun.elapsed().as_secs_f64(),
    })
}
