//! One sample through all segments: what a job will hold and how long its parts take, before it is started.
//!
//! The original model alone runs; nothing is rounded and nothing is kept. Which tensors will have a second copy, once
//! earlier layers are rounded, follows from the plan. A sample's statistics are timed with the streams they will have.
//! Not here: all samples, stages and threads together (whoever plans), the machine's speed at solving (`rates`).

use crate::devices::Devices;
use crate::program::Program;
use crate::rates::Rates;
use crate::{failure, transit};
use halfstep_exec::{Agreement, Engine, LayerStatistics, Sampling, Unfolder, peak, sampled_positions};
use halfstep_model::decoder::DecoderProgram;
use halfstep_model::{Dim, Model, Segment, Tensor};
use halfstep_work::{Failure, InputTensor, LayerId, Objective, Plan, SegmentId, ShardId, Source};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Short parts are timed this often and the fastest counts: other programs only ever add to a time.
const REPEATS: u32 = 16;
/// But no part for longer than this.
const REPEAT_TIME: Duration = Duration::from_millis(20);

/// What one run of a few samples showed.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbeReport {
    /// Samples of the run; bytes, positions and seconds below are of all of them: 1, unless the model wants more.
    pub samples: usize,
    /// In the plan's order.
    pub segments: Vec<SegmentProbe>,
    /// This machine.
    pub rates: Rates,
}

/// One segment.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct SegmentProbe {
    /// Tensors held after it for later segments and for its taps, original stream.
    pub original_bytes: u64,
    /// Those of them that differ in the quantized stream, which holds a second copy.
    pub quantized_bytes: u64,
    /// Times that it runs for a shard: 0, 1, or 2 for both streams.
    pub streams: u32,
    /// Building and loading, once per stream.
    pub load_seconds: f64,
    /// One run.
    pub forward_seconds: f64,
    /// Inputs of layers that become rows here.
    pub taps: Vec<TapProbe>,
}

/// The input of one use of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct TapProbe {
    /// Whose.
    pub layer: LayerId,
    /// Rows that enter the statistics.
    pub positions: u64,
    /// Whether both streams enter.
    pub differs: bool,
    /// Bytes of its statistics, for any number of samples.
    pub statistics_bytes: u64,
    /// Statistics of a shard, whatever its size.
    pub shard_seconds: f64,
    /// Statistics of these samples on top of that.
    pub sample_seconds: f64,
}

/// Runs one sample of the first shard, or the whole shard for a model that takes no less.
///
/// `threads` is how many will work. Memory follows the segment: tensors go as soon as none needs them.
///
/// # Errors
/// What the job would fail with in its first shard.
pub fn probe(
    plan: &Plan,
    source: &dyn Source,
    engine: &dyn Engine,
    threads: usize,
) -> Result<ProbeReport, Failure> {
    let program = Program::new(plan, source)?;
    program.check(engine)?;
    let rates = Rates::measure(&plan.solver, threads)?;
    let inputs = source.inputs(ShardId(0)).map_err(failure::source)?;
    let shard = inputs.first().and_then(|input| input.shape.first()).copied().unwrap_or(1);
    let run = |inputs: &[InputTensor], samples| {
        let segments = Walk::new(plan, &program, source, engine, inputs)?.all()?;
        Ok(ProbeReport { samples, segments, rates })
    };
    if shard > 1 && !has_fixed_batch(source)? {
        let one: Vec<InputTensor> = inputs.iter().map(first_sample).collect();
        // A batch may be fixed by a shape inside the graph; then the shard shows whether the job can run.
        if let Ok(report) = run(&one, 1) {
            return Ok(report);
        }
    }
    run(&inputs, shard)
}

