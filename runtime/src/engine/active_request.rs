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

    /// Tokens of the sequence when it is over at the latest, prompt and output.
    pub fn max_len(&self) -> usize {
        match &self.task {
            Task::Generate(generation) => self.prompt_tokens + generation.max_tokens,
            Task::Encode(_) => self.prompt_tokens,
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
        if let Task::Generate(generation) = &self.task {
            tracing::warn!(request_id = generation.request_id, "request failed: {error}");
        }
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
    /// For the log.
    request_id: String,
    /// Unbounded so that a slow reader cannot stop the loop; at most `max_tokens` events and the last one go in.
    pub events: mpsc::UnboundedSender<TokenEvent>,
    /// Set by a reader that leaves because the text is complete.
    pub text_is_complete: Arc<AtomicBool>,
    eos_token_ids: Arc<[u32]>,
    /// As of the tokens that are known. Its `output_token_ids` are away while they travel in a step.
    sampling: RowSampling,
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
        let GenerateRequest { request_id, eos_token_ids, .. } = request;
        Self { request_id, events, text_is_complete, eos_token_ids, sampling, max_tokens, generated: 0 }
    }

    /// Count a chosen token, prepare the next choice, and say whether there is one.
    pub fn accept(&mut self, token: &SampledToken) -> Verdict {
        self.generated += 1;
        let generated = self.generated;
        let params = Arc::clone(&self.sampling.params);
        if !params.ignore_eos && self.eos_token_ids.contains(&token.token_id) {
            return Verdict::Stop(FinishReason::Stop { stop_token_id: None });
        }
        if params.stop_token_ids.contains(&token.token_id) {
            return Verdict::Stop(FinishReason::Stop { stop_token_id: Some(token.token_id) });
        }
        if generated >= self.max_tokens {
            return Verdict::LastToken;
        }
        if self.penalizes_output() {
            self.sampling.output_token_ids.push(token.token_id);
        }
        Verdict::GoOn
    }

    /// For a step that chooses the token after `pending` ones which are not known yet.
    pub fn sampling_after(&self, pending: usize) -> RowSampling {
        let sampling = &self.sampling;
        let chosen = self.generated + pending;
        let may_end = chosen >= sampling.params.min_tokens;
        RowSampling {
            params: Arc::clone(&sampling.params),
            seed: sampling.seed,
            step: chosen as u64,
            prompt_token_ids: Arc::clone(&sampling.prompt_token_ids),
            output_token_ids: Vec::new(),
            forbidden_token_ids: if may_end { Vec::new() } else { sampling.forbidden_token_ids.clone() },
        }
    }

    /// The tokens generated so far as the penalties need them, empty without any. They come back by
    /// [`Self::return_output`] before the next token is accepted.
    pub fn lend_output(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.sampling.output_token_ids)
    }

    pub fn return_output(&mut self, output_token_ids: Vec<u32>) {
        self.sampling.output_token_ids = output_token_ids;
    }

    /// Choosing a token needs to know all before it.
    pub fn penalizes_output(&self) -> bool {
        let params = &self.sampling.params;
        params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
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

#[cfg(test)]
mod tests {
    use super::super::SamplingParams;
    use super::*;

    fn generation(params: SamplingParams, max_tokens: usize) -> Generation {
        let request = GenerateRequest {
            request_id: "test".to_owned(),
            prompt_token_ids: vec![1, 2, 3],
            params: Arc::new(params),
            eos_token_ids: Arc::new([9]),
            choice_index: 0,
        };
        Generation::new(request, max_tokens, mpsc::unbounded_channel().0, Arc::default())
    }

    fn token(token_id: u32) -> SampledToken {
        SampledToken { token_id, logprob: None, top_logprobs: Vec::new() }
    }

    #[test]
    fn every_token_moves_the_random_number_on() {
        let mut generation = generation(SamplingParams::default(), 10);
        for step in 0..3 {
            assert_eq!((generation.sampling_after(0).step, generation.sampling_after(1).step), (step, step + 1));
            assert_eq!(generation.accept(&token(4)), Verdict::GoOn);
        }
        // Nobody asked for penalties, so nothing is carried along for them.
        let sampling = generation.sampling;
        assert!(sampling.output_token_ids.is_empty() && sampling.prompt_token_ids.is_empty());
    }

    #[test]
    fn penalties_get_what_they_need() {
        let mut repetition = generation(SamplingParams { repetition_penalty: 1.1, ..SamplingParams::default() }, 10);
        repetition.accept(&token(4));
        let sampling = repetition.sampling;
        assert_eq!((&*sampling.prompt_token_ids, &*sampling.output_token_ids), (&[1, 2, 3][..], &[4][..]));
        let mut presence = generation(SamplingParams { presence_penalty: 1.0, ..SamplingParams::default() }, 10);
        presence.accept(&token(4));
        let sampling = presence.sampling;
        assert_eq!((sampling.prompt_token_ids.len(), &*sampling.output_token_ids), (0, &[4][..]));
    }

    #[test]
    fn a_token_not_known_yet_counts_for_min_tokens() {
        let mut generation = generation(SamplingParams { min_tokens: 2, ..SamplingParams::default() }, 10);
        assert_eq!(generation.sampling_after(1).forbidden_token_ids, [9]);
        generation.accept(&token(4));
        assert_eq!(generation.sampling_after(0).forbidden_token_ids, [9]);
        assert!(generation.sampling_after(1).forbidden_token_ids.is_empty());
    }

    #[test]
    fn a_stop_goes_before_the_last_token() {
        let stop = Verdict::Stop(FinishReason::Stop { stop_token_id: None });
        assert_eq!(generation(SamplingParams::default(), 1).accept(&token(9)), stop);
        assert_eq!(generation(SamplingParams::default(), 1).accept(&token(4)), Verdict::LastToken);
        let both = SamplingParams { stop_token_ids: vec![9], ..SamplingParams::default() };
        assert_eq!(generation(both.clone(), 5).accept(&token(9)), stop);
        let ignoring = SamplingParams { ignore_eos: true, ..both };
        let named = Verdict::Stop(FinishReason::Stop { stop_token_id: Some(9) });
        assert_eq!(generation(ignoring, 5).accept(&token(9)), named);
    }
}
