//! Plain text tables: aligned columns, two spaces apart, no lines, no colour.

use std::fmt;

/// Side on which a column's text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// A table being filled.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Columns by heading; `<` before the heading aligns left, otherwise right.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let column = |heading: &&str| match heading.strip_prefix('<') {
            Some(heading) => (heading.to_string(), Align::Left),
            None => (heading.to_string(), Align::Right),
        };
        Self { columns: headings.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row; missing cells are empty.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        // A name with a line break would break the table, and with an escape the terminal.
        let clean = |cell: String| cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        self.rows.push(cells.into_iter().map(clean).collect());
    }

    fn widths(&self) -> Vec<usize> {
        let cell = |row: &Vec<String>, index: usize| row.get(index).map_or(0, |cell| cell.chars().count());
        let widest = |(index, (heading, _)): (usize, &(String, Align))| {
            let rows = self.rows.iter().map(|row| cell(row, index)).max().unwrap_or(0);
            rows.max(heading.chars().count())
        };
        self.columns.iter().enumerate().map(widest).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let headings = self.columns.iter().map(|(heading, _)| heading.clone()).collect();
        for row in std::iter::once(&headings).chain(&self.rows) {
            let mut line = String::new();
            for ((cell, width), (_, align)) in row.iter().zip(&widths).zip(&self.columns) {
                match align {
                    Align::Left => line += &format!("{cell:<width$}  "),
                    Align::Right => line += &format!("{cell:>width$}  "),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_blanks() {
        let mut table = Table::new(&["<name", "bits"]);
        table.row(["conv1".into(), "4".into()]);
        table.row(["a\u{1b}[31m".into(), "16".into()]);
        assert_eq!(table.to_string(), "name    bits\nconv1      4\na?[31m    16\n");
    }
}
