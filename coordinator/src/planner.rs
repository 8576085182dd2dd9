//! From a model and a configuration to a plan. Pure but for reading the model.
//!
//! Shards and row chunks depend on the job alone, never on who will compute them (DESIGN section 4).

use crate::checkpoint::{LayerForm, check};
use crate::config::LanguageConfig;
use crate::dataset::Dataset;
use crate::dataset::tokens::{self, TokenOptions};
use crate::rules::{Decision, decide};
use crate::subject::{LanguageModel, Subject, model_inputs};
use crate::{CoordinatorError, JobConfig};
use halfstep_model::checkpoint::is_checkpoint;
use halfstep_model::{Cut, Dim, Layer, Model, Unsupported, fold_batch_norms, normalize};
use halfstep_quant::GridSpec;
use halfstep_work::{KeptLayer, LayerId, LayerPlan, Objective, Partition, Plan, SegmentId, StagePlan};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Rows of a chunk lie in this range where the layer is large enough: few enough that two cores share a small layer,
/// enough that a product of them runs near full speed.
const CHUNK_ROWS: Range<usize> = 16..128;
/// Rows of a chunk of the largest layers, a sixteenth of which is more than the above: a GPU's products of 128 rows run at a quarter of
/// its speed, of 512 at nearly all of it, and sixteen chunks are still enough to share.
const CHUNK_ROWS_WIDE: usize = 512;
/// Inputs of one shard stay below this many bytes, as far as whole samples allow.
const SHARD_INPUT_BYTES: usize = 5 << 20;
/// And below this many samples.
const SHARD_SAMPLES_MAX: usize = 32;
/// Tokens of one shard, as far as whole sequences allow: enough rows for products at full speed, few enough that many
/// nodes share a job of the usual size.
const SHARD_TOKENS: usize = 2048;
/// More shards of a language model than this are made larger, up to so many times: each costs a pass over the layers' sums.
const TOKEN_SHARDS: usize = 256;
const SHARD_GROWTH_MAX: usize = 4;
/// Windows of calibration text unless told otherwise: what others use.
const TEXT_SAMPLES: usize = 128;
/// Bytes of the 64-bit sums of one slice, all three matrices: one message of a few seconds on a slow link.
const SLICE_BYTES: usize = 4 << 20;
/// More slices of one layer cost more in grants and commits than they are worth to any number of nodes.
const SLICES_MAX: usize = 512;
/// Matrices of statistics a layer can have.
const MATRICES: usize = 3;

/// A model that is ready to be quantized, and what will happen to it.
pub struct Prepared {
    /// What nodes execute and what the outputs are made from.
    pub subject: Arc<Subject>,
    /// The layers of the plan, in plan order, with their geometry.
    pub layers: Vec<Layer>,
    /// Segments and taps; layer indexes are plan indexes.
    pub cut: Cut,
    /// The plan.
    pub plan: Plan,
    /// Facts the user should know, one sentence each.
    pub notes: Vec<String>,
}

/// Reads a model and brings it into the form that everything else works on.
///
/// # Errors
/// A model that cannot be read or is not valid.
pub fn prepare_model(path: &Path, fold: bool) -> Result<(Model, Vec<String>), CoordinatorError> {
    let mut model = Model::read(path)?;
    normalize(&mut model);
    let mut notes = Vec::new();
    if fold {
        let folded = fold_batch_norms(&mut model)?;
        if !folded.is_empty() {
            notes.push(format!("{} batch norms folded into the layers before them", folded.len()));
        }
    }
    Ok((model, notes))
}

/// How many samples one shard holds: the model's own batch where that is fixed.
///
/// # Errors
/// `BadInput` if the inputs' fixed batch sizes differ.
fn shard_samples(
    model: &Model,
    asked: Option<usize>,
    sample_bytes: usize,
) -> Result<(usize, bool), CoordinatorError> {
    let mut fixed: Option<(String, usize)> = None;
    for input in model.inputs() {
        if let Some(Dim::Known(size)) = input.dims.first() {
            match &fixed {
                Some((name, known)) if known != size => {
                    return Err(CoordinatorError::BadInput(format!(
                        "model inputs `{name}` and `{}`: first dimensions must agree, found {known} and {size}",
                        input.name
                    )));
                }
                _ => fixed = Some((input.name.clone(), *size)),
            }
        }
    }
    if let Some((name, size)) = fixed {
        if let Some(asked) = asked.filter(|asked| *asked != size) {
            return Err(CoordinatorError::Configuration(format!(
                "shard size {asked}: model input `{name}` has a fixed batch of {size}; expected {size}"
            )));
        }
        return Ok((size.max(1), true));
    }
    let by_bytes = SHARD_INPUT_BYTES / sample_bytes.max(1);
    Ok((asked.unwrap_or(by_bytes.clamp(1, SHARD_SAMPLES_MAX)).max(1), false))
}

