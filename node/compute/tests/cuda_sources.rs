//! What holds of every kernel source: NVRTC compiles it for the architectures we name, and its README says how to call it.
//!
//! Not here: what kernels compute (`cuda_solver_kernels` and the like).

#![expect(clippy::unwrap_used, reason = "tests")]

mod shim;

use std::collections::BTreeMap;

use shim::nvrtc::Nvrtc;

/// Ampere, consumer Ampere, Ada, Hopper, Blackwell, consumer Blackwell.
const ARCHITECTURES: [i32; 6] = [80, 86, 89, 90, 100, 120];

/// Name without ending, and text.
fn sources() -> BTreeMap<String, String> {
    let files = std::fs::read_dir(shim::folder()).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "cu"));
    let sources: BTreeMap<_, _> = files
        .map(|path| {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(!sources.is_empty());
    sources
}

#[test]
fn every_kernel_compiles_for_every_architecture_and_keeps_its_numbers_in_registers() {
    let Some(nvrtc) = Nvrtc::find() else { return };
    let known = nvrtc.architectures();
    for architecture in ARCHITECTURES {
        if !known.contains(&architecture) {
            println!("skipped: this NVRTC does not know architecture {architecture}, only {known:?}");
            continue;
        }
        for (name, source) in sources() {
            let report = nvrtc.resources(&format!("{name}.cu"), &source, architecture);
            let report = report.unwrap_or_else(|log| panic!("{name}.cu for sm_{architecture}:\n{log}"));
            for kernel in shim::kernels(&source) {
                assert_no_stack(&report, &kernel, architecture);
            }
        }
    }
}

/// Kernels that put a few numbers on the stack which they need once a row: name, architecture.
const ONCE_A_ROW: [(&str, i32); 1] = [("refine_rows_29696", 120)];

/// The assembler's report names each function, and on the line below its use of memory.
fn assert_no_stack(report: &str, kernel: &str, architecture: i32) {
    let mut lines =
        report.lines().skip_while(|line| !line.ends_with(&format!("Function properties for {kernel}")));
    let used = lines.nth(1).unwrap_or_default();
    if ONCE_A_ROW.contains(&(kernel, architecture)) {
        let bytes = used.split("bytes stack frame").next().and_then(|text| text.split_whitespace().last());
        assert!(bytes.unwrap().parse::<u32>().unwrap() <= 64, "{kernel} for sm_{architecture}: `{used}`");
        return;
    }
    let expected = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
    assert!(
        used.ends_with(&format!(" {expected}")),
        "{kernel} for sm_{architecture}: `{used}` of:\n{report}"
    );
}

#[test]
fn a_broken_source_is_refused_with_its_file_and_line() {
    let Some(nvrtc) = Nvrtc::find() else { return };
    let log = nvrtc
        .machine_code("broken.cu", "extern \"C\" __global__ void f() {\n    undeclared = 1;\n}\n", 90)
        .unwrap_err();
    assert!(log.contains("broken.cu(2)") && log.contains("undeclared"), "{log}");
}

#[test]
fn no_source_includes_anything() {
    for (name, source) in sources() {
        assert!(!source.contains("#include"), "{name}.cu includes a file, which NVRTC would not find");
        assert!(!source.contains("atomic"), "{name}.cu: atomics add in any order");
    }
}

/// `u32 rows`, `*f32 out`: a parameter as the README writes it.
fn described(parameter: &str) -> String {
    let words: Vec<&str> =
        parameter.split_whitespace().filter(|word| !["const", "__restrict__"].contains(word)).collect();
    let (name, kind) = words.split_last().unwrap();
    let kind = kind.concat();
    let element = match kind.trim_end_matches('*') {
        "float" => "f32",
        "double" => "f64",
        "int" => "i32",
        other => other,
    };
    format!("{}{element} {name}", if kind.ends_with('*') { "*" } else { "" })
}

/// Kernels and their parameters.
fn signatures(source: &str) -> Vec<(String, Vec<String>)> {
    let bodies = source.split("__global__ void ").skip(1);
    let names = shim::kernels(source).into_iter();
    names
        .zip(bodies)
        .map(|(name, body)| {
            let parameters = body.split_once(&format!("{name}(")).unwrap().1.split_once(") {").unwrap().0;
            (name, parameters.split(',').map(described).collect())
        })
        .collect()
}

/// The README's rows: kernel, and its parameters without their remarks.
fn documented() -> BTreeMap<String, Vec<String>> {
    let readme = std::fs::read_to_string(shim::folder().join("README.md")).unwrap();
    let rows = readme.lines().filter(|line| line.starts_with("| `"));
    rows.filter_map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, parameters, _grid] = cells[..] else { return None };
        // Remarks are in brackets or code: what is left of each part is type and name.
        let code_free: String = parameters.split('`').step_by(2).collect();
        let parts =
            code_free.split(", ").map(|part| part.split(" (").next().unwrap_or_default().replace('\\', ""));
        let parameters = parts.map(|part| part.trim().to_owned());
        Some((name.trim_matches('`').to_owned(), parameters.collect()))
    })
    .collect()
}

#[test]
fn the_readme_lists_every_kernel_with_its_arguments_in_order() {
    let mut rows = documented();
    for (file, source) in sources() {
        for (kernel, parameters) in signatures(&source) {
            let row = rows
                .remove(&kernel)
                .unwrap_or_else(|| panic!("README.md has no row for {kernel} of {file}.cu"));
            assert_eq!(row, parameters, "README.md: arguments of {kernel}");
        }
    }
    assert!(rows.is_empty(), "README.md has rows for kernels that are not there: {:?}", rows.keys());
}
