//! The CUDA kernels' own source on the CPU, against float64: see `tests/cuda_emulation`.

use std::path::Path;
use std::process::Command;

#[test]
fn kernels_compute_what_plain_loops_compute() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = tempfile::tempdir().unwrap();
    let program = target.path().join("emulation");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let compiled = Command::new(&compiler)
        .current_dir(here.join("tests/cuda_emulation"))
        // Fibers jump between stacks, which glibc's fortified longjmp takes for an error.
        .args(["-std=c++20", "-O2", "-w", "-U_FORTIFY_SOURCE", "-I.", "-I../../src/cuda/kernels", "main.cpp", "-o"])
        .arg(&program)
        .output()
        .unwrap_or_else(|error| panic!("a C++20 compiler is needed, CXX or c++: {}: {error}", compiler.display()));
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let run = Command::new(&program).output().unwrap();
    assert!(run.status.success(), "{}\n{}", run.status, String::from_utf8_lossy(&run.stdout));
}
