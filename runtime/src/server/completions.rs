//! `POST /v1/completions`.

use super::chat::{self, StreamFields};
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{self, Delta, Deltas, Finish, GenerationRequest, UsageSum};
use super::logprobs::{CompletionLogprobs, TokenInfo};
use super::models;
use super::openai::{Answer, CompletionChoice, UsageField};
use super::prompt::Prompts;
use super::sampling;
use super::sse::{self, Chunks, Events};
use super::state::{ServerState, unix_seconds};
use crate::engine::Usage;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::Value;
use std::sync::Arc;

const MAX_PROMPTS: usize = 2048;
/// OpenAI's default for this route.
const DEFAULT_MAX_TOKENS: usize = 16;

pub async fn create(State(state): State<Arc<ServerState>>, fields: Fields) -> Result<Response, ApiError> {
    let model = state.model()?;
    models::check_name(&state, &fields)?;
    models::require_generation(model, "/v1/completions")?;
    let n = fields.count("n", 1..=128)?.unwrap_or(1);
    let stream = StreamFields::parse(&fields)?;
    let mut params = sampling::parse(&fields, &chat::limits(model))?;
    params.logprobs = fields.integer("logprobs", 0..=20)?.and_then(|n| u32::try_from(n).ok());
    params.max_tokens = fields.count("max_tokens", 1..=i64::MAX)?.unwrap_or(DEFAULT_MAX_TOKENS);
    chat::check_min_tokens(&params)?;
    let echo = fields.flag("echo")?.unwrap_or(false);
    if echo && params.logprobs.is_some() {
        let message = "logprobs of the prompt (echo with logprobs) are not supported";
        return Err(ApiError::field("logprobs", message).code("unsupported_parameter"));
    }
    let prompts = Prompts::parse(&fields, "prompt", MAX_PROMPTS)?;
    let echoed = if echo { prompts.texts(&model.tokenizer)? } else { Vec::new() };
    let prompts = prompts.into_token_ids(&state, model).await?;
    for prompt in &prompts {
        chat::max_tokens(None, prompt.len(), model.max_model_len)?;
    }
    let choices = prompts.len() * n;
    let logprobs = params.logprobs.is_some();
    let id = format!("cmpl-{}", uuid::Uuid::new_v4().simple());
    let request = GenerationRequest { request_id: id.clone(), prompts, params, n };
    let deltas = generation::start(model, &request)?;
    let head = Head { id, created: unix_seconds(), model: state.model_name().to_owned(), logprobs };
    // Every choice begins with its prompt, when it is to be echoed.
    let begin = (0..choices).map(|index| echoed.get(index / n).cloned().unwrap_or_default()).collect();
    if stream.on {
        let chunks = CompletionChunks { head, include_usage: stream.include_usage, begin, offsets: vec![0; choices] };
        return sse::respond(deltas, chunks, n).await;
    }
    whole(deltas, &head, begin, n).await
}

struct Head {
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
}

impl Head {
    fn answer(&self, choices: Vec<CompletionChoice>, usage: UsageField) -> Answer<'_, CompletionChoice> {
        let object = "text_completion";
        Answer { id: &self.id, object, created: self.created, model: &self.model, choices, usage }
    }
}

async fn whole(mut deltas: Deltas, head: &Head, begin: Vec<String>, n: usize) -> Result<Response, ApiError> {
    let mut choices: Vec<(String, Vec<TokenInfo>, Option<Finish>)> =
        begin.into_iter().map(|text| (text, Vec::new(), None)).collect();
    let mut usage = UsageSum::new(n);
    while let Some(delta) = deltas.next().await {
        let delta = delta?;
        usage.add(&delta);
        let (text, tokens, finish) = &mut choices[delta.index];
        text.push_str(&delta.text);
        tokens.extend(delta.tokens);
        *finish = delta.finish;
    }
    let choice =
        |(index, (text, tokens, finish)): (usize, (String, Vec<TokenInfo>, Option<Finish>))| CompletionChoice {
            index,
            text,
            logprobs: head.logprobs.then(|| CompletionLogprobs::new(tokens, &mut 0)),
            finish_reason: finish.as_ref().map(|finish| finish.reason),
            stop_reason: Some(finish.map_or(Value::Null, |finish| finish.stop_reason)),
        };
    let choices = choices.into_iter().enumerate().map(choice).collect();
    Ok(Json(head.answer(choices, UsageField::Is(usage.total()))).into_response())
}

struct CompletionChunks {
    head: Head,
    include_usage: bool,
    /// Text that goes before a choice's first delta.
    begin: Vec<String>,
    /// Characters so far of each choice, for logprobs.
    offsets: Vec<usize>,
}

impl Chunks for CompletionChunks {
    fn delta(&mut self, delta: Delta, out: &mut Events) {
        let index = delta.index;
        let text = std::mem::take(&mut self.begin[index]) + &delta.text;
        let offset = &mut self.offsets[index];
        let logprobs = self.head.logprobs.then(|| CompletionLogprobs::new(delta.tokens, offset));
        let (finish_reason, stop_reason) = match delta.finish {
            Some(finish) => (Some(finish.reason), Some(finish.stop_reason)),
            None => (None, None),
        };
        let usage = if self.include_usage { UsageField::Null } else { UsageField::LeftOut };
        let choice = CompletionChoice { index, text, logprobs, finish_reason, stop_reason };
        out.push(&self.head.answer(vec![choice], usage));
    }

    fn usage(&mut self, usage: Usage, out: &mut Events) {
        if self.include_usage {
            out.push(&self.head.answer(Vec::new(), UsageField::Is(usage)));
        }
    }
}
