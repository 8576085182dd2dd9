//! Whole networks through `halfstep`: on the device twice, with different numbers of threads, and on the CPU; then measured.
//!
//! Both runs on the device must write the same bytes. How much better or worse than the CPU's their roundings are is said, not
//! judged: both end in other optima. Not here: how a job is run (`halfstep`), what its files say (`results`).

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::asked::Asked;
use crate::figures::Figures;
use crate::halfstep::{Device, Halfstep, Job};
use crate::results::{self, Objectives, Timing, gib};

/// A network that is looked for.
struct Model {
    folder: &'static str,
    bits: &'static str,
    group_size: Option<&'static str>,
    /// A folder of a language model, not an ONNX file.
    language: bool,
}

const MODELS: [Model; 3] = [
    Model { folder: "fashion-mnist", bits: "3", group_size: None, language: false },
    Model { folder: "efficientnet-lite0", bits: "4", group_size: None, language: false },
    Model { folder: "smollm2", bits: "4", group_size: Some("64"), language: true },
];

/// Windows that a language model is measured on, of each text.
const WINDOWS: &str = "16";

/// The files of a model.
struct Inputs {
    model: PathBuf,
    calibration: OsString,
    /// Names of data to measure with and where it is.
    evaluations: Vec<(&'static str, OsString)>,
}

/// One job that ended.
struct Done {
    /// What it ran on, for names of figures.
    device: String,
    output: PathBuf,
    objectives: Objectives,
}

/// Every model that is there; what goes wrong with one is kept, and the next one is run.
pub(crate) fn models(halfstep: &Halfstep, asked: &Asked, figures: &mut Figures) {
    for model in &MODELS {
        match inputs(model, &asked.models.join(model.folder)) {
            Ok(inputs) => {
                let outcome = one(halfstep, asked, model, &inputs, figures);
                outcome.unwrap_or_else(|why| figures.fail(format!("{}: {why}", model.title())));
            }
            Err(missing) => {
                figures.note(&format!("{}: left out, {} is not there", model.title(), missing.display()))
            }
        }
    }
}

impl Model {
    fn title(&self) -> String {
        format!("{} W{}", self.folder, self.bits)
    }

