//! Reports as text for a person; every function is a pure mapping from a report to a string.

use super::Table;
use crate::answers::{
    EvalRow, FleetRow, GpuRow, InspectReport, Kept, LinkRow, PerplexityReport, PlanReport, QuantizeOutcome,
};
use crate::values::ByteSize;
use crate::verify::Verified;

/// The table of solved layers, what was kept and why, what failed, where time went.
pub(crate) fn outcome(outcome: &QuantizeOutcome) -> String {
    let mut table =
        Table::new(&["<layer", "bits", "<grid", "nearest", "now", "SQNR dB", "away", "weights", "s"]);
    for row in &outcome.rows {
        table.row([
            row.name.clone(),
            row.bits.to_string(),
            row.grid.clone(),
            short(row.objective_before),
            short(row.objective_after),
            format!("{:.1}", row.sqnr_db),
            per_cent(row.rounded_away, row.weights),
            row.weights.to_string(),
            format!("{:.1}", row.seconds),
        ]);
    }
    let mut out = if outcome.rows.is_empty() { String::new() } else { table.to_string() };
    out += &kept(&outcome.kept);
    for layer in &outcome.failed {
        out += &format!("failed `{}`: {}\n", layer.name, layer.cause);
    }
    for note in &outcome.notes {
        out += &format!("note: {note}\n");
    }
    if !outcome.phases.is_empty() {
        let phases = outcome.phases.iter().map(|(name, seconds)| format!("{name} {seconds:.1} s"));
        out += &format!("time: {}\n", phases.collect::<Vec<_>>().join(", "));
    }
    if let Some(bytes) = outcome.peak_resident_bytes {
        out += &format!("memory: {} at most, in the process that wrote this\n", ByteSize(bytes));
    }
    out
}

/// Layers and what would be rounded.
pub(crate) fn inspect(report: &InspectReport) -> String {
    let mut out = report.opset.map_or_else(String::new, |opset| format!("opset {opset}\n"));
    for (side, values) in [("input", &report.inputs), ("output", &report.outputs)] {
        for value in values {
            out += &format!("{side} {value}\n");
        }
    }
    let mut table =
        Table::new(&["<layer", "<op", "<weight", "rows", "cols", "groups", "<activation", "uses"]);
    for layer in &report.layers {
        table.row([
            layer.name.clone(),
            layer.op.clone(),
            format!("{:?}", layer.shape),
            layer.rows.to_string(),
            layer.cols.to_string(),
            layer.groups.to_string(),
            layer.activation.clone(),
            layer.uses.to_string(),
        ]);
    }
    let weights: usize = report.layers.iter().map(|layer| layer.rows * layer.cols).sum();
    out += &format!("\n{table}\n{}, {weights} weights\n", count(report.layers.len(), "layer"));
    out + &kept(&report.kept)
}

/// Stages, bytes and time.
pub(crate) fn plan(report: &PlanReport) -> String {
    let mut table =
        Table::new(&["stage", "layers", "ops", "chunks", "carry", "statistics", "s", "<first layer"]);
    for stage in &report.stages {
        table.row([
            stage.stage.to_string(),
            stage.layers.len().to_string(),
            stage.nodes.to_string(),
            stage.chunks.to_string(),
            ByteSize(stage.carry_bytes).to_string(),
            ByteSize(stage.statistics_bytes).to_string(),
            format!("{:.1}", stage.seconds),
            stage.layers.first().cloned().unwrap_or_default(),
        ]);
    }
    let layers: usize = report.stages.iter().map(|stage| stage.layers.len()).sum();
    let mut out = format!("{table}\n");
    out += &format!(
        "{} in {}, {} in {}\n",
        count(layers, "layer"),
        count(report.stages.len(), "stage"),
        count(report.samples, "sample"),
        count(report.shards, "shard")
    );
    out += &format!(
        "memory {} at most for data, carries and statistics; {} to files; new weights {}\n",
        ByteSize(report.peak_bytes),
        ByteSize(report.spill_bytes),
        ByteSize(report.output_bytes)
    );
    out += &report.gpu.as_ref().map(gpu).unwrap_or_default();
    let phases = report.phases.iter().map(|(name, seconds)| format!("{name} {}", duration(*seconds)));
    out +=
        &format!("estimated time {}: {}\n", duration(report.seconds), phases.collect::<Vec<_>>().join(", "));
    out += "from a run of one sample (one batch if the model fixes it) and this machine's speed now\n";
    out + &fleet(&report.fleet, report.link.as_ref()) + &kept(&report.kept)
}

