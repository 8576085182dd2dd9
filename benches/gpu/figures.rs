//! Figures as they are printed, kept for a file; and what must not be as it is.

use crate::asked::Asked;

/// Everything measured, in order.
#[derive(Default)]
pub(crate) struct Figures {
    all: Vec<(String, f64, &'static str)>,
    failures: Vec<String>,
}

impl Figures {
    /// Prints a figure with a remark and keeps it.
    pub(crate) fn say(&mut self, name: &str, value: f64, unit: &'static str, remark: &str) {
        println!("{name:<44} {value:>12.4} {unit:<8} {remark}");
        self.keep(name, value, unit);
    }

    /// Keeps a figure for the file; a remark beside another has printed it.
    pub(crate) fn keep(&mut self, name: &str, value: f64, unit: &'static str) {
        self.all.push((name.to_owned(), value, unit));
    }

    /// Prints a line beside the figures: what is being done, or why it is not.
    pub(crate) fn note(&self, line: &str) {
        println!("{line}");
    }

    /// Keeps the sentence that says what went wrong; other parts go on.
    pub(crate) fn fail(&mut self, why: String) {
        if !self.failures.contains(&why) {
            self.failures.push(why);
        }
    }

    /// What went wrong, in order.
    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// A JSON object per figure, in an array.
    pub(crate) fn json(&self) -> String {
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        let line = |(name, value, unit): &(String, f64, &str)| {
            let value = if value.is_finite() { value.to_string() } else { "null".into() };
            format!("  {{\"name\": \"{}\", \"value\": {value}, \"unit\": \"{unit}\"}}", quoted(name))
        };
        format!("[\n{}\n]\n", self.all.iter().map(line).collect::<Vec<_>>().join(",\n"))
    }

    /// Writes the file, if one is asked for; that it cannot be written is a failure.
    pub(crate) fn write(&mut self, asked: &Asked) {
        let Some(path) = &asked.json else { return };
        std::fs::write(path, self.json())
            .unwrap_or_else(|error| self.fail(format!("{}: {error}", path.display())));
    }
}
