//! The time of one step.

use super::work::{AttentionWork, Counted, OpKind, Rate, Work};
use super::{Engine, EngineSpeed};
use crate::gpus::GpuModel;
use crate::model::Rows;
use crate::model::work::Kernels;
use serde::{Deserialize, Serialize};

/// What a step carries. Averages, hence fractions.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Step {
    pub decode_sequences: f64,
    /// Tokens that each of them looks back on.
    pub decode_context_tokens: f64,
    pub prefill_tokens: f64,
    /// Length of the prompts that they belong to.
    pub prompt_tokens: f64,
}

impl Step {
    pub fn decode(sequences: f64, context_tokens: f64) -> Self {
        Self { decode_sequences: sequences, decode_context_tokens: context_tokens, ..Self::default() }
    }

    /// `tokens` of prompts that are `prompt_tokens` long each.
    pub fn prefill(tokens: f64, prompt_tokens: f64) -> Self {
        Self { prefill_tokens: tokens, prompt_tokens, ..Self::default() }
    }

    fn prompts(&self) -> f64 {
        if self.prompt_tokens > 0.0 { self.prefill_tokens / self.prompt_tokens } else { 0.0 }
    }

    fn rows(&self, rows: Rows) -> f64 {
        match rows {
            Rows::Tokens => self.decode_sequences + self.prefill_tokens,
            Rows::Sequences => self.decode_sequences + self.prompts(),
        }
    }
}

/// One replica's cards, and what runs on them.
#[derive(Debug, Clone, Copy)]
pub struct Machine<'a> {
    pub gpu: &'a GpuModel,
    pub tensor_parallel_size: u64,
    pub engine: &'a EngineSpeed,
}

/// All ops of one kind in a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OpTime {
    pub kind: OpKind,
    pub launches: f64,
    pub bytes: f64,
    pub flops: f64,
    pub seconds: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    pub seconds: f64,
    /// Of it, what the engine's host code adds.
    pub host_seconds: f64,
    /// Kinds that the model has.
    pub ops: Vec<OpTime>,
}

/// Bytes, flops and seconds of one op.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    bytes: f64,
    flops: f64,
    seconds: f64,
}

/// Time one step of `work` takes.
pub fn step_time(work: &[Counted], step: &Step, machine: &Machine<'_>) -> StepTime {
    let mut ops: Vec<OpTime> = Vec::new();
    for counted in work {
        let cost = cost(&counted.work, step, machine);
        let kind = counted.work.kind();
        let at = ops.iter().position(|op| op.kind == kind).unwrap_or_else(|| {
            ops.push(OpTime { kind, launches: 0.0, bytes: 0.0, flops: 0.0, seconds: 0.0 });
            ops.len() - 1
        });
        let op = &mut ops[at];
        op.launches += counted.count;
        op.bytes += counted.count * cost.bytes;
        op.flops += counted.count * cost.flops;
        op.seconds += counted.count * cost.seconds;
    }
    let engine = machine.engine;
    let prefill_s = if step.prefill_tokens > 0.0 { engine.prefill_step_s } else { 0.0 };
    let host_seconds = engine.step_s + prefill_s + engine.sequence_s * step.rows(Rows::Sequences);
    let seconds = host_seconds + ops.iter().map(|op| op.seconds).sum::<f64>();
    StepTime { seconds, host_seconds, ops }
}

fn cost(work: &Work, step: &Step, machine: &Machine<'_>) -> Cost {
    let engine = machine.engine;
    match *work {
        Work::Product { rows, flops_per_row, weight_bytes, row_bytes, rate, kernels, .. } => {
            let rows = step.rows(rows);
            if rows <= 0.0 {
                return Cost::default();
            }
            let (bytes, flops) = (weight_bytes + rows * row_bytes, rows * flops_per_row);
            machine.product((bytes, flops), rate, kernels, 1.0)
        }
        Work::Experts { rows, experts, top_k, always_bytes, flops_per_row, weight_bytes, row_bytes, rate, kernels } => {
            let rows = step.rows(rows);
            // Each token picks its experts evenly and by itself.
            let touched = 1.0 - (1.0 - top_k / experts).max(0.0).powf(rows);
            let weights = always_bytes + (weight_bytes - always_bytes) * touched;
            // Each token's row goes through `top_k` products.
            let (bytes, flops) = (weights + rows * top_k * row_bytes, rows * flops_per_row);
            machine.product((bytes, flops), rate, kernels, engine.grouped)
        }
        Work::Attention(attention) => machine.attention(&attention, step),
        Work::Recurrent { state_bytes, flops_per_row, row_bytes } => {
            let rows = step.rows(Rows::Tokens);
            let bytes = state_bytes * step.rows(Rows::Sequences) + rows * row_bytes;
            let flops = rows * flops_per_row;
            let busy = machine.smooth_max(machine.memory_s(bytes), flops / (engine.attention_matrix * machine.half()));
            Cost { bytes, flops, seconds: engine.attention_s + busy }
        }
        Work::Elementwise { rows, row_bytes } => {
            let bytes = step.rows(rows) * row_bytes;
            Cost { bytes, flops: 0.0, seconds: engine.small_s + machine.memory_s(bytes) }
        }
        Work::Exchange { rows, row_bytes } => {
            let bytes = step.rows(rows) * row_bytes;
            Cost { bytes, flops: 0.0, seconds: machine.exchange_s(bytes) }
        }
    }
}

