//! The engine from outside: start it, put requests in, read tokens and figures out.

use super::FailureKind;
use super::active_request::{ActiveRequest, Generation, Submission, Task};
use super::core::{Command, Core};
use super::shared::{End, Shared, Ticket};
use super::{
    AdmissionError, Backend, BackendInfo, EngineConfig, EngineLoad, EngineStartError, FinishReason, GenerateRequest,
    MAX_NAMED_TOKENS, RequestError, TokenEvent, TokenStream, Usage,
};
use std::fmt;
use std::future::Future;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long past its deadline a shutdown waits for the step that runs.
const STEP_GRACE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// Start an engine on its own thread. It ends by [`EngineHandle::shutdown`], by a fatal error of the backend, or
    /// when the last handle is gone and the last request done.
    ///
    /// # Errors
    /// Limits that are out of range or do not agree with the backend.
    pub fn start(backend: Box<dyn Backend>, config: EngineConfig) -> Result<EngineHandle, EngineStartError> {
        let info = backend.info().clone();
        config.validate(&info)?;
        // Admission keeps the requests below this; one more for a wake-up call.
        let (commands, receiver) = sync_channel(config.max_in_flight_reqs() + 1);
        let shared = Shared::new(config, info)?;
        let core = Core::new(backend, Arc::clone(&shared), receiver);
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || core.run())?;
        Ok(EngineHandle { commands, shared, thread: Arc::new(Mutex::new(Some(thread))) })
    }
}

#[derive(Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    shared: Arc<Shared>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("EngineHandle").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

/// How a shutdown went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// The thread is joined. `failed` requests had to be cut off.
    Done { failed: usize },
    /// A step did not come back; the thread is left behind and the process should end.
    Hung,
}

impl EngineHandle {
    /// Put a request into the queue. Never blocks. Dropping the stream cancels the request.
    ///
    /// # Errors
    /// Why it cannot be served now or ever; nothing was queued.
    pub fn generate(&self, request: GenerateRequest) -> Result<TokenStream, AdmissionError> {
        let prompt_tokens = request.prompt_token_ids.len();
        self.check_prompt(&request.prompt_token_ids)?;
        check_named_tokens(&request)?;
        let context = self.context_for_generation(prompt_tokens)?;
        let max_tokens = request.params.max_tokens.min(context - prompt_tokens);
        let (events, receiver) = mpsc::unbounded_channel();
        let text_is_complete = Arc::new(AtomicBool::new(false));
        let stream = TokenStream::new(receiver, Arc::clone(&text_is_complete), Arc::clone(&self.shared));
        let ticket = self.shared.admit(prompt_tokens)?;
        if max_tokens == 0 {
            let usage = Usage { prompt_tokens, ..Usage::default() };
            drop(events.send(TokenEvent::Finished { reason: FinishReason::Length, usage }));
            return Ok(stream);
        }
        let prompt_token_ids = request.prompt_token_ids.clone();
        let task = Task::Generate(Generation::new(request, max_tokens, events, text_is_complete));
        self.submit(prompt_token_ids, task, ticket)?;
        Ok(stream)
    }

    /// Put a prompt for an embedding or classification model into the queue. Never blocks. Dropping the future
    /// cancels the request.
    ///
    /// # Errors
    /// Why it cannot be served now or ever; nothing was queued.
    pub fn encode(
        &self,
        prompt_token_ids: Vec<u32>,
    ) -> Result<impl Future<Output = Result<Vec<f32>, RequestError>> + Send + use<>, AdmissionError> {
        self.check_prompt(&prompt_token_ids)?;
        self.check_encode_length(prompt_token_ids.len())?;
        let ticket = self.shared.admit(prompt_token_ids.len())?;
        let (reply, answer) = oneshot::channel();
        self.submit(prompt_token_ids, Task::Encode(reply), ticket)?;
        let shared = Arc::clone(&self.shared);
        Ok(async move { answer.await.unwrap_or_else(|_| Err(shared.abandoned())) })
    }

    pub fn info(&self) -> &BackendInfo {
        &self.shared.info
    }

    pub fn load(&self) -> EngineLoad {
        self.shared.load()
    }

    /// Prometheus text with vLLM's names.
    pub fn metrics(&self) -> String {
        self.shared.metrics.render(&self.shared.load())
    }

