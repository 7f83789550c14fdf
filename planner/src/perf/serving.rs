//! From step times to what users see: time to first token, time per output token, requests and tokens a second.
//!
//! The steady state of continuous batching: B sequences decode while prompts of newcomers are read in between. A
//! request of I prompt and O output tokens takes O - 1 decode steps, so each step must take in B * I / (O - 1) prompt
//! tokens on average. They come in whole prompts: a share of the steps carries one, the others none.

use super::step::{Machine, Step, StepTime, step_time};
use super::work::Counted;
use serde::{Deserialize, Serialize};

/// Prompt and output of a typical request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestShape {
    pub input_tokens: u64,
    /// 0 for models that do not generate.
    pub output_tokens: u64,
}

impl RequestShape {
    pub fn total_tokens(&self) -> u64 {
        self.input_tokens.saturating_add(self.output_tokens)
    }

    /// Cut to a context: the prompt gives way first, the output when it is more than half.
    #[must_use]
    pub fn within(self, max_model_len: u64) -> Self {
        if self.total_tokens() <= max_model_len {
            return self;
        }
        let rest = max_model_len.saturating_sub(self.input_tokens);
        let output_tokens = self.output_tokens.min((max_model_len / 2).max(1)).max(rest.min(self.output_tokens));
        let input_tokens = self.input_tokens.min(max_model_len.saturating_sub(output_tokens)).max(1);
        Self { input_tokens, output_tokens }
    }
}

/// One replica at one load.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Requests under way at once.
    pub concurrency: f64,
    pub requests_per_s: f64,
    pub output_tokens_per_s: f64,
    /// Waiting for other prompts included, for arrivals at random.
    pub ttft_ms: f64,
    /// Mean time between output tokens, steps with prompts included. 0 for models that do not generate.
    pub tpot_ms: f64,
    /// Share of the time that goes to steps with prompts.
    pub prefill_share: f64,
}

impl Rates {
    /// To six digits: more would be pretence, and do not survive a decimal form.
    #[must_use]
    pub fn rounded(self) -> Self {
        Self {
            concurrency: round(self.concurrency),
            requests_per_s: round(self.requests_per_s),
            output_tokens_per_s: round(self.output_tokens_per_s),
            ttft_ms: round(self.ttft_ms),
            tpot_ms: round(self.tpot_ms),
            prefill_share: round(self.prefill_share),
        }
    }
}

/// To six significant digits.
pub fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let digits = 5 - value.abs().log10().floor() as i32;
    // Dividing by a power of ten rounds correctly; multiplying by its inverse does not.
    let scale = 10_f64.powi(digits.abs());
    if digits >= 0 { (value * scale).round() / scale } else { (value / scale).round() * scale }
}

/// A replica to be timed.
#[derive(Debug, Clone, Copy)]
pub struct Replica<'a> {
    pub work: &'a [Counted],
    pub machine: Machine<'a>,
    pub shape: RequestShape,
    pub max_num_batched_tokens: u64,
}

/// A load with B sequences that decode.
#[derive(Debug, Clone, Copy)]
struct Load {
    decoding: f64,
    /// Mean time of a step.
    step_s: f64,
    /// What a newcomer's prompt takes from its first chunk to its token.
    prompt_s: f64,
    /// What it waits before, for prompts that came first.
    queued_s: f64,
    prefill_share: f64,
}

