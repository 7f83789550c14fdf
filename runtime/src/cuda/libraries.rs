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
    "{} was not found on the loader path nor in {}{}; {}",
    library.names()[0],
    if looked_in.is_empty() { "any known place".to_owned() } else { list(looked_in) },
    broken.iter().map(|(path, why)| format!("; {} cannot be opened: {why}", path.display())).collect::<String>(),
    library.remedy()
)]
pub struct Missing {
    pub library: Library,
    pub looked_in: Vec<PathBuf>,
    /// Files that are there and could not be opened, with the loader's reason.
    pub broken: Vec<(PathBuf, String)>,
}

/// More places than this tell nobody anything.
const MOST_LISTED: usize = 6;

fn list(paths: &[PathBuf]) -> String {
    let listed: Vec<String> = paths.iter().take(MOST_LISTED).map(|p| p.display().to_string()).collect();
    let more = paths.len() - listed.len();
    let more = if more > 0 { format!(" and {more} more places") } else { String::new() };
    format!("{}{more}", listed.join(", "))
}

/// One line of `mserve doctor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibraryReport {
    pub library: Library,
    /// The file that is open.
    pub found: Result<PathBuf, Missing>,
}

impl LibraryReport {
    /// As the file's name has it: `13.0.88` of `libnvrtc.so.13.0.88`.
    pub fn version(&self) -> Option<String> {
        let name = self.found.as_ref().ok()?.file_name()?.to_str()?;
        Some(name.split_once(".so.")?.1.to_owned())
    }
}

/// Looks for all libraries and says where each is. Opens them; harmless on a machine without a GPU.
pub fn report() -> Vec<LibraryReport> {
    let found = |library| open(library).map(|name| loaded_file(library).unwrap_or(name));
    Library::ALL.map(|library| LibraryReport { library, found: found(library) }).into()
}

/// The CUDA version that the driver speaks, 13000 for 13.0. None without a driver.
pub fn driver_speaks() -> Option<i32> {
    open(Library::Driver).ok()?;
    let mut version = 0;
    // SAFETY: writes one integer; the driver was opened before, so cudarc finds it. May be asked before cuInit.
    let result = unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) };
    (result == cudarc::driver::sys::CUresult::CUDA_SUCCESS).then_some(version)
}

/// The file behind a library that is open: the loader may have found it by its bare name.
fn loaded_file(library: Library) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    mapped_file(&maps, library)
}

fn mapped_file(maps: &str, library: Library) -> Option<PathBuf> {
    let stem = library.names()[0].split_once(".so")?.0;
    let files = maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])));
    let is_it = |file: &PathBuf| {
        let name = file.file_name().and_then(|name| name.to_str());
        name.and_then(|name| name.strip_prefix(stem)).is_some_and(|rest| rest.starts_with(".so"))
    };
    files.into_iter().find(is_it)
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
        let many = (0..9).map(|n| format!("/{n}").into()).collect();
        let broken = vec![("/3/libnvrtc.so.13".into(), "file too short".to_owned())];
        let text = Missing { library: Library::Nvrtc, looked_in: many, broken }.to_string();
        assert!(
            text.contains("/4, /5 and 3 more places; /3/libnvrtc.so.13 cannot be opened: file too short"),
            "{text}"
        );
    }

    #[test]
    fn the_file_behind_a_library_and_its_version() {
        let maps = "7f00-7f01 r-xp 00000000 00:1b 7 /usr/lib/libnvrtc-builtins.so.13.0\n\
                    7f01-7f02 r--p 00000000 00:1b 7 /usr/local/cuda-13.0/lib64/libnvrtc.so.13.0.88\n\
                    7f02-7f03 rw-p 00000000 00:00 0 \n";
        let file = mapped_file(maps, Library::Nvrtc);
        assert_eq!(file, Some(PathBuf::from("/usr/local/cuda-13.0/lib64/libnvrtc.so.13.0.88")));
        assert_eq!(mapped_file(maps, Library::CublasLt), None);
        let report = LibraryReport { library: Library::Nvrtc, found: file.ok_or_else(|| unreachable!()) };
        assert_eq!(report.version().as_deref(), Some("13.0.88"));
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
