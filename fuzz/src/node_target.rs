//! What nodes fetch from each other and read back from their disks: slices of sums and means, sample rows, carries.
//!
//! A reader knows the form of what it asked for; here the first bytes choose it. Whatever is read is put to its use.

use anyhow::Result;
use bytes::Bytes;
use halfstep_agent::{CarryPlace, decode_carry, encode_carry};
use halfstep_exec::{
    CarryKey, CarryStore, Exponents, LayerMeans, SampleRows, ShardSamples, SliceForm, Stream, SumSlice,
    UseSlice, decode_means, decode_samples, decode_sums, encode_means, encode_samples, encode_sums,
};
use halfstep_model::{Data, Tensor};
use halfstep_work::{RangeId, SegmentId, ShardId};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const PLACE: CarryPlace = (RangeId(1), SegmentId(2), ShardId(3));
const SHARDS: [u32; 2] = [1, 4];

/// What is asked for: kind of blob, form of the layer, rows.
struct Asked {
    kind: u8,
    form: SliceForm,
    rows: std::ops::Range<usize>,
}

impl Asked {
    fn from(head: [u8; 2]) -> Self {
        let [kind, form] = head.map(usize::from);
        let (cols, groups) = (1 + form % 5, 1 + form / 5 % 2);
        let form = SliceForm { cols, groups, uses: 1 + form / 10 % 2, differs: form / 20 % 2 == 1 };
        let last = form.cols * form.groups;
        let rows = if kind / 3 % 2 == 0 { 0..last } else { 0..last.div_ceil(2) };
        Self { kind: (kind % 3) as u8, form, rows }
    }
}

/// Reads a blob of a layer's statistics; the first two bytes say what was asked for.
pub(crate) fn slice(data: &[u8]) -> Result<()> {
    let Some((head, blob)) = data.split_first_chunk::<2>() else { return Ok(()) };
    let Asked { kind, form, rows } = Asked::from(*head);
    match kind {
        0 => sums(blob, &form, rows),
        1 => means(blob, &form, rows),
        _ => samples(blob, &form),
    }
    Ok(())
}

fn sums(blob: &[u8], form: &SliceForm, rows: std::ops::Range<usize>) {
    let Ok(read) = decode_sums(blob, form, rows.clone()) else { return };
    let again = decode_sums(&encode_sums(read.as_ref()), form, rows).expect("what was written can be read");
    assert_eq!(again, read);
    let Some(mut sum) = read else { return };
    sum.add(&sum.clone()).expect("a slice has its own form");
    sum.means().expect("uses that were read are of one form");
}

fn means(blob: &[u8], form: &SliceForm, rows: std::ops::Range<usize>) {
    let Ok(read) = decode_means(blob, form, rows.clone()) else { return };
    let written = encode_means(&read);
    let again = decode_means(&written, form, rows).expect("what was written can be read");
    // Bytes: a NaN is not equal to itself.
    assert_eq!(encode_means(&again), written);
    let mut whole = LayerMeans::new(form.cols, form.groups);
    let rows = read.rows.clone();
    whole.place(std::sync::Arc::new(read)).expect("a slice of the form asked for has a place");
    let placed = whole.slice(rows).expect("its rows are in");
    assert_eq!(encode_means(&placed), written);
    drop(whole.complete(2));
}

fn samples(blob: &[u8], form: &SliceForm) {
    let Ok(read) = decode_samples(blob, form, &SHARDS) else { return };
    let whole =
        |rows: &SampleRows| rows.x_q.len() == rows.x_fp.len() && rows.x_q.len().is_multiple_of(form.cols);
    assert!(read.iter().flat_map(BTreeMap::values).flatten().all(whole), "rows of the width asked for");
    assert_eq!(encode_samples(&read), blob, "rows have one form on the wire");
}

/// Reads another node's carry.
pub(crate) fn carry(data: &[u8]) -> Result<()> {
    let Ok(read) = decode_carry(&Bytes::copy_from_slice(data), PLACE) else { return Ok(()) };
    let written = encode_carry(PLACE, &read)?;
    let again = decode_carry(&written, PLACE)?;
    assert_eq!(encode_carry(PLACE, &again)?, written);
    Ok(())
}

