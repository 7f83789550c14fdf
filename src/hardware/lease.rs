//! One `mserve` at a time on a card: a locked file per GPU UUID. The lock ends with the process, however it ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Held for as long as this lives. Children do not inherit it.
#[derive(Debug)]
pub struct GpuLease {
    _locked: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("GPU {uuid} is in use by another mserve{}", .holder.map_or(String::new(), |pid| format!(" (pid {pid})")))]
    Held { uuid: String, holder: Option<u32> },
    #[error("{uuid:?} is not a GPU UUID")]
    BadUuid { uuid: String },
    #[error("cannot lock {}: {source}", .path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

impl GpuLease {
    /// Lock a card in `dir`, [`crate::control::runtime_dir`]. Does not wait.
    ///
    /// # Errors
    /// [`LeaseError::Held`] names the process that has it.
    pub fn take(dir: &Path, uuid: &str) -> Result<Self, LeaseError> {
        // It becomes part of a path.
        if uuid.is_empty() || !uuid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return Err(LeaseError::BadUuid { uuid: uuid.to_owned() });
        }
        let path = dir.join(format!("gpu-{uuid}.lock"));
        let failed = |source| LeaseError::Io { path: path.clone(), source };
        let mut options = OpenOptions::new();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LeaseError::Held { uuid: uuid.to_owned(), holder: holder(&mut file) });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let pid = std::process::id().to_string();
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(pid.as_bytes())).map_err(failed)?;
        Ok(Self { _locked: file })
    }
}

fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_second_taker_learns_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let lease = GpuLease::take(dir.path(), "GPU-1").unwrap();
        let error = GpuLease::take(dir.path(), "GPU-1").unwrap_err();
        let pid = std::process::id();
        assert_eq!(error.to_string(), format!("GPU GPU-1 is in use by another mserve (pid {pid})"));
        GpuLease::take(dir.path(), "GPU-2").unwrap();
        drop(lease);
        GpuLease::take(dir.path(), "GPU-1").unwrap();
    }

    #[test]
    fn a_lock_file_left_behind_does_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("gpu-GPU-1.lock"), "999999999999 garbage").unwrap();
        GpuLease::take(dir.path(), "GPU-1").unwrap();
    }

    #[test]
    fn a_uuid_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for uuid in ["", "../x", "a/b", "a\0b"] {
            assert!(matches!(GpuLease::take(dir.path(), uuid), Err(LeaseError::BadUuid { .. })));
        }
    }
}
