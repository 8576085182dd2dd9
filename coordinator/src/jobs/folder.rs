//! `jobs/ID` in the state folder: inputs under their names, results.
//!
//! A file that lies readable at the path the client named, with the same hash, is used in place (a shared file system,
//! the same machine). Others come as uploaded artefacts and are linked, or copied, under their relative names.
//! Roles are used in place as a whole or not at all: a folder of data must hold just the files of the job.

use super::JobSpec;
use super::names::relative;
use crate::artefacts::{Artefacts, sync_folder};
use crate::dataset::DataFiles;
use crate::failpoints::visit;
use crate::manifest::FileRecord;
use crate::store::{FileRole, InputFile};
use crate::{CoordinatorError, JobConfig};
use halfstep_work::JobId;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Files of one job; more is not a job.
const FILES_MAX: usize = 1 << 20;

/// Where one job's files lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFolder {
    root: PathBuf,
}

/// The inputs on this machine, and how they are called in the manifest.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) config: JobConfig,
    /// Root of the calibration files on this machine, and as the user named it.
    pub(super) data_root: (PathBuf, PathBuf),
}

impl JobFolder {
    /// That of `job`; nothing is created.
    pub fn new(state: &Path, job: JobId) -> Self {
        Self { root: state.join("jobs").join(job.to_string()) }
    }

    /// Where the results appear.
    pub fn results(&self) -> PathBuf {
        self.root.join("results")
    }

    /// Bytes that removing it frees: of all files but inputs that are links to artefacts.
    pub(super) fn bytes(&self) -> u64 {
        bytes_below(&self.root)
    }

    /// Removes everything of the job.
    ///
    /// # Errors
    /// `Storage`; a folder that is not there is no error.
    pub fn remove(&self) -> Result<(), CoordinatorError> {
        match fs::remove_dir_all(&self.root) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(CoordinatorError::storage(&self.root, "remove", e))
            }
            _ => Ok(()),
        }
    }

    /// Puts the inputs where they can be read.
    ///
    /// # Errors
    /// `BadInput` for names that cannot be, roles that are missing, files that have changed or are not here; `Storage`.
    pub(super) fn place(
        &self,
        artefacts: &Artefacts,
        spec: &JobSpec,
        files: &[InputFile],
    ) -> Result<Placed, CoordinatorError> {
        check_files(spec, files)?;
        self.sweep()?;
        let of =
            |wanted: fn(FileRole) -> bool| files.iter().filter(|file| wanted(file.role)).collect::<Vec<_>>();
        let model = of(|role| matches!(role, FileRole::Model | FileRole::ModelData));
        let data = of(|role| role == FileRole::Calibration);
        let tokenizer = of(|role| role == FileRole::Tokenizer);
        let model_root = match in_place(&model) {
            Some(root) => root,
            None => self.bring(artefacts, "model", &model)?,
        };
        let data_root = match in_place(&data).filter(|root| is_whole(spec, root, &data)) {
            Some(root) => root,
            None => self.bring(artefacts, "calibration", &data)?,
        };
        let one = |root: &Path, file: &InputFile| relative(&file.name).map(|name| root.join(name));
        let bad = CoordinatorError::BadInput;
        let calibration = match (spec.calibration_is_folder, &spec.calibration_key) {
            (true, _) => data_root.clone(),
            (false, None) => one(&data_root, data[0]).map_err(bad)?,
            (false, Some(key)) => {
                let mut text = one(&data_root, data[0]).map_err(bad)?.into_os_string();
                text.push(format!(":{key}"));
                text.into()
            }
        };
        let shown = PathBuf::from(&spec.calibration);
        let shown_root = if spec.calibration_is_folder {
            shown
        } else {
            shown.parent().map(Path::to_path_buf).unwrap_or_default()
        };
        let model_file = model.iter().find(|file| file.role == FileRole::Model);
        let model_file = model_file.ok_or_else(|| bad("job: has no model".into()))?;
        let model = match spec.model_is_folder {
            true => model_root,
            false => one(&model_root, model_file).map_err(bad)?,
        };
        let mut config = spec.config(model, calibration, self.results());
        if let [tokenizer] = tokenizer[..] {
            let root = match in_place(&[tokenizer]) {
                Some(root) => root,
                None => self.bring(artefacts, "tokenizer", &[tokenizer])?,
            };
            config.language.tokenizer = Some(one(&root, tokenizer).map_err(bad)?);
        }
        Ok(Placed { config, data_root: (data_root, shown_root) })
    }

    /// Removes results that a crash left half-written.
    fn sweep(&self) -> Result<(), CoordinatorError> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Ok(()) };
        for path in entries.flatten().map(|entry| entry.path()) {
            let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if hidden && path.is_dir() {
                fs::remove_dir_all(&path).map_err(|e| CoordinatorError::storage(&path, "remove", e))?;
            }
        }
        Ok(())
    }

    /// Links or copies every file below `input/PART`; done again from nothing each time.
    fn bring(
        &self,
        artefacts: &Artefacts,
        part: &str,
        files: &[&InputFile],
    ) -> Result<PathBuf, CoordinatorError> {
        let root = self.root.join("input").join(part);
        if root.exists() {
            fs::remove_dir_all(&root).map_err(|e| CoordinatorError::storage(&root, "remove", e))?;
        }
        fs::create_dir_all(&root).map_err(|e| CoordinatorError::storage(&root, "create folder", e))?;
        for file in files {
            let target = root.join(relative(&file.name).map_err(CoordinatorError::BadInput)?);
            let folder = target.parent().unwrap_or(&root);
            fs::create_dir_all(folder).map_err(|e| CoordinatorError::storage(folder, "create folder", e))?;
            let origin = origin(artefacts, file)?;
            let linked = visit("input.link").and_then(|()| origin.bring_to(&target));
            linked.map_err(|e| CoordinatorError::storage(&target, "create", e))?;
            sync_folder(folder).map_err(|e| CoordinatorError::storage(folder, "sync folder", e))?;
        }
        Ok(root)
    }
}

