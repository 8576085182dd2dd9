//! A table of figures that is printed row by row, as they come, and kept for programs.
//!
//! Not here: the summary of a campaign (`table`).

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::by_hand::{Bounds, say};
use crate::cpu::load;

/// One figure.
#[derive(Clone, Debug)]
pub enum Cell {
    /// Shown with so many digits after the point, and a unit right behind.
    Number(f64, usize, &'static str),
    /// A whole number.
    Count(u64),
    /// Anything else.
    Text(String),
}

impl Cell {
    fn text(&self) -> String {
        match self {
            Self::Number(number, digits, unit) => format!("{number:.digits$}{unit}"),
            Self::Count(count) => count.to_string(),
            Self::Text(text) => text.clone(),
        }
    }

    fn value(&self) -> Value {
        match self {
            Self::Number(number, ..) => json!(number),
            Self::Count(count) => json!(count),
            Self::Text(text) => json!(text),
        }
    }
}

/// See the module. Columns are as wide as their heads or as stated, whichever is more.
#[derive(Debug)]
pub struct Sheet {
    columns: &'static [(&'static str, usize)],
    facts: Map<String, Value>,
    rows: Vec<Value>,
}

impl Sheet {
    /// Prints what holds for the whole table, and its head.
    ///
    /// # Errors
    /// If nobody reads it.
    pub fn begin(columns: &'static [(&'static str, usize)], facts: &[(&str, Value)]) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let mut all = Map::new();
        all.insert("cores".into(), json!(cores));
        all.insert("load_before".into(), json!(load()));
        all.extend(facts.iter().map(|(name, value)| ((*name).to_string(), value.clone())));
        let shown: Vec<String> = all.iter().map(|(name, value)| format!("{name} {value}")).collect();
        say(shown.join(", "))?;
        say(line(columns, columns.iter().map(|(head, _)| (*head).to_string())))?;
        Ok(Self { columns, facts: all, rows: Vec::new() })
    }

    /// Prints and keeps one row.
    ///
    /// # Errors
    /// If nobody reads it.
    pub fn row(&mut self, cells: &[Cell]) -> Result<()> {
        say(line(self.columns, cells.iter().map(Cell::text)))?;
        let named = self.columns.iter().zip(cells).map(|((head, _), cell)| (key(head), cell.value()));
        self.rows.push(Value::Object(named.collect()));
        Ok(())
    }

    /// Keeps the whole; says if `left_out` cases were not begun in time.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(mut self, bounds: &Bounds, left_out: usize) -> Result<()> {
        if left_out > 0 {
            say(format!("{left_out} cases were not begun: the time was over"))?;
        }
        self.facts.insert("cases_left_out".into(), json!(left_out));
        self.facts.insert("rows".into(), Value::Array(self.rows));
        bounds.keep(&Value::Object(self.facts))
    }
}

fn line(columns: &[(&str, usize)], texts: impl Iterator<Item = String>) -> String {
    let padded = columns.iter().zip(texts).map(|((head, width), text)| {
        let width = head.chars().count().max(*width);
        format!("{text:>width$}")
    });
    padded.collect::<Vec<_>>().join("  ")
}

fn key(head: &str) -> String {
    let plain = head.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' });
    plain.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_kept_under_the_names_of_their_columns() {
        const COLUMNS: &[(&str, usize)] = &[("case", 8), ("CPU s", 0), ("nodes", 0)];
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("figures.json");
        let mut sheet = Sheet::begin(COLUMNS, &[("threads", json!(2))]).unwrap();
        sheet.row(&[Cell::Text("batches".into()), Cell::Number(1.25, 1, ""), Cell::Count(3)]).unwrap();
        sheet.finish(&Bounds { minutes: None, json: Some(file.clone()) }, 1).unwrap();
        let kept: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert_eq!(kept["rows"], json!([{"case": "batches", "cpu_s": 1.25, "nodes": 3}]));
        assert_eq!((&kept["threads"], &kept["cases_left_out"]), (&json!(2), &json!(1)));
    }

    #[test]
    fn columns_stand_under_each_other() {
        let head = line(&[("a", 4), ("long", 2)], ["a", "long"].map(str::to_string).into_iter());
        let row = line(&[("a", 4), ("long", 2)], ["xyz", "1"].map(str::to_string).into_iter());
        assert_eq!((head.as_str(), row.as_str()), ("   a  long", " xyz     1"));
    }
}