    /// Options of `quantize`.
    fn options(&self, quick: bool) -> Vec<String> {
        let mut words = vec!["--bits", self.bits];
        words.extend(self.group_size.into_iter().flat_map(|size| ["--group-size", size]));
        match (quick, self.language) {
            (true, true) => {
                words.extend("--samples 2 --start nearest --refine-sweeps 0 --scale-fits 0".split(' '))
            }
            (true, false) => words.extend(["--samples", "64", "--iterations", "20"]),
            // The CPU's run is what takes longest of all parts.
            (false, true) => words.extend(["--samples", "32"]),
            (false, false) => {}
        }
        words.into_iter().map(str::to_owned).collect()
    }
}

/// The files in a model's folder, or the first one that is missing.
fn inputs(model: &Model, folder: &Path) -> Result<Inputs, PathBuf> {
    let there = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
    let must = |name: &str| there(name).ok_or_else(|| folder.join(name));
    if !model.language {
        let (network, calibration) = (must("model.onnx")?, must("calibration.npz")?.into_os_string());
        let evaluations = there("eval.npz").into_iter().map(|path| ("eval.npz", path.into_os_string()));
        return Ok(Inputs { model: network, calibration, evaluations: evaluations.collect() });
    }
    must("config.json")?;
    let arrays = there("tokens.npz");
    let array = |path: &Path, name: &str| {
        let mut key = path.as_os_str().to_owned();
        key.push(format!(":{name}"));
        key
    };
    let calibration = match (there("calib.npy"), &arrays) {
        (Some(file), _) => file.into_os_string(),
        (None, Some(arrays)) => array(arrays, "calib"),
        (None, None) => return Err(folder.join("tokens.npz")),
    };
    let texts = ["eval_handbook", "eval_anarchism"];
    let evaluations = arrays.iter().flat_map(|path| texts.map(|name| (name, array(path, name)))).collect();
    Ok(Inputs { model: folder.to_path_buf(), calibration, evaluations })
}

/// Numbers of threads that bytes may not depend on.
fn threads() -> [usize; 2] {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    [cores, if cores > 1 { cores.div_ceil(2) } else { 2 }]
}

fn one(
    halfstep: &Halfstep,
    asked: &Asked,
    model: &Model,
    inputs: &Inputs,
    figures: &mut Figures,
) -> Result<(), String> {
    let place = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
    let device = Device::from(asked.device);
    let [most, fewer] = threads();
    let mut run = |device: &Device, threads: usize| {
        let output =
            place.path().join(format!("{threads}-{}", if *device == Device::Cpu { "cpu" } else { "cuda" }));
        quantize(halfstep, asked.quick, model, inputs, (device, threads), output, figures)
    };
    let mut done = vec![run(&device, most)?];
    let again = run(&device, fewer)?;
    if device != Device::Cpu {
        done.push(run(&Device::Cpu, most)?);
    }
    let what = format!("{most} and {fewer} threads on {device}");
    same(&model.title(), &what, [&done[0].output, &again.output], figures)?;
    qualities(&model.title(), &done, figures)?;
    if inputs.evaluations.is_empty() {
        figures.note(&format!("{}: not measured, there is no data for it", model.title()));
    }
    inputs
        .evaluations
        .iter()
        .try_for_each(|(name, data)| evaluate(halfstep, asked, model, inputs, (name, data), &done, figures))
}

fn quantize(
    halfstep: &Halfstep,
    quick: bool,
    model: &Model,
    inputs: &Inputs,
    (device, threads): (&Device, usize),
    output: PathBuf,
    figures: &mut Figures,
) -> Result<Done, String> {
    let name = format!("{}, {device}, {threads} threads", model.title());
    figures.note(&format!("running {name} ..."));
    let ran = halfstep.quantize(&Job {
        model: &inputs.model,
        calibration: &inputs.calibration,
        device,
        threads: Some(threads),
        options: &model.options(quick),
        output: &output,
    })?;
    let timing = Timing::read(&output)?;
    let (gpu, host) = (gib(ran.gpu_bytes), gib(Some(timing.host_bytes)));
    figures.say(&name, ran.seconds, "s", &format!("{}; GPU {gpu}, host {host}", timing.sentence()));
    Ok(Done { device: device.to_string(), objectives: results::objectives(&output)?, output })
}

/// Says how many files of two runs differ, and keeps it as a failure if any does.
pub(crate) fn same(
    title: &str,
    what: &str,
    folders: [&Path; 2],
    figures: &mut Figures,
) -> Result<(), String> {
    let (files, found) = results::different(folders[0], folders[1])?;
    let remark = format!("of {files}, {what}, allowed 0");
    figures.say(&format!("{title}, files that differ"), found.len() as f64, "", &remark);
    if !found.is_empty() {
        figures.fail(format!("{title}: {} differ between {what}", found.join(", ")));
    }
    Ok(())
}

/// Errors of the layers: each job's over nearest rounding's, the device's over the CPU's.
fn qualities(title: &str, done: &[Done], figures: &mut Figures) -> Result<(), String> {
    for Done { device, objectives, .. } in done {
        let remark = format!("geometric mean of {} layers' objectives", objectives.len());
        let ratio = results::over_nearest(objectives);
        figures.say(&format!("{title}, {device}, over nearest rounding"), ratio, "", &remark);
    }
    if let [mine, cpu] = done {
        let ratio = results::over(&mine.objectives, &cpu.objectives)?;
        figures.say(
            &format!("{title}, {} over {}", mine.device, cpu.device),
            ratio,
            "",
            "the same, layer by layer",
        );
    }
    Ok(())
}

/// Measures the original and the results on some data.
fn evaluate(
    halfstep: &Halfstep,
    asked: &Asked,
    model: &Model,
    inputs: &Inputs,
    (name, data): (&str, &OsStr),
    done: &[Done],
    figures: &mut Figures,
) -> Result<(), String> {
    let samples = match (model.language, asked.quick) {
        (true, true) => Some("2"),
        (true, false) => Some(WINDOWS),
        (false, true) => Some("500"),
        (false, false) => None,
    };
    let mut words: Vec<OsString> = ["eval", "--json", "--reference"].map(Into::into).into();
    words.extend([inputs.model.clone().into(), "--data".into(), data.to_owned()]);
    words.extend(samples.into_iter().flat_map(|samples| ["--samples".into(), samples.into()]));
    if model.language {
        words.extend(["--device".into(), Device::from(asked.device).to_string().into()]);
    }
    let network =
        |done: &Done| if model.language { done.output.clone() } else { done.output.join("model.onnx") };
    words.extend(done.iter().map(|done| network(done).into_os_string()));
    figures.note(&format!("measuring {} on {name} ...", model.title()));
    let said = halfstep.run(&words)?;
    let rows: Value = serde_json::from_str(&said).map_err(|error| format!("`halfstep eval`: {error}"))?;
    let whose = std::iter::once("original").chain(done.iter().map(|done| done.device.as_str()));
    for (whose, row) in whose.zip(rows.as_array().into_iter().flatten()) {
        say(&format!("{}, {name}, {whose}", model.title()), row, figures);
    }
    Ok(())
}

/// What `eval` says first of a kind of model, beside what else it says.
fn say(name: &str, row: &Value, figures: &mut Figures) {
    const OTHERS: [(&str, &str); 4] =
        [("top1", "top-1"), ("agreement", "agreement"), ("sqnr_db", "dB"), ("kl", "nats from the original")];
    let (first, first_unit) = match row["perplexity"].as_f64() {
        Some(_) => ("perplexity", "perplexity"),
        None if row["top1"].is_number() => ("top1", "top-1"),
        None => ("agreement", "agreement"),
    };
    let others = OTHERS.iter().filter(|(key, _)| *key != first);
    let mut remarks = Vec::new();
    for (key, word) in others {
        if let Some(value) = row[key].as_f64() {
            figures.keep(&format!("{name}, {key}"), value, "");
            remarks.push(format!("{value:.4} {word}"));
        }
    }
    if let Some(value) = row[first].as_f64() {
        figures.say(name, value, first_unit, &remarks.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|name| std::fs::write(folder.path().join(name), "").unwrap());
        folder
    }

    #[test]
    fn files_of_a_model_are_found_and_the_missing_one_is_named() {
        let place = folder(&["model.onnx", "calibration.npz"]);
        let found = inputs(&MODELS[0], place.path()).ok().unwrap();
        assert_eq!((found.model, found.evaluations.len()), (place.path().join("model.onnx"), 0));
        let place = folder(&["model.onnx", "eval.npz"]);
        assert_eq!(inputs(&MODELS[1], place.path()).err(), Some(place.path().join("calibration.npz")));

        let place = folder(&["config.json", "tokens.npz"]);
        let found = inputs(&MODELS[2], place.path()).ok().unwrap();
        assert!(found.calibration.to_string_lossy().ends_with("tokens.npz:calib"));
        let (name, data) = &found.evaluations[1];
        assert!(*name == "eval_anarchism" && data.to_string_lossy().ends_with("tokens.npz:eval_anarchism"));
        let place = folder(&["config.json", "calib.npy"]);
        let found = inputs(&MODELS[2], place.path()).ok().unwrap();
        assert!(found.calibration.to_string_lossy().ends_with("calib.npy") && found.evaluations.is_empty());
        let place = folder(&["config.json"]);
        assert_eq!(inputs(&MODELS[2], place.path()).err(), Some(place.path().join("tokens.npz")));
    }

    #[test]
    fn other_bytes_are_a_failure() {
        let (one, other) = (folder(&["model.onnx"]), folder(&["model.onnx"]));
        let mut figures = Figures::default();
        same("m W3", "4 and 2 threads", [one.path(), other.path()], &mut figures).unwrap();
        assert!(figures.failures().is_empty());
        std::fs::write(other.path().join("model.onnx"), "else").unwrap();
        same("m W3", "4 and 2 threads", [one.path(), other.path()], &mut figures).unwrap();
        assert_eq!(figures.failures(), ["m W3: model.onnx differ between 4 and 2 threads"]);
    }
}
