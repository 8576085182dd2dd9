//! ONNX Runtime, loaded from a library the user names.
//!
//! Telemetry off, one intra-op thread per run. `ort` sessions are exclusive while they run, so each concurrent run gets
//! its own session of the same model.
//! Not here: finding a library, CUDA providers.

use crate::engine::{Engine, NodeNames, Session};
use crate::error::ExecError;
use bytes::Bytes;
use halfstep_model::{Data, Model, Tensor};
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::{Session as Inner, SessionInputValue};

use ort::value::{DynValue, TensorElementType as Element, TensorRef, ValueType};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const NAME: &str = "ONNX Runtime";

/// The library this process has loaded: there can be one, and one environment in it.
static LOADED: Mutex<Option<(PathBuf, Environment)>> = Mutex::new(None);

/// ONNX Runtime from a shared library. The process can hold one such library: the first that was loaded stays.
#[derive(Clone)]
pub struct OrtEngine {
    library: PathBuf,
    environment: Environment,
}

impl OrtEngine {
    /// Loads the library, or takes it as it is if it is loaded already.
    ///
    /// # Errors
    /// `Library` if the file is missing, is no ONNX Runtime or too old, or if another library is loaded already.
    pub fn open(library: impl AsRef<Path>) -> Result<Self, ExecError> {
        let path = library.as_ref();
        let refuse = |reason: String| ExecError::Library { path: path.to_path_buf(), reason };
        // `ort` takes a relative path from the executable's folder; ours is the user's, from where they stand.
        let library = std::fs::canonicalize(path).map_err(|error| refuse(error.to_string()))?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let environment = match loaded.as_ref() {
            Some((known, environment)) if *known == library => environment.clone(),
            Some((known, _)) => return Err(refuse(format!("this process already uses {}", known.display()))),
            None => environment(&library).map_err(refuse)?,
        };
        *loaded = Some((library.clone(), environment.clone()));
        Ok(Self { library, environment })
    }

    fn session(&self, model: &[u8]) -> Result<Inner, String> {
        let mut builder = Inner::builder(&self.environment)
            .map_err(text)?
            .with_intra_threads(1)
            .map_err(text)?
            .with_inter_threads(1)
            .map_err(text)?;
        builder.commit_from_memory(model).map_err(text)
    }
}

