//! The carry store: live tensors in memory up to a budget, beyond it in files.
//!
//! The budget is a hard limit on the bytes the store keeps resident; what is on a device counts for nothing. When a tensor does not fit, the oldest go to disk
//! first (a shard's next segment is furthest away for what was put longest ago); a tensor larger than the whole budget
//! goes straight to disk. Files live in a folder of their own, removed with the store.
//! Not here: the files' format (`file`), which tensors are live (`model::cut`).

use super::file::{self, Shape};
use super::packed::Carried;
use crate::error::ExecError;
use halfstep_model::Tensor;
use halfstep_model::decoder::CarryPrecision;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tempfile::TempDir;

/// Which of the two models computed a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// The original model.
    FullPrecision,
    /// The model whose earlier layers are quantized.
    Quantized,
}

/// Names one live tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CarryKey {
    /// The range of stages whose streams it belongs to.
    pub lane: u32,
    /// Whose.
    pub stream: Stream,
    /// Its name in the model.
    pub tensor: String,
    /// The shard.
    pub shard: u32,
}

/// Where the bytes are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CarryUse {
    /// Bytes in memory now.
    pub resident: usize,
    /// The most that was ever in memory; never above the budget.
    pub peak: usize,
    /// Bytes written to files so far.
    pub spilled: u64,
}

/// Thread-safe store of live tensors.
#[derive(Debug)]
pub struct CarryStore {
    budget: usize,
    spill_dir: PathBuf,
    precision: CarryPrecision,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    held: HashMap<CarryKey, Held>,
    /// Resident tensors that have bytes, oldest first.
    ages: BTreeMap<u64, CarryKey>,
    next: u64,
    usage: CarryUse,
    /// Made when the first file is.
    folder: Option<TempDir>,
}

#[derive(Debug, Clone)]
enum Held {
    Memory { age: u64, kept: Carried },
    File { path: PathBuf, shape: Shape },
}

impl CarryStore {
    /// A store that keeps at most `budget` bytes in memory and the rest in a new folder inside `spill_dir`, which is
    /// made when first needed.
    pub fn new(budget: usize, spill_dir: impl Into<PathBuf>) -> Self {
        Self::with_precision(budget, spill_dir, CarryPrecision::F32)
    }

    /// The same; with `Bf16`, f32 tensors whose values are all bfloat16 ([`round_to_bf16`](crate::round_to_bf16)) take
    /// half the bytes, in memory and on disk, and come back as they were. Others are kept as they are.
    pub fn with_precision(budget: usize, spill_dir: impl Into<PathBuf>, precision: CarryPrecision) -> Self {
        Self { budget, spill_dir: spill_dir.into(), precision, inner: Mutex::default() }
    }

    /// Keeps a tensor; replaces one of the same key.
    ///
    /// # Errors
    /// `Storage` if something must go to disk and cannot (disk full): then the new tensor is not kept, everything
    /// else is, and no partial file is left.
    pub fn put(&self, key: CarryKey, tensor: Arc<Tensor>) -> Result<(), ExecError> {
        self.put_carried(key, Carried::new(tensor, self.precision))
    }

    /// [`Self::put`] of what another store, or a session, has made ready.
    ///
    /// # Errors
    /// The same.
    pub fn put_carried(&self, key: CarryKey, kept: Carried) -> Result<(), ExecError> {
        self.put_locked(&mut self.lock(), key, kept)
    }

    fn put_locked(&self, inner: &mut Inner, key: CarryKey, kept: Carried) -> Result<(), ExecError> {
        let bytes = kept.bytes();
        inner.remove(&key);
        if bytes > self.budget {
            return self.spill(inner, key, &kept);
        }
        while inner.usage.resident > self.budget - bytes {
            self.spill_oldest(inner)?;
        }
        inner.keep(key, kept, bytes);
        Ok(())
    }

    /// A kept tensor. One that is in a file is read for the caller and stays in the file.
    ///
    /// # Errors
    /// `Missing`; `Storage`, `Damaged` from the file.
    pub fn get(&self, key: &CarryKey) -> Result<Arc<Tensor>, ExecError> {
        self.carried(key)?.tensor()
    }