/// What a device holds, and whether that is too much.
fn gpu(row: &GpuRow) -> String {
    let bytes = ByteSize(row.bytes);
    let by = count(row.threads, "thread");
    let mut out =
        format!("GPU memory {bytes} at most for statistics and solving by {by} (stage {})", row.stage);
    out += &match (row.memory_bytes.map(ByteSize), row.threads_that_fit) {
        (None, _) => String::new(),
        (Some(memory), 0) => format!("; too much for the {memory} here, even with --threads 1"),
        (Some(memory), fit) if fit < row.threads => {
            format!("; too much for the {memory} here: --threads {fit} fits")
        }
        (Some(memory), _) => format!("; {memory} here"),
    };
    out + "\n"
}

/// Ways to spread a job over a fleet.
fn fleet(rows: &[FleetRow], link: Option<&LinkRow>) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["<--partition", "time", "moved", "on a node", "<"]);
    for row in rows {
        let remark = match &row.why {
            Some(why) => format!("recommended: {why}"),
            None if row.fits => String::new(),
            None => "does not fit".into(),
        };
        table.row([
            row.partition.clone(),
            duration(row.seconds),
            ByteSize(row.bytes_moved).to_string(),
            ByteSize(row.node_bytes).to_string(),
            remark,
        ]);
    }
    let link = link.map(|link| format!("{link}\n")).unwrap_or_default();
    format!("\n{table}{link}")
}

/// Networks side by side.
pub(crate) fn eval(rows: &[EvalRow]) -> String {
    let mut table = Table::new(&["<model", "samples", "top-1", "agreement", "SQNR dB", "s"]);
    let or_dash = |value: Option<f64>, digits: usize| match value {
        Some(value) if value.is_infinite() => "equal".into(),
        Some(value) => format!("{value:.digits$}"),
        None => "-".into(),
    };
    for row in rows {
        table.row([
            row.model.display().to_string(),
            row.samples.to_string(),
            or_dash(row.top1, 4),
            or_dash(row.agreement, 4),
            or_dash(row.sqnr_db, 2),
            format!("{:.1}", row.seconds),
        ]);
    }
    table.to_string()
}

/// What `eval` measured of language models.
pub(crate) fn perplexity(report: &PerplexityReport) -> String {
    let mut table = Table::new(&["<model", "perplexity", "top-1", "KL", "agreement", "tokens", "s"]);
    let or_dash =
        |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    for row in &report.rows {
        table.row([
            row.model.display().to_string(),
            format!("{:.3}", row.perplexity),
            format!("{:.4}", row.top1),
            or_dash(row.kl, 5),
            or_dash(row.agreement, 4),
            row.tokens.to_string(),
            format!("{:.1}", row.seconds),
        ]);
    }
    let mut out = table.to_string();
    if let Some(row) = report.rows.first() {
        out += &format!(
            "\nchunked: {} of up to {} tokens, each by itself; its first token is not predicted\n",
            count(row.windows, "window"),
            row.sequence_length
        );
    }
    report.notes.iter().for_each(|note| out += &format!("{note}\n"));
    out
}

/// What `verify` found.
pub(crate) fn verified(done: &Verified) -> String {
    let mut out = format!(
        "{} and {} match ({})\n",
        count(done.outputs, "output"),
        count(done.inputs, "input"),
        ByteSize(done.bytes)
    );
    for path in &done.missing_inputs {
        out += &format!("input `{}`: no longer there, not checked\n", path.display());
    }
    out
}

