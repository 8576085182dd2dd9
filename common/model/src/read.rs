//! Reads a model file and its external data by mapping them, so that weights are views and not copies.
//!
//! External data is taken only from regular files inside the model's folder; every offset and length is checked.
//! Not here: what makes a graph well formed (`validate`), single tensors (`tensor`).

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use prost::Message;

use crate::onnx::tensor_proto::DataLocation;
use crate::onnx::{GraphProto, ModelProto, TensorProto};
use crate::{Dtype, Model, ModelError, node, tensor};

/// Reads, resolves external data and checks.
pub(crate) fn model(path: &Path) -> Result<Model, ModelError> {
    let in_file = |source| match source {
        io @ ModelError::Io { .. } => io,
        other => ModelError::InFile { path: path.to_owned(), source: Box::new(other) },
    };
    let mut proto = decode(map(path)?).map_err(in_file)?;
    if let Some(graph) = proto.graph.as_mut() {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        let mut files = Folder::open(folder.unwrap_or(Path::new(".")))?;
        resolve(graph, &mut files).map_err(in_file)?;
    }
    Model::from_proto(proto).map_err(in_file)
}

/// Decodes the message; `raw_data` fields share `bytes`.
pub(crate) fn decode(bytes: Bytes) -> Result<ModelProto, ModelError> {
    ModelProto::decode(bytes).map_err(|source| ModelError::Decode { source })
}

/// Maps a whole regular file.
pub(crate) fn map(path: &Path) -> Result<Bytes, ModelError> {
    let io = |action| move |source| ModelError::Io { path: path.to_owned(), action, source };
    let file = File::open(path).map_err(io("open"))?;
    let metadata = file.metadata().map_err(io("open"))?;
    if !metadata.is_file() {
        let source = std::io::Error::other("it is not a regular file");
        return Err(io("read")(source));
    }
    if metadata.len() == 0 {
        return Ok(Bytes::new());
    }
    #[expect(unsafe_code, reason = "memory mapping is what keeps weights out of memory")]
    // SAFETY: the mapping is read-only and private to this process; `Model::read` and `Checkpoint::open` document
    // that the files must not be changed while what was read lives.
    let mapping = unsafe { memmap2::Mmap::map(&file) }.map_err(io("map"))?;
    Ok(Bytes::from_owner(mapping))
}

/// The model's folder and the data files of it that are mapped so far.
struct Folder {
    root: PathBuf,
    files: HashMap<PathBuf, Bytes>,
}

impl Folder {
    fn open(root: &Path) -> Result<Folder, ModelError> {
        let io = |source| ModelError::Io { path: root.to_owned(), action: "open", source };
        let root = root.canonicalize().map_err(io)?;
        Ok(Folder { root, files: HashMap::new() })
    }

    /// The bytes of the file at `location`, which must lie inside the folder after symbolic links are followed.
    fn file(&mut self, location: &str) -> Result<Bytes, String> {
        let relative = Path::new(location);
        let inside = |c: Component<'_>| matches!(c, Component::Normal(_) | Component::CurDir);
        if location.is_empty() || !relative.components().all(inside) {
            return Err("expected a path inside the model's folder, without `..`".to_owned());
        }
        let joined = self.root.join(relative);
        let path = joined.canonicalize().map_err(|e| format!("cannot open: {e}"))?;
        if !path.starts_with(&self.root) {
            return Err("leads out of the model's folder through a symbolic link".to_owned());
        }
        if let Some(bytes) = self.files.get(&path) {
            return Ok(bytes.clone());
        }
        let bytes = map(&path).map_err(|e| e.to_string())?;
        self.files.insert(path, bytes.clone());
        Ok(bytes)
    }
}

/// Turns every external tensor of the graph, nested graphs included, into one with `raw_data`.
fn resolve(graph: &mut GraphProto, files: &mut Folder) -> Result<(), ModelError> {
    each_tensor(graph, &mut |tensor| resolve_tensor(tensor, files))
}

