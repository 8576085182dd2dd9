//! A job that is being worked on: inputs in place, planned, its durable work read back; and its end.
//!
//! Everything here blocks (files, planning) and belongs on a thread of its own.

use super::JobFolder;
use super::JobSpec;
use crate::artefacts::{ArtefactError, Artefacts};
use crate::export::{Input, Origin, export, write_records};
use crate::failpoints::visit;
use crate::manifest::FileRecord;
use crate::planner::form;
use crate::source::{ROUNDING_BYTES_MAX, read_rounding};
use crate::store::{Change, JobRecord, ResultFile, Store};
use crate::{
    CoordinatorError, JobConfig, JobSource, LanguageModel, Outcome, OutcomeKind, Prepared, Report, Roundings,
    Staging, Subject, assemble, checkpoint, integers, prepare, summarise,
};
use halfstep_quant::Encodings;
use halfstep_work::{JobId, Plan, Receipt};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Exit codes of finished jobs, as the command line documents them.
const SOLVED: u8 = 0;
const SOME_KEPT: u8 = 3;
const SOME_FAILED: u8 = 4;

/// See the module.
pub struct ActiveJob {
    /// Its id.
    pub id: JobId,
    /// The job on this machine.
    pub config: JobConfig,
    /// The plan.
    pub plan: Arc<Plan>,
    /// What nodes may fetch.
    pub source: Arc<JobSource>,
    prepared: Prepared,
    folder: JobFolder,
    inputs: Vec<Input>,
}

/// Work that was durable when the job was taken up.
#[derive(Default)]
pub struct Resumed {
    /// Receipts of verified roundings, and layers given up.
    pub outcome: Outcome,
    /// Forgets what is damaged or missing; to be committed before the chunks are solved again.
    pub lost: Vec<Change>,
}

/// What a finished job left.
pub struct Finished {
    /// Documented exit code.
    pub exit: u8,
    /// Files in `jobs/ID/results`, in name order.
    pub results: Vec<ResultFile>,
    /// Layers and their numbers.
    pub report: Report,
}

impl ActiveJob {
    /// Puts the inputs in place, reads and plans.
    ///
    /// # Errors
    /// Whatever is wrong with the inputs or the configuration; `Storage`.
    pub fn prepare(
        state: &Path,
        artefacts: &Arc<Artefacts>,
        record: &JobRecord,
    ) -> Result<Self, CoordinatorError> {
        let spec = JobSpec::from_json(&record.spec)?;
        let folder = JobFolder::new(state, record.id);
        let placed = folder.place(artefacts, &spec, &record.files)?;
        let (prepared, dataset) = prepare(&placed.config)?;
        let mut inputs = model_inputs(&prepared.subject, &placed.config.model, Path::new(&spec.model));
        let (root, shown_root) = &placed.data_root;
        for path in dataset.files() {
            let shown = path.strip_prefix(root).map_or_else(|_| path.clone(), |name| shown_root.join(name));
            inputs.push(Input { path: path.clone(), shown });
        }
        let tokenizer = placed.config.language.tokenizer.iter();
        inputs.extend(tokenizer.map(|path| Input {
            path: path.clone(),
            shown: path.file_name().map(PathBuf::from).unwrap_or_default(),
        }));
        let plan = Arc::new(prepared.plan.clone());
        let subject = Arc::clone(&prepared.subject);
        let source = JobSource::new(Arc::clone(&plan), subject, dataset, Arc::clone(artefacts))
            .map_err(|e| CoordinatorError::ReadBack { subject: "plan".into(), what: e.to_string() })?;
        Ok(Self {
            id: record.id,
            config: placed.config,
            plan,
            source: Arc::new(source),
            prepared,
            folder,
            inputs,
        })
    }

    /// Facts the user should know about the plan, one sentence each.
    pub fn notes(&self) -> &[String] {
        &self.prepared.notes
    }

    /// Reads the durable work back and lets it be fetched. A rounding whose artefact is missing, damaged or not of this
    /// plan is forgotten, so that it is solved again.
    ///
    /// # Errors
    /// `Store`, or `Artefact` if a file cannot be read for another reason than damage.
    pub fn resume(&self, store: &Store, artefacts: &Artefacts) -> Result<Resumed, CoordinatorError> {
        let committed = store.committed(self.id)?;
        let mut resumed = Resumed::default();
        for ((layer, chunk), hash) in committed.roundings {
            let read = match artefacts.read(&hash, ROUNDING_BYTES_MAX) {
                Ok(bytes) => read_rounding(&self.plan, &bytes)
                    .ok()
                    .filter(|read| (read.layer, read.chunk) == (layer, chunk)),
                Err(
                    ArtefactError::Damaged { .. }
                    | ArtefactError::Missing { .. }
                    | ArtefactError::Size { .. },
                ) => None,
                Err(error) => return Err(error.into()),
            };
            match read {
                Some(rounding) => {
                    self.source.commit(layer, chunk, hash);
                    resumed.outcome.receipts.insert((layer, chunk), Receipt::of(&rounding));
                }
                None => resumed.lost.push(Change::ForgetRounding { job: self.id, layer, chunk }),
            }
        }
        committed.given_up.keys().for_each(|layer| self.source.give_up(*layer));
        resumed.outcome.given_up = committed.given_up;
        Ok(resumed)
    }