fn environment(library: &Path) -> Result<Environment, String> {
    let builder = ort::init_from(library).map_err(text)?;
    let environment = builder.with_name("halfstep").with_telemetry(false).build().map_err(text)?;
    // What goes wrong comes back as an error; a library does not print.
    environment.set_log_level(LogLevel::Fatal);
    Ok(environment)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Engine for OrtEngine {
    fn name(&self) -> String {
        match self.library.file_name() {
            Some(file) => format!("{NAME} ({})", file.to_string_lossy()),
            None => NAME.to_owned(),
        }
    }

    fn load(&self, model: Bytes) -> Result<Box<dyn Session>, ExecError> {
        let nodes = NodeNames::of(&Model::from_bytes(model.clone())?);
        let first = self.session(&model).map_err(|reason| {
            let (node, op_type) = nodes.find_in(&reason);
            ExecError::Load { engine: NAME.into(), node, op_type, reason }
        })?;
        Ok(Box::new(OrtSession { engine: self.clone(), model, nodes, idle: Mutex::new(vec![first]) }))
    }
}

struct OrtSession {
    engine: OrtEngine,
    model: Bytes,
    nodes: NodeNames,
    idle: Mutex<Vec<Inner>>,
}

impl Session for OrtSession {
    fn run(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>, ExecError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut session = match idle {
            Some(session) => session,
            None => self.engine.session(&self.model).map_err(|reason| self.run_error(reason))?,
        };
        let result = self.run_on(&mut session, inputs, outputs);
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(session);
        result
    }
}

impl OrtSession {
    fn run_error(&self, reason: String) -> ExecError {
        let (node, op_type) = self.nodes.find_in(&reason);
        ExecError::Run { engine: NAME.into(), node, op_type, reason }
    }

    fn run_on(
        &self,
        session: &mut Inner,
        inputs: &[(&str, &Tensor)],
        outputs: &[&str],
    ) -> Result<Vec<Tensor>, ExecError> {
        let widened = widen(session, inputs);
        let mut values: Vec<(String, SessionInputValue<'_>)> = Vec::with_capacity(inputs.len());
        for ((name, tensor), wide) in inputs.iter().zip(&widened) {
            let value = to_ort(wide.as_ref().unwrap_or(tensor)).map_err(|reason| self.run_error(reason))?;
            values.push(((*name).to_owned(), value));
        }
        let results = session.run(values).map_err(|error| self.run_error(error.to_string()))?;
        outputs
            .iter()
            .map(|name| match results.get(name) {
                Some(value) => from_ort(name, value),
                None => Err(ExecError::Missing { name: (*name).to_owned() }),
            })
            .collect()
    }
}

/// I32 tensors where the model declares I64 or Bool (a carry that another engine wrote), in the declared type.
fn widen(session: &Inner, inputs: &[(&str, &Tensor)]) -> Vec<Option<Tensor>> {
    let declared = |name: &str| {
        let input = session.inputs().iter().find(|input| input.name() == name)?;
        match input.dtype() {
            ValueType::Tensor { ty, .. } => Some(*ty),
            _ => None,
        }
    };
    let widen = |(name, tensor): &(&str, &Tensor)| {
        let data = match (&tensor.data, declared(name)?) {
            (Data::I32(v), Element::Int64) => Data::I64(v.iter().map(|x| i64::from(*x)).collect()),
            (Data::I32(v), Element::Bool) => Data::Bool(v.iter().map(|x| *x != 0).collect()),
            _ => return None,
        };
        Some(Tensor { shape: tensor.shape.clone(), data })
    };
    inputs.iter().map(widen).collect()
}

fn to_ort(tensor: &Tensor) -> Result<SessionInputValue<'_>, String> {
    let shape = tensor.shape.as_slice();
    macro_rules! view {
        ($v:expr) => {
            TensorRef::from_array_view((shape, $v.as_slice())).map(SessionInputValue::from).map_err(text)
        };
    }
    match &tensor.data {
        Data::F32(v) => view!(v),
        Data::F64(v) => view!(v),
        Data::I64(v) => view!(v),
        Data::I32(v) => view!(v),
        Data::U8(v) => view!(v),
        Data::I8(v) => view!(v),
        Data::Bool(v) => view!(v),
    }
}

fn from_ort(name: &str, value: &DynValue) -> Result<Tensor, ExecError> {
    let refuse = |actual: String| ExecError::Tensor {
        name: name.to_owned(),
        expected: "a dense tensor of a type Halfstep holds".into(),
        actual,
    };
    let ValueType::Tensor { ty, .. } = value.dtype() else {
        return Err(refuse(value.dtype().to_string()));
    };
    macro_rules! extract {
        ($t:ty, $variant:ident) => {{
            let (shape, data) =
                value.try_extract_tensor::<$t>().map_err(|error| refuse(error.to_string()))?;
            (shape.iter().map(|d| usize::try_from(*d).unwrap_or(0)).collect(), Data::$variant(data.to_vec()))
        }};
    }
    let (shape, data): (Vec<usize>, Data) = match ty {
        Element::Float32 => extract!(f32, F32),
        Element::Float64 => extract!(f64, F64),
        Element::Int64 => extract!(i64, I64),
        Element::Int32 => extract!(i32, I32),
        Element::Uint8 => extract!(u8, U8),
        Element::Int8 => extract!(i8, I8),
        Element::Bool => extract!(bool, Bool),
        other => return Err(refuse(format!("{other:?}"))),
    };
    Ok(Tensor::new(shape, data)?)
}
