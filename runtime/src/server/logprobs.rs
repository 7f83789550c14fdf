//! Log-probabilities in OpenAI's two forms.

use crate::engine::{SampledToken, TokenLogprob};
use crate::tokenizer::Tokenizer;
use serde::Serialize;
use serde_json::{Map, Value};

/// JSON has no -infinity; vLLM writes this.
const LOWEST: f32 = -9999.0;

/// One generated token with its log-probability and those of the likeliest.
#[derive(Debug, Clone)]
pub struct TokenInfo {
    chosen: Entry,
    top: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Entry {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl Entry {
    fn new(tokenizer: &Tokenizer, token: TokenLogprob) -> Self {
        let bytes = tokenizer.bytes_of(token.token_id);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Self { token: text, logprob: token.logprob.max(LOWEST), bytes }
    }
}

impl TokenInfo {
    /// `None` when the engine was not asked for log-probabilities.
    pub fn new(tokenizer: &Tokenizer, sampled: &SampledToken) -> Option<Self> {
        let chosen = Entry::new(tokenizer, sampled.logprob?);
        let top = sampled.top_logprobs.iter().map(|&token| Entry::new(tokenizer, token)).collect();
        Some(Self { chosen, top })
    }
}

/// The chat form.
#[derive(Debug, Serialize)]
pub struct ChatLogprobs {
    content: Vec<ChatTokenLogprob>,
}

#[derive(Debug, Serialize)]
struct ChatTokenLogprob {
    #[serde(flatten)]
    chosen: Entry,
    top_logprobs: Vec<Entry>,
}

impl From<Vec<TokenInfo>> for ChatLogprobs {
    fn from(tokens: Vec<TokenInfo>) -> Self {
        let content = tokens
            .into_iter()
            .map(|token| ChatTokenLogprob { chosen: token.chosen, top_logprobs: token.top })
            .collect();
        Self { content }
    }
}

/// The completions form: parallel lists.
#[derive(Debug, Default, Serialize)]
pub struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    /// Characters before each token.
    text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// `offset` counts the characters so far and moves on.
    pub fn new(tokens: Vec<TokenInfo>, offset: &mut usize) -> Self {
        let mut lists = Self::default();
        for token in tokens {
            lists.text_offset.push(*offset);
            *offset += token.chosen.token.chars().count();
            lists.token_logprobs.push(token.chosen.logprob);
            // OpenAI's list always holds the chosen token, so it may have one more than was asked for.
            let missing = (!token.top.contains(&token.chosen)).then(|| token.chosen.clone());
            let top = token.top.into_iter().chain(missing);
            lists.top_logprobs.push(top.map(|entry| (entry.token, Value::from(entry.logprob))).collect());
            lists.tokens.push(token.chosen.token);
        }
        lists
    }
}
