//! `POST /v1/chat/completions`.

use super::error::ApiError;
use super::fields::Fields;
use super::generation::{self, Delta, Deltas, Finish, GenerationRequest, UsageSum};
use super::logprobs::TokenInfo;
use super::models;
use super::openai::{Answer, ChatChoice, ChatChunkChoice, ChatDelta, ChatMessage, UsageField};
use super::prompt::text_work;
use super::sampling::{self, Limits};
use super::sse::{self, Chunks, Events};
use super::state::{ServedModel, ServerState, unix_seconds};
use crate::engine::{SamplingParams, Usage};
use crate::tokenizer::{RenderInput, TemplateError};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

const MAX_MESSAGES: usize = 10_000;
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
/// Switches of templates that a request may set; everything else in `chat_template_kwargs` is refused.
const SWITCHES: [&str; 2] = ["enable_thinking", "thinking"];

pub async fn create(State(state): State<Arc<ServerState>>, fields: Fields) -> Result<Response, ApiError> {
    let model = state.model()?;
    models::check_name(&state, &fields)?;
    models::require_generation(model, "/v1/chat/completions")?;
    let logprobs = logprobs(&fields)?;
    let n = fields.count("n", 1..=128)?.unwrap_or(1);
    let stream = StreamFields::parse(&fields)?;
    let mut params = sampling::parse(&fields, &limits(model))?;
    let prompt = prompt(&state, model, &fields).await?;
    params.logprobs = logprobs;
    let asked = fields.count("max_completion_tokens", 1..=i64::MAX)?.or(fields.count("max_tokens", 1..=i64::MAX)?);
    params.max_tokens = max_tokens(asked, prompt.len(), model.max_model_len)?;
    check_min_tokens(&params)?;
    let id = format!("chatcmpl-{}", uuid::Uuid::new_v4().simple());
    let request = GenerationRequest { request_id: id.clone(), prompts: vec![prompt], params, n };
    let deltas = generation::start(model, &request)?;
    let head = Head { id, created: unix_seconds(), model: state.model_name().to_owned(), logprobs: logprobs.is_some() };
    if stream.on {
        let chunks = ChatChunks { head, include_usage: stream.include_usage, begun: vec![false; n] };
        return sse::respond(deltas, chunks, n).await;
    }
    whole(deltas, &head, n).await
}

/// What every answer and chunk repeats.
struct Head {
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
}

pub struct StreamFields {
    pub on: bool,
    pub include_usage: bool,
}

impl StreamFields {
    /// # Errors
    /// 400 for wrong types, and for options without a stream.
    pub fn parse(fields: &Fields) -> Result<Self, ApiError> {
        let on = fields.flag("stream")?.unwrap_or(false);
        let expected = "an object like {\"include_usage\": true}";
        let options: Option<BTreeMap<String, Value>> = fields.get("stream_options", expected)?;
        if options.is_some() && !on {
            return Err(ApiError::field("stream_options", "stream_options is only allowed with stream: true"));
        }
        let include_usage = match options.as_ref().and_then(|options| options.get("include_usage")) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(include)) => *include,
            Some(_) => {
                let message = "stream_options.include_usage must be true or false";
                return Err(ApiError::field("stream_options.include_usage", message).code("invalid_type"));
            }
        };
        Ok(Self { on, include_usage })
    }
}

pub fn limits(model: &ServedModel) -> Limits {
    Limits { vocab_size: model.engine.info().vocab_size, defaults: model.generation_defaults }
}

/// What was asked for, else the rest of the context.
pub fn max_tokens(asked: Option<usize>, prompt: usize, max_model_len: usize) -> Result<usize, ApiError> {
    if prompt >= max_model_len {
        return Err(ApiError::context_length(format!(
            "this model's maximum context length is {max_model_len} tokens, and the prompt has {prompt}"
        )));
    }
    Ok(asked.unwrap_or(max_model_len - prompt))
}

pub fn check_min_tokens(params: &SamplingParams) -> Result<(), ApiError> {
    if params.min_tokens <= params.max_tokens {
        return Ok(());
    }
    let message = format!("min_tokens is {}, more than max_tokens ({})", params.min_tokens, params.max_tokens);
    Err(ApiError::field("min_tokens", message))
}