    /// `kind`: device and engine of the nodes. Assembles and exports; the results appear under their folder by rename.
    ///
    /// # Errors
    /// As `assemble` and `export`; no result is visible then.
    pub fn finish(
        &self,
        outcome: &Outcome,
        kind: &(String, String),
        timing: &serde_json::Value,
    ) -> Result<Finished, CoordinatorError> {
        let report = match self.prepared.subject.as_ref() {
            Subject::Onnx(model) => {
                let mut assembled = assemble(&self.prepared, outcome, self.source.as_ref())?;
                export(&self.config, model, &mut assembled, &self.origin(kind), timing)?;
                assembled.report
            }
            Subject::Language(language) => self.finish_language(language, outcome, kind, timing)?,
        };
        visit("job.finish").map_err(|e| CoordinatorError::storage(self.folder.results(), "finish", e))?;
        let results = list_results(&self.folder.results())?;
        Ok(Finished { exit: exit_code(&report, &self.config, &self.prepared.subject), results, report })
    }

    fn origin<'a>(&'a self, kind: &'a (String, String)) -> Origin<'a> {
        Origin { job: self.id, kind, inputs: &self.inputs }
    }

    /// One layer in memory at a time.
    fn finish_language(
        &self,
        language: &LanguageModel,
        outcome: &Outcome,
        kind: &(String, String),
        timing: &serde_json::Value,
    ) -> Result<Report, CoordinatorError> {
        let mut report = summarise(&self.prepared, outcome)?;
        let staging = Staging::new(&self.config.output, self.config.force)?;
        let solved = Solved { prepared: &self.prepared, outcome, roundings: self.source.as_ref() };
        let (format, shard_bytes) = (self.config.language.format, self.config.language.file_bytes);
        let options = checkpoint::Options { format, shard_bytes };
        let exported = checkpoint::export(&language.checkpoint, &solved, options, &staging)?;
        report.notes.extend(exported.notes);
        write_records(&staging, &report, &self.config, &self.origin(kind), timing)?;
        staging.publish()?;
        Ok(report)
    }
}

/// The layers of a job by name.
struct Solved<'a> {
    prepared: &'a Prepared,
    outcome: &'a Outcome,
    roundings: &'a dyn Roundings,
}

impl checkpoint::SolvedLayers for Solved<'_> {
    fn forms(&self) -> Vec<checkpoint::LayerForm> {
        let Prepared { plan, layers, .. } = self.prepared;
        let solved = plan
            .layers
            .iter()
            .zip(layers)
            .filter(|(entry, _)| !self.outcome.given_up.contains_key(&entry.id));
        solved.map(|(entry, layer)| form(layer, entry.grid)).collect()
    }

    fn layer(&self, name: &str) -> Result<Option<(Encodings, Vec<i32>)>, CoordinatorError> {
        let entry = self.prepared.plan.layers.iter().find(|entry| entry.name == name);
        entry.map_or(Ok(None), |entry| integers(entry, self.outcome, self.roundings))
    }
}

/// The files of the model, and how the user would name them.
fn model_inputs(subject: &Subject, model: &Path, shown: &Path) -> Vec<Input> {
    match subject {
        Subject::Onnx(_) => vec![Input { path: model.into(), shown: shown.into() }],
        Subject::Language(language) => {
            let named = |path: &PathBuf| match path.strip_prefix(model) {
                Ok(name) => shown.join(name),
                Err(_) => path.clone(),
            };
            let files = language.checkpoint.files().iter();
            files.map(|path| Input { path: path.clone(), shown: named(path) }).collect()
        }
    }
}

/// Kept layers count only if nobody asked for that. What a language model keeps is meant to be kept: embeddings, heads,
/// routers.
fn exit_code(report: &Report, config: &JobConfig, subject: &Subject) -> u8 {
    let asked = |reason: &str| {
        subject.onnx().is_none()
            || config.rules.iter().any(|rule| rule.skip && reason.contains(&format!("`{}`", rule.pattern)))
    };
    let kinds = || report.layers.iter().map(|layer| &layer.kind);
    if kinds().any(|kind| matches!(kind, OutcomeKind::Failed { .. })) {
        SOME_FAILED
    } else if kinds().any(|kind| matches!(kind, OutcomeKind::Kept { reason } if !asked(reason))) {
        SOME_KEPT
    } else {
        SOLVED
    }
}

fn list_results(folder: &Path) -> Result<Vec<ResultFile>, CoordinatorError> {
    let fail = |e| CoordinatorError::storage(folder, "list", e);
    let mut results = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let record = FileRecord::of(&path, name.as_str())?;
        let hash = blake3::Hash::from_hex(&record.blake3);
        let hash =
            hash.map_err(|e| CoordinatorError::ReadBack { subject: name.clone(), what: e.to_string() })?;
        results.push(ResultFile { name, size: record.bytes, hash });
    }
    results.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(results)
}
