//! The carry store: live tensors in memory up to a budget, beyond it in files.
//!
//! The budget is a hard limit on the bytes the store keeps resident. When a tensor does not fit, the oldest go to disk
//! first (a shard's next segment is furthest away for what was put longest ago); a tensor larger than the whole budget
//! goes straight to disk. Files live in a folder of their own, removed with the store.
//! Not here: the files' format (`file`), which tensors are live (`program`).

use super::file::{self, Shape};
use crate::error::ExecError;
use halfstep_model::Tensor;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which of the two models computed a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// The original weights.
    FullPrecision,
    /// The weights rounded so far.
    Quantized,
}

impl Stream {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::FullPrecision => "full-precision",
            Self::Quantized => "quantized",
        }
    }
}

/// Names one live tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CarryKey {
    /// Whose.
    pub stream: Stream,
    /// Its name in the model.
    pub tensor: String,
    /// The shard.
    pub shard: u32,
    /// The batch within the shard, from 0.
    pub part: u32,
}

impl CarryKey {
    /// Part 0.
    pub fn new(stream: Stream, tensor: impl Into<String>, shard: u32) -> Self {
        Self { stream, tensor: tensor.into(), shard, part: 0 }
    }

    /// The same tensor of another batch of the shard.
    #[must_use]
    pub fn part(self, part: u32) -> Self {
        Self { part, ..self }
    }
}

impl<T: Into<String>> From<(Stream, T, u32)> for CarryKey {
    fn from((stream, tensor, shard): (Stream, T, u32)) -> Self {
        Self::new(stream, tensor, shard)
    }
}

/// Where the bytes are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CarryStats {
    /// In memory now.
    pub resident_bytes: u64,
    /// The most that was ever in memory; never above the budget.
    pub resident_bytes_peak: u64,
    /// In files now.
    pub spilled_bytes: u64,
    /// Ever written to files.
    pub spilled_bytes_total: u64,
}

/// Thread-safe store of live tensors.
#[derive(Debug)]
pub struct CarryStore {
    budget_bytes: u64,
    folder: tempfile::TempDir,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<CarryKey, Entry>,
    /// Resident entries, oldest first.
    ages: BTreeMap<u64, CarryKey>,
    next: u64,
    stats: CarryStats,
}

#[derive(Debug)]
enum Entry {
    Resident { age: u64, tensor: Arc<Tensor> },
    Spilled { path: PathBuf, shape: Shape, bytes: u64 },
}

impl CarryStore {
    /// A store that keeps at most `budget_bytes` in memory and the rest in a new folder inside `spill_dir`.
    ///
    /// # Errors
    /// `Io` if that folder cannot be made.
    pub fn new(budget_bytes: u64, spill_dir: impl AsRef<Path>) -> Result<Self, ExecError> {
        let spill_dir = spill_dir.as_ref();
        let folder = tempfile::Builder::new().prefix("halfstep-carry-").tempdir_in(spill_dir);
        let folder = folder.map_err(|source| ExecError::Io {
            path: spill_dir.to_path_buf(),
            action: "make a carry folder in",
            source,
        })?;
        Ok(Self { budget_bytes, folder, inner: Mutex::default() })
    }

    /// Keeps a tensor; replaces one of the same key.
    ///
    /// # Errors
    /// `Io` if something must go to disk and cannot (disk full): then the new tensor is not kept and no partial
    /// file is left.
    pub fn put(&self, key: impl Into<CarryKey>, tensor: Tensor) -> Result<(), ExecError> {
        self.put_shared(key, Arc::new(tensor))
    }

    /// [`CarryStore::put`] without copying.
    ///
    /// # Errors
    /// As [`CarryStore::put`].
    pub fn put_shared(&self, key: impl Into<CarryKey>, tensor: Arc<Tensor>) -> Result<(), ExecError> {
        let (key, bytes) = (key.into(), tensor.bytes() as u64);
        let mut inner = self.lock();
        inner.remove(&key);
        if bytes > self.budget_bytes {
            return self.spill(&mut inner, key, &tensor);
        }
        while inner.stats.resident_bytes > self.budget_bytes - bytes {
            self.evict_oldest(&mut inner)?;
        }
        inner.insert(key, tensor, bytes);
        Ok(())
    }

    /// A kept tensor. One that is in a file is read for the caller and stays in the file.
    ///
    /// # Errors
    /// `Missing`; `Io`, `Corrupt` from the file.
    pub fn get(&self, key: &CarryKey) -> Result<Arc<Tensor>, ExecError> {
        let (path, shape) = match self.lock().entries.get(key) {
            Some(Entry::Resident { tensor, .. }) => return Ok(Arc::clone(tensor)),
            Some(Entry::Spilled { path, shape, .. }) => (path.clone(), shape.clone()),
            None => return Err(missing(key)),
        };
        Ok(Arc::new(file::read(&path, &key.tensor, &shape)?))
    }

