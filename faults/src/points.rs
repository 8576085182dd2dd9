//! The names of all failpoints, read from the tables in the sources: a new one is tested from the day it is written.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::binary::root;
use crate::damage::files_below;

/// File and constant of a table.
const FILE: &str = "failpoints.rs";
const TABLE: &str = "const FAILPOINTS: &[&str] =";

/// Every failpoint in the tables below a folder of the repository, in the order in which they stand there.
///
/// # Errors
/// If there is none.
pub fn failpoints(folder: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for path in files_below(&root().join(folder))?.iter().filter(|path| path.ends_with(FILE)) {
        let text = fs::read_to_string(path).with_context(|| format!("source {}", path.display()))?;
        names.extend(names_in(&text));
    }
    ensure!(!names.is_empty(), "{folder}: no failpoint in any `{FILE}`");
    Ok(names)
}

fn names_in(text: &str) -> Vec<String> {
    let table =
        text.split_once(TABLE).and_then(|(_, rest)| rest.split_once("];")).map_or("", |(table, _)| table);
    // Every second piece stands between quotes.
    table.split('"').skip(1).step_by(2).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_table_and_no_others() {
        let text = "visit(\"x\"); pub const FAILPOINTS: &[&str] = &[\n  \"a.b\",\n  \"c\",\n]; visit(\"y\")";
        assert_eq!(names_in(text), ["a.b", "c"]);
    }
}