/// Puts the bytes where a spilled tensor was: they are refused, or are what was written.
pub(crate) fn spilled(data: &[u8]) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("halfstep-fuzz-").tempdir()?;
    let (store, path) = spill(folder.path())?;
    fs::write(path, data)?;
    if let Ok(read) = store.get(&key()) {
        assert_eq!(read.data.to_le_bytes(), tensor()?.data.to_le_bytes(), "a file that differs was believed");
    }
    Ok(())
}

fn key() -> CarryKey {
    CarryKey { lane: 0, stream: Stream::FullPrecision, tensor: "x".into(), shard: 0 }
}

fn tensor() -> Result<Tensor> {
    Ok(Tensor::new(vec![2, 3], Data::F32(vec![0.5, -1.0, 3.25, f32::NAN, 0.0, 9.0]))?)
}

/// A store without memory, and the file of the one tensor in it.
fn spill(folder: &Path) -> Result<(CarryStore, PathBuf)> {
    let store = CarryStore::new(0, folder);
    store.put(key(), Arc::new(tensor()?))?;
    let mut found = Vec::new();
    for own in fs::read_dir(folder)? {
        for file in fs::read_dir(own?.path())? {
            found.push(file?.path());
        }
    }
    let file = found.pop().ok_or_else(|| anyhow::anyhow!("no file in {}", folder.display()))?;
    Ok((store, file))
}

pub(crate) fn slices() -> Result<Vec<Vec<u8>>> {
    let mut seeds = Vec::new();
    // Forms with one and two uses, groups and streams.
    for form_byte in [0, 2, 7, 12, 22, 39] {
        for kind in 0..6u8 {
            let Asked { kind: what, form, rows } = Asked::from([kind, form_byte]);
            let blob = match what {
                0 => encode_sums(Some(&some_sums(&form, rows))),
                1 => encode_means(&some_sums(&form, rows).means()?),
                _ => encode_samples(&vec![some_samples(&form); form.uses]),
            };
            seeds.push([&[kind, form_byte], blob.as_ref()].concat());
        }
    }
    seeds.push([&[0, 0], encode_sums(None).as_ref()].concat());
    Ok(seeds)
}

fn some_sums(form: &SliceForm, rows: std::ops::Range<usize>) -> SumSlice {
    let lower: usize = rows.clone().map(|row| row % form.cols + 1).sum();
    let full = rows.len() * form.cols;
    let len = if form.differs { 2 * lower + full } else { lower };
    let exponents = Exponents { h: 20, cross: form.differs.then_some((-3, 0)) };
    let one = UseSlice { positions: 64, exponents, sums: (0..len as i64).map(|i| (i - 3) << 40).collect() };
    SumSlice { cols: form.cols, rows, uses: vec![one; form.uses] }
}

fn some_samples(form: &SliceForm) -> BTreeMap<u32, ShardSamples> {
    let rows =
        |count: usize| SampleRows { x_q: vec![0.5; count * form.cols], x_fp: vec![1.5; count * form.cols] };
    let shard =
        |shard: u32| (shard, (0..form.groups).map(|group| rows(group + shard as usize % 3)).collect());
    SHARDS.into_iter().map(shard).collect()
}

pub(crate) fn carries() -> Result<Vec<Vec<u8>>> {
    let whole = Arc::new(Tensor::new(vec![1, 2], Data::I64(vec![-7, 7]))?);
    let live = [
        (Stream::FullPrecision, "x".to_owned(), Arc::new(tensor()?)),
        (Stream::Quantized, "x".to_owned(), Arc::new(tensor()?)),
        (Stream::FullPrecision, "q/\u{fc}".to_owned(), whole),
    ];
    Ok(vec![encode_carry(PLACE, &live)?.to_vec(), encode_carry(PLACE, &[])?.to_vec()])
}

pub(crate) fn spilled_files() -> Result<Vec<Vec<u8>>> {
    let folder = tempfile::tempdir()?;
    let (_store, file) = spill(folder.path())?;
    Ok(vec![fs::read(file)?])
}
