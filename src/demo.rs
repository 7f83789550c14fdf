//! The demo model, carried in the binary: `mserve launch` has something to serve on any machine.

use anyhow::Context;
use std::hash::Hasher;
use std::path::{Path, PathBuf};

macro_rules! demo_file {
    ($name:literal) => {
        ($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model/", $name)).as_slice())
    };
}

const FILES: [(&str, &[u8]); 6] = [
    demo_file!("config.json"),
    demo_file!("generation_config.json"),
    demo_file!("tokenizer.json"),
    demo_file!("tokenizer_config.json"),
    demo_file!("chat_template.jinja"),
    demo_file!("model.safetensors"),
];

/// The demo model as a directory: `$XDG_CACHE_HOME/mserve/demo-model-<hash>`, written there the first time.
///
/// # Errors
/// When no place can be written.
pub fn unpack() -> anyhow::Result<PathBuf> {
    let places = [cache_dir(), crate::control::runtime_dir().ok()];
    let mut last = anyhow::anyhow!("there is no cache directory: set HOME or XDG_CACHE_HOME");
    for place in places.into_iter().flatten() {
        match unpack_in(&place) {
            Ok(directory) => return Ok(directory),
            Err(error) => last = error,
        }
    }
    Err(last.context("cannot unpack the demo model"))
}

fn cache_dir() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(base.join("mserve"))
}

fn unpack_in(place: &Path) -> anyhow::Result<PathBuf> {
    let directory = place.join(format!("demo-model-{:016x}", hash()));
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    for (name, bytes) in FILES {
        write_once(&directory.join(name), bytes)?;
    }
    Ok(directory)
}

/// Another launch may be doing the same: a file appears whole, by rename, or not at all.
fn write_once(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    if std::fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    let tmp = path.with_extension(format!("tmp-{}", std::process::id()));
    let written = std::fs::write(&tmp, bytes).and_then(|()| std::fs::rename(&tmp, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&tmp);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn hash() -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    FILES.iter().for_each(|(name, bytes)| {
        hasher.write(name.as_bytes());
        hasher.write(bytes);
    });
    hasher.finish()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn unpacks_once_and_repairs_what_was_damaged() {
        let place = tempfile::tempdir().unwrap();
        let directory = unpack_in(place.path()).unwrap();
        let weights = directory.join("model.safetensors");
        let written = std::fs::metadata(&weights).unwrap().modified().unwrap();
        std::fs::write(directory.join("config.json"), "cut off").unwrap();
        assert_eq!(unpack_in(place.path()).unwrap(), directory);
        assert_eq!(std::fs::metadata(&weights).unwrap().modified().unwrap(), written);
        assert_eq!(std::fs::read(directory.join("config.json")).unwrap(), FILES[0].1);
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), FILES.len());
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(unpack_in(&file).unwrap_err().to_string().contains("cannot create"));
    }
}
