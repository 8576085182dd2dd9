//! The libraries of a CUDA device that the host pretends to be (`../fake/cuda.cpp`), built into a folder.
//!
//! Not here: opening them.
#![allow(unreachable_pub, reason = "a module of tests")]

use std::path::Path;
use std::process::Command;

/// Names under which the product looks for what the fake is.
pub const NAMES: [&str; 3] = ["libcuda.so", "libcublas.so", "libnvrtc.so"];

/// Builds them; `tests`: the folder above this one. What is compiled for the device lies beside them.
///
/// # Errors
/// There is no compiler.
///
/// # Panics
/// If the compiler refuses the fake: then nothing would be tested.
pub fn build(tests: &Path, folder: &Path) -> Result<(), String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    if Command::new(&compiler).arg("--version").output().is_err() {
        return Err(format!("no device, and no C++ compiler `{compiler}` to pretend one with"));
    }
    let define = |name: &str, path: &Path| format!("-D{name}={path:?}");
    let defines = [define("SHIM", &tests.join("shim/shim.h")), define("FOLDER", folder)];
    for name in NAMES {
        let mut command = Command::new(&compiler);
        command.args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]);
        match name == NAMES[0] {
            true => command.args(&defines).arg(tests.join("fake/cuda.cpp")),
            // The others have nothing of their own; a look-up goes on to what they need.
            false => command
                .args(["-x", "c++", "/dev/null", "-x", "none", "-Wl,--no-as-needed"])
                .arg(folder.join(NAMES[0])),
        };
        let output = command.arg(format!("-Wl,-soname,{name}")).arg("-o").arg(folder.join(name)).output();
        let output = output.map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "the fake does not compile: {said}");
    }
    Ok(())
}