    /// Take in nothing new, give what runs until `drain_for` has passed, then fail it and join the thread.
    /// A second call with less time shortens the first.
    pub async fn shutdown(&self, drain_for: Duration) -> Shutdown {
        self.shared.stop_within(drain_for);
        // A full channel means that the engine is not asleep.
        drop(self.commands.try_send(Command::Wake));
        let failed = match tokio::time::timeout(drain_for.saturating_add(STEP_GRACE), self.shared.ended()).await {
            Ok(End::Asked { failed }) => failed,
            Ok(End::Failed { .. }) => 0,
            Err(_) => return Shutdown::Hung,
        };
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join());
            if tokio::time::timeout(STEP_GRACE, joined).await.is_err() {
                return Shutdown::Hung;
            }
        }
        Shutdown::Done { failed }
    }

    /// Resolves with the reason when the engine has ended by itself: the device is lost or the engine broke.
    /// Pending for ever after a `shutdown`.
    pub fn stopped(&self) -> impl Future<Output = (FailureKind, String)> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move {
            match shared.ended().await {
                End::Failed { kind, why } => (kind, why),
                End::Asked { .. } => std::future::pending().await,
            }
        }
    }

    fn submit(&self, prompt_token_ids: Vec<u32>, task: Task, ticket: Ticket) -> Result<(), AdmissionError> {
        let request = ActiveRequest::new(task, ticket, prompt_token_ids.len());
        let command = Command::Submit(Box::new(Submission { prompt_token_ids, request }));
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => AdmissionError::QueueFull { queued: self.shared.config.max_num_queued_reqs },
            TrySendError::Disconnected(_) => {
                AdmissionError::Stopped { why: self.shared.refusal().unwrap_or_else(|| "its thread ended".to_owned()) }
            }
        })?;
        self.shared.count_request();
        Ok(())
    }

    fn check_prompt(&self, prompt_token_ids: &[u32]) -> Result<(), AdmissionError> {
        let vocab_size = self.shared.info.vocab_size;
        if prompt_token_ids.is_empty() {
            return Err(AdmissionError::EmptyPrompt);
        }
        match prompt_token_ids.iter().find(|&&token_id| token_id as usize >= vocab_size) {
            Some(&token_id) => Err(AdmissionError::TokenOutOfVocabulary { token_id, vocab_size }),
            None => Ok(()),
        }
    }

    /// Tokens that the sequence may come to: the context, or the whole pool where that is less. Leaves room for one
    /// token of output.
    fn context_for_generation(&self, prompt_tokens: usize) -> Result<usize, AdmissionError> {
        let max_model_len = self.shared.config.max_model_len;
        if prompt_tokens >= max_model_len {
            return Err(AdmissionError::PromptTooLong { prompt_tokens, max_model_len });
        }
        self.check_pool(prompt_tokens + 1)?;
        Ok(max_model_len.min(self.pool_tokens()))
    }

    /// A prompt to encode runs in one step, so it must fit the step's budget too.
    fn check_encode_length(&self, prompt_tokens: usize) -> Result<(), AdmissionError> {
        let config = &self.shared.config;
        let max_model_len = config.max_model_len.min(config.max_num_batched_tokens);
        if prompt_tokens > max_model_len {
            return Err(AdmissionError::PromptTooLong { prompt_tokens, max_model_len });
        }
        if self.shared.info.num_blocks == 0 { Ok(()) } else { self.check_pool(prompt_tokens) }
    }

    fn check_pool(&self, tokens: usize) -> Result<(), AdmissionError> {
        let info = &self.shared.info;
        if tokens <= self.pool_tokens() {
            return Ok(());
        }
        let needed_blocks = tokens.div_ceil(info.block_size.max(1));
        Err(AdmissionError::PoolTooSmall { needed_blocks, total_blocks: info.num_blocks })
    }

    fn pool_tokens(&self) -> usize {
        self.shared.info.num_blocks.saturating_mul(self.shared.info.block_size)
    }
}

fn check_named_tokens(request: &GenerateRequest) -> Result<(), AdmissionError> {
    let params = &request.params;
    let named = params.logit_bias.len() + params.stop_token_ids.len() + request.eos_token_ids.len();
    let most = MAX_NAMED_TOKENS;
    if named <= most { Ok(()) } else { Err(AdmissionError::TooManyNamedTokens { named, most }) }
}
