//! `tokenizer.json`, loaded and checked against the model.

use super::byte_level::token_bytes;
use super::files::{MAX_TOKENIZER_BYTES, read_capped};
use super::{ModelFiles, TokenizerError};
use serde_json::Value;
use std::collections::HashSet;
use tokenizers::DecoderWrapper;

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    decoding: Decoding,
    special: HashSet<u32>,
    /// UTF-8 bytes of the longest token: no shorter text of n bytes has fewer than n / this tokens.
    longest_token_bytes: usize,
    /// Put before a text when `tokenizer.json`'s post-processor should and does not.
    prepended_bos: Option<u32>,
}

/// How tokens become text, as far as a stream has to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decoding {
    /// Byte-level BPE: tokens are byte strings, text is their concatenation.
    Bytes,
    /// Anything else: decoded in a window. With `byte_fallback`, a run of tokens `<0xNN>` is text only as a whole.
    Window { byte_fallback: bool },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    #[error("the text has {bytes} bytes, which cannot fit the context of {max_tokens} tokens")]
    TooLong { bytes: usize, max_tokens: usize },
    #[error("the text cannot be tokenized: {0}")]
    Tokenizer(String),
}

impl Tokenizer {
    /// Read `tokenizer.json` and check that its ids fit `vocab_size`.
    ///
    /// # Errors
    /// No file, too large, not a tokenizer, or one of another vocabulary.
    pub fn load(files: &ModelFiles, vocab_size: usize) -> Result<Self, TokenizerError> {
        let path = files.dir.join("tokenizer.json");
        let bytes =
            read_capped(&path, MAX_TOKENIZER_BYTES)?.ok_or_else(|| TokenizerError::Missing { path: path.clone() })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| TokenizerError::Parse { path: path.clone(), what: e.to_string() })?;
        // Files of encoders often carry a truncation and a padding of their training.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| TokenizerError::Parse { path: path.clone(), what: e.to_string() })?;
        let vocabulary = inner.get_vocab(true);
        let last = vocabulary.iter().max_by_key(|&(_, &id)| id);
        match last {
            None => return Err(TokenizerError::Empty { path }),
            Some((token, &token_id)) if token_id as usize >= vocab_size => {
                return Err(TokenizerError::VocabularyMismatch { path, token: token.clone(), token_id, vocab_size });
            }
            Some(_) => {}
        }
        let longest_token_bytes = vocabulary.keys().map(String::len).max().unwrap_or(1).max(1);
        let special =
            inner.get_added_tokens_decoder().iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let decoding = decoding_of(&inner);
        let mut tokenizer = Self { inner, decoding, special, longest_token_bytes, prepended_bos: None };
        tokenizer.prepended_bos = tokenizer.missing_bos(files);
        Ok(tokenizer)
    }

    /// transformers adds the beginning-of-sequence token of Llama and Gemma tokenizers by `add_bos_token`, whatever
    /// the post-processor of `tokenizer.json` says.
    fn missing_bos(&self, files: &ModelFiles) -> Option<u32> {
        let class = files.tokenizer_config.get("tokenizer_class").and_then(Value::as_str)?;
        let rebuilt = ["Llama", "CodeLlama", "Gemma"].iter().any(|family| class.starts_with(family));
        if !rebuilt || files.tokenizer_config.get("add_bos_token") != Some(&Value::Bool(true)) {
            return None;
        }
        let bos = self.token_to_id(&files.special_tokens().bos_token?)?;
        let encoding = self.inner.encode_fast("a", true).ok()?;
        (encoding.get_ids().first() != Some(&bos)).then_some(bos)
    }

    /// Token ids of a text that stands for itself: with the special tokens the model expects around it.
    ///
    /// # Errors
    /// Text that cannot fit `max_tokens` (found before any work is done), or that the tokenizer refuses.
    pub fn encode(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>, EncodeError> {
        let mut ids = self.encode_with(text, max_tokens, true)?;
        if let Some(bos) = self.prepended_bos {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Token ids of a rendered chat template, which writes its special tokens itself.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_rendered(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>, EncodeError> {
        self.encode_with(text, max_tokens, false)
    }

    fn encode_with(&self, text: &str, max_tokens: usize, add_special: bool) -> Result<Vec<u32>, EncodeError> {
        if text.len() > self.max_text_bytes(max_tokens) {
            return Err(EncodeError::TooLong { bytes: text.len(), max_tokens });
        }
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| EncodeError::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of these ids, special tokens left out.
    ///
    /// # Errors
    /// When the decoder of `tokenizer.json` fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, EncodeError> {
        self.inner.decode(ids, true).map_err(|e| EncodeError::Tokenizer(e.to_string()))
    }

    /// Bytes of a single token, special tokens included: what `logprobs` shows.
    pub fn bytes_of(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
        match self.decoding {
            Decoding::Bytes => token_bytes(&token),
            Decoding::Window { byte_fallback } => match fallback_byte(&token) {
                Some(byte) if byte_fallback => vec![byte],
                _ => token.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }

    /// A text with more bytes than this cannot fit `max_tokens`.
    pub fn max_text_bytes(&self, max_tokens: usize) -> usize {
        max_tokens.saturating_add(1).saturating_mul(self.longest_token_bytes)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    pub(super) fn decoding(&self) -> Decoding {
        self.decoding
    }
}

fn decoding_of(inner: &tokenizers::Tokenizer) -> Decoding {
    let byte_fallback = match inner.get_decoder() {
        Some(DecoderWrapper::ByteLevel(_)) => return Decoding::Bytes,
        Some(DecoderWrapper::ByteFallback(_)) => true,
        Some(DecoderWrapper::Sequence(sequence)) => {
            sequence.get_decoders().iter().any(|d| matches!(d, DecoderWrapper::ByteFallback(_)))
        }
        _ => false,
    };
    Decoding::Window { byte_fallback }
}

/// The byte of a token `<0xNN>`.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}
