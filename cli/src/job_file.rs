//! `job.toml`: the same options as the flags, under the same names.
//!
//! Unknown keys are refused with the nearest known one; paths are relative to the folder of the job file.
//! Not here: defaults and merging (`config`, `options`).

use std::path::{Path, PathBuf};

use clap::{Args, Command};
use serde::Deserialize;
use toml::{Table, Value};

use crate::exit::CliError;
use crate::options::{DataOptions, JobOptions};
use crate::values::unknown;

/// A job file larger than this is not one.
const JOB_FILE_BYTES_MAX: u64 = 1 << 20;

/// Reads and checks a job file.
pub(crate) fn read(path: &Path) -> Result<JobOptions, CliError> {
    let refuse = |what: String| CliError::configuration(format!("job file `{}`: {what}", path.display()));
    let size = std::fs::metadata(path).map_err(|e| refuse(format!("cannot be read: {e}")))?.len();
    if size > JOB_FILE_BYTES_MAX {
        return Err(refuse(format!("has {size} bytes, expected at most {JOB_FILE_BYTES_MAX}")));
    }
    let text = std::fs::read_to_string(path).map_err(|e| refuse(format!("cannot be read: {e}")))?;
    let mut options = parse(&text).map_err(refuse)?;
    relative_to(&mut options, path.parent().unwrap_or(Path::new("")));
    Ok(options)
}

fn parse(text: &str) -> Result<JobOptions, String> {
    let table: Table =
        text.parse().map_err(|error: toml::de::Error| error.to_string().trim_end().to_string())?;
    let (data_keys, job_keys) = (keys::<DataOptions>(), keys::<JobOptions>());
    let known: Vec<&str> = job_keys.iter().map(String::as_str).collect();
    let (mut data, mut job) = (Table::new(), Table::new());
    for (key, value) in table {
        if !known.contains(&key.as_str()) {
            return Err(unknown(&format!("key `{key}`"), &key, &known));
        }
        let is_data = data_keys.contains(&key);
        if is_data { &mut data } else { &mut job }.insert(key, value);
    }
    let mut options: JobOptions = typed(job)?;
    options.data = typed(data)?;
    check_numbers(&options)?;
    Ok(options)
}

/// One key at a time, so that an error can name it.
fn typed<T: for<'de> Deserialize<'de>>(table: Table) -> Result<T, String> {
    for (key, value) in &table {
        let one = Table::from_iter([(key.clone(), value.clone())]);
        if let Err(error) = Value::Table(one).try_into::<T>() {
            return Err(format!("key `{key}`: {}", error.message()));
        }
    }
    Value::Table(table).try_into::<T>().map_err(|error| error.message().to_string())
}

/// The ranges that flags check while parsing.
fn check_numbers(options: &JobOptions) -> Result<(), String> {
    use crate::values::{bits, fraction, non_negative};
    let within = |key: &str, value: Option<f32>, check: fn(&str) -> Result<f32, String>| match value {
        Some(value) => check(&value.to_string()).map(drop).map_err(|error| format!("key `{key}`: {error}")),
        None => Ok(()),
    };
    if let Some(width) = options.bits {
        bits(&width.to_string()).map_err(|error| format!("key `bits`: {error}"))?;
    }
    within("warm-start", options.warm_start, fraction)?;
    within("positions", options.positions, fraction)?;
    within("learning-rate", options.learning_rate, non_negative)?;
    within("lambda", options.lambda, non_negative)?;
    within("damping", options.damping, non_negative)
}

/// Long names of the flags of `T`, plus its positional arguments.
fn keys<T: Args>() -> Vec<String> {
    let command = T::augment_args(Command::new("keys"));
    let name = |arg: &clap::Arg| arg.get_long().map_or_else(|| arg.get_id().to_string(), str::to_string);
    command.get_arguments().map(name).collect()
}

fn relative_to(options: &mut JobOptions, folder: &Path) {
    let paths = [
        &mut options.model,
        &mut options.data.calibration,
        &mut options.output,
        &mut options.spill_dir,
        &mut options.onnxruntime,
        &mut options.tokenizer,
    ];
    for path in paths.into_iter().flatten().chain(&mut options.cuda_libraries) {
        let moved: PathBuf = folder.join(&*path);
        *path = moved;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_quant::Scheme;

    #[test]
    fn keys_are_the_names_of_the_flags() {
        let options = parse(
            "model = 'm.onnx'\ncalibration = 'c.npz'\nbits = 3\nscheme = 'asymmetric'\nmean = [0, 0.5]\n\
             override = ['conv1:bits=8']\nmemory-budget = '2GiB'\nbeta-range = '10,2'\nobjective = 'samples'",
        )
        .unwrap();
        assert_eq!((options.bits, options.scheme), (Some(3), Some(Scheme::Asymmetric)));
        assert_eq!(options.data.mean, [0.0, 0.5]);
        assert_eq!(options.overrides[0].bits, Some(8));
        assert_eq!(options.memory_budget.unwrap().0, 2 << 30);
    }

    #[test]
    fn every_flag_is_a_key() {
        // A key that serde does not know would be refused although a flag has its name.
        for key in keys::<JobOptions>() {
            let error = parse(&format!("{key} = {{}}")).unwrap_err();
            assert!(!error.contains("unknown field"), "{key}: {error}");
        }
    }

    #[test]
    fn wrong_files_are_refused_by_key() {
        for (text, expect) in [
            ("iteration = 5", "key `iteration` is unknown, did you mean `iterations`?"),
            ("group_size = 5", "key `group_size` is unknown, did you mean `group-size`?"),
            ("bits = 9", "key `bits`: bit width is `9`, expected 2 to 8 or 16"),
            ("bits = 'four'", "key `bits`: invalid type: string \"four\", expected u8"),
            (
                "warm-start = 2.0",
                "key `warm-start`: `2` is not a fraction, expected more than 0 and at most 1",
            ),
            (
                "override = ['a:bit=1']",
                "key `override`: override setting `bit` is unknown, did you mean `bits`?",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err(), expect);
        }
        assert!(parse("bits = ").unwrap_err().starts_with("TOML parse error at line 1"));
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        std::fs::write(&path, "model = 'm.onnx'\noutput = '/abs'\ntokenizer = 't'").unwrap();
        let options = read(&path).unwrap();
        assert_eq!(options.model, Some(folder.path().join("m.onnx")));
        assert_eq!(options.tokenizer, Some(folder.path().join("t")));
        assert_eq!(options.output, Some("/abs".into()));
    }
}
