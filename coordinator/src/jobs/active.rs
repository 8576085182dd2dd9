//! A job that is being worked on: inputs in place, planned, its durable work read back; and its end.
//!
//! Everything here blocks (files, planning) and belongs on a thread of its own.

use super::JobFolder;
use super::JobSpec;
use crate::artefacts::{ArtefactError, Artefacts};
use crate::export::{Input, export};
use crate::failpoints::visit;
use crate::manifest::FileRecord;
use crate::source::{ROUNDING_BYTES_MAX, read_rounding};
use crate::store::{Change, JobRecord, ResultFile, Store};
use crate::{
    Assembled, CoordinatorError, JobConfig, JobSource, Outcome, OutcomeKind, Prepared, assemble, prepare,
};
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
    pub assembled: Assembled,
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
        let mut inputs = vec![Input { path: placed.config.model.clone(), shown: PathBuf::from(&spec.model) }];
        let (root, shown_root) = &placed.data_root;
        for path in dataset.files() {
            let shown = path.strip_prefix(root).map_or_else(|_| path.clone(), |name| shown_root.join(name));
            inputs.push(Input { path: path.clone(), shown });
        }
        let plan = Arc::new(prepared.plan.clone());
        let model = Arc::new(prepared.model.clone());
        let source = JobSource::new(Arc::clone(&plan), model, dataset, Arc::clone(artefacts))
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
        let mut assembled = assemble(&self.prepared, outcome, self.source.as_ref())?;
        export(&self.config, &self.prepared, &mut assembled, kind, &self.inputs, timing)?;
        visit("job.finish").map_err(|e| CoordinatorError::storage(self.folder.results(), "finish", e))?;
        let results = list_results(&self.folder.results())?;
        Ok(Finished { exit: exit_code(&assembled, &self.config), results, assembled })
    }
}

/// Kept layers count only if nobody asked for that.
fn exit_code(assembled: &Assembled, config: &JobConfig) -> u8 {
    let asked = |reason: &str| {
        config.rules.iter().any(|rule| rule.skip && reason.contains(&format!("`{}`", rule.pattern)))
    };
    let kinds = || assembled.report.layers.iter().map(|layer| &layer.kind);
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