    /// Whether a tensor is kept.
    pub fn contains(&self, key: &CarryKey) -> bool {
        self.lock().entries.contains_key(key)
    }

    /// Drops a tensor; harmless if it is not there.
    pub fn remove(&self, key: &CarryKey) {
        self.lock().remove(key);
    }

    /// Drops every tensor of a shard that `keep` refuses.
    pub fn retain(&self, shard: u32, keep: impl Fn(&CarryKey) -> bool) {
        let mut inner = self.lock();
        let dead = inner.entries.keys().filter(|key| key.shard == shard && !keep(key));
        for key in dead.cloned().collect::<Vec<_>>() {
            inner.remove(&key);
        }
    }

    /// How many parts of a tensor are kept, counted from 0 without a gap.
    pub fn parts(&self, stream: Stream, tensor: &str, shard: u32) -> u32 {
        let inner = self.lock();
        let key = CarryKey::new(stream, tensor, shard);
        (0..).find(|part| !inner.entries.contains_key(&key.clone().part(*part))).unwrap_or(u32::MAX)
    }

    /// Where the bytes are.
    pub fn stats(&self) -> CarryStats {
        self.lock().stats
    }

    /// The limit on resident bytes.
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change below is complete before anything in it can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn evict_oldest(&self, inner: &mut Inner) -> Result<(), ExecError> {
        let oldest = inner.ages.first_key_value().map(|(_, key)| key.clone());
        let key = oldest.ok_or_else(|| ExecError::Internal("carry: resident bytes without a tensor".into()))?;
        let Some(Entry::Resident { tensor, .. }) = inner.entries.get(&key) else {
            return Err(ExecError::Internal("carry: an age without a resident tensor".into()));
        };
        let tensor = Arc::clone(tensor);
        self.spill(inner, key, &tensor)
    }

    /// Writes the file first: if that fails, what was resident stays so.
    fn spill(&self, inner: &mut Inner, key: CarryKey, tensor: &Tensor) -> Result<(), ExecError> {
        let path = self.folder.path().join(format!("{:08}.carry", inner.next));
        inner.next += 1;
        file::write(&path, tensor)?;
        inner.remove(&key);
        let bytes = tensor.bytes() as u64;
        inner.stats.spilled_bytes += bytes;
        inner.stats.spilled_bytes_total += bytes;
        inner.entries.insert(key, Entry::Spilled { path, shape: Shape::of(tensor), bytes });
        Ok(())
    }
}

fn missing(key: &CarryKey) -> ExecError {
    ExecError::Missing {
        tensor: key.tensor.clone(),
        shard: key.shard,
        part: key.part,
        stream: key.stream.name(),
    }
}

impl Inner {
    fn insert(&mut self, key: CarryKey, tensor: Arc<Tensor>, bytes: u64) {
        let age = self.next;
        self.next += 1;
        self.ages.insert(age, key.clone());
        self.entries.insert(key, Entry::Resident { age, tensor });
        self.stats.resident_bytes += bytes;
        self.stats.resident_bytes_peak = self.stats.resident_bytes_peak.max(self.stats.resident_bytes);
    }

