//! From the engine's tokens to the text of a request's choices.

use super::error::ApiError;
use super::logprobs::TokenInfo;
use super::state::ServedModel;
use crate::engine::{FinishReason, GenerateRequest, SamplingParams, TokenEvent, TokenStream, Usage};
use crate::tokenizer::{IncrementalDetokenizer, StopMatcher, StopOutcome, Tokenizer};
use futures::FutureExt;
use futures::stream::{BoxStream, SelectAll, StreamExt, select_all};
use serde_json::Value;
use std::sync::Arc;

/// Tokens that were already waiting go into one delta, up to this many.
const MAX_TOKENS_PER_DELTA: usize = 64;

/// What a request asks of the engine.
#[derive(Debug)]
pub struct GenerationRequest {
    pub request_id: String,
    pub prompts: Vec<Vec<u32>>,
    pub params: SamplingParams,
    /// Choices per prompt.
    pub n: usize,
}

/// News of one choice.
#[derive(Debug)]
pub struct Delta {
    /// Choices of prompt p are `p * n .. (p + 1) * n`.
    pub index: usize,
    pub text: String,
    /// The new tokens, when logprobs were asked for.
    pub tokens: Vec<TokenInfo>,
    pub finish: Option<Finish>,
}

/// The end of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// `stop` or `length`.
    pub reason: &'static str,
    /// vLLM's addition: the stop string or stop token that was met.
    pub stop_reason: Value,
    pub usage: Usage,
}

/// Deltas of all choices as they come. Dropping it cancels what still runs.
pub type Deltas = SelectAll<BoxStream<'static, Result<Delta, ApiError>>>;

/// Put all choices into the engine's queue.
///
/// # Errors
/// The engine's refusal; choices that were already queued are cancelled.
pub fn start(model: &ServedModel, request: &GenerationRequest) -> Result<Deltas, ApiError> {
    check_context(model, request)?;
    let params = Arc::new(request.params.clone());
    let mut choices = Vec::with_capacity(request.prompts.len() * request.n);
    for prompt in &request.prompts {
        for choice_index in 0..request.n {
            let index = choices.len();
            let tokens = model.engine.generate(GenerateRequest {
                request_id: format!("{}-{index}", request.request_id),
                prompt_token_ids: prompt.clone(),
                params: Arc::clone(&params),
                eos_token_ids: Arc::clone(&model.eos_token_ids),
                choice_index: u32::try_from(choice_index).unwrap_or(u32::MAX),
            })?;
            choices.push(Choice::new(index, tokens, &model.tokenizer, &params, prompt.len()).into_stream());
        }
    }
    Ok(select_all(choices))
}

fn check_context(model: &ServedModel, request: &GenerationRequest) -> Result<(), ApiError> {
    let (limit, output) = (model.max_model_len, request.params.max_tokens);
    match request.prompts.iter().map(Vec::len).find(|prompt| prompt.saturating_add(output) > limit) {
        Some(prompt) => Err(ApiError::context_length(format!(
            "this model's maximum context length is {limit} tokens, and the request asks for {} ({prompt} in the prompt, \
             {output} in the completion)",
            prompt.saturating_add(output)
        ))),
        None => Ok(()),
    }
}

/// Text and end of one choice.
struct Choice {
    index: usize,
    /// `None` once the choice has ended.
    tokens: Option<TokenStream>,
    /// A delta was given out. The first goes out with the first token, even one without text: it starts the answer.
    begun: bool,
    /// Told after the text that came before it.
    failed: Option<ApiError>,
    tokenizer: Arc<Tokenizer>,
    detokenizer: IncrementalDetokenizer,
    stop: StopMatcher,
    /// Stop strings are not looked for before this many tokens.
    min_tokens: usize,
    usage: Usage,
}

impl Choice {
    fn new(
        index: usize,
        tokens: TokenStream,
        tokenizer: &Arc<Tokenizer>,
        params: &SamplingParams,
        prompt_tokens: usize,
    ) -> Self {
        Self {
            index,
            tokens: Some(tokens),
            begun: false,
            failed: None,
            tokenizer: Arc::clone(tokenizer),
            detokenizer: IncrementalDetokenizer::new(Arc::clone(tokenizer)),
            stop: StopMatcher::new(&params.stop),
            min_tokens: params.min_tokens,
            usage: Usage { prompt_tokens, ..Usage::default() },
        }
    }

