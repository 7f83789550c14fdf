//! The small JSON files beside the weights that say how text becomes tokens.

use super::TokenizerError;
use serde_json::{Map, Value};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

pub(super) const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// What a model directory says beside its weights. Absent files are empty objects: none of them is required.
#[derive(Debug, Default)]
pub struct ModelFiles {
    pub dir: PathBuf,
    pub config: Map<String, Value>,
    pub tokenizer_config: Map<String, Value>,
    pub generation_config: Map<String, Value>,
    /// `chat_template.jinja`, which goes before `tokenizer_config.json`.
    pub chat_template: Option<String>,
}

/// Texts of the special tokens that chat templates write themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub unk_token: Option<String>,
    pub pad_token: Option<String>,
}

impl ModelFiles {
    /// # Errors
    /// A file that is there but cannot be read, is too large or is not a JSON object.
    pub fn read(dir: &Path) -> Result<Self, TokenizerError> {
        let template = dir.join("chat_template.jinja");
        let chat_template = match read_capped(&template, MAX_CONFIG_BYTES)? {
            Some(bytes) => Some(
                String::from_utf8(bytes)
                    .map_err(|e| TokenizerError::Json { path: template, what: format!("not UTF-8: {e}") })?,
            ),
            None => None,
        };
        Ok(Self {
            dir: dir.to_owned(),
            config: read_object(&dir.join("config.json"))?,
            tokenizer_config: read_object(&dir.join("tokenizer_config.json"))?,
            generation_config: read_object(&dir.join("generation_config.json"))?,
            chat_template,
        })
    }

    pub fn special_tokens(&self) -> SpecialTokens {
        let text = |name: &str| token_text(self.tokenizer_config.get(name)?);
        SpecialTokens {
            bos_token: text("bos_token"),
            eos_token: text("eos_token"),
            unk_token: text("unk_token"),
            pad_token: text("pad_token"),
        }
    }
}

/// A special token is a string, or an object with `content`.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn read_object(path: &Path) -> Result<Map<String, Value>, TokenizerError> {
    let Some(bytes) = read_capped(path, MAX_CONFIG_BYTES)? else { return Ok(Map::new()) };
    serde_json::from_slice(&bytes).map_err(|e| TokenizerError::Json { path: path.to_owned(), what: e.to_string() })
}

/// The bytes of a regular file, or `None` when there is no such file.
pub(super) fn read_capped(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>, TokenizerError> {
    let read = |source| TokenizerError::Read { path: path.to_owned(), source };
    // Looked at before it is opened: opening a fifo would wait for ever.
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(read(e)),
    };
    if !metadata.is_file() {
        return Err(TokenizerError::NotAFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(read)?;
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > limit_bytes {
        let bytes = metadata.len().max(limit_bytes + 1);
        return Err(TokenizerError::TooLarge { path: path.to_owned(), bytes, limit_bytes });
    }
    Ok(Some(bytes))
}