fn has_fixed_batch(source: &dyn Source) -> Result<bool, Failure> {
    let blob = source.program().map_err(failure::source)?;
    if DecoderProgram::is_one(&blob) {
        return Ok(false);
    }
    let model = Model::from_bytes(blob).map_err(failure::model)?;
    let inputs = model.inputs();
    let mut data = inputs.iter().filter(|input| !model.has_initializer(&input.name));
    Ok(data.any(|input| matches!(input.dims.first(), Some(Dim::Known(_)))))
}

fn first_sample(input: &InputTensor) -> InputTensor {
    let mut one = input.clone();
    if let Some(count) = one.shape.first_mut() {
        let bytes = one.bytes.len() / (*count).max(1);
        one.bytes.truncate(bytes);
        *count = 1;
    }
    one
}

/// A run in progress.
struct Walk<'a> {
    plan: &'a Plan,
    program: &'a Program,
    source: &'a dyn Source,
    engine: &'a dyn Engine,
    held: BTreeMap<String, Tensor>,
}

impl<'a> Walk<'a> {
    fn new(
        plan: &'a Plan,
        program: &'a Program,
        source: &'a dyn Source,
        engine: &'a dyn Engine,
        inputs: &[InputTensor],
    ) -> Result<Self, Failure> {
        let held: Result<_, Failure> =
            inputs.iter().map(|input| Ok((input.name.clone(), transit::tensor(input)?))).collect();
        Ok(Self { plan, program, source, engine, held: held? })
    }

    fn all(mut self) -> Result<Vec<SegmentProbe>, Failure> {
        let program = self.program;
        program.cut.segments.iter().enumerate().map(|(index, segment)| self.segment(index, segment)).collect()
    }

    fn segment(&mut self, index: usize, segment: &Segment) -> Result<SegmentProbe, Failure> {
        let id = SegmentId(index as u32);
        let parted = |name: &str| self.program.is_parted(self.plan.range_of(id), name);
        let mut found = SegmentProbe::default();
        if !segment.nodes.is_empty() && !segment.outputs.is_empty() {
            self.forward(segment, &mut found)?;
            found.streams = if self.program.parts(self.plan, id, segment) { 2 } else { 1 };
        }
        let tapped = |name: &String| segment.taps.iter().any(|tap| tap.tensor == *name);
        self.held.retain(|name, _| segment.live_after.contains(name) || tapped(name));
        let bytes = |(_, tensor): (&String, &Tensor)| tensor.bytes() as u64;
        found.original_bytes = self.held.iter().map(bytes).sum();
        found.quantized_bytes = self.held.iter().filter(|(name, _)| parted(name)).map(bytes).sum();
        let taps: Result<_, Failure> =
            segment.taps.iter().map(|tap| self.tap(LayerId(tap.layer as u32), &tap.tensor)).collect();
        found.taps = taps?;
        self.held.retain(|name, _| segment.live_after.contains(name));
        Ok(found)
    }

    /// The first run warms caches up and is not timed.
    fn forward(&mut self, segment: &Segment, found: &mut SegmentProbe) -> Result<(), Failure> {
        let begun = Instant::now();
        let (session, _) =
            self.program.load(self.engine, &Devices::cpu(), segment, self.source, BTreeMap::new())?;
        found.load_seconds = begun.elapsed().as_secs_f64();
        let inputs: Result<Vec<(&str, &Tensor)>, Failure> =
            segment.inputs.iter().map(|name| Ok((name.as_str(), self.held(name)?))).collect();
        let inputs = inputs?;
        let names: Vec<&str> = segment.outputs.iter().map(String::as_str).collect();
        let outputs = session.run(&inputs, &names).map_err(failure::exec)?;
        found.forward_seconds = fastest(|| {
            let begun = Instant::now();
            session.run(&inputs, &names).map_err(failure::exec)?;
            Ok(begun.elapsed().as_secs_f64())
        })?;
        self.held.extend(segment.outputs.iter().cloned().zip(outputs));
        Ok(())
    }

