//! Steps under way on the device, oldest first. With room for two the device finds its next step waiting when it is done
//! with one, and never idles while the host looks at tokens (vLLM's asynchronous scheduling).

use super::FailureKind;
use super::scheduler::ScheduledStep;
use super::{Backend, BackendError, RowOutput, StepBatch};
use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// One step under way and the next behind it; a third would make every stop known one more step too late.
const MAX_DEPTH: usize = 2;

/// One step. Kept when it is over, to reuse its memory.
#[derive(Debug, Default)]
pub struct Flight {
    pub plan: ScheduledStep,
    pub batch: StepBatch,
    /// That the device took for it, known when it is over.
    pub device_time: Duration,
    /// Its tokens must be known before the next step is planned: penalties need them.
    pub holds_up_next: bool,
}

pub struct Pipeline {
    backend: Box<dyn Backend>,
    depth: usize,
    counts_tokens: bool,
    flights: VecDeque<Flight>,
    spare: Vec<Flight>,
    /// In all that [`Self::collect`] was waited for.
    waited: Duration,
    /// The device has done all that can wait. Steps may give it more.
    nothing_put_off: bool,
}

impl Pipeline {
    pub fn new(backend: Box<dyn Backend>) -> Self {
        let depth = backend.max_steps_in_flight().clamp(1, MAX_DEPTH);
        let counts_tokens = backend.counts_tokens();
        let (flights, spare) = (VecDeque::new(), Vec::new());
        Self { backend, depth, counts_tokens, flights, spare, waited: Duration::ZERO, nothing_put_off: false }
    }

    pub fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.flights.len() >= self.depth
    }

    /// Whether a step may be planned now.
    pub fn is_open(&self) -> bool {
        !self.is_full() && !self.flights.iter().any(|flight| flight.holds_up_next)
    }

    /// Whether the device needs the tokens so far of a row with penalties in every step.
    pub fn needs_output(&self) -> bool {
        !self.counts_tokens
    }

    pub fn waited(&self) -> Duration {
        self.waited
    }

    pub fn spare(&mut self) -> Flight {
        self.spare.pop().unwrap_or_default()
    }

    pub fn keep_spare(&mut self, flight: Flight) {
        self.spare.push(flight);
    }

    /// Put a step behind those under way. A backend that runs one by one starts it when it is collected.
    ///
    /// # Errors
    /// The step and why it was not taken.
    pub fn submit(&mut self, flight: Flight) -> Result<(), Box<(Flight, BackendError)>> {
        self.nothing_put_off = false;
        if self.depth > 1
            && let Err(error) = guarded(&mut *self.backend, |backend| backend.submit(&flight.batch))
        {
            return Err(Box::new((flight, error)));
        }
        self.flights.push_back(flight);
        Ok(())
    }

    /// Wait for the oldest step; `None` when none is under way.
    pub fn collect(&mut self) -> Option<(Flight, Result<Vec<RowOutput>, BackendError>)> {
        let mut flight = self.flights.pop_front()?;
        let begin = Instant::now();
        let result = guarded(&mut *self.backend, |backend| match self.depth {
            1 => backend.step(&flight.batch),
            _ => backend.collect(),
        });
        let waited = begin.elapsed();
        self.waited += waited;
        // Without the device's own clock: as long as it was waited for, which is all of it where steps run one by one.
        flight.device_time = self.backend.last_step_time().unwrap_or(waited);
        let result = result.and_then(|outputs| self.check_count(&flight.batch, outputs));
        Some((flight, result))
    }

    /// Let the device do a little of what it has put off, when no step is under way. False: nothing is left.
    ///
    /// # Errors
    /// Only one that ends the engine.
    pub fn idle(&mut self) -> Result<bool, BackendError> {
        if self.nothing_put_off || !self.flights.is_empty() {
            return Ok(false);
        }
        let more = guarded(&mut *self.backend, |backend| backend.idle()).or_else(|error| {
            if error.fatal {
                return Err(error);
            }
            tracing::warn!("work of idle times is given up: {error}");
            Ok(false)
        })?;
        self.nothing_put_off = !more;
        Ok(more)
    }

    fn check_count(&self, batch: &StepBatch, outputs: Vec<RowOutput>) -> Result<Vec<RowOutput>, BackendError> {
        let wanted = batch.sequences.iter().filter(|sequence| sequence.wants_output).count();
        if outputs.len() == wanted {
            return Ok(outputs);
        }
        let what = format!("it returned {} outputs for {wanted} sequences", outputs.len());
        let device = self.backend.info().device.clone();
        Err(BackendError { device, what, fatal: false, kind: FailureKind::Internal })
    }
}

/// A panic in a backend leaves it in a state that nobody knows: as bad as a lost device.
fn guarded<T>(
    backend: &mut dyn Backend,
    call: impl FnOnce(&mut dyn Backend) -> Result<T, BackendError>,
) -> Result<T, BackendError> {
    catch_unwind(AssertUnwindSafe(|| call(backend))).unwrap_or_else(|panic| {
        let what = format!("it panicked: {}", panic_message(&*panic));
        let device = backend.info().device.clone();
        Err(BackendError { device, what, fatal: true, kind: FailureKind::Internal })
    })
}

pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
