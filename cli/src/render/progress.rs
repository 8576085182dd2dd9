//! Progress of a run: a bar with time left on a terminal, plain lines into a file, JSON lines for programs.
//!
//! Plain lines are STYLE's: a right-aligned word, seconds since the start of the layer, position, name, what happened.
//! Not here: the final report (`text`).

use std::io::{self, Write};
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::text::short;
use crate::answers::Progress;

/// How a run is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// stderr is a terminal.
    Terminal,
    /// stderr is a file or pipe.
    Plain,
    /// JSON lines to stdout.
    Json,
    /// Nothing.
    Quiet,
}

/// Shows events. Shared between threads.
pub(crate) struct Renderer {
    mode: Mode,
    bar: ProgressBar,
    out: Mutex<Box<dyn Write + Send>>,
    total: Mutex<usize>,
}

impl Renderer {
    /// Shows on this process's streams.
    pub(crate) fn new(mode: Mode) -> Self {
        let out: Box<dyn Write + Send> =
            if mode == Mode::Json { Box::new(io::stdout()) } else { Box::new(io::stderr()) };
        Self::to(mode, out)
    }

    fn to(mode: Mode, out: Box<dyn Write + Send>) -> Self {
        let target =
            if mode == Mode::Terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        Self { mode, bar, out: Mutex::new(out), total: Mutex::new(0) }
    }

