//! The engine's loop: schedule, run, postprocess. It has its own thread; requests come through a bounded channel.

use super::FailureKind;
use super::active_request::{ActiveRequest, Submission, Task, Verdict};
use super::block_manager::{BlockManager, PrefixCaching};
use super::pipeline::{Flight, Pipeline, panic_message};
use super::scheduler::{ScheduledStep, Scheduler, SchedulerLimits};
use super::sequence::{Sequence, SequenceId};
use super::shared::{End, Shared, StepKind, StepRecord};
use super::{Backend, BackendError, FinishReason, RequestError, RowOutput, SampledToken, TokenEvent, batch};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub enum Command {
    Submit(Box<Submission>),
    /// Look at what else was asked: the engine may be asleep.
    Wake,
}

pub struct Core {
    pipeline: Pipeline,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    scheduler: Scheduler,
    requests: HashMap<SequenceId, ActiveRequest>,
    next_id: SequenceId,
    record: StepRecord,
    host_clock: HostClock,
}

/// Where the time of the engine's thread went.
struct HostClock {
    since: Instant,
    /// Of the pipeline, at `since`.
    waited: Duration,
}

impl Core {
    pub fn new(backend: Box<dyn Backend>, shared: Arc<Shared>, commands: Receiver<Command>) -> Self {
        let (config, info) = (&shared.config, &shared.info);
        let caching = match config.enable_prefix_caching {
            true => PrefixCaching::On { hash_seed: fastrand::u64(..) },
            false => PrefixCaching::Off,
        };
        let limits = SchedulerLimits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
        };
        let scheduler = Scheduler::new(limits, BlockManager::new(info.num_blocks, info.block_size, caching));
        Self {
            pipeline: Pipeline::new(backend),
            shared,
            commands,
            scheduler,
            requests: HashMap::new(),
            next_id: 0,
            record: StepRecord::default(),
            host_clock: HostClock { since: Instant::now(), waited: Duration::ZERO },
        }
    }

    /// Run until the end is asked for, nobody can ask for anything any more, or the device is lost.
    /// No request is left without an answer.
    pub fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run_until_end()));
        self.drop_cancelled();
        let end = match outcome {
            Ok(Ok(())) => End::Asked { failed: self.requests.len() },
            Ok(Err(error)) => End::Failed { kind: error.kind, why: error.to_string() },
            Err(panic) => {
                let why = format!("the engine panicked: {}", panic_message(&*panic));
                End::Failed { kind: FailureKind::Internal, why }
            }
        };
        let label = match &end {
            End::Asked { .. } => "abort",
            End::Failed { why, .. } => {
                tracing::error!("the engine stops: {why}");
                "error"
            }
        };
        self.shared.set_end(end);
        for (_, request) in self.requests.drain() {
            count_end(&self.shared, &request, label);
            request.fail(self.shared.abandoned());
        }
        self.shared.set_usage(0, 0);
    }

    fn run_until_end(&mut self) -> Result<(), BackendError> {
        while self.receive()? {
            self.drop_cancelled();
            if self.has_work() {
                self.run_step()?;
            }
            self.publish_usage();
        }
        Ok(())
    }

    /// Take in what has come; wait for something when there is nothing to do. False: the end.
    ///
    /// # Errors
    /// When the device is lost in what it does while nothing else is to do.
    fn receive(&mut self) -> Result<bool, BackendError> {
        while let Ok(command) = self.commands.try_recv() {
            self.take(command);
        }
        if let Some(deadline) = self.shared.stop_at() {
            return Ok(self.has_work() && Instant::now() < deadline);
        }
        if self.has_work() {
            return Ok(true);
        }
        // One piece, then back here to see what has come.
        if self.pipeline.idle()? {
            self.host_clock.since = Instant::now();
            return Ok(true);
        }
        // An error: no handle is left, and nothing to do for any.
        let received = self.commands.recv();
        self.host_clock.since = Instant::now();
        Ok(received.map(|command| self.take(command)).is_ok())
    }

    fn has_work(&self) -> bool {
        // Steps that nobody waits for any more still hold blocks.
        self.scheduler.has_work() || !self.pipeline.is_empty()
    }

    fn take(&mut self, command: Command) {
        let Command::Submit(submission) = command else { return };
        let Submission { prompt_token_ids, request } = *submission;
        let id = self.next_id;
        self.next_id += 1;
        let max_len = request.max_len();
        self.scheduler.add(Sequence { max_len, ..Sequence::new(id, request.kind(), prompt_token_ids) });
        self.requests.insert(id, request);
    }

    fn drop_cancelled(&mut self) {
        let cancelled = self.requests.extract_if(|_, request| request.is_cancelled());
        for (id, request) in cancelled {
            self.scheduler.remove(id);
            let completed = matches!(&request.task, Task::Generate(generation) if generation.was_completed_by_reader());
            count_end(&self.shared, &request, if completed { "stop" } else { "abort" });
        }
    }

    fn publish_usage(&self) {
        let blocks = self.scheduler.blocks();
        self.shared.set_usage(self.scheduler.num_running(), blocks.num_blocks() - blocks.num_free());
    }

    /// Send a step ahead where that can be, and look at the oldest when there are enough or nothing can be sent.
    ///
    /// # Errors
    /// Only one that ends the engine; any other has failed the requests of the step.
    fn run_step(&mut self) -> Result<(), BackendError> {
        let submitted = self.pipeline.is_open() && self.submit_step()?;
        if !submitted || self.pipeline.is_full() {
            self.collect_step()?;
        }
        Ok(())
    }

    /// False: no step could be sent.
    fn submit_step(&mut self) -> Result<bool, BackendError> {
        let mut flight = self.pipeline.spare();
        self.scheduler.schedule(&mut flight.plan);
        if flight.plan.rows.is_empty() {
            // Or the loop would spin for ever.
            assert!(!self.pipeline.is_empty(), "there is work, and the scheduler found nothing to run");
            self.pipeline.keep_spare(flight);
            return Ok(false);
        }
        self.note_schedule(&flight.plan);
        self.fill_batch(&mut flight);
        // The pipeline keeps the plan, or hands it back with the error.
        self.scheduler.begin(&flight.plan);
        match self.pipeline.submit(flight) {
            Ok(()) => Ok(true),
            Err(refused) => {
                let (flight, error) = *refused;
                self.step_over(flight, Err(error))?;
                Ok(false)
            }
        }
    }

    fn collect_step(&mut self) -> Result<(), BackendError> {
        match self.pipeline.collect() {
            Some((flight, result)) => self.step_over(flight, result),
            None => Ok(()),
        }
    }

    fn step_over(
        &mut self,
        mut flight: Flight,
        result: Result<Vec<RowOutput>, BackendError>,
    ) -> Result<(), BackendError> {
        self.take_back_output(&mut flight);
        let outcome = match result {
            Ok(outputs) => {
                self.postprocess(&flight, outputs);
                Ok(())
            }
            Err(error) => {
                self.scheduler.end(&flight.plan);
                self.fail_step(&flight.plan, &error);
                if error.fatal { Err(error) } else { Ok(()) }
            }
        };
        self.pipeline.keep_spare(flight);
        if outcome.is_ok() {
            self.record.host_time = self.host_time();
            self.shared.record_step(&mut self.record);
        }
        outcome
    }

    /// Since it was last asked for, without waiting for the device or for requests.
    fn host_time(&mut self) -> Duration {
        let (now, waited) = (Instant::now(), self.pipeline.waited());
        let spent = now.saturating_duration_since(self.host_clock.since);
        let host_time = spent.saturating_sub(waited - self.host_clock.waited);
        self.host_clock = HostClock { since: now, waited };
        host_time
    }

    fn note_schedule(&mut self, plan: &ScheduledStep) {
        let metrics = &self.shared.metrics;
        metrics.num_preemptions.inc_by(plan.preempted.len() as u64);
        let now = Instant::now();
        for id in &plan.admitted {
            let (Some(request), Some(sequence)) = (self.requests.get_mut(id), self.scheduler.sequence(*id)) else {
                continue;
            };
            if request.times.scheduled.is_none() {
                request.times.scheduled = Some(now);
                request.ticket.leave_queue();
                request.cached_tokens = sequence.num_cached_tokens.unwrap_or(0);
                if self.shared.config.enable_prefix_caching && matches!(request.task, Task::Generate(_)) {
                    metrics.prefix_cache_queries.inc_by(request.prompt_tokens as u64);
                    metrics.prefix_cache_hits.inc_by(request.cached_tokens as u64);
                }
            }
        }
    }

    fn fill_batch(&mut self, flight: &mut Flight) {
        batch::clear(&mut flight.batch);
        flight.holds_up_next = false;
        let block_size = self.shared.info.block_size;
        let needs_output = self.pipeline.needs_output();
        for row in &flight.plan.rows {
            let Some(sequence) = self.scheduler.sequence(row.id) else { continue };
            let wants_output = row.context_len == sequence.token_ids.len();
            let sampling = self.requests.get_mut(&row.id).and_then(|request| match &mut request.task {
                Task::Generate(generation) => Some((generation.sampling_after(sequence.num_pending), generation)),
                Task::Encode(_) => None,
            });
            let sampling = sampling.map(|(mut sampling, generation)| {
                if wants_output && generation.penalizes_output() && (needs_output || sequence.num_pending == 0) {
                    sampling.output_token_ids = generation.lend_output();
                    flight.holds_up_next |= needs_output;
                }
                sampling
            });
            batch::push(&mut flight.batch, sequence, row.query_len, block_size, sampling);
        }
    }

    fn take_back_output(&mut self, flight: &mut Flight) {
        let rows = flight.plan.rows.iter().zip(&mut flight.batch.sequences);
        for (row, sequence) in rows.filter(|(_, sequence)| sequence.wants_output) {
            if let Some(ActiveRequest { task: Task::Generate(generation), .. }) = self.requests.get_mut(&row.id)
                && generation.penalizes_output()
                && let Some(sampling) = sequence.sampling.take()
                // Empty: nothing was lent, and the step behind may have given back some already.
                && !sampling.output_token_ids.is_empty()
            {
                generation.return_output(sampling.output_token_ids);
            }
        }
    }

    /// Rows of requests that are over, since a step was under way when they ended, have nobody to go to.
    fn postprocess(&mut self, flight: &Flight, outputs: Vec<RowOutput>) {
        self.scheduler.complete(&flight.plan);
        self.shared.metrics.iteration_tokens.observe(flight.plan.num_tokens as f64);
        self.record.prompt_tokens = self.computed_prompt_tokens(flight);
        self.record.kind = kind_of(&flight.plan);
        self.record.num_tokens = flight.plan.num_tokens;
        self.record.device_time = flight.device_time;
        let now = Instant::now();
        let mut outputs = outputs.into_iter();
        for (row, sequence) in flight.plan.rows.iter().zip(&flight.batch.sequences) {
            let output = if sequence.wants_output { outputs.next() } else { None };
            match output {
                Some(RowOutput::Token(token)) => self.token_chosen(row.id, token, now),
                Some(RowOutput::Vector(vector)) => self.vector_computed(row.id, vector),
                None => {}
            }
        }
    }

    fn computed_prompt_tokens(&self, flight: &Flight) -> usize {
        let rows = flight.plan.rows.iter().zip(&flight.batch.sequences);
        rows.map(|(row, sequence)| {
            let prompt_tokens = self.requests.get(&row.id).map_or(0, |request| request.prompt_tokens);
            let before = sequence.context_len - sequence.query_len;
            sequence.context_len.min(prompt_tokens) - before.min(prompt_tokens)
        })
        .sum()
    }

    fn token_chosen(&mut self, id: SequenceId, token: SampledToken, now: Instant) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Task::Generate(generation) = &mut request.task else {
            return self.fail(id, "it chose a token where a vector was wanted");
        };
        let verdict = generation.accept(&token);
        note_token(&self.shared, &mut self.record, request, now);
        let Task::Generate(generation) = &request.task else { return };
        let token_id = token.token_id;
        // A reader that is gone is noticed before the next step.
        match verdict {
            Verdict::GoOn => {
                drop(generation.events.send(TokenEvent::Token(token)));
                self.scheduler.append_token(id, token_id);
            }
            Verdict::LastToken => {
                drop(generation.events.send(TokenEvent::Token(token)));
                self.finish(id, FinishReason::Length);
            }
            Verdict::Stop(reason) => self.finish(id, reason),
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        self.scheduler.remove(id);
        let Some(request) = self.requests.remove(&id) else { return };
        let label = match reason {
            FinishReason::Stop { .. } => "stop",
            FinishReason::Length => "length",
        };
        count_end(&self.shared, &request, label);
        let usage = request.usage();
        // The place is free before the client hears of the end and may come again.
        drop(request.ticket);
        if let Task::Generate(generation) = request.task {
            drop(generation.events.send(TokenEvent::Finished { reason, usage }));
        }
    }

    fn vector_computed(&mut self, id: SequenceId, vector: Vec<f32>) {
        if matches!(self.requests.get(&id), Some(request) if matches!(request.task, Task::Generate(_))) {
            return self.fail(id, "it returned a vector where a token was wanted");
        }
        self.scheduler.remove(id);
        let Some(request) = self.requests.remove(&id) else { return };
        self.shared.metrics.prompt_tokens.inc_by(request.prompt_tokens as u64);
        count_end(&self.shared, &request, "stop");
        drop(request.ticket);
        if let Task::Encode(reply) = request.task {
            drop(reply.send(Ok(vector)));
        }
    }

    fn fail_step(&mut self, plan: &ScheduledStep, error: &BackendError) {
        tracing::warn!("a step of {} sequences failed: {error}", plan.rows.len());
        for row in &plan.rows {
            self.fail(row.id, &error.what);
        }
    }

    fn fail(&mut self, id: SequenceId, what: &str) {
        self.scheduler.remove(id);
        if let Some(request) = self.requests.remove(&id) {
            count_end(&self.shared, &request, "error");
            request.fail(RequestError::Device(what.to_owned()));
        }
    }
}

