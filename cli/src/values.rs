//! Values of options that are more than a number: byte sizes, ranges, overrides.
//!
//! Each has one text form, used by flags and by job files alike.
//! Not here: the options themselves (`options`).

use std::fmt;
use std::str::FromStr;

use halfstep_quant::{Granularity, RangeEstimator, Scheme};
use halfstep_work::Partition;
use serde::de::DeserializeOwned;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::{Deserialize, Serialize};

/// Parses an enum from its serde name, e.g. `gram`.
pub(crate) fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    T::deserialize(StrDeserializer::<ValueError>::new(text)).map_err(|error| error.to_string())
}

/// Makes a type with `FromStr` readable from a job file's string.
macro_rules! text_form {
    ($($name:ty),*) => {$(
        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }
    )*};
}
text_form!(ByteSize, RangeArg, BetaRange, Override, PartitionArg, LinkSpeed, DeviceArg, GradientsArg);

/// A number of bytes: `4GiB`, `512MB`, `1000000`, `0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "u64")]
pub(crate) struct ByteSize(pub(crate) u64);

const UNITS: [(&str, u64); 10] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            || format!("`{text}` is not a size in bytes, expected for example 4GiB, 512MB or 1000000");
        let unit = UNITS.iter().find(|(unit, _)| text.ends_with(unit));
        let (number, factor) =
            unit.map_or((text, 1), |(unit, factor)| (text.strip_suffix(unit).unwrap_or(text), *factor));
        let number: f64 = number.trim().parse().map_err(|_| refuse())?;
        let bytes = number * factor as f64;
        // Beyond 2^63 an f64 no longer converts into an i64 file offset.
        if bytes == 0.0 || (1.0..9.2e18).contains(&bytes) { Ok(Self(bytes as u64)) } else { Err(refuse()) }
    }
}

impl From<ByteSize> for u64 {
    fn from(size: ByteSize) -> Self {
        size.0
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        match units.iter().find(|(_, size)| self.0 >= *size) {
            Some((unit, size)) => f.pad(&format!("{:.1} {unit}", self.0 as f64 / *size as f64)),
            None => f.pad(&format!("{} B", self.0)),
        }
    }
}

/// A range estimator; `percentile` alone means 99.9 %.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct RangeArg(pub(crate) RangeEstimator);

impl FromStr for RangeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = if text == "percentile" { "percentile:99.9" } else { text };
        text.parse().map(Self).map_err(|error: halfstep_quant::QuantError| error.to_string())
    }
}

/// Annealing of beta: `20,2`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct BetaRange(pub(crate) f32, pub(crate) f32);

impl FromStr for BetaRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            || format!("`{text}` is not a beta range, expected START,END with START >= END > 0, as in 20,2");
        let (start, end) = text.split_once(',').ok_or_else(refuse)?;
        let parse = |text: &str| text.trim().parse::<f32>().ok().filter(|value| value.is_finite());
        let (start, end) = (parse(start).ok_or_else(refuse)?, parse(end).ok_or_else(refuse)?);
        if start >= end && end > 0.0 { Ok(Self(start, end)) } else { Err(refuse()) }
    }
}

/// How a job is spread over nodes: `batches`, `layers:R`, `grid:RxS`, or `auto`, none: chosen when it is submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct PartitionArg(pub(crate) Option<Partition>);

/// More ranges or nodes than this are a typing mistake.
const PARTITION_MAX: usize = 10_000;

impl FromStr for PartitionArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || {
            format!(
                "`{text}` is not a partition, expected auto, batches, layers:R or grid:RxS with 2 or more ranges R, as in grid:2x4"
            )
        };
        let count = |text: &str, least: usize| {
            text.parse::<usize>().ok().filter(|n| (least..=PARTITION_MAX).contains(n)).ok_or_else(refuse)
        };
        match text.split_once(':') {
            None if text == "auto" => Ok(Self(None)),
            None if text == "batches" => Ok(Self(Some(Partition::Batches))),
            Some(("layers", ranges)) => Ok(Self(Some(Partition::Layers { ranges: count(ranges, 2)? }))),
            Some(("grid", size)) => {
                let (ranges, nodes) = size.split_once('x').ok_or_else(refuse)?;
                Ok(Self(Some(Partition::Grid { ranges: count(ranges, 2)?, nodes: count(nodes, 1)? })))
            }
            _ => Err(refuse()),
        }
    }
}