impl Machine<'_> {
    fn bandwidth(&self) -> f64 {
        self.gpu.memory_bandwidth_bytes_per_s as f64
    }

    fn half(&self) -> f64 {
        self.gpu.rates.half_flops_per_s as f64
    }

    fn memory_s(&self, bytes: f64) -> f64 {
        bytes / (self.engine.memory * self.bandwidth())
    }

    /// Near the ridge neither limit is reached: the p-norm of both times.
    fn smooth_max(&self, a: f64, b: f64) -> f64 {
        let p = self.engine.sharpness;
        let (small, large) = if a < b { (a, b) } else { (b, a) };
        if large <= 0.0 { 0.0 } else { large * (1.0 + (small / large).powf(p)).powf(1.0 / p) }
    }

    /// `share`: of what a plain product reaches.
    fn product(&self, (bytes, flops): (f64, f64), rate: Rate, kernels: Kernels, share: f64) -> Cost {
        let engine = self.engine;
        let peak = match rate {
            Rate::Half => self.half(),
            Rate::WeightOnly => engine.weight_only * self.half(),
            Rate::Fp8 => engine.fp8 * self.gpu.rates.fp8_flops_per_s.map_or(self.half(), |rate| rate as f64),
            Rate::Fp4 => engine.fp8 * self.gpu.rates.fp4_flops_per_s.map_or(self.half(), |rate| rate as f64),
        };
        let busy = self.smooth_max(self.memory_s(bytes), flops / (engine.matrix * peak));
        // Rows are quantised by a kernel of their own before an fp8 product.
        let quantise = if matches!(rate, Rate::Fp8 | Rate::Fp4) { engine.small_s } else { 0.0 };
        let launches = kernels.products as f64 * (engine.product_s + quantise) + kernels.small as f64 * engine.small_s;
        Cost { bytes, flops, seconds: launches + busy / share }
    }

    fn attention(&self, attention: &AttentionWork, step: &Step) -> Cost {
        let engine = self.engine;
        let entries = |tokens: f64| tokens / attention.tokens_per_entry;
        let reach = |tokens: f64| attention.reach.map_or(entries(tokens), |reach| entries(tokens).min(reach));
        let pairs = step.decode_sequences * reach(step.decode_context_tokens);
        let (bytes, flops) = (pairs * attention.kv_bytes_per_token, pairs * attention.flops_per_pair);
        let mut cost = Cost { bytes, flops, seconds: engine.attention_s };
        let decode_rate = engine.attention_matrix * self.half();
        let memory = engine.attention_memory * self.bandwidth();
        cost.seconds += self.smooth_max(bytes / memory, flops / decode_rate);
        if step.prefill_tokens > 0.0 {
            let seen = if attention.bidirectional { step.prompt_tokens } else { step.prompt_tokens / 2.0 };
            let flops = step.prefill_tokens * reach(seen) * attention.prefill_flops_per_pair;
            let bytes = step.prefill_tokens * (attention.kv_bytes_per_token + attention.row_bytes);
            cost.bytes += bytes;
            cost.flops += flops;
            cost.seconds += self.smooth_max(bytes / memory, flops / (engine.attention_matrix * self.half()));
        }
        cost
    }

    /// The faster of a one-shot exchange between peers and a ring.
    fn exchange_s(&self, bytes: f64) -> f64 {
        let ranks = self.tensor_parallel_size as f64;
        if ranks < 2.0 {
            return 0.0;
        }
        let engine = self.engine;
        let nvlink = self.gpu.link.nvlink_bytes_per_s;
        let link = nvlink.unwrap_or(self.gpu.link.pcie_bytes_per_s) as f64;
        // Without NVLink every message crosses the host's bridge.
        let slower = if nvlink.is_some() { 1.0 } else { 2.0 };
        let one_shot = engine.one_shot_s * slower + bytes * (ranks - 1.0) / (engine.one_shot_link * link);
        let ring = engine.ring_s * slower + 2.0 * bytes * (ranks - 1.0) / ranks / (engine.ring_link * link);
        one_shot.min(ring)
    }
}

impl StepTime {
    /// The op kind that takes most of the step, and whether bytes or flops bound it.
    pub fn longest(&self) -> Option<&OpTime> {
        self.ops.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds))
    }
}

impl Engine {
    /// The engine's constants.
    pub fn speed(self) -> &'static EngineSpeed {
        super::engines::speed(self)
    }
}