/// Reads model and data and plans the job.
///
/// # Errors
/// `Model` or `Dataset` for files that cannot be used; `BadInput` if there is no layer to quantize or too few samples;
/// `Configuration` for bad rules.
pub fn prepare(config: &JobConfig) -> Result<(Prepared, Dataset), CoordinatorError> {
    if is_checkpoint(&config.model) {
        return prepare_language(config);
    }
    if config.language != LanguageConfig::default() {
        return Err(CoordinatorError::Configuration(format!(
            "model `{}`: options of language models were given, expected a checkpoint's folder with config.json",
            config.model.display()
        )));
    }
    let (model, mut notes) = prepare_model(&config.model, config.fold_batch_norm)?;
    let dataset = Dataset::open(&config.calibration, &config.dataset)?.for_inputs(&model_inputs(&model)?)?;
    let samples = dataset.samples();
    let (shard, fixed) = shard_samples(&model, config.shard_size, dataset.bytes_held() / samples.max(1))?;
    let shards = shards(samples, shard, fixed, &mut notes)?;
    Ok((plan(config, Subject::Onnx(Box::new(model)), notes, shard, shards)?, dataset))
}

fn prepare_language(config: &JobConfig) -> Result<(Prepared, Dataset), CoordinatorError> {
    let model = LanguageModel::open(&config.model, &config.language)?;
    let dataset = calibration_tokens(config, &model)?;
    let mut notes = dataset.notes().to_vec();
    let samples = dataset.samples();
    let window = dataset.slice(0..samples.min(1))?;
    let tokens = window.first().and_then(|ids| ids.shape.last()).copied().unwrap_or(1);
    let shard = config.shard_size.unwrap_or_else(|| windows_of_a_shard(samples, tokens));
    let shards = shards(samples, shard, false, &mut notes)?;
    Ok((plan(config, Subject::Language(Box::new(model)), notes, shard, shards)?, dataset))
}

/// How many of `samples` windows of `tokens` tokens one shard holds.
fn windows_of_a_shard(samples: usize, tokens: usize) -> usize {
    let usual = (SHARD_TOKENS / tokens.max(1)).max(1);
    usual * samples.div_ceil(usual).div_ceil(TOKEN_SHARDS).clamp(1, SHARD_GROWTH_MAX)
}

/// Calibration data as windows of token ids.
fn calibration_tokens(config: &JobConfig, model: &LanguageModel) -> Result<Dataset, CoordinatorError> {
    let own = Some(config.model.join("tokenizer.json")).filter(|own| own.is_file());
    // Text has no end worth waiting for; rows of ids were chosen by somebody.
    let kind = config.calibration.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
    let default = ["txt", "jsonl", "parquet"].contains(&kind).then_some(TEXT_SAMPLES);
    let options = TokenOptions {
        tokenizer: config.language.tokenizer.clone().or(own),
        vocabulary: model.decoder().vocabulary,
        positions: model.decoder().longest(),
        sequence_length: config.language.sequence_length,
        samples: config.dataset.samples.or(default),
        seed: config.solver.seed,
        field: config.language.text_field.clone().unwrap_or_else(|| "text".into()),
    };
    Ok(tokens::open(&config.calibration, &options)?)
}