    fn into_stream(self) -> BoxStream<'static, Result<Delta, ApiError>> {
        futures::stream::unfold(self, |mut choice| async move {
            let delta = choice.next_delta().await?;
            choice.begun = true;
            Some((delta, choice))
        })
        .boxed()
    }

    /// Waits for one token and takes those that are already there with it.
    async fn next_delta(&mut self) -> Option<Result<Delta, ApiError>> {
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        let mut delta = Delta { index: self.index, text: String::new(), tokens: Vec::new(), finish: None };
        let mut taken = 0;
        loop {
            let tokens = self.tokens.as_mut()?;
            let is_empty = delta.text.is_empty() && delta.tokens.is_empty();
            let event = if is_empty && (self.begun || taken == 0) {
                tokens.next().await
            } else {
                match tokens.next().now_or_never() {
                    Some(event) => event,
                    None => return Some(Ok(delta)),
                }
            };
            if let Err(error) = self.take(event?, &mut delta) {
                self.tokens = None;
                if delta.text.is_empty() && delta.tokens.is_empty() {
                    return Some(Err(error));
                }
                self.failed = Some(error);
                return Some(Ok(delta));
            }
            taken += 1;
            if delta.finish.is_some() {
                return Some(Ok(delta));
            }
            if taken >= MAX_TOKENS_PER_DELTA && !delta.text.is_empty() {
                return Some(Ok(delta));
            }
        }
    }

    fn take(&mut self, event: TokenEvent, delta: &mut Delta) -> Result<(), ApiError> {
        match event {
            TokenEvent::Token(token) => {
                self.usage.completion_tokens += 1;
                delta.tokens.extend(TokenInfo::new(&self.tokenizer, &token));
                let piece = self.detokenizer.push(token.token_id);
                self.add_text(&piece, delta);
            }
            TokenEvent::Finished { reason, usage } => {
                let rest = self.detokenizer.flush();
                self.add_text(&rest, delta);
                if delta.finish.is_none() {
                    delta.text.push_str(&self.stop.flush());
                    let (reason, stop_reason) = match reason {
                        FinishReason::Stop { stop_token_id } => {
                            ("stop", stop_token_id.map_or(Value::Null, Value::from))
                        }
                        FinishReason::Length => ("length", Value::Null),
                    };
                    delta.finish = Some(Finish { reason, stop_reason, usage });
                }
                self.tokens = None;
            }
            TokenEvent::Failed(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Text passes the stop strings; when one is met the choice ends and the engine is told.
    fn add_text(&mut self, piece: &str, delta: &mut Delta) {
        if self.usage.completion_tokens < self.min_tokens {
            delta.text.push_str(&self.stop.pass(piece));
            return;
        }
        match self.stop.push(piece) {
            StopOutcome::Text(text) => delta.text.push_str(&text),
            StopOutcome::Stopped { text, stop } => {
                delta.text.push_str(&text);
                delta.finish = Some(Finish { reason: "stop", stop_reason: Value::from(stop), usage: self.usage });
                if let Some(tokens) = self.tokens.take() {
                    tokens.stop();
                }
            }
        }
    }
}

/// Usage of a request: each prompt counted once, whatever its number of choices.
#[derive(Debug)]
pub struct UsageSum {
    n: usize,
    total: Usage,
}

impl UsageSum {
    pub fn new(n: usize) -> Self {
        Self { n, total: Usage::default() }
    }

    pub fn add(&mut self, delta: &Delta) {
        let Some(finish) = &delta.finish else { return };
        self.total.completion_tokens += finish.usage.completion_tokens;
        if delta.index.is_multiple_of(self.n) {
            self.total.prompt_tokens += finish.usage.prompt_tokens;
            self.total.cached_tokens += finish.usage.cached_tokens;
        }
    }

    pub fn total(&self) -> Usage {
        self.total
    }
}
