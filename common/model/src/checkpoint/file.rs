//! One weight file, read piece by piece: what nobody has asked for is never in memory, and what was read goes when its
//! reader is done with it.
//!
//! Read rather than mapped: pages of a map count as the process's own until the system takes them away, and a file that
//! shrinks under a map kills the process. Not here: what the header means (`header`).

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use super::header::{self, Entry};
use crate::ModelError;

/// An open file of a known length.
#[derive(Debug)]
pub(super) struct WeightFile {
    path: PathBuf,
    bytes: usize,
    /// Its position belongs to whoever reads.
    file: Mutex<File>,
}

impl WeightFile {
    /// # Errors
    /// `Io`, also for what is no regular file.
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |action| move |source| ModelError::Io { path: path.to_owned(), action, source };
        let file = File::open(path).map_err(io("open"))?;
        let metadata = file.metadata().map_err(io("open"))?;
        let bytes = usize::try_from(metadata.len()).map_err(|e| io("read")(std::io::Error::other(e)))?;
        if !metadata.is_file() {
            return Err(io("read")(std::io::Error::other("it is not a regular file")));
        }
        Ok(Self { path: path.to_owned(), bytes, file: Mutex::new(file) })
    }

    /// Its tensors, as the header lists them.
    ///
    /// # Errors
    /// `Io`; `InFile` with what breaks the format.
    pub(super) fn entries(&self) -> Result<Vec<Entry>, ModelError> {
        let in_file = |source| ModelError::InFile { path: self.path.clone(), source: Box::new(source) };
        let first = self.read(0..self.bytes.min(header::LENGTH_BYTES))?;
        let json = header::place(&first, self.bytes).map_err(in_file)?;
        header::entries(&self.read(json.clone())?, json.end, self.bytes).map_err(in_file)
    }

    /// A stretch of its bytes.
    ///
    /// # Errors
    /// `Io`, also if the file has been cut off since it was opened.
    pub(super) fn read(&self, range: Range<usize>) -> Result<Bytes, ModelError> {
        let io = |source| ModelError::Io { path: self.path.clone(), action: "read", source };
        let length = range.len();
        let mut bytes = Vec::with_capacity(length);
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(range.start as u64)).map_err(io)?;
        (&mut *file).take(length as u64).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() < length {
            let (end, was) = (range.start + bytes.len(), self.bytes);
            let problem = format!("it ends at byte {end}, but had {was} bytes when it was opened");
            return Err(io(std::io::Error::other(problem)));
        }
        Ok(bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_cut_off_since_is_named_with_its_lengths() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w");
        std::fs::write(&path, [1, 2, 3, 4, 5]).unwrap();
        let file = WeightFile::open(&path).unwrap();
        assert_eq!(file.read(1..4).unwrap().as_ref(), [2, 3, 4]);
        assert!(file.read(5..5).unwrap().is_empty());
        File::options().write(true).open(&path).unwrap().set_len(3).unwrap();
        let error = file.read(1..4).unwrap_err();
        assert!(error.is_io());
        assert!(error.to_string().contains("ends at byte 3, but had 5 bytes"), "{error}");
        assert!(WeightFile::open(folder.path()).unwrap_err().to_string().contains("regular"));
    }
}
