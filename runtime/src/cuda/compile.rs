//! From kernel sources to machine code for one card: NVRTC on several threads, results kept on disk.

use super::CudaError;
use super::cubin_cache::{CubinKey, DiskCache};
use cudarc::nvrtc::{result as nvrtc, sys};
use std::ffi::CString;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One compilation: the whole text, and the options that make it a variant (`-DHEAD_DIM=128`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSource {
    /// For messages and file names.
    pub name: String,
    pub text: String,
    pub options: Vec<String>,
}

const STANDARD_OPTIONS: [&str; 2] = ["--std=c++17", "-default-device"];

/// NVRTC's (major, minor). The library must be open.
///
/// # Errors
/// When it does not answer.
pub fn compiler_version() -> Result<(i32, i32), CudaError> {
    version().ok_or_else(|| failure("(any)", "any card", "nvrtcVersion does not answer".to_owned()))
}

fn version() -> Option<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers through pointers to live ones. The library was opened before (`libraries::open`), so
    // cudarc finds it instead of panicking.
    let result = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    (result == sys::nvrtcResult::NVRTC_SUCCESS).then_some((major, minor))
}

/// Compiles every source for `arch`, those not in the cache on up to `threads` threads. Cubins in the order of `sources`.
///
/// # Errors
/// The first source that does not compile, with the compiler's words.
pub fn compile_all(
    sources: &[KernelSource],
    arch: &str,
    cache: Option<&DiskCache>,
    threads: usize,
) -> Result<Vec<Vec<u8>>, CudaError> {
    let compiler = compiler_version()?;
    let next = AtomicUsize::new(0);
    let empty: Vec<Option<Result<Vec<u8>, CudaError>>> = (0..sources.len()).map(|_| None).collect();
    let done = Mutex::new(empty);
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(source) = sources.get(at) else { return };
            let result = cached(source, arch, compiler, cache);
            done.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[at] = Some(result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(sources.len()) {
            scope.spawn(work);
        }
        work();
    });
    let done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.into_iter().flatten().collect()
}

fn cached(
    source: &KernelSource,
    arch: &str,
    compiler: (i32, i32),
    cache: Option<&DiskCache>,
) -> Result<Vec<u8>, CudaError> {
    let key = CubinKey { source: &source.text, arch, options: &source.options, compiler };
    if let Some(cubin) = cache.and_then(|c| c.cubin(&source.name, &key)) {
        return Ok(cubin);
    }
    let cubin = compile(source, arch)?;
    if let Some(Err(error)) = cache.map(|c| c.store_cubin(&source.name, &key, &cubin)) {
        tracing::warn!("kernel {} is compiled but could not be kept: {error}", source.name);
    }
    Ok(cubin)
}

/// Destroys the program however the compilation ends.
struct Compilation(sys::nvrtcProgram);

impl Drop for Compilation {
    fn drop(&mut self) {
        // SAFETY: made by `create_program`, destroyed only here.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

/// Compiles one source. The library must be open.
///
/// # Errors
/// What the compiler says.
pub fn compile(source: &KernelSource, arch: &str) -> Result<Vec<u8>, CudaError> {
    let fail = |log: String| failure(&source.name, arch, log);
    let text = CString::new(source.text.as_str()).map_err(|e| fail(e.to_string()))?;
    let name = CString::new(format!("{}.cu", source.name)).map_err(|e| fail(e.to_string()))?;
    let program = nvrtc::create_program(&text, Some(&name)).map_err(|e| fail(e.to_string()))?;
    let program = Compilation(program);
    let mut options = vec![format!("--gpu-architecture={arch}")];
    options.extend(STANDARD_OPTIONS.map(str::to_owned));
    options.extend(source.options.iter().cloned());
    // SAFETY: the program is live; text and name outlive it.
    let compiled = unsafe { nvrtc::compile_program(program.0, &options) };
    if let Err(error) = compiled {
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program.0) }.unwrap_or_default();
        let log: String = log.iter().map(|&c| char::from(c as u8)).filter(|c| *c != '\0').collect();
        return Err(fail(format!("{error}\n{log}")));
    }
    let mut bytes = 0;
    // SAFETY: the program is live and compiled; writes one integer.
    let result = unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut bytes) };
    result.result().map_err(|e| fail(e.to_string()))?;
    let mut cubin = vec![0_u8; bytes];
    // SAFETY: the vector has the size that NVRTC just named.
    let result = unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()) };
    result.result().map_err(|e| fail(e.to_string()))?;
    if cubin.is_empty() {
        return Err(fail("the compiler gave no machine code".to_owned()));
    }
    Ok(cubin)
}

fn failure(kernel: &str, arch: &str, log: String) -> CudaError {
    CudaError::Compile { kernel: kernel.to_owned(), arch: arch.to_owned(), compiler: version(), log }
}