    /// A kept tensor as it is kept; as [`Self::get`].
    ///
    /// # Errors
    /// The same.
    pub fn carried(&self, key: &CarryKey) -> Result<Carried, ExecError> {
        // Copied out, so that neither unpacking nor reading keeps others waiting.
        let held = self.lock().held.get(key).cloned();
        match held {
            Some(Held::Memory { kept, .. }) => Ok(kept),
            Some(Held::File { path, shape }) => file::read(&path, &shape),
            None => Err(ExecError::Missing { name: key.tensor.clone() }),
        }
    }

    /// Takes everything that is on a device to the host: its memory is needed for something else.
    ///
    /// # Errors
    /// `Device`; as [`Self::put`].
    pub fn leave_devices(&self) -> Result<(), ExecError> {
        let away = |held: &Held| matches!(held, Held::Memory { kept: Carried::OnDevice(_), .. });
        let keys: Vec<CarryKey> = {
            let inner = self.lock();
            inner.held.iter().filter(|(_, held)| away(held)).map(|(key, _)| key.clone()).collect()
        };
        for key in keys {
            let Ok(Carried::OnDevice(there)) = self.carried(&key) else { continue };
            let here = Carried::OnDevice(there.clone()).on_host()?;
            let mut inner = self.lock();
            // It may have been dropped or replaced meanwhile.
            let same = |held: &Held| matches!(held, Held::Memory { kept: Carried::OnDevice(now), .. } if Arc::ptr_eq(&now.values, &there.values));
            if inner.held.get(&key).is_some_and(same) {
                self.put_locked(&mut inner, key, here)?;
            }
        }
        Ok(())
    }

    /// Whether a tensor is kept.
    pub fn contains(&self, key: &CarryKey) -> bool {
        self.lock().held.contains_key(key)
    }

    /// Drops a tensor and its file; harmless if it is not there.
    pub fn remove(&self, key: &CarryKey) {
        self.lock().remove(key);
    }

    /// Drops every tensor of a lane's shard that `keep` refuses.
    pub fn retain(&self, lane: u32, shard: u32, keep: impl Fn(&CarryKey) -> bool) {
        let mut inner = self.lock();
        let dead = inner.held.keys().filter(|key| (key.lane, key.shard) == (lane, shard) && !keep(key));
        for key in dead.cloned().collect::<Vec<_>>() {
            inner.remove(&key);
        }
    }

    /// Where the bytes are.
    pub fn usage(&self) -> CarryUse {
        self.lock().usage
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change below is complete before anything in it can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spill_oldest(&self, inner: &mut Inner) -> Result<(), ExecError> {
        let oldest = inner.ages.first_key_value().map(|(_, key)| key.clone());
        let key =
            oldest.ok_or_else(|| ExecError::Internal("carry: resident bytes without a tensor".into()))?;
        let Some(Held::Memory { kept, .. }) = inner.held.get(&key) else {
            return Err(ExecError::Internal("carry: an age without a resident tensor".into()));
        };
        let kept = kept.clone();
        self.spill(inner, key, &kept)
    }

    /// Writes the file first: if that fails, what was resident stays so.
    fn spill(&self, inner: &mut Inner, key: CarryKey, kept: &Carried) -> Result<(), ExecError> {
        let path = self.next_path(inner)?;
        file::write(&path, kept)?;
        inner.remove(&key);
        inner.usage.spilled += kept.bytes() as u64;
        inner.held.insert(key, Held::File { path, shape: Shape::of(kept) });
        Ok(())
    }

    fn next_path(&self, inner: &mut Inner) -> Result<PathBuf, ExecError> {
        let folder = match inner.folder.take() {
            Some(folder) => folder,
            None => self.make_folder()?,
        };
        inner.next += 1;
        let path = folder.path().join(format!("{:08}.carry", inner.next));
        inner.folder = Some(folder);
        Ok(path)
    }

    fn make_folder(&self) -> Result<TempDir, ExecError> {
        let fail = |source| ExecError::Storage {
            path: self.spill_dir.clone(),
            action: "make a carry folder in",
            source,
        };
        std::fs::create_dir_all(&self.spill_dir).map_err(fail)?;
        tempfile::Builder::new().prefix("halfstep-carry-").tempdir_in(&self.spill_dir).map_err(fail)
    }
}

impl Inner {
    fn keep(&mut self, key: CarryKey, kept: Carried, bytes: usize) {
        self.next += 1;
        let age = self.next;
        // What takes no memory of the host is never in its way.
        if bytes > 0 {
            self.ages.insert(age, key.clone());
        }
        self.held.insert(key, Held::Memory { age, kept });
        self.usage.resident += bytes;
        self.usage.peak = self.usage.peak.max(self.usage.resident);
    }

