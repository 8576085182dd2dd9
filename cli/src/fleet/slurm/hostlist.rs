//! Host lists as Slurm writes them: `gpu[001-004,7],login`.
//!
//!     list = item ("," item)*          empty items are nothing
//!     item = name | (prefix "[" range ("," range)* "]")+
//!     range = number | number "-" number
//!
//! Numbers are padded with zeros to the width of a range's first; order and duplicates are kept. Stricter than
//! `scontrol show hostnames`, which makes something of brackets that are never closed: a wrong host is worse than none.
//! Not here: where lists come from (`allocation`).

/// Hosts that a list, and so each range in it, may name.
pub(super) const HOSTS_MAX: usize = 65_536;
/// Longest host name, as in the DNS.
const NAME_MAX: usize = 255;
/// Longest number: fits a u64.
const DIGITS_MAX: usize = 18;

/// The hosts of a list, in its order.
///
/// # Errors
/// One sentence with the list and what is wrong in it; also for more than [`HOSTS_MAX`] hosts.
pub(crate) fn expand(list: &str) -> Result<Vec<String>, String> {
    let refuse = |problem: String| format!("host list `{}`: {problem}", shortened(list));
    let mut hosts = Vec::new();
    for item in items(list).map_err(refuse)? {
        hosts.extend(expand_item(item).map_err(refuse)?);
        if hosts.len() > HOSTS_MAX {
            return Err(refuse(too_many()));
        }
    }
    Ok(hosts)
}

/// Whether a text names hosts by numbers in brackets. A bracket in front is an IPv6 address.
pub(crate) fn is_list(text: &str) -> bool {
    text.find('[').is_some_and(|at| at > 0)
}

fn too_many() -> String {
    format!("names more than {HOSTS_MAX} hosts")
}

/// Enough of a list to know it by.
fn shortened(list: &str) -> String {
    const SHOWN: usize = 80;
    match list.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}...", &list[..at]),
        None => list.into(),
    }
}