fn plan(
    config: &JobConfig,
    subject: Subject,
    mut notes: Vec<String>,
    shard: usize,
    shards: Vec<Range<usize>>,
) -> Result<Prepared, CoordinatorError> {
    let (listed, unsupported) = subject.layers()?;
    let decisions = decide(&listed, config.grid, &config.rules)?;
    let (layers, grids, kept) = select(listed, decisions, unsupported);
    if layers.is_empty() {
        return Err(CoordinatorError::BadInput(no_layer(&config.model, &kept)));
    }
    if let Subject::Language(model) = &subject {
        let forms = layers.iter().zip(&grids).map(|(layer, grid)| form(layer, *grid));
        check(&model.checkpoint, &forms.collect::<Vec<_>>(), config.language.format)?;
    }
    let cut = subject.cut(&layers)?;
    if config.solver.positions_fraction < 1.0 {
        notes.push(format!(
            "statistics use {} of the positions of each sample",
            config.solver.positions_fraction
        ));
    }
    let stages = stages(&layers, &cut);
    let ranges = stage_ranges(config.partition, &layers, &stages, &cut, &mut notes);
    let mut stage_of = vec![SegmentId(0); layers.len()];
    for (stage, entry) in stages.iter().enumerate() {
        entry.solve.iter().for_each(|id| stage_of[id.index()] = SegmentId(stage as u32));
    }
    let mut lenders = Lenders::new(config.solver.objective);
    let plans = layers.iter().zip(grids).enumerate().map(|(index, (layer, grid))| {
        let id = LayerId(index as u32);
        let statistics_of = lenders.of(&layers, index, stage_of[index]);
        LayerPlan {
            id,
            name: layer.name.clone(),
            op_type: layer.op_type.clone(),
            rows: layer.rows,
            cols: layer.cols,
            groups: layer.groups,
            grid,
            chunks: chunks(layer.rows, layer.groups),
            statistics_of,
            slices: if statistics_of.is_none() { slices(layer.cols, layer.groups) } else { Vec::new() },
            stage: stage_of[index],
        }
    });
    let plan = Plan {
        layers: plans.collect(),
        kept,
        stages,
        batch: shard,
        shards,
        propagation: config.propagation,
        solver: config.solver,
        ranges,
    };
    plan.validate()?;
    Ok(Prepared { subject: Arc::new(subject), layers, cut, plan, notes })
}

/// A layer as exporters of checkpoints know it.
pub(crate) fn form(layer: &Layer, grid: GridSpec) -> LayerForm {
    LayerForm { name: layer.name.clone(), weight: layer.weight.clone(), layout: layer.layout, grid }
}

type Selected = (Vec<Layer>, Vec<GridSpec>, Vec<KeptLayer>);

fn select(listed: Vec<Layer>, decisions: Vec<Decision>, unsupported: Vec<Unsupported>) -> Selected {
    let mut layers = Vec::new();
    let mut grids = Vec::new();
    let mut kept: Vec<KeptLayer> = unsupported
        .into_iter()
        .map(|u| KeptLayer { name: u.name, op_type: u.op_type, reason: u.reason })
        .collect();
    for (layer, decision) in listed.into_iter().zip(decisions) {
        match decision {
            Decision::Quantize(grid) => {
                layers.push(layer);
                grids.push(grid);
            }
            Decision::Skip { pattern } => kept.push(KeptLayer {
                name: layer.name,
                op_type: layer.op_type,
                reason: format!("skipped by pattern `{pattern}`"),
            }),
        }
    }
    (layers, grids, kept)
}

fn no_layer(path: &Path, kept: &[KeptLayer]) -> String {
    let first = kept.first().map_or(String::new(), |k| format!("; first of them `{}`: {}", k.name, k.reason));
    format!(
        "{}: no layer to quantize, expected at least one Conv, ConvTranspose, Gemm or MatMul with constant weights, \
         found {} layers that are kept{first}",
        path.display(),
        kept.len()
    )
}

fn shards(
    samples: usize,
    size: usize,
    fixed: bool,
    notes: &mut Vec<String>,
) -> Result<Vec<Range<usize>>, CoordinatorError> {
    if samples == 0 || (fixed && samples < size) {
        return Err(CoordinatorError::BadInput(format!(
            "calibration data: too few samples, expected at least {}, found {samples}",
            if fixed { size } else { 1 }
        )));
    }
    let used = if fixed { samples / size * size } else { samples };
    if used < samples {
        notes.push(format!(
            "{} of {samples} samples left out: the model's batch is fixed at {size}",
            samples - used
        ));
    }
    Ok((0..used).step_by(size).map(|start| start..(start + size).min(used)).collect())
}

/// A layer is solved at the stage of its last use.
fn stages(layers: &[Layer], cut: &Cut) -> Vec<StagePlan> {
    let mut last = vec![0usize; layers.len()];
    for (stage, segment) in cut.segments.iter().enumerate() {
        for tap in &segment.taps {
            last[tap.layer] = last[tap.layer].max(stage);
        }
    }
    (0..cut.segments.len())
        .map(|stage| StagePlan {
            solve: (0..layers.len()).filter(|l| last[*l] == stage).map(|l| LayerId(l as u32)).collect(),
        })
        .collect()
}

/// Layers that others can share the statistics of, by stage and first input.
struct Lenders<'a> {
    found: BTreeMap<(SegmentId, &'a str), Vec<usize>>,
    objective: Objective,
}

impl<'a> Lenders<'a> {
    fn new(objective: Objective) -> Self {
        Self { found: BTreeMap::new(), objective }
    }

