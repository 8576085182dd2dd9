//! Kernels on the host: compiles a `.cu` file as C++ under `shim.h`, loads it, launches its kernels from host memory.
//!
//! [`Family::outputs`] launches a kernel in several ways that must not matter: grids, orders of blocks and threads, alignment
//! of the arrays. All must give the same bytes, leave inputs and the memory around every array untouched.
//!
//! With `HALFSTEP_TEST_KERNELS_ON=gpu` the same tests run on the first GPU instead ([`gpu`]).
//!
//! Not here: which kernels there are, what they should compute (the tests beside this folder).
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(unreachable_pub, reason = "a module of tests")]
#![expect(
    unsafe_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "loads a library built here; tests"
)]

mod gpu;
pub mod nvrtc;
pub mod values;

use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use halfstep_compute::random::Stream;
use libloading::{Library, Symbol};

/// Elements of poison on both sides of an array; a multiple of 16 bytes whatever the element.
const GUARD_BYTES: usize = 256;
/// What guards hold, by order: a result that a read outside of an array entered differs. The last is NaN.
const GUARDS: [u8; 3] = [0xa5, 0x3c, 0xff];
/// Orders of blocks and threads that each grid is run in; 0 is the natural one.
const ORDERS: u64 = GUARDS.len() as u64;

/// Threads per block and blocks, as CUDA has them.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub blocks: [u32; 3],
    pub threads: [u32; 3],
}

/// Flat grids with too many threads, too few, and one block.
pub fn flat(len: usize) -> Vec<Grid> {
    let enough = len.div_ceil(256).max(1) as u32;
    [enough + 1, (enough / 3).max(1)].map(|x| Grid { blocks: [x, 1, 1], threads: [256, 1, 1] }).to_vec()
}

/// Grids for kernels that give rows to y and blocks: wide, narrow.
pub fn by_rows(rows: usize) -> Vec<Grid> {
    let grid = |x: u32, threads| Grid { blocks: [x.max(1), 1, 1], threads };
    vec![grid(rows.div_ceil(8) as u32, [32, 8, 1]), grid(rows as u32 / 2, [256, 1, 1]), grid(1, [64, 4, 1])]
}

/// Grids for kernels of a warp per row.
pub fn by_warps(rows: usize) -> Vec<Grid> {
    let grid = |x: usize, threads| Grid { blocks: [x.max(1) as u32, 1, 1], threads: [threads, 1, 1] };
    vec![grid(rows.div_ceil(8) + 1, 256), grid(rows / 17, 64)]
}

/// One array of a launch.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    F32(Vec<f32>),
    F64(Vec<f64>),
    U16(Vec<u16>),
    U32(Vec<u32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
}

impl Array {
    pub fn f32(self) -> Vec<f32> {
        let Self::F32(values) = self else { panic!("not an array of f32") };
        values
    }

