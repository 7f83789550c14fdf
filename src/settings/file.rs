//! `mserve.toml` as written, and what to say about one that is wrong.

use super::values::{Bytes, Count, Devices, PoolingChoice, Share, Tokens, Written};
use crate::exit::Failure;
use crate::status::ModelKind;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A real file has a few kilobytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConfigFile {
    #[serde(default)]
    pub server: ServerTable,
    #[serde(default, rename = "model")]
    pub models: Vec<ModelTable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServerTable {
    pub host: Option<String>,
    pub port: Option<u16>,
    /// Name of the environment variable that holds the key.
    pub api_key_env: Option<String>,
    pub api_key_file: Option<PathBuf>,
    pub max_concurrent_requests: Option<Written<Count>>,
    /// Seconds that running requests get when the deployment is stopped.
    pub shutdown_timeout: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelTable {
    pub name: Option<String>,
    /// More names under which it is served.
    #[serde(default)]
    pub served_model_names: Vec<String>,
    pub path: PathBuf,
    pub kind: Option<Written<ModelKind>>,
    pub replicas: Option<Written<Count>>,
    pub devices: Option<Written<Devices>>,
    pub replicas_per_device: Option<Written<Count>>,
    pub max_model_len: Option<Written<Tokens>>,
    pub max_num_seqs: Option<Written<Count>>,
    pub max_num_batched_tokens: Option<Written<Tokens>>,
    pub block_size: Option<Written<Count>>,
    pub threads: Option<Written<Count>>,
    pub kv_cache_memory: Option<Written<Bytes>>,
    /// Of a card, for one replica.
    pub gpu_memory_utilization: Option<Written<Share>>,
    pub chat_template: Option<PathBuf>,
    pub pooling: Option<Written<PoolingChoice>>,
}

impl ConfigFile {
    /// # Errors
    /// [`Failure`] with the file and, where there is one, the line.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let unreadable = |why: String| Failure::usage(format!("cannot read {}: {why}", path.display()));
        let meta = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?;
        if !meta.is_file() {
            return Err(
                unreadable("it is not a file".into()).hint("to serve one model: mserve launch --model DIRECTORY")
            );
        }
        if meta.len() > MAX_FILE_BYTES {
            return Err(unreadable(format!("it has {} bytes; a deployment has at most {MAX_FILE_BYTES}", meta.len())));
        }
        let text = std::fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
        Self::parse(&text, path)
    }

    pub fn parse(text: &str, path: &Path) -> Result<Self, Failure> {
        toml::from_str(text).map_err(|error| explain(&error, text, path))
    }
}

fn explain(error: &toml::de::Error, text: &str, path: &Path) -> Failure {
    let line = error.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
    let place = format!("{}:{line}", path.display());
    // serde's words: unknown field `replcias`, expected one of `name`, `path` ...
    let mut quoted = error.message().split('`').skip(1).step_by(2);
    if error.message().starts_with("unknown field")
        && let Some(unknown) = quoted.next()
    {
        let known: Vec<&str> = quoted.collect();
        let hint = match nearest(unknown, &known) {
            Some(near) => format!("did you mean `{near}`? known keys: {}", known.join(", ")),
            None => format!("known keys: {}", known.join(", ")),
        };
        return Failure::usage(format!("{place}: unknown key `{unknown}`")).hint(hint);
    }
    let at = error.span().and_then(|span| text.get(span)).and_then(|at| at.lines().next()).unwrap_or("").trim();
    let at = if at.is_empty() || at.len() > 60 { String::new() } else { format!(" (at `{at}`)") };
    Failure::usage(format!("{place}: {}{at}", error.message().trim()))
}

/// The known word with the fewest edits, when they are few enough to be a slip.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let distance = |other: &str| edit_distance(word, other);
    known.iter().copied().min_by_key(|other| distance(other)).filter(|other| distance(other) <= 1 + word.len() / 3)
}

