//! Figures as they are printed, kept for a file.

/// Everything measured, in order.
#[derive(Default)]
pub(crate) struct Figures(Vec<(String, f64, &'static str)>);

impl Figures {
    /// Prints a figure with a remark and keeps it.
    pub(crate) fn say(&mut self, name: &str, value: f64, unit: &'static str, remark: &str) {
        println!("{name:<44} {value:>12.4} {unit:<8} {remark}");
        self.0.push((name.to_owned(), value, unit));
    }

    /// A JSON object per figure, in an array.
    pub(crate) fn json(&self) -> String {
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        let line = |(name, value, unit): &(String, f64, &str)| {
            let value = if value.is_finite() { value.to_string() } else { "null".into() };
            format!("  {{\"name\": \"{}\", \"value\": {value}, \"unit\": \"{unit}\"}}", quoted(name))
        };
        format!("[\n{}\n]\n", self.0.iter().map(line).collect::<Vec<_>>().join(",\n"))
    }
}
