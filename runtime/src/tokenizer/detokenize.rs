//! Token ids in, text out, piece by piece.

use super::Tokenizer;
use super::byte_level::token_bytes;
use super::text::{Decoding, fallback_byte};
use std::sync::Arc;

/// Turns a stream of token ids into a stream of text whose pieces join to [`Tokenizer::decode`] of all the ids,
/// for any ids. Bytes that may still become a character are held back.
#[derive(Debug, Clone)]
pub struct IncrementalDetokenizer {
    tokenizer: Arc<Tokenizer>,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    /// Byte-level: the bytes of a character that is not complete yet (three at most).
    Bytes(Vec<u8>),
    Window(Window),
}

/// Decoders whose text depends on neighbours: the last tokens are decoded again together with the new one.
#[derive(Debug, Clone, Default)]
struct Window {
    ids: Vec<u32>,
    /// Bytes of the decoded window that were given out.
    emitted: usize,
    byte_fallback: bool,
}

impl IncrementalDetokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        let state = match tokenizer.decoding() {
            Decoding::Bytes => State::Bytes(Vec::new()),
            Decoding::Window { byte_fallback } => State::Window(Window { byte_fallback, ..Window::default() }),
        };
        Self { tokenizer, state }
    }

    /// Text that is certain once this token is known; often empty.
    pub fn push(&mut self, id: u32) -> String {
        // Skipped tokens leave no trace, not even as a neighbour.
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        let Some(token) = self.tokenizer.id_to_token(id) else { return String::new() };
        match &mut self.state {
            State::Bytes(pending) => {
                pending.extend(token_bytes(&token));
                take_complete(pending)
            }
            State::Window(window) => window.push(&self.tokenizer, id, &token),
        }
    }

    /// What is left at the end; an incomplete character becomes U+FFFD.
    pub fn flush(&mut self) -> String {
        match &mut self.state {
            State::Bytes(pending) => String::from_utf8_lossy(&std::mem::take(pending)).into_owned(),
            State::Window(window) => window.advance(&self.tokenizer, false),
        }
    }
}

/// Move all of `bytes` into text except an incomplete character at the end.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut incomplete = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        let invalid = chunk.invalid();
        let last = invalid.as_ptr_range().end == bytes.as_ptr_range().end;
        match std::str::from_utf8(invalid) {
            // `error_len` is none when more bytes could complete it.
            Err(e) if last && e.error_len().is_none() => incomplete = invalid.len(),
            Err(_) => text.push(char::REPLACEMENT_CHARACTER),
            Ok(_) => {}
        }
    }
    bytes.drain(..bytes.len() - incomplete);
    text
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, token: &str) -> String {
        self.ids.push(id);
        // A run of byte tokens is decoded as one: one bad byte spoils all of it, so none is certain before its end.
        if self.byte_fallback && fallback_byte(token).is_some() {
            return String::new();
        }
        self.advance(tokenizer, true)
    }

    fn advance(&mut self, tokenizer: &Tokenizer, hold_back: bool) -> String {
        // A decoder that fails here fails on the whole as well; the pieces then end early.
        let Ok(text) = tokenizer.decode(&self.ids) else { return String::new() };
        let mut end = text.len();
        if hold_back && text.ends_with(char::REPLACEMENT_CHARACTER) {
            end -= char::REPLACEMENT_CHARACTER.len_utf8();
        }
        if end < self.emitted || !text.is_char_boundary(self.emitted) {
            return String::new();
        }
        let piece = text[self.emitted..end].to_owned();
        self.emitted = end;
        if end == text.len() {
            self.shrink(tokenizer);
        }
        piece
    }

    /// Keep only the context that the next token needs: the shortest tail that has text of its own, so that what a
    /// decoder does to the beginning of a text (strip a space, join a word piece) falls on what is already out.
    fn shrink(&mut self, tokenizer: &Tokenizer) {
        for start in (0..self.ids.len()).rev() {
            let text = tokenizer.decode(&self.ids[start..]).unwrap_or_default();
            if !text.is_empty() {
                self.ids.drain(..start);
                self.emitted = text.len();
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::ModelFiles;
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn tokenizer(json: &Value) -> Arc<Tokenizer> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        let files = ModelFiles::read(dir.path()).unwrap();
        Arc::new(Tokenizer::load(&files, 1000).unwrap())
    }

    fn bpe(vocab: &[&str], byte_fallback: bool, decoder: &Value) -> Arc<Tokenizer> {
        let vocab: serde_json::Map<String, Value> =
            vocab.iter().enumerate().map(|(id, &token)| (token.to_owned(), json!(id))).collect();
        let special = |id: usize, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        tokenizer(&json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special(0, "<s>")],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": byte_fallback,
                      "ignore_merges": false, "vocab": vocab, "merges": []}
        }))
    }

    /// `é` is Ã ©, `€` is â Ĥ ¬, `😀` is ð Ł ĺ Ģ in the byte alphabet.
    fn byte_level() -> Arc<Tokenizer> {
        let vocab = ["<s>", "a", "Ġb", "Ã", "©", "â", "Ĥ", "¬", "ð", "Ł", "ĺ", "Ģ", "ðŁĺ", "Ģx", "ÿ", "ï¿½"];
        bpe(
            &vocab,
            false,
            &json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        )
    }

    fn llama_like() -> Arc<Tokenizer> {
        let vocab = ["<s>", "▁a", "b", "▁", "▁▁", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", "<0x41>", "<0xFF>", "é"];
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        bpe(&vocab, true, &decoder)
    }

    fn metaspace() -> Arc<Tokenizer> {
        let vocab = ["<s>", "▁a", "b", "▁", "▁▁", "é"];
        bpe(&vocab, false, &json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}))
    }

    fn word_piece() -> Arc<Tokenizer> {
        let vocab = ["<s>", "un", "##able", "'", "s", "do", "not", "##n't", ",", "##"];
        bpe(&vocab, false, &json!({"type": "WordPiece", "prefix": "##", "cleanup": true}))
    }

    fn stream(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> Vec<String> {
        let mut detokenizer = IncrementalDetokenizer::new(Arc::clone(tokenizer));
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
        pieces.push(detokenizer.flush());
        pieces
    }

    #[test]
    fn a_character_comes_out_when_its_last_byte_is_in() {
        assert_eq!(stream(&byte_level(), &[1, 8, 9, 10, 11, 2]), ["a", "", "", "", "😀", " b", ""]);
        assert_eq!(stream(&byte_level(), &[12, 13]), ["", "😀x", ""]);
    }

    #[test]
    fn an_incomplete_end_is_flushed() {
        assert_eq!(stream(&byte_level(), &[1, 5, 6]), ["a", "", "", "\u{FFFD}"]);
    }

    #[test]
    fn byte_fallback_waits_for_the_end_of_the_run() {
        assert_eq!(stream(&llama_like(), &[1, 5, 6, 7, 2, 1]), ["a", "", "", "", "€b", " a", ""]);
        assert_eq!(stream(&llama_like(), &[5, 6, 7]), ["", "", "", "€"]);
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_whole(ids in prop::collection::vec(0u32..18, 0..24)) {
            for tokenizer in [byte_level(), llama_like(), metaspace(), word_piece()] {
                let whole = tokenizer.decode(&ids).unwrap();
                let pieces = stream(&tokenizer, &ids);
                prop_assert_eq!(pieces.concat(), whole.clone(), "{:?}", pieces);
                if !whole.contains('\u{FFFD}') {
                    let clean = !pieces.iter().any(|p| p.contains('\u{FFFD}'));
                    prop_assert!(clean, "{:?}", pieces);
                }
            }
        }
    }
}