/// What to solve on: `auto`, `cpu`, `cuda`, `cuda:0,1`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum DeviceArg {
    #[default]
    Auto,
    Cpu,
    /// Numbers of devices; none: all.
    Cuda(Vec<usize>),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("`{text}` is not a device, expected auto, cpu, cuda or cuda:0,1");
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(Vec::new())),
            Some(("cuda", numbers)) => {
                let numbers = numbers.split(',').map(|number| number.parse().map_err(|_| refuse()));
                Ok(Self::Cuda(numbers.collect::<Result<_, _>>()?))
            }
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for DeviceArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(numbers) if numbers.is_empty() => f.write_str("cuda"),
            Self::Cuda(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", numbers.join(","))
            }
        }
    }
}

impl From<DeviceArg> for String {
    fn from(device: DeviceArg) -> Self {
        device.to_string()
    }
}

/// How gradients are computed on CUDA devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub(crate) enum GradientsArg {
    #[default]
    Tf32,
    F32,
}

impl FromStr for GradientsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tf32" => Ok(Self::Tf32),
            "f32" => Ok(Self::F32),
            _ => Err(format!("`{text}` is not a number format, expected tf32 or f32")),
        }
    }
}

/// Speed of a network link in bytes per second: `10Gbit`, `100Mbit`, or a size per second as in `1GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct LinkSpeed(pub(crate) f64);

impl LinkSpeed {
    /// Where nothing is known: 10 Gbit/s.
    pub(crate) const ASSUMED: Self = Self(10e9 / 8.0);
}

/// Three digits: nobody knows more of a line.
impl fmt::Display for LinkSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.0 * 8.0;
        // What would be shown as 1000 of a unit is 1 of the next.
        let (unit, name) = [(1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")]
            .into_iter()
            .find(|(unit, _)| bits >= unit * 0.9995)
            .unwrap_or((1.0, "bit/s"));
        let amount = bits / unit;
        let digits = if amount < 9.995 { 2 } else { usize::from(amount < 99.95) };
        let text = format!("{amount:.digits$}");
        let text = if digits > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
        write!(f, "{text} {name}")
    }
}

impl FromStr for LinkSpeed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bits = [("Gbit", 1e9 / 8.0), ("Mbit", 1e6 / 8.0)];
        let bits = bits.iter().find_map(|(unit, factor)| {
            let number = text.strip_suffix(unit)?.trim().parse::<f64>().ok()?;
            Some(number * factor)
        });
        let bytes = bits.or_else(|| text.parse::<ByteSize>().ok().map(|size| size.0 as f64));
        let bytes = bytes.filter(|bytes| bytes.is_finite() && *bytes >= 1.0);
        bytes.map(Self).ok_or_else(|| {
            format!("`{text}` is not a link speed, expected for example 10Gbit, 100Mbit or 1GiB")
        })
    }
}

/// Other settings for the layers whose name matches: `conv1:bits=8,scheme=asymmetric`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Override {
    /// Layer name pattern; `*` matches anything.
    pub(crate) pattern: String,
    pub(crate) bits: Option<u8>,
    pub(crate) scheme: Option<Scheme>,
    pub(crate) granularity: Option<Granularity>,
    pub(crate) range: Option<RangeEstimator>,
}

const OVERRIDE_KEYS: [&str; 4] = ["bits", "scheme", "granularity", "range"];

impl FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, settings) = split_override(text)?;
        let mut out =
            Self { pattern: pattern.into(), bits: None, scheme: None, granularity: None, range: None };
        for setting in settings.split(',') {
            let (key, value) = setting
                .split_once('=')
                .ok_or_else(|| format!("`{setting}` is not KEY=VALUE in override `{text}`"))?;
            out.set(key.trim(), value.trim())?;
        }
        Ok(out)
    }
}

impl Override {
    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "bits" => self.bits = Some(bits(value)?),
            "scheme" => self.scheme = Some(value.parse::<Scheme>().map_err(|e| e.to_string())?),
            "granularity" => {
                self.granularity = Some(value.parse::<Granularity>().map_err(|e| e.to_string())?);
            }
            "range" => self.range = Some(value.parse::<RangeArg>()?.0),
            _ => return Err(unknown(&format!("override setting `{key}`"), key, &OVERRIDE_KEYS)),
        }
        Ok(())
    }
}