/// Names of the files beside a model that hold its tensors, as the model gives them, sorted; the files are not opened.
///
/// # Errors
/// `Io`, or `InFile` if it is not ONNX.
pub fn external_files(path: &Path) -> Result<Vec<String>, ModelError> {
    let decoded = map(path).and_then(decode);
    let mut proto = decoded.map_err(|source| match source {
        io @ ModelError::Io { .. } => io,
        other => ModelError::InFile { path: path.to_owned(), source: Box::new(other) },
    })?;
    let mut names = BTreeSet::new();
    if let Some(graph) = proto.graph.as_mut() {
        each_tensor(graph, &mut |tensor| {
            if tensor.data_location() == DataLocation::External {
                let found = tensor.external_data.iter().find(|entry| entry.key() == "location");
                names.extend(found.map(|entry| entry.value().to_owned()));
            }
            Ok(())
        })?;
    }
    Ok(names.into_iter().collect())
}

/// Visits every stored tensor of the graph and of the graphs inside it.
fn each_tensor(
    graph: &mut GraphProto,
    visit: &mut dyn FnMut(&mut TensorProto) -> Result<(), ModelError>,
) -> Result<(), ModelError> {
    graph.initializer.iter_mut().try_for_each(&mut *visit)?;
    for sparse in &mut graph.sparse_initializer {
        sparse.values.iter_mut().chain(&mut sparse.indices).try_for_each(&mut *visit)?;
    }
    for attribute in graph.node.iter_mut().flat_map(|n| &mut n.attribute) {
        for tensor in node::attribute_tensors_mut(attribute) {
            visit(tensor)?;
        }
        for inner in attribute.g.iter_mut().chain(&mut attribute.graphs) {
            each_tensor(inner, visit)?;
        }
    }
    Ok(())
}

fn resolve_tensor(proto: &mut TensorProto, files: &mut Folder) -> Result<(), ModelError> {
    if proto.data_location() != DataLocation::External {
        return Ok(());
    }
    let entry = |key: &str| {
        let found = proto.external_data.iter().find(|e| e.key() == key);
        found.map(|e| e.value().to_owned())
    };
    let location = entry("location").unwrap_or_default();
    let external = |problem| ModelError::External {
        tensor: proto.name().to_owned(),
        location: location.clone(),
        problem,
    };
    let number = |key: &'static str| match entry(key) {
        None => Ok(None),
        Some(text) => match text.parse::<u64>() {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(external(format!("{key}: expected bytes as a whole number, found `{text}`"))),
        },
    };
    let offset = number("offset")?.unwrap_or(0);
    let length = match number("length")? {
        Some(length) => length,
        None => stored_bytes(proto)?.ok_or_else(|| external("length is missing".to_owned()))?,
    };
    let file = files.file(&location).map_err(external)?;
    let raw = range(&file, offset, length).map_err(external)?;
    proto.raw_data = Some(raw);
    proto.data_location = None;
    proto.external_data.clear();
    Ok(())
}

/// Bytes the tensor takes by shape and type, where the type has a whole number of bytes.
fn stored_bytes(proto: &TensorProto) -> Result<Option<u64>, ModelError> {
    let elements = tensor::elements(proto)? as u64;
    let size = Dtype::from_onnx(proto.data_type()).size();
    Ok(size.and_then(|s| elements.checked_mul(s as u64)))
}

fn range(file: &Bytes, offset: u64, length: u64) -> Result<Bytes, String> {
    let end = offset.checked_add(length).filter(|end| *end <= file.len() as u64);
    let (Some(end), Ok(start)) = (end, usize::try_from(offset)) else {
        let have = file.len();
        return Err(format!("expected {length} bytes at offset {offset}, the file has {have}"));
    };
    // `end` is at most the file's length, which is a usize.
    Ok(file.slice(start..end as usize))
}
