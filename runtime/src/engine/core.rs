//! The engine's loop: schedule, run, postprocess. It has its own thread; requests come through a bounded channel.

use super::active_request::{ActiveRequest, Submission, Task, Verdict};
use super::block_manager::{BlockManager, PrefixCaching};
use super::scheduler::{ScheduledStep, Scheduler, SchedulerLimits};
use super::sequence::{Sequence, SequenceId};
use super::shared::{End, Shared, StepRecord};
use super::{Backend, BackendError, FinishReason, RequestError, RowOutput, SampledToken, StepBatch, TokenEvent, batch};
use std::any::Any;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

#[derive(Debug)]
pub enum Command {
    Submit(Submission),
    /// Look at what else was asked: the engine may be asleep.
    Wake,
}

pub struct Core {
    backend: Box<dyn Backend>,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    scheduler: Scheduler,
    requests: HashMap<SequenceId, ActiveRequest>,
    next_id: SequenceId,
    step: ScheduledStep,
    batch: StepBatch,
    record: StepRecord,
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
            backend,
            shared,
            commands,
            scheduler,
            requests: HashMap::new(),
            next_id: 0,
            step: ScheduledStep::default(),
            batch: StepBatch::default(),
            record: StepRecord::default(),
        }
    }

    /// Run until the end is asked for, nobody can ask for anything any more, or the device is lost.
    /// No request is left without an answer.
    pub fn run(mut self) {
        let end = match catch_unwind(AssertUnwindSafe(|| self.run_until_end())) {
            Ok(Ok(())) => End::Asked { failed: self.requests.len() },
            Ok(Err(error)) => End::Failed { why: error.to_string() },
            Err(panic) => End::Failed { why: format!("the engine panicked: {}", panic_message(&*panic)) },
        };
        if let End::Failed { why } = &end {
            tracing::error!("the engine stops: {why}");
        }
        self.shared.set_end(end);
        for (_, request) in self.requests.drain() {
            self.shared.metrics.request_success.with_label_values(&["error"]).inc();
            request.fail(self.shared.abandoned());
        }
        self.shared.set_usage(0, 0);
    }

    fn run_until_end(&mut self) -> Result<(), BackendError> {
        while self.receive() {
            self.drop_cancelled();
            if self.scheduler.has_work() {
                self.run_step()?;
            }
            self.publish_usage();
        }
        Ok(())
    }

    /// Take in what has come; wait for something when there is nothing to do. False: the end.
    fn receive(&mut self) -> bool {
        if !self.scheduler.has_work() {
            if self.shared.stop_at().is_some() {
                return false;
            }
            match self.commands.recv() {
                Ok(command) => self.take(command),
                Err(_) => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        self.shared.stop_at().is_none_or(|deadline| Instant::now() < deadline && self.scheduler.has_work())
    }

    fn take(&mut self, command: Command) {
        let Command::Submit(Submission { prompt_token_ids, request }) = command else { return };
        let id = self.next_id;
        self.next_id += 1;
        self.scheduler.add(Sequence::new(id, request.kind(), prompt_token_ids));
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

    /// # Errors
    /// Only one that ends the engine; any other has failed the requests of the step.
    fn run_step(&mut self) -> Result<(), BackendError> {
        self.scheduler.schedule(&mut self.step);
        self.note_schedule();
        self.fill_batch();
        let result = run_backend(&mut *self.backend, &self.batch);
        self.take_back_sampling();
        match result.and_then(|outputs| self.check_count(outputs)) {
            Ok(outputs) => self.postprocess(outputs),
            Err(error) => {
                self.fail_step(&error);
                if error.fatal {
                    return Err(error);
                }
            }
        }
        self.shared.record_step(&mut self.record);
        Ok(())
    }

    fn note_schedule(&mut self) {
        let metrics = &self.shared.metrics;
        metrics.num_preemptions.inc_by(self.step.preempted.len() as u64);
        let now = Instant::now();
        for id in &self.step.admitted {
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

    fn fill_batch(&mut self) {
        batch::clear(&mut self.batch);
        let block_size = self.shared.info.block_size;
        for row in &self.step.rows {
            let Some(sequence) = self.scheduler.sequence(row.id) else { continue };
            let sampling = self.requests.get_mut(&row.id).and_then(|request| match &mut request.task {
                Task::Generate(generation) => generation.sampling.take(),
                Task::Encode(_) => None,
            });
            batch::push(&mut self.batch, sequence, row.query_len, block_size, sampling);
        }
    }

    fn take_back_sampling(&mut self) {
        for (row, sequence) in self.step.rows.iter().zip(&mut self.batch.sequences) {
            if let Some(ActiveRequest { task: Task::Generate(generation), .. }) = self.requests.get_mut(&row.id) {
                generation.sampling = sequence.sampling.take();
            }
        }
    }

    fn check_count(&self, outputs: Vec<RowOutput>) -> Result<Vec<RowOutput>, BackendError> {
        let wanted = self.batch.sequences.iter().filter(|sequence| sequence.wants_output).count();
        if outputs.len() == wanted {
            return Ok(outputs);
        }
        let what = format!("it returned {} outputs for {wanted} sequences", outputs.len());
        Err(BackendError { device: self.shared.info.device.clone(), what, fatal: false })
    }

    fn postprocess(&mut self, outputs: Vec<RowOutput>) {
        self.scheduler.advance(&self.step);
        self.shared.metrics.iteration_tokens.observe(self.step.num_tokens as f64);
        self.record.prompt_tokens = self.computed_prompt_tokens();
        let now = Instant::now();
        let mut outputs = outputs.into_iter();
        for at in 0..self.step.rows.len() {
            let id = self.step.rows[at].id;
            let output = if self.batch.sequences[at].wants_output { outputs.next() } else { None };
            match output {
                Some(RowOutput::Token(token)) => self.token_chosen(id, token, now),
                Some(RowOutput::Vector(vector)) => self.vector_computed(id, vector),
                None => {}
            }
        }
    }

    fn computed_prompt_tokens(&self) -> usize {
        let rows = self.step.rows.iter().zip(&self.batch.sequences);
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

    fn fail_step(&mut self, error: &BackendError) {
        tracing::warn!("a step of {} sequences failed: {error}", self.step.rows.len());
        for at in 0..self.step.rows.len() {
            self.fail(self.step.rows[at].id, &error.what);
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

/// A panic in a backend leaves it in a state that nobody knows: as bad as a lost device.
fn run_backend(backend: &mut dyn Backend, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
    catch_unwind(AssertUnwindSafe(|| backend.step(batch))).unwrap_or_else(|panic| {
        let what = format!("it panicked: {}", panic_message(&*panic));
        Err(BackendError { device: backend.info().device.clone(), what, fatal: true })
    })
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
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
