//! A decoder block of a large language model through `halfstep quantize`, and what the whole model would take.
//!
//! A model's time is blocks times the block's; reading its embedding and head, and the calibration text, is not in it. Not here:
//! the checkpoint (`checkpoint`), how a job is run (`halfstep`).

use std::path::{Path, PathBuf};
use std::time::Instant;

use tempfile::TempDir;

use crate::asked::Asked;
use crate::checkpoint::{self, SHAPES, Shape};
use crate::figures::Figures;
use crate::halfstep::{Device, Halfstep, Job, Ran};
use crate::models::same;
use crate::results::{Timing, gib};

/// How blocks are quantized unless the command line says otherwise.
const OPTIONS: [[&str; 2]; 4] =
    [["--bits", "4"], ["--group-size", "128"], ["--carries", "bf16"], ["--memory-budget", "70GiB"]];
/// With AdaRound, which language models do without by default.
const LEARNED: [&str; 2] = ["--iterations", "1000"];
/// Positions of the models, unless the windows are longer.
const POSITIONS: usize = 8192;

/// A block and options of its own.
#[derive(Debug, Clone, PartialEq)]
struct Run {
    shape: Shape,
    own: Option<[&'static str; 2]>,
}

/// Windows, and tokens of each.
type Windows = (usize, usize);

/// A checkpoint that was written, its tokens beside it, and room for results.
struct Written {
    name: &'static str,
    place: TempDir,
}

/// Every block that is asked for; what goes wrong with one is kept, and the next one is run.
pub(crate) fn blocks(halfstep: &Halfstep, asked: &Asked, figures: &mut Figures) {
    let windows = windows(asked);
    let mut written: Option<Written> = None;
    for run in runs(asked) {
        let name = run.shape.sizes.name;
        let outcome = (|| {
            // Runs of one shape follow each other and read the same files; the larger ones may not fit beside others.
            let files = match written.take().filter(|written| written.name == name) {
                Some(files) => files,
                None => write(&run.shape, windows, figures)?,
            };
            each(halfstep, asked, &run, windows, files.place.path(), figures)?;
            written = Some(files);
            Ok(())
        })();
        outcome.unwrap_or_else(|why: String| figures.fail(format!("block {name}: {why}")));
    }
}

fn windows(asked: &Asked) -> Windows {
    let usual = if asked.quick { (4, 64) } else { (128, 2048) };
    let of = |typed: Option<u32>, usual| typed.map_or(usual, |typed| typed as usize);
    (of(asked.samples, usual.0), of(asked.sequence_length, usual.1))
}

/// Blocks in order, with options that the command line does not give itself.
fn runs(asked: &Asked) -> Vec<Run> {
    let [tiny, _, small, large] = SHAPES;
    let all = match (asked.block.as_slice(), asked.quick) {
        ([], true) => vec![(tiny, None)],
        ([], false) => vec![(small, None), (small, Some(LEARNED)), (large, Some(LEARNED))],
        (named, _) => named.iter().map(|shape| (*shape, None)).collect(),
    };
    let own = |own: Option<[&'static str; 2]>| own.filter(|[flag, _]| !typed(asked, flag));
    let mut runs: Vec<Run> = all.into_iter().map(|(shape, with)| Run { shape, own: own(with) }).collect();
    runs.dedup();
    runs
}

/// Whether `-- ..` has a flag.
fn typed(asked: &Asked, flag: &str) -> bool {
    let is =
        |word: &String| word.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='));
    asked.quantize.iter().any(is)
}

fn options(asked: &Asked, run: &Run) -> Vec<String> {
    let ours = OPTIONS.into_iter().filter(|[flag, _]| !typed(asked, flag));
    let words = ours.chain(run.own).flatten().map(str::to_owned);
    words.chain(asked.quantize.iter().cloned()).collect()
}

/// Writes checkpoint and tokens.
fn write(shape: &Shape, windows: Windows, figures: &mut Figures) -> Result<Written, String> {
    let name = shape.sizes.name;
    figures.note(&format!("writing block {name} and {} x {} tokens ...", windows.0, windows.1));
    let (begun, failed) = (Instant::now(), |error: std::io::Error| format!("cannot be written: {error}"));
    let place = tempfile::tempdir().map_err(failed)?;
    let model = model(place.path());
    std::fs::create_dir(&model).map_err(failed)?;
    let bytes = checkpoint::write(&model, shape.sizes, windows.1.max(POSITIONS)).map_err(failed)?;
    checkpoint::write_tokens(&tokens(place.path()), windows.0, windows.1).map_err(failed)?;
    let remark = format!("{:.2} GB of weights", bytes as f64 / 1e9);
    figures.say(&format!("{name} written"), begun.elapsed().as_secs_f64(), "s", &remark);
    Ok(Written { name, place })
}

fn model(place: &Path) -> PathBuf {
    place.join("model")
}

fn tokens(place: &Path) -> PathBuf {
    place.join("tokens.npy")
}

/// The devices of a run: the one that is measured, or the first so many.
fn devices(asked: &Asked) -> Vec<Device> {
    match asked.gpus.as_slice() {
        [] => vec![Device::from(asked.device)],
        counts => counts.iter().map(|count| Device::Cuda((0..*count as usize).collect())).collect(),
    }
}

/// One run on each choice of devices; all of them must write the bytes of the first.
fn each(
    halfstep: &Halfstep,
    asked: &Asked,
    run: &Run,
    windows: Windows,
    place: &Path,
    figures: &mut Figures,
) -> Result<(), String> {
    let results = tempfile::tempdir_in(place).map_err(|error| format!("no place for results: {error}"))?;
    let mut first: Option<(Device, PathBuf)> = None;
    for (number, device) in devices(asked).into_iter().enumerate() {
        let own = run.own.map_or(String::new(), |own| format!(" {}", own.join(" ")));
        let title = format!("{} {}x{} {device}{own}", run.shape.sizes.name, windows.0, windows.1);
        let output = results.path().join(number.to_string());
        figures.note(&format!("running {title} ..."));
        let ran = halfstep.quantize(&Job {
            model: &model(place),
            calibration: tokens(place).as_os_str(),
            device: &device,
            threads: None,
            options: &options(asked, run),
            output: &output,
        })?;
        row(&title, run, windows, &device, &ran, &Timing::read(&output)?, figures);
        match &first {
            None => first = Some((device, output)),
            Some((one, of_first)) => {
                same(&title, &format!("{one} and {device}"), [of_first, &output], figures)?;
                std::fs::remove_dir_all(&output).map_err(|error| error.to_string())?;
            }
        }
    }
    Ok(())
}

/// Everything of one run.
fn row(
    title: &str,
    run: &Run,
    (samples, length): Windows,
    device: &Device,
    ran: &Ran,
    timing: &Timing,
    figures: &mut Figures,
) {
    let (blocks, minutes) = (run.shape.blocks, f64::from(run.shape.blocks) * ran.seconds / 60.0);
    let place = match device.ordinals().len() {
        0 => "CPU".to_owned(),
        1 => "1 GPU".to_owned(),
        more => format!("{more} GPUs"),
    };
    let (gpu, host) = (gib(ran.gpu_bytes), gib(Some(timing.host_bytes)));
    let remark = format!(
        "{} tokens, {place}; {}; GPU {gpu}, host {host}; {blocks} blocks x {:.1} s = {minutes:.0} min",
        samples * length,
        timing.sentence(),
        ran.seconds
    );
    figures.say(title, ran.seconds, "s", &remark);
    for (phase, seconds) in timing.phases {
        figures.keep(&format!("{title}, {phase}"), seconds, "s");
    }
    if let Some(bytes) = ran.gpu_bytes {
        figures.keep(&format!("{title}, GPU memory"), bytes as f64, "B");
    }
    figures.keep(&format!("{title}, host memory"), timing.host_bytes as f64, "B");
    figures.keep(&format!("{title}, whole model"), minutes, "min");
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn asked(words: &str) -> Asked {
        Asked::parse_from(format!("gpu {words}").split_whitespace())
    }

    #[test]
    fn what_is_typed_replaces_what_is_ours() {
        let names = |words: &str| -> Vec<String> {
            let asked = asked(words);
            let line = |run: &Run| format!("{} {}", run.shape.sizes.name, options(&asked, run).join(" "));
            runs(&asked).iter().map(line).collect()
        };
        const OURS: &str = "--bits 4 --group-size 128 --carries bf16 --memory-budget 70GiB";
        assert_eq!(
            names(""),
            [
                format!("llama-8b {OURS}"),
                format!("llama-8b {OURS} --iterations 1000"),
                format!("llama-70b {OURS} --iterations 1000")
            ]
        );
        assert_eq!(names("--quick"), [format!("tiny {OURS}")]);
        assert_eq!(
            names("--block llama-1b -- --bits=3"),
            [format!("llama-1b {} --bits=3", OURS.trim_start_matches("--bits 4 "))]
        );
        // Both runs of the 8B block would be the same.
        let learned = names("-- --iterations 5");
        assert_eq!(learned, ["llama-8b", "llama-70b"].map(|name| format!("{name} {OURS} --iterations 5")));
    }

    #[test]
    fn windows_and_devices_are_those_that_were_typed() {
        assert_eq!(windows(&asked("")), (128, 2048));
        assert_eq!(windows(&asked("--quick --samples 2")), (2, 64));
        let named = |words| devices(&asked(words)).iter().map(Device::to_string).collect::<Vec<_>>();
        assert_eq!(named("--gpus 1,2,4"), ["cuda:0", "cuda:0,1", "cuda:0,1,2,3"]);
        assert_eq!(
            (named("--device cuda:2"), named("--device cpu")),
            (vec!["cuda:2".to_owned()], vec!["cpu".to_owned()])
        );
    }
}
