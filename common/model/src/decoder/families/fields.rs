//! Fields of a configuration, each checked where it is read. JSON's `null` counts as absent.

use super::FamilyError;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// Longest text of a value in an error.
const SHOWN_CHARS: usize = 60;

/// A JSON object with its path.
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    pub(super) fn new(config: &'a Value) -> Result<Self, FamilyError> {
        match config {
            Value::Object(object) => Ok(Self { object, path: String::new() }),
            other => Err(FamilyError::Field {
                field: "config".to_owned(),
                expected: "an object".to_owned(),
                actual: shown(other),
            }),
        }
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// Whether the field is there and says `null`, where that is not the same as its absence.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.object.get(name).is_some_and(Value::is_null)
    }

    /// The error about a field of this object.
    pub(super) fn refuse(&self, name: &str, expected: impl Into<String>) -> FamilyError {
        FamilyError::Field {
            field: format!("{}{name}", self.path),
            expected: expected.into(),
            actual: self.get(name).map_or_else(|| "nothing".to_owned(), shown),
        }
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, FamilyError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields { object, path: format!("{}{name}.", self.path) })),
            Some(_) => Err(self.refuse(name, "an object")),
        }
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, FamilyError> {
        self.get(name).map(|value| value.as_str().ok_or_else(|| self.refuse(name, "a text"))).transpose()
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool, FamilyError> {
        self.get(name)
            .map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.refuse(name, "true or false")))
    }

    /// A flag that changes what is computed in a way not known here.
    pub(super) fn must_not_be_set(&self, name: &str) -> Result<(), FamilyError> {
        if self.flag(name, false)? {
            Err(self.refuse(name, "false: nothing else is computed here"))
        } else {
            Ok(())
        }
    }

    pub(super) fn optional_size(
        &self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, FamilyError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let size =
            value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| range.contains(size));
        let expected = || format!("a whole number from {} to {}", range.start(), range.end());
        size.map(Some).ok_or_else(|| self.refuse(name, expected()))
    }

    pub(super) fn size(&self, name: &str, range: RangeInclusive<usize>) -> Result<usize, FamilyError> {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.optional_size(name, range)?.ok_or_else(|| self.refuse(name, expected))
    }

    /// Above 0 and finite as f32.
    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, FamilyError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        positive(value).map(Some).ok_or_else(|| self.refuse(name, "a positive number"))
    }

    pub(super) fn need_positive(&self, name: &str) -> Result<f64, FamilyError> {
        self.positive(name)?.ok_or_else(|| self.refuse(name, "a positive number"))
    }

    /// Exactly `count` positive numbers.
    pub(super) fn positives(&self, name: &str, count: usize) -> Result<Vec<f64>, FamilyError> {
        let numbers: Option<Vec<f64>> =
            self.get(name).and_then(Value::as_array).and_then(|array| array.iter().map(positive).collect());
        let numbers = numbers.filter(|numbers| numbers.len() == count);
        numbers.ok_or_else(|| self.refuse(name, format!("{count} positive numbers")))
    }

    pub(super) fn sizes(&self, name: &str) -> Result<Vec<usize>, FamilyError> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let size = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok());
        let sizes = value.as_array().and_then(|array| array.iter().map(size).collect());
        sizes.ok_or_else(|| self.refuse(name, "a list of whole numbers"))
    }

    /// One of few texts per layer.
    pub(super) fn texts(&self, name: &str, count: usize) -> Result<Option<Vec<&'a str>>, FamilyError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let texts: Option<Vec<&str>> =
            value.as_array().and_then(|array| array.iter().map(Value::as_str).collect());
        let texts = texts.filter(|texts| texts.len() == count);
        texts.map(Some).ok_or_else(|| self.refuse(name, format!("{count} texts, one per layer")))
    }
}

fn positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| *number > 0.0 && *number <= f64::from(f32::MAX))
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