    fn held(&self, name: &str) -> Result<&Tensor, Failure> {
        self.held
            .get(name)
            .ok_or_else(|| failure::internal(format!("tensor `{name}`: dropped before it was read")))
    }

    fn tap(&self, id: LayerId, name: &str) -> Result<TapProbe, Failure> {
        let layer = self.program.layer(id);
        let x = self.held(name)?;
        let unfolder =
            Unfolder::new(name, &layer.unfold, x, layer.cols, layer.groups).map_err(failure::exec)?;
        let shard = self.accumulate(id, name, x, unfolder.positions(), f32::MIN_POSITIVE)?;
        let all = self.accumulate(id, name, x, unfolder.positions(), self.plan.solver.positions_fraction)?;
        Ok(TapProbe {
            layer: id,
            positions: all.positions,
            differs: self.program.differs(self.plan, id),
            statistics_bytes: all.bytes,
            // With next to no position, what remains is the cost of a shard.
            shard_seconds: shard.seconds,
            sample_seconds: (all.seconds - shard.seconds).max(0.0),
        })
    }

    /// Statistics of `fraction` of a tensor's `total` positions, made and dropped.
    fn accumulate(
        &self,
        id: LayerId,
        name: &str,
        x: &Tensor,
        total: usize,
        fraction: f32,
    ) -> Result<Accumulated, Failure> {
        let (layer, solver) = (self.program.layer(id), &self.plan.solver);
        let mut found = Accumulated {
            positions: sampled_positions(total, fraction, 0).len() as u64,
            ..Accumulated::default()
        };
        let largest = x.as_f32().map_or(f32::NAN, peak);
        // Inputs that are not finite fail their layer alone: it costs no statistics.
        if !largest.is_finite() {
            return Ok(found);
        }
        let keep =
            if solver.objective == Objective::Samples { solver.positions_per_shard as usize } else { 0 };
        let sampling = Sampling { fraction, keep_per_shard: keep, seed: solver.seed };
        let agreed = Agreement { peak_fp: largest, peak_q: largest, positions: found.positions.max(1) };
        let differs = self.program.differs(self.plan, id);
        found.seconds = fastest(|| {
            let statistics = LayerStatistics::new(layer, u64::from(id.0), agreed, sampling, !differs);
            let statistics = statistics.map_err(failure::exec)?;
            found.bytes = statistics.bytes() as u64;
            let begun = Instant::now();
            statistics.accumulate(layer, name, 0, x, differs.then_some(x)).map_err(failure::exec)?;
            Ok(begun.elapsed().as_secs_f64())
        })?;
        Ok(found)
    }
}

#[derive(Default)]
struct Accumulated {
    positions: u64,
    bytes: u64,
    seconds: f64,
}

/// The least of a few timings.
pub(crate) fn fastest(mut timed: impl FnMut() -> Result<f64, Failure>) -> Result<f64, Failure> {
    let begun = Instant::now();
    let mut least = timed()?;
    for _ in 1..REPEATS {
        if begun.elapsed() > REPEAT_TIME {
            break;
        }
        least = least.min(timed()?);
    }
    Ok(least)
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_work::ScalarKind;

    #[test]
    fn the_first_sample_is_the_first_stretch_of_bytes() {
        let input = InputTensor {
            name: "x".into(),
            kind: ScalarKind::U8,
            shape: vec![3, 2],
            bytes: vec![1, 2, 3, 4, 5, 6].into(),
        };
        let one = first_sample(&input);
        assert_eq!((one.shape, one.bytes.as_ref()), (vec![1, 2], [1, 2].as_slice()));
    }

    #[test]
    fn the_fastest_of_a_few_timings_counts() {
        let mut left = [4.0, 3.0, 1.0, 2.0].into_iter().cycle();
        assert_eq!(fastest(|| Ok(left.next().unwrap())).unwrap(), 1.0);
        let failing = fastest(|| Err(failure::internal("no")));
        assert_eq!(failing.unwrap_err().message, "no");
    }
}
