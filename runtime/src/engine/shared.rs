//! What the engine's thread and its handles share: admission counters, progress, the end.

use super::FailureKind;
use super::metrics::Metrics;
use super::window::{LatencyWindow, RateWindow};
use super::{AdmissionError, BackendInfo, EngineConfig, EngineLoad, RequestError, StepTotals};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// No stop was asked for.
const RUNNING: u64 = u64::MAX;

#[derive(Debug)]
pub struct Shared {
    pub config: EngineConfig,
    pub info: BackendInfo,
    pub metrics: Metrics,
    started: Instant,
    in_flight: AtomicUsize,
    queued_tokens: AtomicUsize,
    requests_total: AtomicU64,
    /// Since `started`: when the engine last went from idle to busy, and when the last step ended.
    busy_since_ms: AtomicU64,
    last_step_ms: AtomicU64,
    /// Since `started`: when requests that still run are to be failed, or [`RUNNING`].
    stop_at_ms: AtomicU64,
    progress: Mutex<Progress>,
    end: watch::Sender<Option<End>>,
}

/// Why the engine's thread ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// `shutdown`, or nobody held a handle any more. `failed`: requests that had to be cut off.
    Asked { failed: usize },
    /// The device or the engine itself broke.
    Failed { kind: FailureKind, why: String },
}

/// Written by the engine after every step, read by `load`.
#[derive(Debug)]
struct Progress {
    running: usize,
    used_blocks: usize,
    steps_total: u64,
    time_to_first_token: LatencyWindow,
    inter_token_latency: LatencyWindow,
    prompt_rate: RateWindow,
    generation_rate: RateWindow,
    steps: [StepTotals; 3],
    host_time: Duration,
}

/// What a step computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StepKind {
    /// One token of every sequence.
    #[default]
    Decode,
    Mixed,
    /// No sequence with a single token.
    Prefill,
}

/// What one step did, kept between steps to reuse its memory.
#[derive(Debug, Default)]
pub struct StepRecord {
    pub times_to_first_token: Vec<Duration>,
    pub inter_token_latencies: Vec<Duration>,
    /// Tokens computed for prompts, and tokens generated.
    pub prompt_tokens: usize,
    pub generation_tokens: usize,
    pub kind: StepKind,
    pub num_tokens: usize,
    pub device_time: Duration,
    /// Of the engine's thread since the step before, without waiting.
    pub host_time: Duration,
}

impl StepRecord {
    fn clear(&mut self) {
        self.times_to_first_token.clear();
        self.inter_token_latencies.clear();
        self.prompt_tokens = 0;
        self.generation_tokens = 0;
    }
}

impl Shared {
    pub fn new(config: EngineConfig, info: BackendInfo) -> Result<Arc<Self>, prometheus::Error> {
        let metrics = Metrics::new(&config, &info)?;
        Ok(Arc::new(Self {
            config,
            info,
            metrics,
            started: Instant::now(),
            in_flight: AtomicUsize::new(0),
            queued_tokens: AtomicUsize::new(0),
            requests_total: AtomicU64::new(0),
            busy_since_ms: AtomicU64::new(0),
            last_step_ms: AtomicU64::new(0),
            stop_at_ms: AtomicU64::new(RUNNING),
            progress: Mutex::new(Progress {
                running: 0,
                used_blocks: 0,
                steps_total: 0,
                time_to_first_token: LatencyWindow::new(),
                inter_token_latency: LatencyWindow::new(),
                prompt_rate: RateWindow::default(),
                generation_rate: RateWindow::default(),
                steps: [StepTotals::default(); 3],
                host_time: Duration::ZERO,
            }),
            end: watch::Sender::new(None),
        }))
    }

    fn now_ms(&self) -> u64 {
        duration_ms(self.started.elapsed())
    }

    /// Room for one more request with this many prompt tokens, or why there is none.
    pub fn admit(self: &Arc<Self>, prompt_tokens: usize) -> Result<Ticket, AdmissionError> {
        if let Some(why) = self.refusal() {
            return Err(AdmissionError::Stopped { why });
        }
        let before = self.in_flight.fetch_add(1, Relaxed);
        if before == 0 {
            self.busy_since_ms.store(self.now_ms(), Relaxed);
        }
        let queued_before = self.queued_tokens.fetch_add(prompt_tokens, Relaxed);
        // From here on dropping the ticket takes both counts back.
        let ticket = Ticket { shared: Arc::clone(self), queued_tokens: prompt_tokens };
        let too_many = before >= self.config.max_in_flight_reqs();
        let too_long = queued_before > 0 && queued_before + prompt_tokens > self.config.max_queued_tokens();
        if too_many || too_long {
            return Err(AdmissionError::QueueFull { queued: before.saturating_sub(self.progress().running) });
        }
        Ok(ticket)
    }

    /// Set when nothing may be let in any more.
    pub fn refusal(&self) -> Option<String> {
        match &*self.end.borrow() {
            Some(End::Failed { why, .. }) => Some(why.clone()),
            Some(End::Asked { .. }) => Some("it was shut down".to_owned()),
            None => self.stop_at().map(|_| "it is shutting down".to_owned()),
        }
    }

    pub fn count_request(&self) {
        self.requests_total.fetch_add(1, Relaxed);
    }

    /// Ask for the end; requests get `drain_for` from now. An earlier deadline replaces a later one.
    pub fn stop_within(&self, drain_for: Duration) {
        let at_ms = self.now_ms().saturating_add(duration_ms(drain_for)).min(RUNNING - 1);
        self.stop_at_ms.fetch_min(at_ms, Relaxed);
    }

