//! Which array feeds which model input.
//!
//! Rule: by name; but a model with one input takes the only array there is (beside labels), whatever its name.
//! Dimensions after the first must agree where the model fixes them; dtypes must convert exactly.
//! Not here: reading the model (`model`), the batch size it is run at (`plan`).

use super::{Array, DType, DatasetError};

/// Name under which data sets keep labels; never fed to a model that does not ask for it by name.
pub(super) const LABELS: &str = "y";

/// What the model says about one input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInput {
    /// Input name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions, `None` where free or symbolic. The first is the sample dimension and is not compared.
    pub dims: Vec<Option<usize>>,
}

/// Arrays in the order of `inputs`, renamed and delivered in the inputs' dtypes.
pub(super) fn match_inputs(arrays: Vec<Array>, inputs: &[ModelInput]) -> Result<Vec<Array>, DatasetError> {
    let names: Vec<String> = arrays.iter().map(|array| array.name.clone()).collect();
    let mut pool: Vec<Option<Array>> = arrays.into_iter().map(Some).collect();
    let mut matched = Vec::with_capacity(inputs.len());
    let mut missing = Vec::new();
    for input in inputs {
        match position(&names, input, inputs.len()).and_then(|index| pool[index].take()) {
            Some(array) => matched.push(fit(array, input)?),
            None => missing.push(input.name.clone()),
        }
    }
    if missing.is_empty() { Ok(matched) } else { Err(DatasetError::Unmatched { missing, arrays: names }) }
}

fn position(names: &[String], input: &ModelInput, inputs: usize) -> Option<usize> {
    let by_name = names.iter().position(|name| *name == input.name);
    let only = || {
        let mut data = names.iter().enumerate().filter(|(_, name)| *name != LABELS);
        let first = data.next()?.0;
        (inputs == 1 && data.next().is_none()).then_some(first)
    };
    by_name.or_else(only)
}

fn fit(array: Array, input: &ModelInput) -> Result<Array, DatasetError> {
    let agrees = input.dims.len() == array.shape.len()
        && input
            .dims
            .iter()
            .zip(&array.shape)
            .skip(1)
            .all(|(dim, actual)| dim.is_none_or(|dim| dim == *actual));
    if !agrees {
        let (array, actual) = (array.name, array.shape);
        let expected = describe(&input.dims);
        return Err(DatasetError::Shape { array, actual, input: input.name.clone(), expected });
    }
    array.deliver_as(&input.name, input.dtype)
}

/// `[N, 3, ?, ?]`: the sample dimension, then known sizes.
fn describe(dims: &[Option<usize>]) -> String {
    let name = |(i, dim): (usize, &Option<usize>)| match dim {
        _ if i == 0 => "N".to_string(),
        Some(dim) => dim.to_string(),
        None => "?".to_string(),
    };
    format!("[{}]", dims.iter().enumerate().map(name).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(name: &str, shape: &[usize]) -> Array {
        Array::new(name, shape.to_vec(), DType::U8, vec![0; shape.iter().product()]).unwrap()
    }

    fn input(name: &str, dims: &[Option<usize>]) -> ModelInput {
        ModelInput { name: name.into(), dtype: DType::F32, dims: dims.to_vec() }
    }

    #[test]
    fn one_array_feeds_one_input_whatever_the_names() {
        let arrays = vec![array("x", &[2, 3]), array("y", &[2])];
        let matched = match_inputs(arrays, &[input("image", &[None, Some(3)])]).unwrap();
        assert_eq!((matched.len(), matched[0].name.as_str(), matched[0].dtype), (1, "image", DType::F32));
    }

    #[test]
    fn several_inputs_are_matched_by_name_in_model_order() {
        let arrays = vec![array("mask", &[2, 4]), array("ids", &[2, 5])];
        let matched =
            match_inputs(arrays, &[input("ids", &[None, None]), input("mask", &[None, None])]).unwrap();
        assert_eq!(matched[0].shape, [2, 5]);
        assert_eq!(matched[1].shape, [2, 4]);
    }

    #[test]
    fn unmatched_inputs_list_both_sides() {
        let arrays = vec![array("a", &[2, 4]), array("b", &[2, 5])];
        let error = match_inputs(arrays, &[input("ids", &[None, None])]).unwrap_err().to_string();
        assert_eq!(error, "model inputs `ids` have no array of that name: the data has `a`, `b`");
    }

    #[test]
    fn a_shape_that_differs_is_refused_with_both_shapes() {
        for shape in [&[2, 28, 28][..], &[2, 3, 28, 28]] {
            let dims = [Some(1), Some(1), None, Some(28)];
            let error =
                match_inputs(vec![array("x", shape)], &[input("input", &dims)]).unwrap_err().to_string();
            let expect = format!("array `x` has shape {shape:?}, model input `input` needs [N, 1, ?, 28]");
            assert_eq!(error, expect);
        }
    }

    #[test]
    fn labels_are_not_taken_for_data() {
        assert!(match_inputs(vec![array("y", &[2, 4])], &[input("input", &[None, None])]).is_err());
        assert!(match_inputs(vec![array("y", &[2, 4])], &[input("y", &[None, None])]).is_ok());
    }
}
