//! The binary runs wherever there is a C library: everything else, CUDA above all, is opened at run time or built in.
//!
//! Not here: which version of the C library, which is that of the machine that builds (`k8s/Dockerfile` says which).
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use object::read::elf::ElfFile64;
use object::{Endianness, elf};

/// The C library in its parts, the loader, and the compiler's own, which every Linux has.
const ALLOWED: [&str; 7] = [
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
];

/// The libraries that a program asks the loader for.
fn needed(bytes: &[u8]) -> Vec<String> {
    let file = ElfFile64::<Endianness>::parse(bytes).unwrap();
    let table = file.elf_dynamic_table().unwrap();
    let names = table.iter().filter(|entry| entry.tag == elf::DT_NEEDED);
    names.map(|entry| String::from_utf8(table.string(entry).unwrap().to_vec()).unwrap()).collect()
}

#[test]
fn the_binary_needs_the_c_library_and_nothing_else() {
    let binary = std::fs::read(env!("CARGO_BIN_EXE_halfstep")).unwrap();
    let found = needed(&binary);
    assert!(found.iter().any(|name| name == "libc.so.6"), "nothing was read: {found:?}");
    let strange: Vec<_> = found.iter().filter(|name| !ALLOWED.contains(&name.as_str())).collect();
    assert!(strange.is_empty(), "needs {strange:?} besides the C library; all: {found:?}");
}
