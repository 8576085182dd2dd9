//! Labels of evaluation data: class ids, or a matrix of acceptable classes.
//!
//! Not here: accuracy itself (`eval`).

use super::{Array, DType, DatasetError};

/// What is right for each sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Labels {
    /// One class id per sample.
    Classes(Vec<i64>),
    /// `[samples, classes]` row-major: whether a class is acceptable.
    Acceptable {
        /// Width of a row.
        classes: usize,
        /// The matrix.
        mask: Vec<bool>,
    },
}

impl Labels {
    /// Labels of an integer array `[N]` (or `[N, 1]`) or a Boolean one `[N, C]`.
    ///
    /// # Errors
    /// `Labels` for anything else.
    pub fn from_array(array: Array) -> Result<Self, DatasetError> {
        let refuse = |problem: String| DatasetError::Labels { array: array.name.clone(), problem };
        match (array.dtype, array.shape.as_slice()) {
            (DType::Bool, &[_, classes]) if classes > 0 => {
                let bytes = array.slice(0..array.samples())?.bytes;
                Ok(Self::Acceptable { classes, mask: bytes.iter().map(|byte| *byte != 0).collect() })
            }
            (DType::I64 | DType::I32 | DType::I8 | DType::U8, [_] | [_, 1]) => {
                let samples = array.samples();
                let name = array.name.clone();
                let bytes = array.deliver_as(&name, DType::I64)?.slice(0..samples)?.bytes;
                Ok(Self::Classes(bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect()))
            }
            (dtype, shape) => Err(refuse(format!(
                "{dtype} of shape {shape:?}, expected class ids (integers [N]) or acceptable classes (bool [N, C])"
            ))),
        }
    }

    /// Samples labelled.
    pub fn len(&self) -> usize {
        match self {
            Self::Classes(ids) => ids.len(),
            Self::Acceptable { classes, mask } => mask.len() / classes,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `class` is right for `sample`.
    pub fn accepts(&self, sample: usize, class: usize) -> bool {
        match self {
            Self::Classes(ids) => ids.get(sample).is_some_and(|id| usize::try_from(*id) == Ok(class)),
            Self::Acceptable { classes, mask } => {
                class < *classes && mask.get(sample * classes + class).copied().unwrap_or(false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_ids_accept_their_class_only() {
        let array = Array::new("y", vec![2], DType::U8, vec![3, 0]).unwrap();
        let labels = Labels::from_array(array).unwrap();
        assert!(labels.accepts(0, 3) && labels.accepts(1, 0));
        assert!(!labels.accepts(0, 0) && !labels.accepts(2, 0));
    }

    #[test]
    fn a_boolean_matrix_accepts_what_it_marks() {
        let array = Array::new("y", vec![2, 3], DType::Bool, vec![1, 0, 1, 0, 0, 0]).unwrap();
        let labels = Labels::from_array(array).unwrap();
        assert_eq!(labels.len(), 2);
        assert!(labels.accepts(0, 0) && !labels.accepts(0, 1) && labels.accepts(0, 2));
        assert!(!labels.accepts(0, 3) && !labels.accepts(1, 0));
    }

    #[test]
    fn float_labels_are_refused() {
        let array = Array::new("y", vec![1], DType::F32, vec![0; 4]).unwrap();
        let error = Labels::from_array(array).unwrap_err().to_string();
        assert!(error.starts_with("labels `y`: float32 of shape [1], expected class ids"), "{error}");
    }
}