    fn element_bytes(&self) -> usize {
        match self {
            Self::U16(_) => 2,
            Self::F32(_) | Self::U32(_) => 4,
            Self::F64(_) | Self::U64(_) | Self::I64(_) => 8,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::F32(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
            Self::F64(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
            Self::U16(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
            Self::U32(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
            Self::U64(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
            Self::I64(v) => v.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        }
    }

    /// The same kind of array with other contents.
    fn of_bytes(&self, bytes: &[u8]) -> Self {
        macro_rules! elements {
            ($type:ty) => {
                bytes
                    .chunks_exact(size_of::<$type>())
                    .map(|chunk| <$type>::from_ne_bytes(chunk.try_into().unwrap()))
                    .collect()
            };
        }
        match self {
            Self::F32(_) => Self::F32(elements!(f32)),
            Self::F64(_) => Self::F64(elements!(f64)),
            Self::U16(_) => Self::U16(elements!(u16)),
            Self::U32(_) => Self::U32(elements!(u32)),
            Self::U64(_) => Self::U64(elements!(u64)),
            Self::I64(_) => Self::I64(elements!(i64)),
        }
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone)]
pub enum Arg {
    U32(u32),
    U64(u64),
    I32(i32),
    F32(f32),
    F64(f64),
    /// An array that must not change.
    In(Array),
    /// An array that is written; as it is before.
    Out(Array),
    /// The array of an earlier argument, for kernels that may work in place.
    Same(usize),
    /// No array.
    Null,
}

/// An input of f32.
pub fn input(values: &[f32]) -> Arg {
    Arg::In(Array::F32(values.to_vec()))
}

/// An input of u32.
pub fn indices(values: &[u32]) -> Arg {
    Arg::In(Array::U32(values.to_vec()))
}

/// An array that is read and written.
pub fn state(values: &[f32]) -> Arg {
    Arg::Out(Array::F32(values.to_vec()))
}

/// An array that is written and holds NaN before.
pub fn poisoned(len: usize) -> Arg {
    state(&vec![f32::NAN; len])
}

/// A number of elements as the kernels' `u32`.
pub fn size(n: usize) -> Arg {
    Arg::U32(n as u32)
}

/// An array in memory of its own, with guards around it.
struct Placed {
    memory: Vec<u128>,
    start: usize,
    len: usize,
    guard: u8,
}

impl Placed {
    /// `shift`: bytes off a multiple of 16.
    fn new(bytes: &[u8], shift: usize, guard: u8) -> Self {
        let start = GUARD_BYTES + shift;
        let memory = vec![u128::from_ne_bytes([guard; 16]); (start + bytes.len() + GUARD_BYTES).div_ceil(16)];
        let mut placed = Self { memory, start, len: bytes.len(), guard };
        let end = start + bytes.len();
        placed.all_mut()[start..end].copy_from_slice(bytes);
        placed
    }

    fn all(&self) -> &[u8] {
        // SAFETY: a `u128` is 16 initialised bytes without padding.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.memory.len() * 16) }
    }

    fn all_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and any bytes are a `u128`.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.memory.len() * 16) }
    }

    fn pointer(&mut self) -> *mut c_void {
        let start = self.start;
        self.all_mut()[start..].as_mut_ptr().cast()
    }

    fn content(&self) -> &[u8] {
        &self.all()[self.start..self.start + self.len]
    }

    fn guards_hold(&self) -> bool {
        let all = self.all();
        let (before, after) = (&all[..self.start], &all[self.start + self.len..]);
        before.iter().chain(after).all(|byte| *byte == self.guard)
    }
}

type Launch = unsafe extern "C" fn(
    kernel: usize,
    blocks: *const u32,
    threads: *const u32,
    arguments: *mut *mut c_void,
    sizes: *const usize,
    count: usize,
    seed: u64,
) -> *const c_char;

/// The kernels of one `.cu` file.
pub struct Family {
    place: Place,
    kernels: Vec<String>,
    /// The shim runs one launch at a time.
    turn: Mutex<()>,
}

/// Where kernels run.
enum Place {
    Host(Library),
    Gpu(gpu::Module),
}

/// Folder of the `.cu` files; below the working folder if the tests were carried to another machine.
pub fn folder() -> PathBuf {
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("cu");
    if built_from.exists() { built_from } else { "node/compute/cu".into() }
}

/// Names of the kernels that a source declares, in order.
pub fn kernels(source: &str) -> Vec<String> {
    let after = source.split("__global__ void ").skip(1);
    let declarations = after
        .map(|rest| rest.split_once(") ").filter(|_| rest.starts_with("__")).map_or(rest, |(_, rest)| rest));
    declarations.map(|rest| rest.split('(').next().unwrap_or_default().trim().to_owned()).collect()
}

impl Family {
    /// Compiles and loads `{name}.cu`; `None`, with the reason printed, where there is no C++ compiler.
    pub fn load(name: &str) -> Option<Self> {
        let source = folder().join(format!("{name}.cu"));
        if std::env::var("HALFSTEP_TEST_KERNELS_ON").is_ok_and(|place| place == "gpu") {
            let text = std::fs::read_to_string(source).unwrap();
            let module = gpu::Module::load(name, &text).unwrap_or_else(|error| panic!("{name}.cu: {error}"));
            return Some(Self { place: Place::Gpu(module), kernels: kernels(&text), turn: Mutex::new(()) });
        }
        Self::on_host(&source)
    }

    /// The same of any file, on the host.
    pub fn on_host(source: &Path) -> Option<Self> {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        if Command::new(&compiler).arg("--version").output().is_err() {
            println!("skipped: no C++ compiler `{compiler}` to run kernels on the host with");
            return None;
        }
        let kernels = kernels(&std::fs::read_to_string(source).unwrap());
        let place = tempfile::tempdir().unwrap();
        let (wrapper, library) = (place.path().join("kernels.cpp"), place.path().join("kernels.so"));
        std::fs::write(&wrapper, wrapper_of(source, &kernels)).unwrap();
        let output = Command::new(&compiler)
            .args([
                "-std=c++17",
                "-O1",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wno-unknown-pragmas",
                "-Wno-unused-function",
            ])
            // What the source does not fuse stays two roundings; an index outside a shared array or a crooked float4 is a trap.
            .args([
                "-ffp-contract=off",
                "-fsanitize=bounds,alignment,shift",
                "-fsanitize-undefined-trap-on-error",
            ])
            .args(["-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-o"])
            .args([&library, &wrapper])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}: {}", source.display(), String::from_utf8_lossy(&output.stderr));
        // SAFETY: the library was built just now from our own sources and runs nothing when loaded.
        let library = unsafe { Library::new(&library) }.unwrap();
        Some(Self { place: Place::Host(library), kernels, turn: Mutex::new(()) })
    }

    /// What `kernel` writes: its `Out` arrays. The same for every grid, order and alignment, or the test fails.
    ///
    /// # Panics
    /// If not, if an input or memory outside the arrays changes, or if the launch itself fails.
    pub fn outputs(&self, kernel: &str, grids: &[Grid], arguments: &[Arg]) -> Vec<Array> {
        let mut first: Option<Vec<Array>> = None;
        for grid in grids {
            for order in 0..ORDERS {
                for crooked in [false, true] {
                    let what = format!("{kernel} with {grid:?}, order {order}, crooked {crooked}");
                    let outputs = self.launch(kernel, *grid, arguments, order, crooked);
                    let outputs = outputs.unwrap_or_else(|error| panic!("{what}: {error}"));
                    let expected = first.get_or_insert_with(|| outputs.clone());
                    for (at, (got, want)) in outputs.iter().zip(expected.iter()).enumerate() {
                        assert!(
                            got.bytes() == want.bytes(),
                            "{what}: output {at} differs from that of {:?} in natural order",
                            grids[0]
                        );
                    }
                }
            }
        }
        first.expect("at least one grid")
    }

    /// One launch; `crooked`: arrays start one element off a multiple of 16 bytes.
    pub fn launch(
        &self,
        kernel: &str,
        grid: Grid,
        arguments: &[Arg],
        order: u64,
        crooked: bool,
    ) -> Result<Vec<Array>, String> {
        let index = self.kernels.iter().position(|name| name == kernel).ok_or("no such kernel")?;
        let mut placed: Vec<Option<Placed>> = arguments
            .iter()
            .map(|argument| match argument {
                Arg::In(array) | Arg::Out(array) => {
                    let shift = if crooked { array.element_bytes() } else { 0 };
                    Some(Placed::new(&array.bytes(), shift, GUARDS[order as usize % GUARDS.len()]))
                }
                _ => None,
            })
            .collect();
        let _turn = self.turn.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &self.place {
            Place::Host(library) => launch_on_host(library, index, grid, arguments, &mut placed, order)?,
            Place::Gpu(module) => {
                let mut values: Vec<u64> =
                    arguments.iter().map(|argument| value(argument, None, &[]).0).collect();
                module.launch(kernel, grid, &mut values, &mut placed, &same(arguments))?;
            }
        }
        results(arguments, &placed)
    }
}

fn launch_on_host(
    library: &Library,
    kernel: usize,
    grid: Grid,
    arguments: &[Arg],
    placed: &mut [Option<Placed>],
    order: u64,
) -> Result<(), String> {
    let places: Vec<Option<u64>> = placed
        .iter_mut()
        .map(|placed| placed.as_mut().map(|placed| placed.pointer().expose_provenance() as u64))
        .collect();
    // Each argument's value in eight bytes, as the driver wants a pointer to each.
    let (mut values, sizes): (Vec<u64>, Vec<usize>) =
        arguments.iter().zip(&places).map(|(argument, place)| value(argument, *place, &places)).unzip();
    let mut pointers: Vec<*mut c_void> =
        values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
    // SAFETY: `launch` has this signature in the wrapper below; every pointer stands for memory that outlives this
    // function, and the shim compares number and sizes of the arguments with the kernel's before it calls it.
    let message = unsafe {
        let launch: Symbol<'_, Launch> = library.get(b"launch").map_err(|error| error.to_string())?;
        let (blocks, threads) = (grid.blocks.as_ptr(), grid.threads.as_ptr());
        launch(kernel, blocks, threads, pointers.as_mut_ptr(), sizes.as_ptr(), sizes.len(), order)
    };
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns string literals.
    Err(unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned())
}

/// Which earlier argument's array each argument is.
fn same(arguments: &[Arg]) -> Vec<Option<usize>> {
    arguments.iter().map(|argument| if let Arg::Same(at) = argument { Some(*at) } else { None }).collect()
}

/// An argument's value and size; `place`: where its array is, `places`: where all are.
fn value(argument: &Arg, place: Option<u64>, places: &[Option<u64>]) -> (u64, usize) {
    match argument {
        Arg::U32(x) => (u64::from(*x), 4),
        Arg::I32(x) => (u64::from(x.cast_unsigned()), 4),
        Arg::U64(x) => (*x, 8),
        Arg::F32(x) => (u64::from(x.to_bits()), 4),
        Arg::F64(x) => (x.to_bits(), 8),
        Arg::Same(at) => (places.get(*at).copied().flatten().unwrap_or(0), 8),
        Arg::In(_) | Arg::Out(_) | Arg::Null => (place.unwrap_or(0), 8),
    }
}

fn results(arguments: &[Arg], placed: &[Option<Placed>]) -> Result<Vec<Array>, String> {
    let mut outputs = Vec::new();
    for (at, (argument, placed)) in arguments.iter().zip(placed).enumerate() {
        let Some(placed) = placed else { continue };
        if !placed.guards_hold() {
            return Err(format!("argument {at}: memory outside of the array was written"));
        }
        match argument {
            Arg::In(array) if array.bytes() != placed.content() => {
                return Err(format!("argument {at}: an input was written"));
            }
            Arg::Out(array) => outputs.push(array.of_bytes(placed.content())),
            _ => {}
        }
    }
    Ok(outputs)
}

fn wrapper_of(source: &Path, kernels: &[String]) -> String {
    let shim = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shim/shim.h");
    let entries: String =
        kernels.iter().map(|name| format!("    shim::Entry<&{name}>::kernel(\"{name}\"),\n")).collect();
    format!(
        "#include {shim:?}\n#include {source:?}\nstatic const shim::Kernel kernels[] = {{\n{entries}}};\n\
         extern \"C\" const char* launch(size_t kernel, const unsigned* grid, const unsigned* block, void** arguments,\n\
         \x20   const size_t* sizes, size_t count, uint64_t seed) {{\n\
         \x20   return shim::launch(kernels[kernel], grid, block, arguments, sizes, count, seed);\n}}\n"
    )
}

/// A stream of random numbers from a fresh seed, which is printed; `HALFSTEP_TEST_SEED` repeats one.
pub fn fresh() -> Stream {
    use std::hash::{BuildHasher, Hasher, RandomState};
    let given = std::env::var("HALFSTEP_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let seed = given.unwrap_or_else(|| RandomState::new().build_hasher().finish());
    println!("HALFSTEP_TEST_SEED={seed}");
    Stream::new(seed, 0, 0)
}
