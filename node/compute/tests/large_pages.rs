//! The allocator of large blocks, as the allocator of a process.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

use halfstep_compute::LargePages;

#[global_allocator]
static ALLOCATOR: LargePages = LargePages;

/// The flags of the mapping in which an address lies (`hg`: huge pages are asked for), where the kernel tells.
fn flags_at(address: usize) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
    let mut inside = false;
    for line in maps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let ends = range.and_then(|(from, to)| {
            Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
        });
        if let Some((from, to)) = ends {
            inside = (from..to).contains(&address);
        }
        if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return Some(flags.to_owned());
        }
    }
    None
}

#[test]
fn large_blocks_ask_for_huge_pages_and_keep_what_is_in_them() {
    let mut block = vec![1u8; 64 << 20];
    // Grown, it may move.
    block.resize(96 << 20, 2);
    let zeros = vec![0u8; 64 << 20];
    assert!(
        block[..64 << 20].iter().all(|byte| *byte == 1) && block[64 << 20..].iter().all(|byte| *byte == 2)
    );
    assert!(zeros.iter().all(|byte| *byte == 0));
    if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        return println!("SKIPPED the rest: this kernel has no transparent huge pages");
    }
    for block in [&block, &zeros] {
        let flags = flags_at(block.as_ptr() as usize + (32 << 20)).expect("the kernel tells of a mapping");
        assert!(flags.split(' ').any(|flag| flag == "hg"), "flags of a large block: {flags}");
    }
}