    fn remove(&mut self, key: &CarryKey) {
        match self.held.remove(key) {
            Some(Held::Memory { age, kept }) => {
                self.ages.remove(&age);
                self.usage.resident -= kept.bytes();
            }
            // A file that cannot be removed now goes with the folder.
            Some(Held::File { path, .. }) => drop(std::fs::remove_file(path)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_model::Data;
    use std::fs;
    use std::path::Path;

    fn tensor(values: usize, first: f32) -> Arc<Tensor> {
        Arc::new(Tensor::f32(vec![values], (0..values).map(|i| first + i as f32).collect()).unwrap())
    }

    fn key(name: &str) -> CarryKey {
        CarryKey { lane: 0, stream: Stream::FullPrecision, tensor: name.into(), shard: 0 }
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        let folders = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
        folders.flat_map(|folder| fs::read_dir(folder).unwrap().map(|e| e.unwrap().path())).collect()
    }

    #[test]
    fn budget_is_obeyed_at_its_edge() {
        budget_edge(CarryPrecision::F32, 40);
    }

    #[test]
    fn budget_counts_halves_at_its_edge() {
        budget_edge(CarryPrecision::Bf16, 20);
    }

    /// `bytes`: of ten values, all of which are bfloat16.
    fn budget_edge(precision: CarryPrecision, bytes: usize) {
        for (budget, resident) in [
            (2 * bytes - 1, bytes),
            (2 * bytes, 2 * bytes),
            (2 * bytes + 1, 2 * bytes),
            (bytes - 1, 0),
            (bytes, bytes),
            (bytes + 1, bytes),
            (0, 0),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let store = CarryStore::with_precision(budget, dir.path(), precision);
            store.put(key("a"), tensor(10, 0.0)).unwrap();
            store.put(key("b"), tensor(10, 100.0)).unwrap();
            let usage = store.usage();
            assert_eq!(usage.resident, resident, "budget {budget}");
            assert_eq!(usage.spilled, (2 * bytes - resident) as u64, "budget {budget}");
            assert!(usage.peak <= budget);
            assert_eq!(store.get(&key("a")).unwrap(), tensor(10, 0.0));
            assert_eq!(store.get(&key("b")).unwrap(), tensor(10, 100.0));
            store.remove(&key("a"));
            store.remove(&key("b"));
            assert_eq!((store.usage().resident, files(dir.path()).len()), (0, 0));
            drop(store);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the folder goes with the store");
        }
    }

    #[test]
    fn the_oldest_goes_first_and_a_replaced_tensor_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::new(100, dir.path());
        for name in ["a", "b", "a", "c"] {
            store.put(key(name), tensor(10, 0.0)).unwrap();
        }
        let spilled = |name: &str| matches!(store.lock().held[&key(name)], Held::File { .. });
        assert_eq!((spilled("a"), spilled("b"), spilled("c")), (false, true, false));
        assert_eq!(store.usage().resident, 80);
    }

    #[test]
    fn what_halves_cannot_hold_is_kept_whole() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::with_precision(60, dir.path(), CarryPrecision::Bf16);
        store.put(key("whole"), tensor(10, 0.1)).unwrap();
        store.put(key("halves"), tensor(10, 0.0)).unwrap();
        assert_eq!((store.usage().resident, store.usage().spilled), (60, 0));
        let lengths = Arc::new(Tensor::new(vec![2], Data::I64(vec![3, 1 << 40])).unwrap());
        store.put(key("lengths"), Arc::clone(&lengths)).unwrap();
        assert_eq!((store.usage().resident, store.usage().spilled), (36, 40));
        assert_eq!(store.get(&key("whole")).unwrap(), tensor(10, 0.1));
        assert_eq!(store.get(&key("halves")).unwrap(), tensor(10, 0.0));
        assert_eq!(store.get(&key("lengths")).unwrap(), lengths);
    }

    #[test]
    fn every_element_type_survives_a_file() {
        for precision in [CarryPrecision::F32, CarryPrecision::Bf16] {
            survive_a_file(precision);
        }
    }

    fn survive_a_file(precision: CarryPrecision) {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::with_precision(0, dir.path(), precision);
        let all = [
            Data::F32(vec![f32::NAN, -0.0]),
            Data::F32(vec![f32::from_bits(0x7f80_0001), 0.1]),
            Data::F64(vec![f64::MIN, 1e-300]),
            Data::I64(vec![i64::MIN, 7]),
            Data::I32(vec![i32::MIN, 7]),
            Data::U8(vec![255, 0]),
            Data::I8(vec![-128, 127]),
            Data::Bool(vec![true, false]),
        ];
        for data in all {
            let tensor = Arc::new(Tensor::new(vec![1, 2], data).unwrap());
            store.put(key("t"), Arc::clone(&tensor)).unwrap();
            let back = store.get(&key("t")).unwrap();
            assert_eq!((&back.shape, back.data.to_le_bytes()), (&tensor.shape, tensor.data.to_le_bytes()));
        }
        // More than one conversion buffer, exactly one, none; and a scalar, by shape.
        for values in [8193, 8192, 0] {
            store.put(key("t"), tensor(values, 1.0)).unwrap();
            assert_eq!(store.get(&key("t")).unwrap(), tensor(values, 1.0));
        }
        let scalar = Arc::new(Tensor::f32(vec![], vec![3.0]).unwrap());
        store.put(key("t"), Arc::clone(&scalar)).unwrap();
        assert_eq!(store.get(&key("t")).unwrap(), scalar);
    }

    #[test]
    fn damage_anywhere_in_a_file_is_found() {
        for precision in [CarryPrecision::F32, CarryPrecision::Bf16] {
            find_damage(precision);
        }
    }

    fn find_damage(precision: CarryPrecision) {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::with_precision(0, dir.path(), precision);
        store.put(key("t"), tensor(5, 1.0)).unwrap();
        let path = files(dir.path()).remove(0);
        let good = fs::read(&path).unwrap();
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 0x40;
            fs::write(&path, &bad).unwrap();
            assert!(matches!(store.get(&key("t")), Err(ExecError::Damaged { .. })), "byte {index}");
        }
        for bad in [&good[..good.len() - 1], &good[..10], &[good.as_slice(), b"x"].concat()] {
            fs::write(&path, bad).unwrap();
            assert!(matches!(store.get(&key("t")), Err(ExecError::Damaged { .. })));
        }
        fs::write(&path, &good).unwrap();
        assert_eq!(store.get(&key("t")).unwrap(), tensor(5, 1.0));
    }