fn kind_of(plan: &ScheduledStep) -> StepKind {
    match (plan.num_single(), plan.rows.len()) {
        (single, rows) if single == rows => StepKind::Decode,
        (0, _) => StepKind::Prefill,
        _ => StepKind::Mixed,
    }
}

fn note_token(shared: &Shared, record: &mut StepRecord, request: &mut ActiveRequest, now: Instant) {
    let (metrics, times) = (&shared.metrics, &mut request.times);
    metrics.generation_tokens.inc();
    record.generation_tokens += 1;
    if let Some(last) = times.last_token.replace(now) {
        let latency = now.saturating_duration_since(last);
        metrics.inter_token_latency.observe(latency.as_secs_f64());
        record.inter_token_latencies.push(latency);
    } else {
        times.first_token = Some(now);
        let latency = now.saturating_duration_since(times.arrived);
        metrics.time_to_first_token.observe(latency.as_secs_f64());
        metrics.prompt_tokens.inc_by(request.prompt_tokens as u64);
        record.times_to_first_token.push(latency);
    }
}

/// The metrics of a request that ends; the stretches that it did not reach are left out.
fn count_end(shared: &Shared, request: &ActiveRequest, finished_reason: &str) {
    let (metrics, times) = (&shared.metrics, &request.times);
    metrics.request_success.with_label_values(&[finished_reason]).inc();
    let between = |from: Option<Instant>, to: Option<Instant>| -> Option<Duration> {
        from.zip(to).map(|(from, to)| to.saturating_duration_since(from))
    };
    let arrived = Some(times.arrived);
    let stretches = [
        (&metrics.e2e_request_latency, between(arrived, Some(Instant::now()))),
        (&metrics.request_queue_time, between(arrived, times.scheduled)),
        (&metrics.request_prefill_time, between(times.scheduled, times.first_token)),
        (&metrics.request_decode_time, between(times.first_token, times.last_token)),
        (&metrics.request_inference_time, between(times.scheduled, times.last_token)),
    ];
    for (histogram, stretch) in stretches {
        if let Some(stretch) = stretch {
            histogram.observe(stretch.as_secs_f64());
        }
    }
    metrics.request_prompt_tokens.observe(request.prompt_tokens as f64);
    if matches!(request.task, Task::Generate(_)) {
        metrics.request_generation_tokens.observe(request.usage().completion_tokens as f64);
    }
}