    /// The earlier layer of the stage that reads the same rows; else this one can be shared from now on. The sample rows
    /// of the samples objective are drawn for each layer by itself: there nothing is shared.
    fn of(&mut self, layers: &'a [Layer], index: usize, stage: SegmentId) -> Option<LayerId> {
        let layer = &layers[index];
        let input = layer.uses.first().filter(|_| self.objective == Objective::Gram)?;
        let lenders = self.found.entry((stage, input.input.as_str())).or_default();
        let lender = lenders.iter().find(|lender| layer.reads_rows_of(&layers[**lender]));
        match lender {
            Some(lender) => Some(LayerId(*lender as u32)),
            None => {
                lenders.push(index);
                None
            }
        }
    }
}

/// Fixed row chunks: whole groups where groups are small, parts of one group where it is large.
pub(crate) fn chunks(rows: usize, groups: usize) -> Vec<Range<usize>> {
    let per_group = rows / groups.max(1);
    let most = (rows / 16).next_multiple_of(CHUNK_ROWS.start).clamp(CHUNK_ROWS.end, CHUNK_ROWS_WIDE);
    let target = rows.div_ceil(4).next_multiple_of(CHUNK_ROWS.start).min(most);
    if per_group <= target {
        let step = (target / per_group.max(1)).max(1) * per_group.max(1);
        return (0..rows).step_by(step).map(|s| s..(s + step).min(rows)).collect();
    }
    (0..groups)
        .flat_map(|g| {
            let base = g * per_group;
            (0..per_group).step_by(target).map(move |s| base + s..base + (s + target).min(per_group))
        })
        .collect()
}

/// Fixed rows of the statistics, all groups one after the other: whole rows of about `SLICE_BYTES`, and more where there
/// would be more than `SLICES_MAX` of them.
pub(crate) fn slices(cols: usize, groups: usize) -> Vec<Range<usize>> {
    let row_bytes = (cols * size_of::<i64>() * MATRICES).max(1);
    let rows = cols * groups;
    let step = (SLICE_BYTES / row_bytes).max(rows.div_ceil(SLICES_MAX)).max(1);
    (0..rows).step_by(step).map(|start| start..(start + step).min(rows)).collect()
}

/// Contiguous ranges of stages, as even in weights as they can be, never between two uses of one layer.
fn stage_ranges(
    partition: Partition,
    layers: &[Layer],
    stages: &[StagePlan],
    cut: &Cut,
    notes: &mut Vec<String>,
) -> Vec<Range<usize>> {
    let asked = match partition {
        Partition::Batches => 1,
        Partition::Layers { ranges } | Partition::Grid { ranges, .. } => ranges.max(1),
    };
    let weights = |layer: &LayerId| (layers[layer.index()].rows * layers[layer.index()].cols) as u64;
    // One more each, so that stages without layers are spread as well.
    let work: Vec<u64> =
        stages.iter().map(|stage| 1 + stage.solve.iter().map(weights).sum::<u64>()).collect();
    let mut uses = vec![(usize::MAX, 0); layers.len()];
    for (stage, segment) in cut.segments.iter().enumerate() {
        for tap in &segment.taps {
            let (first, last) = &mut uses[tap.layer];
            (*first, *last) = ((*first).min(stage), (*last).max(stage));
        }
    }
    let may_cut = |at: usize| !uses.iter().any(|(first, last)| *first < at && at <= *last);
    let ranges = even_ranges(&work, asked, may_cut);
    if ranges.len() < asked {
        notes.push(format!("{asked} ranges of stages asked for, the model allows {}", ranges.len()));
    }
    ranges
}

/// Tiles the stages with at most `count` ranges so that the heaviest is as light as possible.
fn even_ranges(work: &[u64], count: usize, may_cut: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
    let ends: Vec<usize> = (1..=work.len()).filter(|at| *at == work.len() || may_cut(*at)).collect();
    let count = count.min(ends.len());
    let fits = |limit: u64| pack(work, &ends, limit, count).filter(|ranges| ranges.len() <= count);
    let (mut low, mut high) = (0, work.iter().sum::<u64>());
    while low < high {
        let middle = low + (high - low) / 2;
        match fits(middle) {
            Some(_) => high = middle,
            None => low = middle + 1,
        }
    }
    fits(high).unwrap_or_default()
}