fn kept(layers: &[Kept]) -> String {
    if layers.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["<kept", "<op", "<reason"]);
    for layer in layers {
        table.row([layer.name.clone(), layer.op.clone(), layer.reason.clone()]);
    }
    format!("\n{table}")
}

/// `1 layer`, `2 layers`.
fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

/// Two significant digits, e.g. `8.7e-5`.
pub(super) fn short(value: f64) -> String {
    format!("{value:.1e}")
}

/// `40 s`, `11 min`, `2 h 05 min`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..90 => format!("{whole} s"),
        90..5400 => format!("{} min", (whole + 30) / 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

fn per_cent(part: u64, whole: u64) -> String {
    format!("{:.1}%", 100.0 * part as f64 / whole.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::{FailedLayer, LayerRow, PerplexityRow, ReportRow, StageRow};

    fn skipped() -> Kept {
        Kept { name: "head".into(), op: "Gemm".into(), reason: "skipped by `head*`".into(), requested: true }
    }

    #[test]
    fn a_fleet_shows_one_recommendation_and_what_does_not_fit() {
        let row = |partition: &str, fits, why: Option<&str>| FleetRow {
            partition: partition.into(),
            seconds: 400.0,
            bytes_moved: 3 << 30,
            node_bytes: 5 << 20,
            fits,
            why: why.map(str::to_owned),
        };
        let rows = [row("batches", true, Some("the fastest")), row("layers:4", false, None)];
        let link = LinkRow::assumed("no coordinator was asked");
        insta::assert_snapshot!(fleet(&rows, Some(&link)), @r"
        --partition   time    moved  on a node
        batches      7 min  3.0 GiB    5.0 MiB  recommended: the fastest
        layers:4     7 min  3.0 GiB    5.0 MiB  does not fit
        link 10 Gbit/s, assumed: no coordinator was asked
        ");
    }

    #[test]
    fn the_outcome_says_what_happened_to_every_layer() {
        let row = ReportRow {
            name: "conv1".into(),
            bits: 3,
            grid: "symmetric per-channel".into(),
            objective_before: 3.14e-4,
            objective_after: 8.72e-5,
            sqnr_db: 22.54,
            rounded_away: 31,
            weights: 576,
            seconds: 0.25,
        };
        let failed = FailedLayer { name: "fc".into(), cause: "statistics are not finite".into() };
        let report = QuantizeOutcome {
            solved: 1,
            kept: vec![skipped()],
            failed: vec![failed],
            rows: vec![row],
            phases: vec![("read".into(), 0.1), ("solve".into(), 2.34)],
            peak_resident_bytes: Some(3 << 29),
            files: vec![],
            notes: vec!["no int8 model: 3 bits".into()],
        };
        insta::assert_snapshot!(outcome(&report), @r"
        layer  bits  grid                   nearest     now  SQNR dB  away  weights    s
        conv1     3  symmetric per-channel   3.1e-4  8.7e-5     22.5  5.4%      576  0.2

        kept  op    reason
        head  Gemm  skipped by `head*`
        failed `fc`: statistics are not finite
        note: no int8 model: 3 bits
        time: read 0.1 s, solve 2.3 s
        memory: 1.5 GiB at most, in the process that wrote this
        ");
    }

    #[test]
    fn inspect_lists_layers_and_what_is_kept() {
        let layer = LayerRow {
            name: "conv1".into(),
            op: "Conv".into(),
            weight: "conv1.weight".into(),
            shape: vec![16, 1, 3, 3],
            rows: 16,
            cols: 9,
            groups: 1,
            activation: "Relu".into(),
            uses: 1,
        };
        let report = InspectReport {
            inputs: vec!["input float32 [N, 1, 28, 28]".into()],
            outputs: vec!["logits float32 [N, 10]".into()],
            opset: Some(17),
            layers: vec![layer],
            kept: vec![skipped()],
        };
        insta::assert_snapshot!(inspect(&report), @r"
        opset 17
        input input float32 [N, 1, 28, 28]
        output logits float32 [N, 10]

        layer  op    weight         rows  cols  groups  activation  uses
        conv1  Conv  [16, 1, 3, 3]    16     9       1  Relu           1

        1 layer, 144 weights

        kept  op    reason
        head  Gemm  skipped by `head*`
        ");
    }

    #[test]
    fn a_plan_shows_stages_bytes_and_time() {
        let stage = StageRow {
            stage: 1,
            layers: vec!["conv1".into(), "conv2".into()],
            nodes: 3,
            chunks: 2,
            carry_bytes: 3 << 20,
            statistics_bytes: 2048,
            seconds: 0.4,
        };
        let report = PlanReport {
            samples: 1024,
            shards: 16,
            stages: vec![stage],
            kept: vec![],
            peak_bytes: 5 << 30,
            spill_bytes: 0,
            output_bytes: 500,
            gpu: Some(GpuRow {
                bytes: 3 << 30,
                stage: 1,
                threads: 8,
                memory_bytes: Some(3 << 30),
                threads_that_fit: 5,
            }),
            seconds: 100.0,
            phases: vec![("read".into(), 4.0), ("forward".into(), 96.0)],
            fleet: vec![],
            link: None,
        };
        insta::assert_snapshot!(plan(&report), @r"
        stage  layers  ops  chunks    carry  statistics    s  first layer
            1       2    3       2  3.0 MiB     2.0 KiB  0.4  conv1

        2 layers in 1 stage, 1024 samples in 16 shards
        memory 5.0 GiB at most for data, carries and statistics; 0 B to files; new weights 500 B
        GPU memory 3.0 GiB at most for statistics and solving by 8 threads (stage 1); too much for the 3.0 GiB here: --threads 5 fits
        estimated time 2 min: read 4 s, forward 2 min
        from a run of one sample (one batch if the model fixes it) and this machine's speed now
        ");
    }

    #[test]
    fn models_are_compared_side_by_side() {
        let row = |model: &str, agreement, sqnr_db| EvalRow {
            model: model.into(),
            samples: 10000,
            top1: Some(0.9083),
            agreement,
            sqnr_db,
            seconds: 1.26,
        };
        let rows =
            [row("a.onnx", Some(1.0), Some(f64::INFINITY)), row("quantized.onnx", Some(0.984), Some(22.51))];
        insta::assert_snapshot!(eval(&rows), @r"
        model           samples   top-1  agreement  SQNR dB    s
        a.onnx            10000  0.9083     1.0000    equal  1.3
        quantized.onnx    10000  0.9083     0.9840    22.51  1.3
        ");
        let alone = EvalRow { top1: None, ..row("a.onnx", None, None) };
        insta::assert_snapshot!(eval(&[alone]), @r"
        model   samples  top-1  agreement  SQNR dB    s
        a.onnx    10000      -          -        -  1.3
        ");
    }

    #[test]
    fn language_models_are_compared_side_by_side() {
        let row = |model: &str, kl, agreement| PerplexityRow {
            model: model.into(),
            method: "chunked",
            windows: 16,
            sequence_length: 256,
            tokens: 4080,
            perplexity: 25.0413,
            top1: 0.41666,
            kl,
            agreement,
            seconds: 3.21,
        };
        let rows = vec![row("original", None, None), row("out/w4", Some(0.0123456), Some(0.93))];
        let notes = vec!["96 documents, 96 windows of up to 256 tokens, 16 used with 4096 tokens".into()];
        insta::assert_snapshot!(perplexity(&PerplexityReport { notes, rows }), @r"
        model     perplexity   top-1       KL  agreement  tokens    s
        original      25.041  0.4167        -          -    4080  3.2
        out/w4        25.041  0.4167  0.01235     0.9300    4080  3.2

        chunked: 16 windows of up to 256 tokens, each by itself; its first token is not predicted
        96 documents, 96 windows of up to 256 tokens, 16 used with 4096 tokens
        ");
    }

    #[test]
    fn durations_are_as_coarse_as_they_are_long() {
        for (seconds, expect) in
            [(0.4, "0 s"), (89.0, "89 s"), (90.0, "2 min"), (660.0, "11 min"), (7500.0, "2 h 05 min")]
        {
            assert_eq!(duration(seconds), expect);
        }
    }
}
