//! The driver and the two libraries that the CUDA backend opens while running, and what to do when one is not there.
//!
//! cudarc opens them by bare name and panics when it cannot, so each is found and opened here first, by its full path:
//! the loader then knows it by its SONAME and gives cudarc the same one.

use super::CudaError;
use super::library_search::{Surroundings, beside, find};
use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Mutex;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// Comes with the NVIDIA driver.
    Driver,
    /// Compiles the kernels.
    Nvrtc,
    /// Matrix products.
    CublasLt,
}

impl Library {
    pub const ALL: [Self; 3] = [Self::Driver, Self::Nvrtc, Self::CublasLt];

    /// File names that serve, the newest first.
    pub const fn names(self) -> &'static [&'static str] {
        match self {
            Self::Driver => &["libcuda.so.1"],
            Self::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12"],
            Self::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12"],
        }
    }

    /// The command that brings it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Driver => "install the NVIDIA driver (https://www.nvidia.com/drivers)",
            Self::Nvrtc => "pip install nvidia-cuda-nvrtc",
            Self::CublasLt => "pip install nvidia-cublas",
        }
    }
}

/// A library that is needed and was not found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} was not found on the loader path nor in {}; {}",
    library.names()[0],
    if looked_in.is_empty() { "any known place".to_owned() } else { list(looked_in) },
    library.remedy()
)]
pub struct Missing {
    pub library: Library,
    pub looked_in: Vec<PathBuf>,
    /// Files that are there and could not be opened, with the loader's reason.
    pub broken: Vec<(PathBuf, String)>,
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// One line of `mserve doctor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibraryReport {
    pub library: Library,
    /// Where it was found: a full path, or the bare name when the loader finds it by itself.
    pub found: Result<PathBuf, Missing>,
}

/// Looks for all libraries and says where each is. Opens them; harmless on a machine without a GPU.
pub fn report() -> Vec<LibraryReport> {
    Library::ALL.map(|library| LibraryReport { library, found: open(library) }).into()
}

/// Opens the driver.
///
/// # Errors
/// [`CudaError::NoDriver`].
pub fn open_driver() -> Result<(), CudaError> {
    open(Library::Driver).map(drop).map_err(|missing| CudaError::NoDriver { why: missing.to_string() })
}

/// Opens what the backend needs beside the driver.
///
/// # Errors
/// [`CudaError::LibraryMissing`].
pub fn open_others() -> Result<(), CudaError> {
    for library in [Library::Nvrtc, Library::CublasLt] {
        open(library).map_err(Box::new)?;
    }
    Ok(())
}

/// Handles of what is open, kept for the life of the process: code of a closed library must not be called.
static OPEN: Mutex<Vec<(&'static str, PathBuf, Handle)>> = Mutex::new(Vec::new());

/// Opens one library and returns where it was found.
///
/// # Errors
/// Where it was looked for.
pub fn open(library: Library) -> Result<PathBuf, Missing> {
    let mut open = OPEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((_, path, _)) = open.iter().find(|(name, ..)| library.names().contains(name)) {
        return Ok(path.clone());
    }
    let mut broken = Vec::new();
    for &name in library.names() {
        if let Ok(handle) = dlopen(OsStr::new(name)) {
            open.push((name, PathBuf::from(name), handle));
            return Ok(PathBuf::from(name));
        }
    }
    let looked_in = Surroundings::of_this_process().library_directories();
    let mut places = looked_in.as_slice();
    while let Some(file) = find(places, library.names()) {
        if library == Library::Nvrtc {
            // NVRTC opens this one by bare name when it first compiles.
            for builtins in beside(&file, "libnvrtc-builtins.so") {
                if let Ok(handle) = dlopen(builtins.as_os_str()) {
                    open.push(("libnvrtc-builtins", builtins, handle));
                }
            }
        }
        match dlopen(file.as_os_str()) {
            Ok(handle) => {
                let name = library.names().iter().find(|n| file.ends_with(n)).unwrap_or(&library.names()[0]);
                open.push((name, file.clone(), handle));
                return Ok(file);
            }
            Err(why) => broken.push((file.clone(), why)),
        }
        let at = places.iter().position(|p| file.parent() == Some(p)).unwrap_or(places.len() - 1);
        places = &places[at + 1..];
    }
    Err(Missing { library, looked_in, broken })
}

fn dlopen(name: &OsStr) -> Result<Handle, String> {
    // SAFETY: opening runs the library's initialisers. These are NVIDIA's own libraries, found under their own names in
    // places that only an administrator or this user can write; their initialisers ask nothing of the caller. The
    // handle is kept in `OPEN` for ever, so no code of it is unmapped while it may run.
    unsafe { Handle::open(Some(name), RTLD_NOW | RTLD_GLOBAL) }.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_says_what_where_and_what_to_do() {
        let missing = Missing { library: Library::CublasLt, looked_in: vec!["/a".into(), "/b".into()], broken: vec![] };
        let text = missing.to_string();
        assert_eq!(text, "libcublasLt.so.13 was not found on the loader path nor in /a, /b; pip install nvidia-cublas");
    }

    #[test]
    fn the_report_has_a_line_for_each_library() {
        let lines = report();
        assert_eq!(lines.iter().map(|l| l.library).collect::<Vec<_>>(), Library::ALL);
        assert!(lines.iter().all(|l| match &l.found {
            Ok(path) => path.components().next().is_some(),
            Err(missing) => missing.library == l.library,
        }));
    }
}