/// Greedy ranges of at most `limit` each, while leaving an end for each of the `count` ranges; none if one stage is
/// heavier.
fn pack(work: &[u64], ends: &[usize], limit: u64, count: usize) -> Option<Vec<Range<usize>>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let (mut start, mut taken) = (0, 0);
    while taken < ends.len() {
        let keep = count.saturating_sub(ranges.len() + 1);
        let last = ends.len().saturating_sub(keep).max(taken + 1);
        let fits = |end: &&usize| work[start..**end].iter().sum::<u64>() <= limit;
        let reached = ends[taken..last].iter().take_while(fits).count();
        let end = *ends.get(taken + reached.checked_sub(1)?)?;
        ranges.push(start..end);
        (start, taken) = (end, taken + reached);
    }
    Some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_tile_and_never_split_across_groups() {
        for (rows, groups) in [(1, 1), (10, 1), (64, 1), (1000, 1), (96, 96), (1152, 1152), (48, 3), (300, 2)]
        {
            let all = chunks(rows, groups);
            let per_group = rows / groups;
            let mut next = 0;
            for chunk in &all {
                assert_eq!(chunk.start, next, "{rows}x{groups}");
                let inside = chunk.start / per_group == (chunk.end - 1) / per_group;
                let whole = chunk.start % per_group == 0 && chunk.end % per_group == 0;
                assert!(inside || whole, "{rows}x{groups}: {chunk:?}");
                next = chunk.end;
            }
            assert_eq!(next, rows);
        }
    }

    #[test]
    fn chunks_grow_with_the_layer_from_16_to_512_rows() {
        for (rows, want) in [
            (1, 1),
            (40, 16),
            (576, 128),
            (1536, 128),
            (2048, 128),
            (4096, 256),
            (14336, 512),
            (200_000, 512),
        ] {
            assert_eq!(chunks(rows, 1)[0].len(), want, "{rows}");
        }
    }

    #[test]
    fn slices_tile_all_rows_of_all_groups_and_stay_near_their_size() {
        for (cols, groups) in [(1, 1), (27, 1), (9, 1152), (1152, 1), (4608, 1), (200_000, 1), (256, 3)] {
            let all = slices(cols, groups);
            let mut next = 0;
            for slice in &all {
                assert_eq!(slice.start, next, "{cols}x{groups}");
                let least = (cols * groups).div_ceil(SLICES_MAX);
                assert!(slice.len() <= least || slice.len() * cols * 24 <= SLICE_BYTES, "{cols}x{groups}");
                next = slice.end;
            }
            assert_eq!(next, cols * groups);
        }
        assert_eq!((slices(27, 1).len(), slices(1152, 1).len(), slices(4608, 1).len()), (1, 8, 125));
        assert!([14336, 28672, 200_000].iter().all(|cols| slices(*cols, 1).len() <= SLICES_MAX));
    }

    #[test]
    fn ranges_are_even_in_work_and_never_part_two_uses_of_a_layer() {
        let anywhere = |_| true;
        assert_eq!(even_ranges(&[1, 1, 1, 9, 1, 1], 1, anywhere), vec![0usize..6; 1]);
        assert_eq!(even_ranges(&[1, 1, 1, 9, 1, 1], 3, anywhere), [0..3, 3..4, 4..6]);
        assert_eq!(even_ranges(&[5, 1, 1, 1, 5, 5], 3, anywhere), [0..3, 3..5, 5..6]);
        assert_eq!(even_ranges(&[9, 1, 1], 3, anywhere), [0..1, 1..2, 2..3], "as many as asked for");
        assert_eq!(even_ranges(&[1, 1], 5, anywhere).len(), 2);
        assert_eq!(even_ranges(&[4, 1, 1, 4], 2, |at| at != 2), [0..3, 3..4]);
        assert_eq!(even_ranges(&[1, 1, 1], 2, |_| false), vec![0usize..3; 1]);
        assert!(even_ranges(&[], 2, anywhere).is_empty());
    }

    #[test]
    fn shards_of_windows_hold_2048_tokens_unless_there_were_many() {
        for (samples, tokens, expect) in [
            (128, 2048, 1),
            (128, 256, 8),
            (256, 2048, 1),
            (257, 2048, 2),
            (512, 2048, 2),
            (1024, 2048, 4),
            (100_000, 2048, 4),
            (512, 8192, 2),
            (4096, 512, 16),
            (0, 0, 2048),
        ] {
            assert_eq!(windows_of_a_shard(samples, tokens), expect, "{samples} of {tokens}");
        }
    }

    #[test]
    fn a_fixed_batch_leaves_the_remainder_out_and_says_so() {
        let mut notes = Vec::new();
        assert_eq!(shards(10, 4, true, &mut notes).expect("enough"), vec![0..4, 4..8]);
        assert!(notes[0].starts_with("2 of 10 samples left out"), "{notes:?}");
        assert!(shards(3, 4, true, &mut notes).is_err());
        assert_eq!(shards(10, 4, false, &mut notes).expect("enough").last(), Some(&(8..10)));
    }
}