impl Replica<'_> {
    /// A decode step of `sequences`, each half through its output.
    pub fn decode_step(&self, sequences: f64) -> StepTime {
        self.time(&Step::decode(sequences, self.context()))
    }

    /// A step of `texts` whole prompts, as many as a step takes.
    pub fn prompt_step(&self, texts: f64) -> StepTime {
        let tokens = (texts * self.shape.input_tokens as f64).min(self.max_num_batched_tokens as f64);
        self.time(&Step::prefill(tokens, self.shape.input_tokens as f64))
    }

    fn context(&self) -> f64 {
        self.shape.input_tokens as f64 + self.shape.output_tokens as f64 / 2.0
    }

    fn time(&self, step: &Step) -> StepTime {
        step_time(self.work, step, &self.machine)
    }

    fn mixed_s(&self, decoding: f64, prefill_tokens: f64) -> f64 {
        let step = Step {
            decode_sequences: decoding,
            decode_context_tokens: self.context(),
            prefill_tokens,
            prompt_tokens: self.shape.input_tokens as f64,
        };
        self.time(&step).seconds
    }

    /// With `concurrency` requests under way, those that wait for their first token included.
    pub fn at(&self, concurrency: f64) -> Rates {
        if self.shape.output_tokens == 0 {
            return self.one_shot(concurrency);
        }
        // More sequences that decode never mean fewer requests under way: halve the interval.
        let (mut low, mut high) = (0.0, concurrency);
        for _ in 0..40 {
            let middle = (low + high) / 2.0;
            let load = self.load(middle);
            let waiting = self.rate(&load) * (load.prompt_s + self.machine.engine.request_s);
            if middle + waiting > concurrency { high = middle } else { low = middle }
        }
        self.rates(&self.load(low.max(1e-6)), concurrency)
    }

    /// Steps that a request decodes in: its first token comes from its prompt.
    fn decode_steps(&self) -> f64 {
        (self.shape.output_tokens as f64 - 1.0).max(0.0)
    }

    fn load(&self, decoding: f64) -> Load {
        let input = self.shape.input_tokens as f64;
        let budget = (self.max_num_batched_tokens as f64 - decoding).max(1.0);
        // Prompt tokens that each step must take in; a model asked for one token does nothing else.
        let wanted = if self.decode_steps() > 0.0 { decoding * input / self.decode_steps() } else { budget };
        let chunk = wanted.max(input).min(budget);
        let share = (wanted / chunk).min(1.0);
        let plain_s = self.mixed_s(decoding, 0.0);
        let with_prompt_s = self.mixed_s(decoding, chunk);
        // Beyond the budget prompts pile up and fewer sequences decode than could.
        let step_s = (plain_s * (1.0 - share) + with_prompt_s * share) * (wanted / chunk).max(1.0);
        // A newcomer's prompt shares its steps with the others that come meanwhile.
        let shared = (input + wanted).min(budget);
        let prompt_s = (input / shared).ceil().max(1.0) * self.mixed_s(decoding, shared);
        // Steps are servers of a whole budget: M/D/1.
        let busy = (wanted / budget).min(0.99);
        let queued_s = busy / (2.0 * (1.0 - busy)) * with_prompt_s;
        let prefill_share = (share * with_prompt_s / step_s.max(1e-12)).min(1.0);
        Load { decoding, step_s, prompt_s, queued_s, prefill_share }
    }

    fn rate(&self, load: &Load) -> f64 {
        if self.decode_steps() == 0.0 {
            1.0 / load.prompt_s
        } else {
            load.decoding / (self.decode_steps() * load.step_s)
        }
    }

    fn rates(&self, load: &Load, concurrency: f64) -> Rates {
        let requests_per_s = self.rate(load);
        let residual_s = if concurrency > 1.0 { load.step_s / 2.0 } else { 0.0 };
        Rates {
            concurrency,
            requests_per_s,
            output_tokens_per_s: requests_per_s * self.shape.output_tokens as f64,
            ttft_ms: 1e3 * (self.machine.engine.request_s + residual_s + load.queued_s + load.prompt_s),
            tpot_ms: 1e3 * load.step_s,
            prefill_share: load.prefill_share,
        }
    }

    /// Texts that pass in one step: a batch of `concurrency` of them, as many steps as its tokens need.
    fn one_shot(&self, concurrency: f64) -> Rates {
        let tokens = concurrency * self.shape.input_tokens as f64;
        let steps = (tokens / self.max_num_batched_tokens as f64).ceil().max(1.0);
        let engine = self.machine.engine;
        // Mixing prompts into decode steps costs nothing where there are none.
        let step_s = self.mixed_s(0.0, tokens / steps) - engine.prefill_step_s;
        let seconds = steps * step_s / engine.one_shot_model;
        Rates {
            concurrency,
            requests_per_s: concurrency / seconds,
            output_tokens_per_s: 0.0,
            ttft_ms: 1e3 * (self.machine.engine.request_s + seconds),
            tpot_ms: 0.0,
            prefill_share: 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_that_is_too_long_is_cut_and_keeps_an_output() {
        for ((input, output), len, cut) in [
            ((1000, 200), 4096, (1000, 200)),
            ((4096, 512), 2048, (1536, 512)),
            ((100, 8000), 2048, (100, 1948)),
            ((5000, 5000), 1000, (500, 500)),
            ((5000, 0), 512, (512, 0)),
            ((10, 10), 2, (1, 1)),
        ] {
            let shape = RequestShape { input_tokens: input, output_tokens: output }.within(len);
            assert_eq!((shape.input_tokens, shape.output_tokens), cut, "{input} {output} in {len}");
        }
    }

    #[test]
    fn rounding_keeps_six_digits() {
        for (value, rounded) in [(0.0, 0.0), (123_456_789.0, 123_457_000.0), (0.001_234_567_8, 0.001_234_57)] {
            assert_eq!(round(value), rounded);
        }
        assert!(round(f64::INFINITY).is_infinite());
    }
}
