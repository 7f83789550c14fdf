//! What a benchmark found, as a table and as JSON.

use super::measure::{Timing, Workload};
use mserve_planner::units;
use mserve_runtime::cpu::CpuBackend;
use mserve_runtime::engine::Backend;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub weights: String,
    pub machine: Machine,
    pub runs: Vec<Run>,
}

#[derive(Debug, Serialize)]
pub struct Machine {
    pub device: String,
    pub threads: usize,
    /// Measured over as many bytes as a step reads.
    pub read_bandwidth_bytes_per_s: f64,
    pub weight_bytes: u64,
    pub kv_bytes_per_token: u64,
}

/// Bytes that a decode step reads.
#[derive(Debug, Clone, Copy)]
pub struct Traffic {
    weight_bytes: u64,
    kv_bytes_per_token: u64,
}

#[derive(Debug, Serialize)]
pub struct Run {
    pub batch: usize,
    pub prompt_len: usize,
    pub output_len: usize,
    /// Prompt tokens per second until every request had its first token.
    pub prefill_tokens_per_s: f64,
    /// Time until every request had its first token.
    pub ttft_ms: f64,
    pub decode_tokens_per_s: f64,
    /// One decode step through the engine.
    pub step_ms: f64,
    /// One decode step of the backend alone.
    pub backend_step_ms: f64,
    /// Weights and mid-run KV that a decode step reads.
    pub bytes_per_step: u64,
    /// Tokens per second if reading those bytes were all there is to do.
    pub bound_tokens_per_s: f64,
    pub share_of_bound: f64,
}

impl Machine {
    pub fn new(backend: &CpuBackend, threads: usize, read_bandwidth_bytes_per_s: f64) -> Self {
        Self {
            device: backend.info().device.clone(),
            threads,
            read_bandwidth_bytes_per_s,
            weight_bytes: backend.weight_bytes(),
            kv_bytes_per_token: backend.kv_bytes_per_token(),
        }
    }
}

impl Traffic {
    pub fn of(backend: &CpuBackend) -> Self {
        Self { weight_bytes: backend.step_weight_bytes(), kv_bytes_per_token: backend.kv_bytes_per_token() }
    }

    fn bytes_per_step(self, batch: usize, workload: Workload) -> u64 {
        let context = (workload.prompt_len + workload.output_len / 2) as u64;
        self.weight_bytes + batch as u64 * context * self.kv_bytes_per_token
    }
}

impl Run {
    pub fn new(
        batch: usize,
        workload: Workload,
        traffic: Traffic,
        bandwidth: f64,
        timing: Timing,
        backend_step: Duration,
    ) -> Self {
        let decode_tokens_per_s = timing.decode_tokens as f64 / timing.decode.as_secs_f64();
        let bytes_per_step = traffic.bytes_per_step(batch, workload);
        let bound_tokens_per_s = batch as f64 * bandwidth / bytes_per_step as f64;
        Self {
            batch,
            prompt_len: workload.prompt_len,
            output_len: workload.output_len,
            prefill_tokens_per_s: (batch * workload.prompt_len) as f64 / timing.prefill.as_secs_f64(),
            ttft_ms: timing.prefill.as_secs_f64() * 1e3,
            decode_tokens_per_s,
            step_ms: 1e3 * batch as f64 / decode_tokens_per_s,
            backend_step_ms: backend_step.as_secs_f64() * 1e3,
            bytes_per_step,
            bound_tokens_per_s,
            share_of_bound: decode_tokens_per_s / bound_tokens_per_s,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        writeln!(f, "{}, weights {}", self.model, self.weights)?;
        writeln!(
            f,
            "{}: {} of weights, {} of KV a token; memory read at {:.1} GB/s",
            machine.device,
            units::format_bytes(machine.weight_bytes),
            units::format_bytes(machine.kv_bytes_per_token),
            machine.read_bandwidth_bytes_per_s / 1e9
        )?;
        writeln!(f, "  batch  prefill tok/s  first token ms  decode tok/s  step ms (backend)  bound tok/s  of bound")?;
        for run in &self.runs {
            writeln!(
                f,
                "  {:>5}  {:>13.0}  {:>14.1}  {:>12.1}  {:>8.2} ({:>7.2})  {:>11.1}  {:>7.0} %",
                run.batch,
                run.prefill_tokens_per_s,
                run.ttft_ms,
                run.decode_tokens_per_s,
                run.step_ms,
                run.backend_step_ms,
                run.bound_tokens_per_s,
                100.0 * run.share_of_bound
            )?;
        }
        Ok(())
    }
}