    fn remove(&mut self, key: &CarryKey) {
        match self.entries.remove(key) {
            Some(Entry::Resident { age, tensor }) => {
                self.ages.remove(&age);
                self.stats.resident_bytes -= tensor.bytes() as u64;
            }
            Some(Entry::Spilled { path, bytes, .. }) => {
                // The folder goes with the store: a file that cannot be removed now is not lost track of.
                let _ = std::fs::remove_file(path);
                self.stats.spilled_bytes -= bytes;
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_model::Data;
    use std::fs;

    fn tensor(values: usize, first: f32) -> Tensor {
        Tensor::f32(vec![values], (0..values).map(|i| first + i as f32).collect()).unwrap()
    }

    fn key(name: &str) -> CarryKey {
        (Stream::FullPrecision, name, 0).into()
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        let folders = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
        folders.flat_map(|folder| fs::read_dir(folder).unwrap().map(|e| e.unwrap().path())).collect()
    }

    #[test]
    fn budget_is_obeyed_at_its_edge() {
        let bytes = 40;
        for (budget, resident, spilled) in [
            (2 * bytes - 1, bytes, bytes),
            (2 * bytes, 2 * bytes, 0),
            (2 * bytes + 1, 2 * bytes, 0),
            (bytes - 1, 0, 2 * bytes),
            (bytes, bytes, bytes),
            (0, 0, 2 * bytes),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let store = CarryStore::new(budget, dir.path()).unwrap();
            store.put(key("a"), tensor(10, 0.0)).unwrap();
            store.put(key("b"), tensor(10, 100.0)).unwrap();
            let stats = store.stats();
            assert_eq!((stats.resident_bytes, stats.spilled_bytes), (resident, spilled), "budget {budget}");
            assert!(stats.resident_bytes_peak <= budget);
            assert_eq!(*store.get(&key("a")).unwrap(), tensor(10, 0.0));
            assert_eq!(*store.get(&key("b")).unwrap(), tensor(10, 100.0));
            store.remove(&key("a"));
            store.remove(&key("b"));
            let stats = store.stats();
            assert_eq!((stats.resident_bytes, stats.spilled_bytes, files(dir.path()).len()), (0, 0, 0));
        }
    }

    #[test]
    fn the_oldest_goes_first_and_a_replaced_tensor_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::new(100, dir.path()).unwrap();
        for name in ["a", "b", "a", "c"] {
            store.put(key(name), tensor(10, 0.0)).unwrap();
        }
        let spilled = |name: &str| matches!(store.lock().entries[&key(name)], Entry::Spilled { .. });
        assert_eq!((spilled("a"), spilled("b"), spilled("c")), (false, true, false));
        assert_eq!(store.stats().resident_bytes, 80);
    }

    #[test]
    fn every_element_type_survives_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::new(0, dir.path()).unwrap();
        let many = CHUNK_AND_A_BIT;
        let all = [
            Data::F32(vec![f32::NAN, -0.0]),
            Data::F64(vec![f64::MIN, 1e-300]),
            Data::I64(vec![i64::MIN, 7]),
            Data::I32(vec![i32::MIN, 7]),
            Data::U8(vec![255, 0]),
            Data::I8(vec![-128, 127]),
            Data::Bool(vec![true, false]),
        ];
        for data in all {
            let tensor = Tensor::new(vec![1, 2], data).unwrap();
            store.put(key("t"), tensor.clone()).unwrap();
            let back = store.get(&key("t")).unwrap();
            assert_eq!((back.shape.clone(), back.data.to_le_bytes()), (tensor.shape, tensor.data.to_le_bytes()));
        }
        for tensor in [tensor(many, 1.0), tensor(0, 0.0), Tensor::f32(vec![], vec![3.0]).unwrap()] {
            store.put(key("t"), tensor.clone()).unwrap();
            assert_eq!(*store.get(&key("t")).unwrap(), tensor);
        }
    }

    const CHUNK_AND_A_BIT: usize = 8193;

    #[test]
    fn damage_anywhere_in_a_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::new(0, dir.path()).unwrap();
        store.put(key("t"), tensor(5, 1.0)).unwrap();
        let path = files(dir.path()).remove(0);
        let good = fs::read(&path).unwrap();
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 0x40;
            fs::write(&path, &bad).unwrap();
            let error = store.get(&key("t")).unwrap_err();
            assert!(matches!(&error, ExecError::Corrupt { tensor, .. } if tensor == "t"), "byte {index}: {error}");
        }
        for bad in [&good[..good.len() - 1], &good[..10], &[good.as_slice(), b"x"].concat()] {
            fs::write(&path, bad).unwrap();
            assert!(matches!(store.get(&key("t")).unwrap_err(), ExecError::Corrupt { .. }));
        }
        fs::write(&path, &good).unwrap();
        assert_eq!(*store.get(&key("t")).unwrap(), tensor(5, 1.0));
    }

    #[test]
    fn a_failed_write_keeps_what_was_there_and_leaves_no_partial_file() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::new(40, dir.path()).unwrap();
        store.put(key("a"), tensor(10, 0.0)).unwrap();
        // Without its folder no file can be written, whoever runs the test.
        fs::remove_dir(store.folder.path()).unwrap();
        let error = store.put(key("b"), tensor(10, 0.0)).unwrap_err();
        assert!(error.to_string().contains("write carry file"), "{error}");
        assert_eq!(*store.get(&key("a")).unwrap(), tensor(10, 0.0));
        assert!(matches!(store.get(&key("b")).unwrap_err(), ExecError::Missing { .. }));
        assert_eq!(store.stats().resident_bytes, 40);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_and_leaves_no_file() {
        let full = Path::new("/dev/full");
        if !full.exists() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.carry");
        std::os::unix::fs::symlink(full, path.with_extension("part")).unwrap();
        let error = file::write(&path, &tensor(100_000, 0.0)).unwrap_err();
        assert!(matches!(&error, ExecError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_folder_goes_with_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::new(0, dir.path()).unwrap();
        store.put(key("a"), tensor(10, 0.0)).unwrap();
        assert_eq!(files(dir.path()).len(), 1);
        drop(store);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn retain_looks_at_one_shard_and_parts_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::new(1000, dir.path()).unwrap();
        for (shard, part) in [(0, 0), (0, 1), (1, 0)] {
            store.put(CarryKey::new(Stream::Quantized, "t", shard).part(part), tensor(1, 0.0)).unwrap();
        }
        assert_eq!(store.parts(Stream::Quantized, "t", 0), 2);
        store.retain(0, |key| key.part == 1);
        assert_eq!(store.parts(Stream::Quantized, "t", 0), 0);
        assert_eq!(store.parts(Stream::Quantized, "t", 1), 1);
        assert_eq!(store.stats().resident_bytes, 8);
    }
}