    pub fn stop_at(&self) -> Option<Instant> {
        let at_ms = self.stop_at_ms.load(Relaxed);
        // Past any clock is as good as "whenever the requests are done".
        let far = || self.started + Duration::from_secs(60 * 60 * 24 * 365);
        (at_ms != RUNNING).then(|| self.started.checked_add(Duration::from_millis(at_ms)).unwrap_or_else(far))
    }

    pub fn set_end(&self, end: End) {
        self.end.send_replace(Some(end));
    }

    /// Waits for the end.
    pub async fn ended(&self) -> End {
        let mut end = self.end.subscribe();
        loop {
            if let Some(end) = &*end.borrow_and_update() {
                return end.clone();
            }
            if end.changed().await.is_err() {
                // Not while `self`, which holds the sender, is here.
                std::future::pending::<()>().await;
            }
        }
    }

    /// What to tell a request whose engine went away without a word to it.
    pub fn abandoned(&self) -> RequestError {
        match &*self.end.borrow() {
            Some(End::Failed { why, .. }) => RequestError::Device(why.clone()),
            _ => RequestError::ShuttingDown,
        }
    }

    pub fn record_step(&self, record: &mut StepRecord) {
        self.last_step_ms.store(self.now_ms(), Relaxed);
        let second = self.started.elapsed().as_secs();
        let mut progress = self.progress();
        progress.steps_total += 1;
        progress.host_time += record.host_time;
        let totals = &mut progress.steps[record.kind as usize];
        totals.steps += 1;
        totals.tokens += record.num_tokens as u64;
        totals.device_ms += record.device_time.as_secs_f64() * 1e3;
        progress.prompt_rate.record(second, record.prompt_tokens as u64);
        progress.generation_rate.record(second, record.generation_tokens as u64);
        for latency in &record.times_to_first_token {
            progress.time_to_first_token.record(second, latency.as_secs_f64() * 1e3);
        }
        for latency in &record.inter_token_latencies {
            progress.inter_token_latency.record(second, latency.as_secs_f64() * 1e3);
        }
        record.clear();
    }

    pub fn set_usage(&self, running: usize, used_blocks: usize) {
        let mut progress = self.progress();
        progress.running = running;
        progress.used_blocks = used_blocks;
    }

    pub fn load(&self) -> EngineLoad {
        let progress = self.progress();
        let now = self.started.elapsed();
        let in_flight = self.in_flight.load(Relaxed);
        // `progress` is as of the last step; a request may have ended since.
        let running = progress.running.min(in_flight);
        let moved_ms = self.last_step_ms.load(Relaxed).max(self.busy_since_ms.load(Relaxed));
        let [ttft_p50_ms, ttft_p95_ms] =
            optional(progress.time_to_first_token.quantiles_ms(now.as_secs(), [0.5, 0.95]));
        let [itl_p50_ms, itl_p95_ms] = optional(progress.inter_token_latency.quantiles_ms(now.as_secs(), [0.5, 0.95]));
        let [decode_steps, mixed_steps, prefill_steps] = progress.steps;
        let queries = self.metrics.prefix_cache_queries.get();
        EngineLoad {
            running: running as u64,
            waiting: (in_flight - running) as u64,
            kv_cache_usage: share(progress.used_blocks as u64, self.info.num_blocks as u64).unwrap_or(0.0),
            kv_blocks_total: self.info.num_blocks as u64,
            kv_block_size: self.info.block_size as u64,
            kv_cache_bytes: self.info.kv_cache_bytes,
            max_model_len: self.config.max_model_len as u64,
            prompt_tokens_total: self.metrics.prompt_tokens.get(),
            generation_tokens_total: self.metrics.generation_tokens.get(),
            prompt_tokens_per_s: progress.prompt_rate.per_second(now.as_secs_f64()),
            generation_tokens_per_s: progress.generation_rate.per_second(now.as_secs_f64()),
            requests_total: self.requests_total.load(Relaxed),
            preemptions_total: self.metrics.num_preemptions.get(),
            prefix_cache_hit_rate: share(self.metrics.prefix_cache_hits.get(), queries),
            ttft_p50_ms,
            ttft_p95_ms,
            itl_p50_ms,
            itl_p95_ms,
            steps_total: progress.steps_total,
            decode_steps,
            mixed_steps,
            prefill_steps,
            engine_host_ms: progress.host_time.as_secs_f64() * 1e3,
            stalled_ms: if in_flight == 0 { 0 } else { duration_ms(now).saturating_sub(moved_ms) },
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        // Plain counters: a panic while they were held leaves them usable.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn optional(quantiles: Option<[f64; 2]>) -> [Option<f64>; 2] {
    quantiles.map_or([None; 2], |quantiles| quantiles.map(Some))
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

fn duration_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A request's place in the engine. Given back when dropped, wherever that happens.
#[derive(Debug)]
pub struct Ticket {
    shared: Arc<Shared>,
    /// Prompt tokens that still count as waiting.
    queued_tokens: usize,
}

impl Ticket {
    /// The request is in its first step.
    pub fn leave_queue(&mut self) {
        self.shared.queued_tokens.fetch_sub(std::mem::take(&mut self.queued_tokens), Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave_queue();
        self.shared.in_flight.fetch_sub(1, Relaxed);
    }
}