fn logprobs(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let on = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=20)?;
    if top.is_some_and(|top| top > 0) && !on {
        return Err(ApiError::field("top_logprobs", "top_logprobs is only allowed with logprobs: true"));
    }
    Ok(on.then(|| top.and_then(|top| u32::try_from(top).ok()).unwrap_or(0)))
}

/// Messages to token ids, by the template.
pub async fn prompt(state: &ServerState, model: &ServedModel, fields: &Fields) -> Result<Vec<u32>, ApiError> {
    let Some(template) = model.chat_template.clone() else {
        return Err(ApiError::new(
            axum::http::StatusCode::BAD_REQUEST,
            "this model has no chat template and none was chosen (--chat-template NAME|FILE); use /v1/completions",
        )
        .code("no_chat_template"));
    };
    let messages = messages(fields)?;
    let switches = switches(fields)?;
    let (tokenizer, limit) = (Arc::clone(&model.tokenizer), model.max_model_len);
    let work = move || {
        let max_output_bytes = tokenizer.max_text_bytes(limit);
        let rendered = template.render(&RenderInput { messages: &messages, switches: &switches, max_output_bytes });
        let text = rendered.map_err(|error| template_error(&error, limit))?;
        Ok(tokenizer.encode_rendered(&text, limit)?)
    };
    text_work(state, work).await?
}

fn template_error(error: &TemplateError, max_model_len: usize) -> ApiError {
    match error {
        TemplateError::OutputTooLong { .. } => ApiError::context_length(format!(
            "this model's maximum context length is {max_model_len} tokens, and the messages cannot fit it"
        )),
        TemplateError::Raised(_) | TemplateError::Failed(_) => {
            ApiError::field("messages", format!("the chat template does not take these messages: {error}"))
        }
    }
}

fn switches(fields: &Fields) -> Result<Vec<(String, bool)>, ApiError> {
    let name = "chat_template_kwargs";
    let expected = "an object of true or false";
    let map: BTreeMap<String, bool> = fields.get(name, expected)?.unwrap_or_default();
    match map.keys().find(|key| !SWITCHES.contains(&key.as_str())) {
        Some(_) => Err(ApiError::field(name, format!("{name} may hold {}", SWITCHES.join(" and ")))),
        None => Ok(map.into_iter().collect()),
    }
}

/// The messages as templates want them: `content` a string.
fn messages(fields: &Fields) -> Result<Vec<Value>, ApiError> {
    let expected = "a list of {\"role\": ..., \"content\": ...}";
    let messages: Option<Vec<Value>> = fields.get("messages", expected)?;
    let messages = messages.ok_or_else(|| {
        ApiError::field("messages", format!("messages is required: {expected}")).code("missing_required_parameter")
    })?;
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let message = format!("messages has {} entries; it must have 1 to {MAX_MESSAGES}", messages.len());
        return Err(ApiError::field("messages", message));
    }
    messages.into_iter().enumerate().map(|(i, message)| template_message(&message, i)).collect()
}

fn template_message(message: &Value, i: usize) -> Result<Value, ApiError> {
    let wrong = |field: &str, what: &str| {
        let param = format!("messages[{i}]{field}");
        let text = format!("{param} {what}");
        ApiError::field(param, text).code("invalid_type")
    };
    let object = message.as_object().ok_or_else(|| wrong("", "must be an object"))?;
    let role = object.get("role").and_then(Value::as_str).filter(|role| ROLES.contains(role));
    let role = role.ok_or_else(|| wrong(".role", &format!("must be one of {}", ROLES.join(", "))))?;
    let is_assistant = role == "assistant";
    let content = match object.get("content") {
        None | Some(Value::Null) if is_assistant => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => join_parts(parts)
            .ok_or_else(|| wrong(".content", "must hold parts of the form {\"type\": \"text\", \"text\": ...}"))?,
        _ => return Err(wrong(".content", "must be a string or a list of text parts")),
    };
    // OpenAI renamed the system role for its own newer models; templates know the old name.
    let role = if role == "developer" { "system" } else { role };
    let mut out = json!({"role": role, "content": content});
    for field in ["name", "reasoning_content"] {
        match object.get(field) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => out[field] = Value::from(text.as_str()),
            Some(_) => return Err(wrong(&format!(".{field}"), "must be a string")),
        }
    }
    if object.get("tool_calls").is_some_and(|calls| !calls.is_null() && calls != &json!([])) {
        return Err(wrong(".tool_calls", "is not supported"));
    }
    Ok(out)
}

