//! What processes have cost the machine.

use std::fs;

/// Seconds of CPU that a process has had in all its threads, as the kernel counts them; none where it does not say.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
        .map(|ticks| ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// In user and kernel mode. The name, in parentheses, may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11).map(str::parse::<u64>);
    Some(fields.next()?.ok()? + fields.next()?.ok()?)
}

/// Tasks that want to run, on the average of the last minute; none where the system does not say.
pub fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_strange_name_changes_nothing() {
        let fields = "R 1 2 3 4 5 6 7 8 9 10 1100 250 0 0 20 0";
        assert_eq!(ticks(&format!("77 (half) step) {fields}")), Some(1350));
        assert_eq!(ticks("77 (x) R 1"), None);
    }

    #[test]
    fn work_is_counted() {
        let (pid, begun) = (std::process::id(), Instant::now());
        let before = cpu_seconds(pid).unwrap();
        while begun.elapsed() < Duration::from_millis(200) {
            std::hint::spin_loop();
        }
        assert!(cpu_seconds(pid).unwrap() > before);
        assert!(load().unwrap() >= 0.0);
    }
}
