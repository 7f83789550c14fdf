//! Text in, token ids out, and back: `tokenizer.json`, chat templates, and the streams between ids and text.

mod byte_level;
mod chat_template;
mod detokenize;
mod error;
mod files;
mod generation_config;
mod python_json;
mod stop;
mod text;

pub use chat_template::{BUILTIN_TEMPLATES, ChatTemplate, RenderInput, TemplateError, TemplateSource};
pub use detokenize::IncrementalDetokenizer;
pub use error::TokenizerError;
pub use files::{ModelFiles, SpecialTokens};
pub use generation_config::{GenerationDefaults, eos_token_ids};
pub use stop::{StopMatcher, StopOutcome};
pub use text::{EncodeError, Tokenizer};
