//! Runs targets in turn on mutated seeds until time is up or something breaks.
//!
//! Execution `n` of a target depends on the run's seed and `n` alone. Every input is on disk before it runs, so that
//! one that kills the process (stack overflow, out of memory) or never ends is not lost.
//! Not here: making smaller inputs of those found.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::Target;
use crate::allocation::take_refused;
use crate::mutate::mutated;
use crate::random::Random;

/// Executions of one target before the next has its turn.
const TURN: u64 = 256;

/// One execution must end within this time.
const EXECUTION_MAX: Duration = Duration::from_secs(20);

/// What and how long to fuzz.
#[derive(Debug, Clone)]
pub struct Options {
    /// Time for all targets together.
    pub time: Duration,
    /// Key of all mutations.
    pub seed: u64,
    /// Folder for the input being run and for those that failed.
    pub artifacts: PathBuf,
}

/// Executions of one target.
#[derive(Debug, Clone, Copy)]
pub struct Tally {
    /// The target.
    pub target: &'static str,
    /// How many inputs it ran.
    pub executions: u64,
    /// Time it took, mutation included.
    pub time: Duration,
}

/// An input that broke a target.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The target.
    pub target: &'static str,
    /// Number of the execution in this run.
    pub execution: u64,
    /// The input.
    pub input: Vec<u8>,
    /// What happened.
    pub cause: String,
    /// Where the input was saved.
    pub saved: PathBuf,
}

/// The execution that is under way, for the watchdog.
static UNDER_WAY: Mutex<Option<(Instant, &'static str)>> = Mutex::new(None);

/// Message and place of the last panic.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Runs one input. `Err` says how the target broke: a panic with its place, or an allocation that was refused.
///
/// # Errors
/// The outer error is the harness's own (no temporary file).
pub fn execute(target: &Target, input: &[u8]) -> Result<Result<(), String>> {
    take_refused();
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    if let Some(bytes) = take_refused() {
        return Ok(Err(format!("asked for a single allocation of {bytes} bytes")));
    }
    match outcome {
        Ok(result) => result.map(Ok),
        Err(_) => Ok(Err(PANIC.lock().map_or_else(|_| "panicked".into(), |text| text.clone()))),
    }
}

/// Fuzzes the targets; ends early at the first failure.
///
/// # Errors
/// The harness's own: seeds or artifacts that cannot be read or written.
pub fn run(targets: &[Target], options: &Options) -> Result<(Vec<Tally>, Option<Failure>)> {
    fs::create_dir_all(&options.artifacts)
        .with_context(|| format!("cannot make {}", options.artifacts.display()))?;
    panic::set_hook(Box::new(|info| {
        if let Ok(mut text) = PANIC.lock() {
            *text = info.to_string();
        }
    }));
    std::thread::spawn(watch);
    let mut state = Vec::new();
    for target in targets {
        let mut seeds = (target.seeds)()?;
        seeds.extend(regressions(target.name)?.into_iter().map(|(_, input)| input));
        state.push((target, seeds, Tally { target: target.name, executions: 0, time: Duration::ZERO }));
    }
    let start = Instant::now();
    let mut failure = None;
    while failure.is_none() && start.elapsed() < options.time {
        for (target, seeds, tally) in &mut state {
            failure = turn(target, seeds, tally, options)?;
            if failure.is_some() {
                break;
            }
        }
    }
    drop(panic::take_hook());
    Ok((state.into_iter().map(|(_, _, tally)| tally).collect(), failure))
}

/// Inputs that once broke the target, by file name.
///
/// # Errors
/// A file that cannot be read; a missing folder is none.
pub(crate) fn regressions(target: &str) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions").join(target);
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    files.into_iter().map(|file| Ok((file.clone(), fs::read(file)?))).collect()
}

fn turn(target: &Target, seeds: &[Vec<u8>], tally: &mut Tally, options: &Options) -> Result<Option<Failure>> {
    let start = Instant::now();
    let under_way = options.artifacts.join(format!("{}-current", target.name));
    // Written in place: creating a file for each input would take most of the time.
    let file = File::create(&under_way)?;
    let mut length = 0;
    for _ in 0..TURN {
        let input = input(seeds, options.seed, tally.executions);
        file.write_all_at(&input, 0)?;
        if input.len() < length {
            file.set_len(input.len() as u64)?;
        }
        length = input.len();
        mark(Some((Instant::now(), target.name)));
        let outcome = execute(target, &input)?;
        mark(None);
        if let Err(cause) = outcome {
            let saved =
                options.artifacts.join(format!("{}-{}-{}", target.name, options.seed, tally.executions));
            fs::rename(&under_way, &saved)?;
            let execution = tally.executions;
            return Ok(Some(Failure { target: target.name, execution, input, cause, saved }));
        }
        tally.executions += 1;
    }
    fs::remove_file(&under_way)?;
    tally.time += start.elapsed();
    Ok(None)
}

/// The first executions run the seeds as they are.
fn input(seeds: &[Vec<u8>], seed: u64, execution: u64) -> Vec<u8> {
    if let Some(plain) = seeds.get(execution as usize) {
        return plain.clone();
    }
    let mut random = Random::new(Random::new(seed).next() ^ execution.wrapping_mul(0x9e6c_63d0_876a_68e5));
    let (base, other) = (random.pick(seeds), random.pick(seeds));
    mutated(base, other, &mut random)
}

fn mark(now: Option<(Instant, &'static str)>) {
    if let Ok(mut under_way) = UNDER_WAY.lock() {
        *under_way = now;
    }
}

/// Ends the process when an execution takes too long: nothing else can end a loop.
#[expect(clippy::print_stderr, reason = "the process ends here, nobody else can say why")]
fn watch() {
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let under_way = UNDER_WAY.lock().ok().and_then(|under_way| *under_way);
        if let Some((since, target)) = under_way
            && since.elapsed() > EXECUTION_MAX
        {
            eprintln!(
                "target {target}: an input took more than {EXECUTION_MAX:?}; it is in {target}-current"
            );
            std::process::exit(1);
        }
    }
}