/// Insertions, deletions, substitutions (Levenshtein).
fn edit_distance(a: &str, b: &str) -> usize {
    // A key of a file is short; one that is not is like nothing known.
    if a.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn error(text: &str) -> String {
        let failure = ConfigFile::parse(text, Path::new("mserve.toml")).unwrap_err();
        assert_eq!(failure.code, crate::exit::USAGE);
        failure.hint.iter().fold(failure.message.clone(), |message, hint| format!("{message} | {hint}"))
    }

    #[test]
    fn a_wrong_file_is_explained_by_line_and_key() {
        let model = "[[model]]\npath = \"m\"\n";
        for (text, expected) in [
            ("[server]\nhots = \"x\"", "mserve.toml:2: unknown key `hots` | did you mean `host`?"),
            (&format!("{model}replcias = 2"), "mserve.toml:3: unknown key `replcias` | did you mean `replicas`?"),
            (&format!("{model}zzzzzzzz = 2"), "mserve.toml:3: unknown key `zzzzzzzz` | known keys: name, "),
            ("[servre]", "mserve.toml:1: unknown key `servre` | did you mean `server`?"),
            ("\n\n[[models]]\n", "mserve.toml:3: unknown key `models` | did you mean `model`?"),
            ("[[model]]\nname = \"x\"", "mserve.toml:1: missing field `path`"),
            (&format!("{model}replicas = 0"), "mserve.toml:3: 0 is out of range, expected 1 to 1024"),
            (&format!("{model}replicas = -1"), "mserve.toml:3: -1 is negative"),
            (&format!("{model}replicas = true"), "mserve.toml:3: invalid type: boolean `true`, expected a number"),
            (
                &format!("{model}kind = \"chta\""),
                "mserve.toml:3: `chta` is not a kind of model; known: chat, embedding",
            ),
            (&format!("{model}devices = \"tpu\""), "mserve.toml:3: `tpu` is not a device; known: auto, cpu, gpu"),
            (
                &format!("{model}pooling = \"max\""),
                "mserve.toml:3: `max` is not a pooling; known: cls, last-token, mean",
            ),
            (&format!("{model}max_model_len = \"32q\""), "mserve.toml:3: `32q` is not a number of tokens"),
            (&format!("{model}kv_cache_memory = \"1 lot\""), "mserve.toml:3: `1 lot` is not a size"),
            ("[server]\nport = 70000", "mserve.toml:2: invalid value: integer `70000`, expected u16"),
            ("[server]\nport = 1\nport = 2", "mserve.toml:3: duplicate key"),
            ("[server\n", "mserve.toml:1: "),
            ("x", "mserve.toml:1: "),
            ("model = 7", "mserve.toml:1: invalid type: integer `7`"),
        ] {
            let error = error(text);
            assert!(error.starts_with(expected), "{text:?}:\n  {error}\n  {expected}");
        }
    }

    #[test]
    fn a_right_file_is_read() {
        let text = "[server]\nport = 0\n[[model]]\npath = \"m\"\nmax_model_len = \"4k\"\nkv_cache_memory = 1048576\n\
                    gpu_memory_utilization = 0.5\n";
        let file = ConfigFile::parse(text, Path::new("x")).unwrap();
        let model = &file.models[0];
        assert_eq!((file.server.port, model.max_model_len), (Some(0), Some(Written(Tokens(4096)))));
        assert_eq!(model.kv_cache_memory, Some(Written(Bytes(1 << 20))));
        assert_eq!(model.gpu_memory_utilization.map(|Written(share)| share.ratio()), Some(0.5));
    }

    #[test]
    fn distances() {
        for (a, b, edits) in [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0), ("hots", "host", 2)] {
            assert_eq!((edit_distance(a, b), edit_distance(b, a)), (edits, edits), "{a} {b}");
        }
        assert_eq!(nearest(&"x".repeat(1000), &["name"]), None);
    }
}
