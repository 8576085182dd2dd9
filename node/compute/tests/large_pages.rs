//! The allocator of large blocks, as the allocator of a process.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

use halfstep_compute::LargePages;

#[global_allocator]
static ALLOCATOR: LargePages = LargePages;

/// Kilobytes of huge pages in this process, if its system gives any to who asks.
fn huge_kib() -> Option<u64> {
    let policy = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    if policy.contains("[never]") {
        return None;
    }
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

#[test]
fn large_blocks_have_huge_pages_where_the_system_has_them_and_keep_what_is_in_them() {
    let Some(before) = huge_kib() else {
        return println!("SKIPPED: this system has no transparent huge pages");
    };
    let mut block = vec![1u8; 64 << 20];
    // Grown, it moves.
    block.resize(96 << 20, 2);
    let zeros = vec![0u8; 64 << 20];
    assert!(
        block[..64 << 20].iter().all(|byte| *byte == 1) && block[64 << 20..].iter().all(|byte| *byte == 2)
    );
    assert!(zeros.iter().all(|byte| *byte == 0));
    let now = huge_kib().unwrap();
    println!("{before} KiB of huge pages before, {now} after");
    drop((block, zeros));
    // Where memory is in pieces there may be none: then only the contents count.
}
