//! Alone in its process: what other tests hold would be counted too.
#![cfg(all(target_os = "linux", target_env = "gnu"))]
#![expect(clippy::unwrap_used, reason = "tests")]

use halfstep_compute::give_back_large_blocks;

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn blocks_of_a_matrix_s_size_go_back_when_they_are_freed() {
    give_back_large_blocks();
    let before = resident_kib();
    // In threads, each of which has a heap of its own, and more than once: the first block of a size is always given back.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                (1..4u8).for_each(|value| drop(std::hint::black_box(vec![value; 24 << 20])));
                // Above the blocks, so that they are not at the end of the heap.
                let above = std::hint::black_box(vec![1u8; 1 << 20]);
                (1..4u8).for_each(|value| drop(std::hint::black_box(vec![value; 24 << 20])));
                drop(above);
            });
        }
    });
    let kept = resident_kib().saturating_sub(before);
    assert!(kept < 24 << 10, "{kept} KiB are kept");
}
