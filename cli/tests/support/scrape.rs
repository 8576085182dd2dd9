//! Prometheus' text, asked for and read as a scraper does.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part; a test may stop"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;

/// One answer.
pub struct Scrape {
    pub text: String,
    /// Values by name and labels as written.
    series: BTreeMap<String, f64>,
}

/// Status and body of a GET.
pub fn get(url: &str) -> (u16, String) {
    let rest = url.strip_prefix("http://").unwrap();
    let (address, path) = rest.split_once('/').unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(!head.to_lowercase().contains("transfer-encoding"), "{head}");
    (status, body.to_owned())
}

impl Scrape {
    pub fn of(url: &str) -> Self {
        let (status, text) = get(url);
        assert_eq!(status, 200, "{text}");
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        let series = lines.map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        });
        Self { series: series.collect(), text }
    }

    /// The sum of all series of this name whose labels have this part.
    pub fn sum(&self, name: &str, part: &str) -> f64 {
        let of_name = |series: &str| series.split('{').next() == Some(name) && series.contains(part);
        self.series.iter().filter(|(series, _)| of_name(series)).map(|(_, value)| value).sum()
    }

    /// Names as declared, those of histograms without their suffixes.
    pub fn names(&self) -> BTreeSet<String> {
        let declared = self.text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        declared.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    }
}
