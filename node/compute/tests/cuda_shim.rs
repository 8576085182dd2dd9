//! That running kernels on the host can fail: each fault it is there to find, in a kernel that has it.
//!
//! Not here: the product's kernels.

#![expect(clippy::unwrap_used, reason = "tests")]

mod shim;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::LazyLock;

use shim::{Arg, Family, Grid, input, poisoned};

static BROKEN: LazyLock<Option<Family>> =
    LazyLock::new(|| Family::on_host(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shim/broken.cu")));

const BLOCK: Grid = Grid { blocks: [1; 3], threads: [256, 1, 1] };
const TWO: Grid = Grid { blocks: [3, 1, 1], ..BLOCK };

fn numbers() -> Vec<f32> {
    (0..256).map(|i| i as f32 * 0.5 + 1.0).collect()
}

/// What `outputs` says of a kernel.
fn complaint(kernel: &str, grid: Grid, arguments: &[Arg]) -> Option<String> {
    let family = BROKEN.as_ref()?;
    let run = catch_unwind(AssertUnwindSafe(|| family.outputs(kernel, &[grid], arguments)));
    Some(run.expect_err(kernel).downcast_ref::<String>().unwrap().clone())
}

#[test]
fn a_sound_kernel_passes_before_and_after_broken_ones() {
    let Some(family) = &*BROKEN else { return };
    let arguments = [input(&numbers()), poisoned(256)];
    let mut turned = numbers();
    turned.reverse();
    for _ in 0..2 {
        assert_eq!(family.outputs("sound", &[BLOCK, TWO], &arguments).remove(0).f32(), turned);
        complaint("misses_a_barrier", BLOCK, &arguments);
        complaint("loses_a_lane", BLOCK, &arguments);
    }
}

#[test]
fn every_fault_is_found_and_named() {
    let cases = [
        ("lacks_a_barrier", BLOCK, "differs"),
        ("lacks_the_second_barrier", BLOCK, "differs"),
        ("reads_what_nobody_wrote", BLOCK, "differs"),
        ("depends_on_the_order_of_blocks", TWO, "differs"),
        ("writes_past_the_end", BLOCK, "argument 1: memory outside of the array was written"),
        ("writes_its_input", BLOCK, "argument 0: an input was written"),
        ("misses_a_barrier", BLOCK, "a barrier or collective that some threads never reach"),
        ("loses_a_lane", BLOCK, "a collective that some lanes have passed by"),
        ("loses_a_lane", Grid { threads: [20, 1, 1], ..BLOCK }, "a collective"),
        ("sound", Grid { threads: [2000, 1, 1], ..BLOCK }, "a block of no threads, or of more than 1024"),
    ];
    for (kernel, grid, expected) in cases {
        let Some(message) = complaint(kernel, grid, &[input(&numbers()), poisoned(256)]) else { return };
        assert!(message.contains(expected), "{kernel}: {message}");
    }
}

#[test]
fn wrong_arguments_are_refused_before_the_kernel_runs() {
    let (x, out) = (input(&numbers()), poisoned(256));
    let cases = [
        (vec![x.clone()], "the number of arguments differs"),
        (vec![x.clone(), out.clone(), Arg::U32(1)], "the number of arguments differs"),
        (vec![x, Arg::U32(1)], "an argument's size differs"),
    ];
    for (arguments, expected) in cases {
        let Some(message) = complaint("sound", BLOCK, &arguments) else { return };
        assert!(message.contains(expected), "{message}");
    }
}