/// Layer names may contain colons, so the pattern ends at the first colon after which `key=` stands.
fn split_override(text: &str) -> Result<(&str, &str), String> {
    let colons = text.match_indices(':').map(|(at, _)| (&text[..at], &text[at + 1..]));
    let is_setting = |rest: &str| {
        let key = rest.split(['=', ':', '/', '.', '*']).next().unwrap_or("");
        rest.len() > key.len() && rest.as_bytes()[key.len()] == b'='
    };
    colons.into_iter().find(|(pattern, rest)| !pattern.is_empty() && is_setting(rest)).ok_or_else(|| {
        format!("`{text}` is not an override, expected PATTERN:KEY=VALUE,... as in conv1:bits=8")
    })
}

/// A bit width.
pub(crate) fn bits(text: &str) -> Result<u8, String> {
    let bits = text.parse::<u8>().ok().filter(|bits| matches!(bits, 2..=8 | 16));
    bits.ok_or_else(|| format!("bit width is `{text}`, expected 2 to 8 or 16"))
}

/// A fraction in (0, 1].
pub(crate) fn fraction(text: &str) -> Result<f32, String> {
    let value = text.parse::<f32>().ok().filter(|value| *value > 0.0 && *value <= 1.0);
    value.ok_or_else(|| format!("`{text}` is not a fraction, expected more than 0 and at most 1"))
}

/// A finite number, 0 or more.
pub(crate) fn non_negative(text: &str) -> Result<f32, String> {
    let value = text.parse::<f32>().ok().filter(|value| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| format!("`{text}` is not a number, expected 0 or more"))
}

/// "`subject` is unknown, did you mean `x`?" or the list of what is known.
pub(crate) fn unknown(subject: &str, key: &str, known: &[&str]) -> String {
    match nearest(key, known) {
        Some(near) => format!("{subject} is unknown, did you mean `{near}`?"),
        None => format!("{subject} is unknown, expected one of {}", known.join(", ")),
    }
}

