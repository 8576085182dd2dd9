//! stub
use crate::{Model, ModelError, Tensor};
use bytes::Bytes;
use std::collections::BTreeMap;
/// stub
pub fn extract(
    _m: &Model,
    _nodes: &[usize],
    _inputs: &[String],
    _outputs: &[String],
    _replace: &BTreeMap<String, Tensor>,
) -> Result<Bytes, ModelError> {
    Ok(Bytes::new())
}
/// stub
pub fn skeleton(_m: &Model) -> Bytes {
    Bytes::new()
}
