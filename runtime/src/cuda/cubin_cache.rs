//! Compiled kernels kept on disk. An entry that is damaged, or was made by another compiler, is not found.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// All that a cubin depends on.
#[derive(Debug, Clone, Copy)]
pub struct CubinKey<'a> {
    pub source: &'a str,
    pub arch: &'a str,
    pub options: &'a [String],
    /// NVRTC's (major, minor).
    pub compiler: (i32, i32),
}

impl CubinKey<'_> {
    fn file_name(&self, kernel: &str) -> String {
        let mut hash = Xxh3::new();
        for part in [self.source, self.arch, &self.options.join("\n"), &format!("{:?}", self.compiler)] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        format!("{kernel}-{}-{:032x}.cubin", self.arch, hash.digest128())
    }
}

const CHECKSUM_BYTES: usize = 16;
/// A cubin of ours is some tens of KB.
const MAX_ENTRY_BYTES: u64 = 64 << 20;

/// A directory of entries: a checksum, then what it is of.
#[derive(Debug, Clone)]
pub struct DiskCache {
    directory: PathBuf,
}

impl DiskCache {
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// `$XDG_CACHE_HOME/mserve`, or under `~/.cache`. None when this user has neither.
    pub fn directory_of_user() -> Option<PathBuf> {
        let path = |variable| std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from);
        let base = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")))?;
        Some(base.join("mserve"))
    }

    pub fn cubin(&self, kernel: &str, key: &CubinKey<'_>) -> Option<Vec<u8>> {
        self.get(&key.file_name(kernel))
    }

    pub fn store_cubin(&self, kernel: &str, key: &CubinKey<'_>, cubin: &[u8]) -> io::Result<()> {
        self.put(&key.file_name(kernel), cubin)
    }

    /// What was stored under `name`, if it is there and whole.
    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.directory.join(name);
        let metadata = std::fs::metadata(&path).ok()?;
        if !metadata.is_file() || metadata.len() > MAX_ENTRY_BYTES {
            return None;
        }
        let entry = std::fs::read(path).ok()?;
        let (checksum, data) = entry.split_at_checked(CHECKSUM_BYTES)?;
        (checksum == xxh3_128(data).to_le_bytes()).then(|| data.to_vec())
    }

    /// Written aside and renamed, so that nobody reads half of it.
    pub fn put(&self, name: &str, data: &[u8]) -> io::Result<()> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        std::fs::create_dir_all(&self.directory)?;
        let aside = format!(".{name}.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let aside = self.directory.join(aside);
        let result = write_entry(&aside, data).and_then(|()| std::fs::rename(&aside, self.directory.join(name)));
        if result.is_err() {
            drop(std::fs::remove_file(&aside));
        }
        result
    }
}

fn write_entry(path: &Path, data: &[u8]) -> io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    file.write_all(&xxh3_128(data).to_le_bytes())?;
    file.write_all(data)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key<'a>(source: &'a str, options: &'a [String]) -> CubinKey<'a> {
        CubinKey { source, arch: "sm_90a", options, compiler: (13, 0) }
    }

    #[test]
    fn a_cubin_is_found_under_exactly_what_it_was_made_from() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DiskCache::at(directory.path().join("deep/cubin"));
        let options = ["-DD=128".to_owned()];
        let key = key("kernel text", &options);
        assert_eq!(cache.cubin("k", &key), None);
        cache.store_cubin("k", &key, b"machine code").unwrap();
        assert_eq!(cache.cubin("k", &key).as_deref(), Some(&b"machine code"[..]));
        let others = [
            CubinKey { source: "kernel text ", ..key },
            CubinKey { arch: "sm_90", ..key },
            CubinKey { options: &[], ..key },
            CubinKey { compiler: (13, 1), ..key },
        ];
        for other in others {
            assert_eq!(cache.cubin("k", &other), None, "{other:?}");
        }
    }

    #[test]
    fn a_damaged_entry_is_not_found() {
        let directory = tempfile::tempdir().unwrap();
        let cache = DiskCache::at(directory.path());
        cache.put("entry", b"all of it").unwrap();
        let path = directory.path().join("entry");
        let whole = std::fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[..3], &[], &[&whole[..20], b"X", &whole[21..]].concat()] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(cache.get("entry"), None);
        }
        cache.put("entry", b"again").unwrap();
        assert_eq!(cache.get("entry").as_deref(), Some(&b"again"[..]));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}
