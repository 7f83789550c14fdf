//! A model that goes on with the alphabet: after `a` comes `b`, after `z` come a space, `é` in two tokens, `!` and the
//! end. A few characters begin other things; see the constants.

use mserve_runtime::engine::{
    Backend, BackendError, BackendInfo, Engine, EngineConfig, EngineHandle, RowOutput, StepBatch, sample,
};
use mserve_runtime::server::{ServedKind, ServedModel, ServerConfig, ServerState};
use mserve_runtime::tokenizer::{ChatTemplate, GenerationDefaults, ModelFiles, Tokenizer, eos_token_ids};
use mserve_runtime::worker::FailureKind;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Of the tokenizer, in order of ids: begin, end, a to z, space, the two bytes of é, and these.
const MORE: [&str; 12] = ["!", "#", "$", "%", "&", "(", ")", "A", "B", ":", "?", "."];
pub const BEGIN: u32 = 0;
pub const END: u32 = 1;
pub const FIRST_LETTER: u32 = 2;
/// `!`, after which the text ends.
const LAST: u32 = FIRST_LETTER + 26 + 3;
/// `#` goes on with `$`, and the step after that fails.
const FAILS_LATER: u32 = LAST + 2;
/// `%` makes the first step fail.
const FAILS_AT_ONCE: u32 = LAST + 3;
/// `&` repeats itself for ever, slowly.
const ENDLESS: u32 = LAST + 4;
/// `(` loses the device.
const LOSES_DEVICE: u32 = LAST + 5;
pub const VOCAB: usize = LAST as usize + MORE.len();
pub const MAX_MODEL_LEN: usize = 1024;

fn vocabulary() -> Vec<String> {
    let letters = ('a'..='z').map(String::from);
    let special = ["<s>", "</s>"].map(str::to_owned).into_iter();
    special.chain(letters).chain(["Ġ", "Ã", "©"].map(str::to_owned)).chain(MORE.map(str::to_owned)).collect()
}

/// Write the model's small files.
pub fn write_files(dir: &Path) {
    let vocab: serde_json::Map<String, Value> =
        vocabulary().into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(BEGIN, "<s>"), special(END, "</s>")],
        "normalizer": null, "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BEGIN], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []}
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{{ m.content }}{% endfor %}"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

struct AlphabetBackend {
    info: BackendInfo,
}

fn next(token: u32) -> u32 {
    match token {
        LAST => END,
        ENDLESS => ENDLESS,
        // Sampled once in ten thousand: the last of all has none behind it.
        last if last as usize + 1 == VOCAB => END,
        _ => token + 1,
    }
}

impl Backend for AlphabetBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
        let error = |what: &str, fatal| BackendError {
            device: "alphabet".to_owned(),
            what: what.to_owned(),
            fatal,
            kind: FailureKind::ContextLost,
        };
        let has = |token: u32| batch.token_ids.contains(&token);
        if has(LOSES_DEVICE) {
            return Err(error("the secret address 0x1234 is gone", true));
        }
        if has(FAILS_LATER) || has(FAILS_AT_ONCE) {
            return Err(error("the secret address 0x1234 is bad", false));
        }
        if has(ENDLESS) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let row = |sequence: &mserve_runtime::engine::StepSequence| {
            let rows = sequence.query_start..sequence.query_start + sequence.query_len;
            let tokens = &batch.token_ids[rows];
            match &sequence.sampling {
                None => RowOutput::Vector(vec![tokens.len() as f32, tokens[0] as f32, 0.0, 1.0]),
                Some(sampling) => {
                    let mut logits = vec![0.0; VOCAB];
                    let likeliest = next(tokens[tokens.len() - 1]) as usize;
                    logits[likeliest] = 20.0;
                    // Who may not take the likeliest takes `?`.
                    logits[VOCAB - 2] = 10.0;
                    RowOutput::Token(sample(&mut logits, sampling))
                }
            }
        };
        Ok(batch.sequences.iter().filter(|s| s.wants_output).map(row).collect())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Embedding,
}

/// Things a test may want otherwise.
pub struct Setup {
    pub kind: Kind,
    pub chat_template: Option<&'static str>,
    pub defaults: GenerationDefaults,
    pub max_num_queued_reqs: usize,
    pub max_num_seqs: usize,
    pub config: ServerConfig,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            kind: Kind::Chat,
            chat_template: None,
            defaults: GenerationDefaults::default(),
            max_num_queued_reqs: 64,
            max_num_seqs: 4,
            config: ServerConfig {
                served_model_names: vec!["alphabet".to_owned(), "abc/alias".to_owned()],
                token: None,
                telemetry: None,
                max_body_bytes: 1 << 20,
                stall_limit: Duration::from_secs(60),
            },
        }
    }
}

impl Setup {
    pub fn engine(&self) -> EngineHandle {
        let embedding = self.kind == Kind::Embedding;
        let info = BackendInfo {
            output_width: if embedding { 4 } else { VOCAB },
            vocab_size: VOCAB,
            block_size: 4,
            num_blocks: if embedding { 0 } else { 1024 },
            kv_cache_bytes: 1 << 10,
            max_model_len: MAX_MODEL_LEN,
            device: "alphabet".to_owned(),
        };
        let config = EngineConfig {
            model_name: "alphabet".to_owned(),
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: MAX_MODEL_LEN,
            max_model_len: MAX_MODEL_LEN,
            max_num_queued_reqs: self.max_num_queued_reqs,
            enable_prefix_caching: true,
        };
        Engine::start(Box::new(AlphabetBackend { info }), config).unwrap()
    }

    pub fn model(&self) -> ServedModel {
        let dir = tempfile::tempdir().unwrap();
        write_files(dir.path());
        let mut files = ModelFiles::read(dir.path()).unwrap();
        if self.chat_template == Some("") {
            files.tokenizer_config.remove("chat_template");
        }
        let choice = self.chat_template.filter(|name| !name.is_empty());
        let tokenizer = Arc::new(Tokenizer::load(&files, VOCAB).unwrap());
        let eos_token_ids = eos_token_ids(&files, &tokenizer, VOCAB).unwrap();
        assert_eq!(eos_token_ids, [END]);
        ServedModel {
            engine: self.engine(),
            tokenizer,
            chat_template: ChatTemplate::load(&files, choice).unwrap().map(Arc::new),
            eos_token_ids: eos_token_ids.into(),
            generation_defaults: self.defaults,
            kind: match self.kind {
                Kind::Chat => ServedKind::Chat,
                Kind::Embedding => ServedKind::Embedding { width: 4 },
            },
            max_model_len: MAX_MODEL_LEN,
        }
    }

    pub fn start(self) -> Arc<ServerState> {
        let model = self.model();
        let state = ServerState::new(self.config);
        state.set_model(model);
        state
    }
}
