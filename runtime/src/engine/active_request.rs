//! A request inside the engine: who is told about it, when it ends, how long it took.

use super::sampler::choice_seed;
use super::sequence::SequenceKind;
use super::shared::Ticket;
use super::{FinishReason, GenerateRequest, RequestError, RowSampling, SampledToken, TokenEvent, Usage};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};

/// What a handle puts into the engine's queue.
#[derive(Debug)]
pub struct Submission {
    pub prompt_token_ids: Vec<u32>,
    pub request: ActiveRequest,
}

#[derive(Debug)]
pub struct ActiveRequest {
    pub task: Task,
    pub ticket: Ticket,
    pub times: Times,
    pub prompt_tokens: usize,
    /// Found in the prefix cache when first scheduled.
    pub cached_tokens: usize,
}

#[derive(Debug)]
pub enum Task {
    Generate(Generation),
    Encode(oneshot::Sender<Result<Vec<f32>, RequestError>>),
}

#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub arrived: Instant,
    pub scheduled: Option<Instant>,
    pub first_token: Option<Instant>,
    pub last_token: Option<Instant>,
}

impl ActiveRequest {
    pub fn new(task: Task, ticket: Ticket, prompt_tokens: usize) -> Self {
        let times = Times { arrived: Instant::now(), scheduled: None, first_token: None, last_token: None };
        Self { task, ticket, times, prompt_tokens, cached_tokens: 0 }
    }

    pub fn kind(&self) -> SequenceKind {
        match self.task {
            Task::Generate(_) => SequenceKind::Generate,
            Task::Encode(_) => SequenceKind::Encode,
        }
    }

    /// Nobody waits for the answer any more.
    pub fn is_cancelled(&self) -> bool {
        match &self.task {
            Task::Generate(generation) => generation.events.is_closed(),
            Task::Encode(reply) => reply.is_closed(),
        }
    }

    pub fn usage(&self) -> Usage {
        let completion_tokens = match &self.task {
            Task::Generate(generation) => generation.generated,
            Task::Encode(_) => 0,
        };
        Usage { prompt_tokens: self.prompt_tokens, cached_tokens: self.cached_tokens, completion_tokens }
    }

    /// Give the place back, then say why: who hears it may come again at once.
    pub fn fail(self, error: RequestError) {
        drop(self.ticket);
        // A receiver that is gone has cancelled; there is nobody to tell.
        match self.task {
            Task::Generate(generation) => drop(generation.events.send(TokenEvent::Failed(error))),
            Task::Encode(reply) => drop(reply.send(Err(error))),
        }
    }
}

#[derive(Debug)]
pub struct Generation {
    /// Unbounded so that a slow reader cannot stop the loop; at most `max_tokens` events and the last one go in.
    pub events: mpsc::UnboundedSender<TokenEvent>,
    /// Set by a reader that leaves because the text is complete.
    pub text_is_complete: Arc<AtomicBool>,
    eos_token_ids: Arc<[u32]>,
    /// `None` only while it travels in a step.
    pub sampling: Option<RowSampling>,
    /// `max_tokens`, less when the context or the pool ends before.
    max_tokens: usize,
    generated: usize,
}

/// What a chosen token means for its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    GoOn,
    /// The token is the last one.
    LastToken,
    /// The token itself is no output.
    Stop(FinishReason),
}

impl Generation {
    pub fn new(
        request: GenerateRequest,
        max_tokens: usize,
        events: mpsc::UnboundedSender<TokenEvent>,
        text_is_complete: Arc<AtomicBool>,
    ) -> Self {
        let sampling = row_sampling(&request);
        let eos_token_ids = request.eos_token_ids;
        Self { events, text_is_complete, eos_token_ids, sampling: Some(sampling), max_tokens, generated: 0 }
    }

    /// Count a chosen token, prepare the next choice, and say whether there is one.
    pub fn accept(&mut self, token: &SampledToken) -> Verdict {
        self.generated += 1;
        let generated = self.generated;
        let Some(sampling) = &mut self.sampling else { return Verdict::GoOn };
        let params = Arc::clone(&sampling.params);
        if !params.ignore_eos && self.eos_token_ids.contains(&token.token_id) {
            return Verdict::Stop(FinishReason::Stop { stop_token_id: None });
        }
        if params.stop_token_ids.contains(&token.token_id) {
            return Verdict::Stop(FinishReason::Stop { stop_token_id: Some(token.token_id) });
        }
        if generated >= self.max_tokens {
            return Verdict::LastToken;
        }
        sampling.step = generated as u64;
        if penalizes_output(sampling) {
            sampling.output_token_ids.push(token.token_id);
        }
        if generated >= params.min_tokens {
            sampling.forbidden_token_ids.clear();
        }
        Verdict::GoOn
    }

    /// The reader left: because it had all the text, or because it gave up.
    pub fn was_completed_by_reader(&self) -> bool {
        self.text_is_complete.load(Relaxed)
    }
}

fn row_sampling(request: &GenerateRequest) -> RowSampling {
    let params = &request.params;
    let prompt_token_ids: &[u32] = if params.repetition_penalty == 1.0 { &[] } else { &request.prompt_token_ids };
    let mut forbidden_token_ids = Vec::new();
    if params.min_tokens > 0 {
        forbidden_token_ids.extend_from_slice(&params.stop_token_ids);
        if !params.ignore_eos {
            forbidden_token_ids.extend_from_slice(&request.eos_token_ids);
        }
    }
    RowSampling {
        params: Arc::clone(params),
        seed: choice_seed(params.seed.unwrap_or_else(|| fastrand::u64(..)), request.choice_index),
        step: 0,
        prompt_token_ids: prompt_token_ids.into(),
        output_token_ids: Vec::new(),
        forbidden_token_ids,
    }
}

fn penalizes_output(sampling: &RowSampling) -> bool {
    let params = &sampling.params;
    params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
}
