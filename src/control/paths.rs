use anyhow::Context;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The directory of sockets, state files and leases: `$XDG_RUNTIME_DIR/mserve`, else `/tmp/mserve-<uid>`.
/// Created with mode 0700.
///
/// # Errors
/// When it cannot be made, or is someone else's: /tmp is open to all, so a planted directory is refused.
pub fn runtime_dir() -> anyhow::Result<PathBuf> {
    let dir = match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute()) {
        Some(base) => PathBuf::from(base).join("mserve"),
        None => PathBuf::from(format!("/tmp/mserve-{}", nix::unistd::geteuid())),
    };
    make_private(&dir)?;
    Ok(dir)
}

pub(super) fn make_private(dir: &Path) -> anyhow::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).with_context(|| format!("cannot create {}", dir.display())),
    }
    let meta = std::fs::symlink_metadata(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    anyhow::ensure!(meta.is_dir(), "{} is not a directory", dir.display());
    anyhow::ensure!(
        meta.uid() == nix::unistd::geteuid().as_raw(),
        "{} belongs to another user (uid {}); set XDG_RUNTIME_DIR to a directory of yours",
        dir.display(),
        meta.uid()
    );
    if meta.permissions().mode() & 0o077 != 0 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
            .with_context(|| format!("cannot make {} private", dir.display()))?;
    }
    Ok(())
}