fn join_parts(parts: &[Value]) -> Option<String> {
    let texts: Option<Vec<&str>> = parts
        .iter()
        .map(|part| {
            if part.get("type")?.as_str()? != "text" {
                return None;
            }
            part.get("text")?.as_str()
        })
        .collect();
    Some(texts?.join("\n"))
}

async fn whole(mut deltas: Deltas, head: &Head, n: usize) -> Result<Response, ApiError> {
    let mut choices: Vec<(String, Vec<TokenInfo>, Option<Finish>)> = vec![Default::default(); n];
    let mut usage = UsageSum::new(n);
    while let Some(delta) = deltas.next().await {
        let delta = delta?;
        usage.add(&delta);
        let (text, tokens, finish) = &mut choices[delta.index];
        text.push_str(&delta.text);
        tokens.extend(delta.tokens);
        *finish = delta.finish;
    }
    let choice = |(index, (text, tokens, finish)): (usize, (String, Vec<TokenInfo>, Option<Finish>))| ChatChoice {
        index,
        message: ChatMessage { role: "assistant", content: text, refusal: None },
        logprobs: head.logprobs.then(|| tokens.into()),
        finish_reason: finish.as_ref().map(|finish| finish.reason),
        stop_reason: finish.map_or(Value::Null, |finish| finish.stop_reason),
    };
    let choices = choices.into_iter().enumerate().map(choice).collect();
    let answer = head.answer("chat.completion", choices, UsageField::Is(usage.total()));
    Ok(Json(answer).into_response())
}

impl Head {
    fn answer<C>(&self, object: &'static str, choices: Vec<C>, usage: UsageField) -> Answer<'_, C> {
        Answer { id: &self.id, object, created: self.created, model: &self.model, choices, usage }
    }
}

struct ChatChunks {
    head: Head,
    include_usage: bool,
    /// Choices whose role was sent.
    begun: Vec<bool>,
}

impl ChatChunks {
    fn push(&self, choices: Vec<ChatChunkChoice>, usage: UsageField, out: &mut Events) {
        out.push(&self.head.answer("chat.completion.chunk", choices, usage));
    }

    fn push_choice(&self, choice: ChatChunkChoice, out: &mut Events) {
        let usage = if self.include_usage { UsageField::Null } else { UsageField::LeftOut };
        self.push(vec![choice], usage, out);
    }
}

impl Chunks for ChatChunks {
    fn delta(&mut self, delta: Delta, out: &mut Events) {
        let index = delta.index;
        let chunk = |delta| ChatChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None };
        if !std::mem::replace(&mut self.begun[index], true) {
            let role = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
            self.push_choice(chunk(role), out);
        }
        if !delta.text.is_empty() || !delta.tokens.is_empty() {
            let logprobs = self.head.logprobs.then(|| delta.tokens.into());
            let content = ChatDelta { role: None, content: Some(delta.text) };
            self.push_choice(ChatChunkChoice { logprobs, ..chunk(content) }, out);
        }
        if let Some(finish) = delta.finish {
            let end = chunk(ChatDelta::default());
            let (finish_reason, stop_reason) = (Some(finish.reason), Some(finish.stop_reason));
            self.push_choice(ChatChunkChoice { finish_reason, stop_reason, ..end }, out);
        }
    }

    fn usage(&mut self, usage: Usage, out: &mut Events) {
        if self.include_usage {
            self.push(Vec::new(), UsageField::Is(usage), out);
        }
    }
}