/// Splits at the commas outside brackets.
fn items(list: &str) -> Result<Vec<&str>, String> {
    let (mut found, mut begin, mut inside) = (Vec::new(), 0, false);
    for (at, c) in list.char_indices() {
        match (c, inside) {
            ('[', false) => inside = true,
            (']', true) => inside = false,
            ('[', true) => return Err("has `[` inside brackets".into()),
            (']', false) => return Err("has `]` without `[`".into()),
            (',', false) => {
                found.push(&list[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("has `[` without `]`".into());
    }
    found.push(&list[begin..]);
    found.retain(|item| !item.is_empty());
    Ok(found)
}

/// One item, whose brackets are known to match.
fn expand_item(item: &str) -> Result<Vec<String>, String> {
    let mut names = vec![String::new()];
    let mut rest = item;
    while let Some((prefix, after)) = rest.split_once('[') {
        let (ranges, tail) = after.split_once(']').ok_or("has `[` without `]`")?;
        names = joined(&names, plain(prefix)?, &numbers(ranges)?)?;
        rest = tail;
    }
    if rest.is_empty() {
        return Ok(names);
    }
    if rest.len() < item.len() {
        return Err(format!("has `{rest}` after its last bracket, expected a comma or the end"));
    }
    joined(&names, plain(rest)?, &[String::new()])
}

/// Every name so far with every number, names first.
fn joined(names: &[String], prefix: &str, numbers: &[String]) -> Result<Vec<String>, String> {
    if names.len().saturating_mul(numbers.len()) > HOSTS_MAX {
        return Err(too_many());
    }
    let mut all = Vec::with_capacity(names.len() * numbers.len());
    for name in names {
        for number in numbers {
            let host = format!("{name}{prefix}{number}");
            if host.len() > NAME_MAX {
                return Err(format!(
                    "names a host of {} characters, expected at most {NAME_MAX}",
                    host.len()
                ));
            }
            all.push(host);
        }
    }
    Ok(all)
}

/// Characters of host names only.
fn plain(text: &str) -> Result<&str, String> {
    let wrong = text.chars().find(|c| !c.is_ascii_alphanumeric() && !"-._".contains(*c));
    match wrong {
        Some(c) => Err(format!("has {c:?}, expected letters, digits, `-`, `.`, `_`")),
        None => Ok(text),
    }
}

/// The numbers between brackets, as they stand in names.
fn numbers(ranges: &str) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for range in ranges.split(',') {
        let refuse = || format!("has the range `{range}`, expected NUMBER or FIRST-LAST with FIRST <= LAST");
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (low, high) = (number(first).ok_or_else(refuse)?, number(last).ok_or_else(refuse)?);
        let count = high.checked_sub(low).ok_or_else(refuse)?;
        if count >= HOSTS_MAX as u64 || all.len() as u64 + count >= HOSTS_MAX as u64 {
            return Err(too_many());
        }
        let width = first.len();
        all.extend((low..=high).map(|number| format!("{number:0width$}")));
    }
    Ok(all)
}

fn number(text: &str) -> Option<u64> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit()) && text.len() <= DIGITS_MAX;
    if digits { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `LIST -> HOSTS` or `LIST -> error`, with what `scontrol show hostnames` of Slurm 22.05 makes of it.
    const VECTORS: &str = include_str!("hostlists.txt");

    #[test]
    fn lists_mean_what_slurm_means_by_them() {
        let rows: Vec<_> = VECTORS.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(rows.len(), 40);
        for row in rows {
            let (list, expected) = row.split_once(" ->").unwrap();
            match expand(list.trim_matches('\'')) {
                Ok(hosts) => assert_eq!(hosts.join(" "), expected.trim(), "{list}"),
                Err(error) => assert_eq!("error", expected.trim(), "{error}"),
            }
        }
    }

    #[test]
    fn at_most_65536_hosts_however_they_are_written() {
        for (list, hosts) in [("n[0-65535]", 65_536), ("r[1-256]n[1-256]", 65_536), ("n[1-65535],x", 65_536)]
        {
            assert_eq!(expand(list).unwrap().len(), hosts, "{list}");
        }
        for list in ["n[0-65536]", "n[1-40000,1-40000]", "r[1-257]n[1-256]", "n[1-65535],x,y"] {
            let error = expand(list).unwrap_err();
            assert_eq!(error, format!("host list `{list}`: names more than 65536 hosts"));
        }
        let nested = "n[0-9]".repeat(20);
        assert!(expand(&nested).unwrap_err().contains("more than 65536 hosts"));
    }

    #[test]
    fn errors_name_the_list_and_the_place() {
        for (list, problem) in [
            ("n[1-", "has `[` without `]`"),
            ("n[3-1]", "has the range `3-1`, expected NUMBER or FIRST-LAST with FIRST <= LAST"),
            ("a[1-2]-ib", "has `-ib` after its last bracket, expected a comma or the end"),
            ("a b", "has ' ', expected letters, digits, `-`, `.`, `_`"),
        ] {
            assert_eq!(expand(list).unwrap_err(), format!("host list `{list}`: {problem}"));
        }
        let long = "x".repeat(300);
        let error = expand(&long).unwrap_err();
        assert!(error.ends_with("...`: names a host of 300 characters, expected at most 255"), "{error}");
    }

    #[test]
    fn addresses_are_no_lists() {
        assert!(is_list("n[1-3]") && is_list("a,b[1]"));
        assert!(!is_list("[::1]") && !is_list("10.0.0.7") && !is_list("n1"));
    }

    /// A list as text, and the hosts that it was made of.
    fn lists() -> impl Strategy<Value = (String, Vec<String>)> {
        let range = (0u64..30, 0u64..30, 1usize..5).prop_map(|(low, more, width)| {
            let hosts: Vec<String> = (low..=low + more).map(|n| format!("{n:0width$}")).collect();
            (format!("{low:0width$}-{}", low + more), hosts)
        });
        let item =
            ("[a-z][a-z0-9.-]{0,6}", prop::collection::vec(range, 0..3)).prop_map(|(prefix, ranges)| {
                if ranges.is_empty() {
                    return (prefix.clone(), vec![prefix]);
                }
                let texts: Vec<_> = ranges.iter().map(|(text, _)| text.as_str()).collect();
                let hosts =
                    ranges.iter().flat_map(|(_, hosts)| hosts).map(|n| format!("{prefix}{n}")).collect();
                (format!("{prefix}[{}]", texts.join(",")), hosts)
            });
        prop::collection::vec(item, 0..4).prop_map(|items| {
            let (texts, hosts): (Vec<_>, Vec<_>) = items.into_iter().unzip();
            (texts.join(","), hosts.concat())
        })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read((text, hosts) in lists()) {
            prop_assert_eq!(expand(&text).unwrap(), hosts);
        }

        #[test]
        fn no_text_panics_or_grows_without_bound(text in "([a-c0-9,\\[\\]-]|[0-9]{1,20}|\\PC){0,60}") {
            if let Ok(hosts) = expand(&text) {
                prop_assert!(hosts.len() <= HOSTS_MAX);
                prop_assert!(hosts.iter().all(|host| !host.is_empty() && host.len() <= NAME_MAX));
            }
        }
    }
}