/// The files that neither lie where the client has them nor were uploaded.
pub(crate) fn missing<'a>(artefacts: &Artefacts, files: &'a [InputFile]) -> Vec<&'a InputFile> {
    files.iter().filter(|file| !artefacts.contains(&file.hash) && !lies_there(file)).collect()
}

/// What a job must have before anything is done with its names.
///
/// # Errors
/// `BadInput` with the first fault.
pub(crate) fn check_files(spec: &JobSpec, files: &[InputFile]) -> Result<(), CoordinatorError> {
    let refuse = |what: String| Err(CoordinatorError::BadInput(format!("job: {what}")));
    if files.len() > FILES_MAX {
        return refuse(format!("has {} files, expected at most {FILES_MAX}", files.len()));
    }
    let mut seen = std::collections::BTreeSet::new();
    for file in files {
        relative(&file.name).map_err(CoordinatorError::BadInput)?;
        // A model's files lie in one folder.
        let role = if file.role == FileRole::ModelData { FileRole::Model } else { file.role };
        if !seen.insert((role, file.name.as_str())) {
            return refuse(format!("file `{}` is there twice", file.name));
        }
    }
    let count = |role| files.iter().filter(|file| file.role == role).count();
    let (models, data) = (count(FileRole::Model), count(FileRole::Calibration));
    if models != 1 {
        return refuse(format!("expected one model, found {models}"));
    }
    let tokenizers = count(FileRole::Tokenizer);
    if tokenizers > 1 {
        return refuse(format!("expected at most one tokenizer, found {tokenizers}"));
    }
    if data == 0 || (data > 1 && !spec.calibration_is_folder) {
        return refuse(format!("expected calibration data, one file or a folder, found {data} files"));
    }
    Ok(())
}

/// The folder in which all files lie under their names, if there is one and each is what was submitted.
fn in_place(files: &[&InputFile]) -> Option<PathBuf> {
    let mut root: Option<PathBuf> = None;
    for file in files {
        let path = file.path.as_ref()?;
        let name = relative(&file.name).ok()?;
        let found = path.ancestors().nth(name.components().count())?.to_path_buf();
        if found.join(&name) != *path || root.as_ref().is_some_and(|root| *root != found) || !lies_there(file)
        {
            return None;
        }
        root = Some(found);
    }
    root
}

/// Whether a folder holds no data besides the job's; a single file always is.
fn is_whole(spec: &JobSpec, root: &Path, files: &[&InputFile]) -> bool {
    if !spec.calibration_is_folder {
        return true;
    }
    DataFiles::list(root, spec.dataset.samples).is_ok_and(|found| found.files.len() == files.len())
}

/// What cannot be read counts for nothing.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_below(&entry.path()),
        Ok(found) if is_only_link(&found) => found.len(),
        _ => 0,
    };
    entries.flatten().map(bytes).sum()
}

#[cfg(unix)]
fn is_only_link(file: &fs::Metadata) -> bool {
    std::os::unix::fs::MetadataExt::nlink(file) == 1
}

#[cfg(not(unix))]
fn is_only_link(_: &fs::Metadata) -> bool {
    true
}

fn lies_there(file: &InputFile) -> bool {
    let Some(path) = file.path.as_ref().filter(|path| path.is_absolute()) else { return false };
    let plain = fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == file.size);
    plain
        && FileRecord::of(path, path.as_path()).is_ok_and(|found| found.blake3 == file.hash.to_hex().as_str())
}

/// Where a file comes from.
enum Origin {
    /// Nobody changes it: a link will do.
    Artefact(PathBuf),
    /// The user may change it.
    User(PathBuf),
}

impl Origin {
    fn bring_to(&self, target: &Path) -> io::Result<()> {
        let from = match self {
            // Across file systems a link is refused.
            Self::Artefact(from) if fs::hard_link(from, target).is_ok() => return Ok(()),
            Self::Artefact(from) | Self::User(from) => from,
        };
        fs::copy(from, target)?;
        fs::File::open(target)?.sync_all()
    }
}

fn origin(artefacts: &Artefacts, file: &InputFile) -> Result<Origin, CoordinatorError> {
    if artefacts.contains(&file.hash) {
        artefacts.verify(&file.hash)?;
        return Ok(Origin::Artefact(artefacts.path(&file.hash)));
    }
    match &file.path {
        Some(path) if lies_there(file) => Ok(Origin::User(path.clone())),
        _ => Err(CoordinatorError::BadInput(format!(
            "input `{}`: neither was it uploaded nor is it where it was submitted from; submit the job again",
            file.name
        ))),
    }
}