    #[test]
    fn a_failed_write_keeps_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let store = CarryStore::new(40, dir.path());
        for name in ["first", "a"] {
            store.put(key(name), tensor(10, 0.0)).unwrap();
        }
        // Without its folder no file can be written, whoever runs the test.
        fs::remove_dir_all(files(dir.path())[0].parent().unwrap()).unwrap();
        let error = store.put(key("b"), tensor(10, 0.0)).unwrap_err();
        assert!(error.to_string().contains("write carry file"), "{error}");
        assert_eq!(store.get(&key("a")).unwrap(), tensor(10, 0.0));
        assert!(matches!(store.get(&key("b")), Err(ExecError::Missing { .. })));
        assert_eq!(store.usage().resident, 40);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_and_leaves_no_file() {
        let full = Path::new("/dev/full");
        assert!(full.exists(), "Linux has a device that is always full");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.carry");
        std::os::unix::fs::symlink(full, path.with_extension("part")).unwrap();
        let error = file::write(&path, &Carried::Whole(tensor(100_000, 0.0))).unwrap_err();
        let ExecError::Storage { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn retain_looks_at_one_shard_of_one_lane_only() {
        let store = CarryStore::new(1000, std::env::temp_dir());
        let at = |name: &str, lane, shard| CarryKey { lane, shard, ..key(name) };
        let all = [("a", 0, 0), ("b", 0, 0), ("a", 0, 1), ("a", 1, 0)];
        for (name, lane, shard) in all {
            store.put(at(name, lane, shard), tensor(1, 0.0)).unwrap();
        }
        store.retain(0, 0, |key| key.tensor == "b");
        let left = all.map(|(name, lane, shard)| store.contains(&at(name, lane, shard)));
        assert_eq!(left, [false, true, true, true]);
        assert_eq!(store.usage().resident, 12);
    }
}
