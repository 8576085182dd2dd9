//! `eval`: networks measured on data: top-1, agreement with a reference, SQNR of the outputs.

use std::path::Path;
use std::time::Instant;

use halfstep_agent::Forward;
use halfstep_coordinator::dataset::{Dataset, Labels};
use halfstep_coordinator::{model_inputs, prepare_model, transit_slice};

use crate::answers::{EvalRequest, EvalRow};
use crate::engine;
use crate::exit::CliError;
use crate::values::DeviceArg;

/// Outputs `[samples, classes]`, row-major.
struct Outputs {
    values: Vec<f32>,
    samples: usize,
}

impl Outputs {
    fn row(&self, sample: usize) -> &[f32] {
        let width = self.values.len() / self.samples.max(1);
        &self.values[sample * width..][..width]
    }

    /// The first of the largest outputs.
    fn top(&self, sample: usize) -> usize {
        let row = self.row(sample);
        (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
    }
}

/// Measures networks; the reference, if any, is the first row.
///
/// # Errors
/// Bad input if a model or the data cannot be used; usage for a device, which ONNX models are not run on.
pub(crate) fn eval(request: &EvalRequest) -> Result<Vec<EvalRow>, CliError> {
    if let Some(device) = request.device.as_ref().filter(|device| **device != DeviceArg::Cpu) {
        let message = format!("device `{device}`: ONNX models are run on the CPU");
        return Err(CliError::usage(message).hint("`--device` is for folders of language models"));
    }
    let options = request.data.to_options();
    let mut data = Dataset::open(&request.data.path, &options).map_err(CliError::bad_input)?;
    let labels = data.take_labels().map_err(CliError::bad_input)?;
    let reference = match &request.reference {
        Some(path) => Some((path, timed(request, path, &data)?)),
        None => None,
    };
    let mut rows = Vec::new();
    if let Some((path, (outputs, seconds))) = &reference {
        rows.push(row(path, outputs, labels.as_ref(), None, *seconds));
    }
    for path in &request.models {
        let (outputs, seconds) = timed(request, path, &data)?;
        rows.push(row(path, &outputs, labels.as_ref(), reference.as_ref().map(|(_, (o, _))| o), seconds));
    }
    Ok(rows)
}

fn timed(request: &EvalRequest, path: &Path, data: &Dataset) -> Result<(Outputs, f64), CliError> {
    let begun = Instant::now();
    Ok((outputs(request, path, data)?, begun.elapsed().as_secs_f64()))
}

fn outputs(request: &EvalRequest, path: &Path, data: &Dataset) -> Result<Outputs, CliError> {
    let (model, _) = prepare_model(path, false)?;
    let data = data.clone().for_inputs(&model_inputs(&model)?).map_err(CliError::bad_input)?;
    let engine = engine::open(request.onnxruntime.as_deref())?;
    let forward = Forward::load(engine.as_ref(), path).map_err(CliError::bad_input)?;
    let samples = data.samples();
    let starts: Vec<usize> = (0..samples).step_by(request.batch).collect();
    let threads = request.threads.unwrap_or_else(engine::cores).clamp(1, starts.len().max(1));
    let run = |start: &usize| {
        let slices =
            data.slice(*start..(*start + request.batch).min(samples)).map_err(CliError::bad_input)?;
        let inputs: Vec<_> = slices.into_iter().map(transit_slice).collect();
        forward.first_output(&inputs).map_err(CliError::bad_input)
    };
    // Batches are dealt out like cards; the order of results is the order of batches.
    let parts: Vec<Vec<Result<Vec<f32>, CliError>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn({
                    let (starts, run) = (&starts, &run);
                    move || starts.iter().skip(worker).step_by(threads).map(run).collect::<Vec<_>>()
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join().unwrap_or_default()).collect()
    });
    let mut values = Vec::new();
    let mut parts: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
    for index in 0..starts.len() {
        let part = parts[index % threads].next();
        values.extend(part.ok_or_else(|| CliError::internal("eval: a worker stopped early"))??);
    }
    if samples == 0 || values.is_empty() || values.len() % samples != 0 {
        return Err(CliError::bad_input(format!(
            "model `{}`: {} outputs for {samples} samples, expected the same number for each",
            path.display(),
            values.len()
        )));
    }
    Ok(Outputs { values, samples })
}

fn row(
    path: &Path,
    outputs: &Outputs,
    labels: Option<&Labels>,
    reference: Option<&Outputs>,
    seconds: f64,
) -> EvalRow {
    let share = |hits: usize| hits as f64 / outputs.samples as f64;
    let top1 = labels
        .filter(|labels| labels.len() == outputs.samples)
        .map(|labels| share((0..outputs.samples).filter(|s| labels.accepts(*s, outputs.top(*s))).count()));
    let comparable = reference.filter(|r| r.values.len() == outputs.values.len());
    EvalRow {
        model: path.into(),
        samples: outputs.samples,
        top1,
        agreement: comparable
            .map(|r| share((0..outputs.samples).filter(|s| outputs.top(*s) == r.top(*s)).count())),
        sqnr_db: comparable.map(|r| halfstep_quant::metrics::sqnr_db(&r.values, &outputs.values)),
        seconds,
    }
}