    /// Shows one event. A stream that is gone is no reason to stop the work.
    pub(crate) fn event(&self, event: &Progress) {
        match self.mode {
            Mode::Quiet => {}
            Mode::Json => self.write(&json(event)),
            Mode::Plain | Mode::Terminal => {
                self.advance(event);
                let total = self.total.lock().map_or(0, |total| *total);
                if let Some(line) = line(event, total) {
                    self.bar.suspend(|| self.write(&line));
                }
            }
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn write(&self, line: &str) {
        if let Ok(mut out) = self.out.lock() {
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        }
    }

    fn advance(&self, event: &Progress) {
        match event {
            Progress::Planned { layers, .. } => {
                if let Ok(mut total) = self.total.lock() {
                    *total = *layers;
                }
                self.bar.set_length(*layers as u64);
                self.bar.set_style(style());
            }
            Progress::StageStarted { stage, stages } => {
                self.bar.set_message(format!("stage {stage}/{stages}"));
                self.bar.tick();
            }
            Progress::ShardCaptured { stage, shard, shards } => {
                self.bar.set_message(format!("stage {stage}, shard {shard}/{shards}"));
            }
            Progress::LayerSolved { index, .. } => self.bar.set_position(*index as u64),
            Progress::Writing { path } => self.bar.set_message(format!("writing {}", path.display())),
            Progress::Waiting { why } => self.bar.set_message(clean(why)),
            Progress::LayerKept { .. }
            | Progress::LayerFailed { .. }
            | Progress::NodeJoined { .. }
            | Progress::NodeLost { .. }
            | Progress::NodeLeftOut { .. }
            | Progress::Retry { .. }
            | Progress::Chosen { .. }
            | Progress::InPlace { .. }
            | Progress::Summary { .. } => {}
        }
    }
}

fn style() -> ProgressStyle {
    let template = "  [{elapsed_precise}] {wide_bar} {pos}/{len} layers, {eta} left, {msg}";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn json(event: &Progress) -> String {
    serde_json::to_string(event)
        .unwrap_or_else(|error| format!("{{\"event\":\"error\",\"message\":\"{error}\"}}"))
}

/// The line of an event, `None` for events that only move the bar.
fn line(event: &Progress, total: usize) -> Option<String> {
    Some(match event {
        Progress::Planned { layers, stages, shards, samples, workers } => format!(
            "  Planning {layers} layers in {stages} stages, {samples} samples in {shards} shards, {workers}"
        ),
        Progress::LayerSolved {
            name,
            index,
            total,
            objective_before,
            objective_after,
            sqnr_db,
            seconds,
            ..
        } => {
            let what =
                format!("error {} -> {}, {sqnr_db:.1} dB", short(*objective_before), short(*objective_after));
            let place = place(*index, *total);
            format!("{:>10} [{seconds:6.1}s] {place} {:<24} {what}", "SOLVED", clean(name))
        }
        Progress::Chosen { partition, nodes, why, link } => {
            let nodes = if *nodes == 1 { "1 node".to_owned() } else { format!("{nodes} nodes") };
            format!("  Spreading by {partition} over {nodes}: {why} ({link})")
        }
        Progress::InPlace { output } => format!(
            "  Done already: {} holds the results of this very job; nothing is computed or written",
            output.display()
        ),
        Progress::LayerKept { name, reason } => aside("KEPT", name, reason, total),
        Progress::LayerFailed { name, cause } => aside("FAILED", name, cause, total),
        Progress::NodeJoined { name, slots } => aside("JOINED", name, &format!("{slots} slots"), total),
        Progress::NodeLost { name, why } => aside("LOST", name, why, total),
        Progress::NodeLeftOut { name, why } => aside("LEFT OUT", name, why, total),
        Progress::Retry { task, why, attempt } => {
            aside("RETRY", task, &format!("{why}, attempt {attempt}"), total)
        }
        Progress::Waiting { why } => aside("WAITING", "", why, total),
        Progress::Summary { solved, kept, failed, seconds, output } => format!(
            "{:>10} [{seconds:6.1}s] {} layers: {solved} solved, {kept} kept, {failed} failed -> {}",
            "Summary",
            solved + kept + failed,
            output.display()
        ),
        Progress::StageStarted { .. } | Progress::ShardCaptured { .. } | Progress::Writing { .. } => {
            return None;
        }
    })
}

fn place(index: usize, total: usize) -> String {
    let width = total.to_string().len();
    format!("({index:>width$}/{total})")
}

/// A layer that takes no place in the count.
fn aside(word: &str, name: &str, why: &str, total: usize) -> String {
    let blank = " ".repeat(place(0, total).len());
    format!("{word:>10} [      -] {blank} {:<24} {}", clean(name), clean(why))
}

/// Names come from the model: control characters must not reach the terminal.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn shown(mode: Mode) -> String {
        let sink = Sink::default();
        let renderer = Renderer::to(mode, Box::new(sink.clone()));
        for event in events() {
            renderer.event(&event);
        }
        renderer.finish();
        let bytes = sink.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn events() -> Vec<Progress> {
        vec![
            Progress::Planned { layers: 12, stages: 5, shards: 16, samples: 1024, workers: "3 nodes".into() },
            Progress::StageStarted { stage: 1, stages: 5 },
            Progress::NodeLost { name: "gpu-3".into(), why: "no sign of life for 10 s".into() },
            Progress::Retry { task: "solve conv1 rows 0..16".into(), why: "node lost".into(), attempt: 2 },
            Progress::LayerSolved {
                name: "conv1".into(),
                index: 1,
                total: 12,
                bits: 4,
                objective_before: 3.1e-4,
                objective_after: 8.7e-5,
                sqnr_db: 22.5,
                rounded_away: 3,
                weights: 144,
                seconds: 0.4,
            },
            Progress::LayerKept { name: "fc\u{1b}[2J".into(), reason: "recurrent".into() },
            Progress::Summary { solved: 12, kept: 1, failed: 0, seconds: 7.5, output: "out".into() },
        ]
    }

    #[test]
    fn plain_lines_read_well_in_a_file() {
        insta::assert_snapshot!(shown(Mode::Plain), @r"
          Planning 12 layers in 5 stages, 1024 samples in 16 shards, 3 nodes
              LOST [      -]         gpu-3                    no sign of life for 10 s
             RETRY [      -]         solve conv1 rows 0..16   node lost, attempt 2
            SOLVED [   0.4s] ( 1/12) conv1                    error 3.1e-4 -> 8.7e-5, 22.5 dB
              KEPT [      -]         fc?[2J                   recurrent
           Summary [   7.5s] 13 layers: 12 solved, 1 kept, 0 failed -> out
        ");
    }

    #[test]
    fn json_is_one_object_per_event() {
        let text = shown(Mode::Json);
        let objects: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let names: Vec<_> = objects.iter().map(|object| object["event"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["planned", "stage-started", "node-lost", "retry", "layer-solved", "layer-kept", "summary"]
        );
        assert_eq!(objects[4]["rounded_away"], 3);
    }

    #[test]
    fn quiet_is_silent() {
        assert_eq!(shown(Mode::Quiet), "");
    }
}
