//! The most memory that this process ever had at once, and what is left, as the system counts it.
//!
//! Resident pages: its own, and those of files it has mapped. Linux says; elsewhere nothing is known.
//! Not here: budgets, and what is kept within them (`exec::carry`).

/// Bytes; none where the system does not say.
pub(crate) fn peak_resident_bytes() -> Option<u64> {
    peak_of(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Bytes that could be had without swapping; none where the system does not say.
pub(crate) fn available_bytes() -> Option<u64> {
    kibibytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

fn peak_of(status: &str) -> Option<u64> {
    kibibytes(status, "VmHWM:")
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_found_among_other_lines() {
        let status = "Name:\thalfstep\nVmPeak:\t  900 kB\nVmHWM:\t   12 kB\nVmRSS:\t    8 kB\n";
        assert_eq!(peak_of(status), Some(12 * 1024));
        for without in ["", "VmHWM:\t12\n", "VmHWM:\t-1 kB\n", "VmHWM:\t18446744073709551615 kB\n"] {
            assert_eq!(peak_of(without), None, "{without}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_had_what_it_has() {
        let before = peak_resident_bytes().unwrap();
        let mut block = vec![0u8; 64 << 20];
        block.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        let after = peak_resident_bytes().unwrap();
        assert!(after >= before.max(64 << 20), "{before} {after} {}", block.len());
        assert!(available_bytes().unwrap() > 1 << 20);
    }
}