/// The known word most like `key`, if any is like it at all.
fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let key = key.replace('_', "-").to_lowercase();
    let scored = known.iter().map(|word| (strsim::jaro_winkler(&key, word), *word));
    let (score, word) = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (score > 0.75).then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfstep_work::Objective;

    #[test]
    fn byte_sizes_are_read_with_either_kind_of_unit() {
        for (text, expect) in [
            ("4GiB", Some(4 << 30)),
            ("1.5 MiB", Some(3 << 19)),
            ("512MB", Some(512_000_000)),
            ("1000000", Some(1_000_000)),
            ("7B", Some(7)),
            ("0", Some(0)),
            ("0.5", None),
            ("-1GiB", None),
            ("4 gigs", None),
            ("1e40GiB", None),
            ("NaN", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<ByteSize>().ok().map(|size| size.0), expect, "{text}");
        }
        assert_eq!(ByteSize(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(ByteSize(1023).to_string(), "1023 B");
    }

    #[test]
    fn overrides_keep_colons_of_layer_names() {
        for (text, pattern) in [
            ("conv1:bits=8", "conv1"),
            ("scope/conv:0:bits=8,range=percentile:99", "scope/conv:0"),
            ("*:bits=8,granularity=per-group:64", "*"),
        ] {
            let parsed: Override = text.parse().unwrap();
            assert_eq!((parsed.pattern.as_str(), parsed.bits), (pattern, Some(8)), "{text}");
        }
        let parsed: Override = "a:scheme=asymmetric,granularity=per-group:64".parse().unwrap();
        assert_eq!(parsed.scheme, Some(Scheme::Asymmetric));
        assert_eq!(parsed.granularity, Some(Granularity::PerGroup { group_size: 64 }));
    }

    #[test]
    fn wrong_overrides_say_what_is_wrong() {
        for (text, expect) in [
            ("conv1", "`conv1` is not an override, expected PATTERN:KEY=VALUE,... as in conv1:bits=8"),
            (":bits=8", "`:bits=8` is not an override, expected PATTERN:KEY=VALUE,... as in conv1:bits=8"),
            ("conv1:bit=8", "override setting `bit` is unknown, did you mean `bits`?"),
            ("conv1:bits=9", "bit width is `9`, expected 2 to 8 or 16"),
            ("conv1:bits=8,x", "`x` is not KEY=VALUE in override `conv1:bits=8,x`"),
        ] {
            assert_eq!(text.parse::<Override>().unwrap_err(), expect);
        }
    }

    #[test]
    fn a_range_is_two_falling_positive_numbers() {
        assert_eq!("20,2".parse(), Ok(BetaRange(20.0, 2.0)));
        for text in ["20", "2,20", "20,0", "inf,2", "20,NaN"] {
            assert!(text.parse::<BetaRange>().is_err(), "{text}");
        }
        assert_eq!("percentile".parse(), Ok(RangeArg(RangeEstimator::Percentile { percentile: 99.9 })));
        assert!("percentile:40".parse::<RangeArg>().is_err());
    }

    #[test]
    fn link_speeds_are_shown_with_three_digits() {
        for (bits, expect) in [
            (940.4e6, "940 Mbit/s"),
            (1e9, "1 Gbit/s"),
            (999.9e6, "1 Gbit/s"),
            (1.04e6, "1.04 Mbit/s"),
            (99.96e6, "100 Mbit/s"),
            (100e6, "100 Mbit/s"),
            (12.34e9, "12.3 Gbit/s"),
            (9.996e9, "10 Gbit/s"),
            (56e3, "56 kbit/s"),
            (8.0, "8 bit/s"),
        ] {
            assert_eq!(LinkSpeed(bits / 8.0).to_string(), expect, "{bits}");
        }
        assert_eq!(LinkSpeed::ASSUMED, "10Gbit".parse().unwrap());
    }

    #[test]
    fn partitions_and_link_speeds_have_one_text_form() {
        for (text, expect) in [
            ("auto", Some(None)),
            ("batches", Some(Some(Partition::Batches))),
            ("layers:3", Some(Some(Partition::Layers { ranges: 3 }))),
            ("grid:2x4", Some(Some(Partition::Grid { ranges: 2, nodes: 4 }))),
            ("layers:1", None),
            ("layers", None),
            ("grid:2", None),
            ("grid:2x0", None),
            ("layers:99999999", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<PartitionArg>().ok().map(|p| p.0), expect, "{text}");
        }
        for (text, expect) in [
            ("auto", Some(DeviceArg::Auto)),
            ("cpu", Some(DeviceArg::Cpu)),
            ("cuda", Some(DeviceArg::Cuda(vec![]))),
            ("cuda:3", Some(DeviceArg::Cuda(vec![3]))),
            ("cuda:0,1", Some(DeviceArg::Cuda(vec![0, 1]))),
            ("cuda:", None),
            ("cuda:a", None),
            ("gpu", None),
        ] {
            let parsed = text.parse::<DeviceArg>().ok();
            assert_eq!(parsed, expect, "{text}");
            assert!(parsed.is_none_or(|device| device.to_string() == text));
        }
        assert_eq!("f32".parse(), Ok(GradientsArg::F32));
        assert!("bf16".parse::<GradientsArg>().is_err());
        assert_eq!("10Gbit".parse(), Ok(LinkSpeed(1.25e9)));
        assert_eq!("8 Mbit".parse(), Ok(LinkSpeed(1e6)));
        assert_eq!("1KiB".parse(), Ok(LinkSpeed(1024.0)));
        assert!("fast".parse::<LinkSpeed>().is_err() && "0Gbit".parse::<LinkSpeed>().is_err());
    }

    #[test]
    fn the_nearest_word_is_offered_only_when_it_is_near() {
        let known = ["iterations", "bits", "seed"];
        assert_eq!(nearest("iteration", &known), Some("iterations"));
        assert_eq!(nearest("Bits", &known), Some("bits"));
        assert_eq!(nearest("zzz", &known), None);
    }

    #[test]
    fn names_are_those_of_the_job_format() {
        assert_eq!(named::<Objective>("samples"), Ok(Objective::Samples));
        assert_eq!(
            named::<Objective>("sample"),
            Err("unknown variant `sample`, expected `gram` or `samples`".into())
        );
    }
}
