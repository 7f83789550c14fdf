//! From a Program's ops to the work of one rank.

use super::EngineSpeed;
use super::work::{AttentionWork, Counted, OpKind, Rate, Work};
use crate::gpus::GpuModel;
use crate::memory::{RankWeight, rank_weight, served_dtype};
use crate::model::{
    AttentionSpec, BufferId, DType, KvSource, LinearWeights, Mask, ModelSpec, Op, Program, Rows, Shard, Task, WeightId,
};

/// The ops of one rank, equal ones counted together.
pub fn extract(
    program: &Program,
    spec: &ModelSpec,
    gpu: &GpuModel,
    engine: &EngineSpeed,
    tensor_parallel_size: u64,
    kv_dtype: DType,
) -> Vec<Counted> {
    let tp = tensor_parallel_size.max(1);
    let mut extractor = Extractor { program, spec, gpu, tp, kv_dtype, found: Vec::new() };
    for op in &program.ops {
        extractor.op(op);
    }
    if spec.task == Task::Generate {
        let row_bytes = spec.vocab_size as f64 * engine.sampler_bytes_per_logit;
        extractor.push(Work::Elementwise { rows: Rows::Sequences, row_bytes });
    }
    extractor.found
}

struct Extractor<'a> {
    program: &'a Program,
    spec: &'a ModelSpec,
    gpu: &'a GpuModel,
    tp: u64,
    kv_dtype: DType,
    found: Vec<Counted>,
}

impl Extractor<'_> {
    fn push(&mut self, work: Work) {
        match self.found.iter_mut().find(|counted| counted.work == work) {
            Some(counted) => counted.count += 1.0,
            None => self.found.push(Counted { work, count: 1.0 }),
        }
    }

    fn op(&mut self, op: &Op) {
        match op {
            Op::Embed { out, .. } => {
                self.elementwise(*out, 2.0);
                self.exchange(*out);
            }
            Op::Norm { add, out, .. } => self.elementwise(*out, if add.is_some() { 3.0 } else { 2.0 }),
            Op::Linear { x, weights, out, .. } => self.linear(*x, weights, *out),
            Op::LmHead { x, weight, out } => self.head(*x, *weight, *out),
            Op::QkNormRopeKvWrite { qkv, .. } => self.elementwise(*qkv, 2.0),
            Op::Attention { attention, source, out, .. } => {
                let spec = self.program.attention(*attention);
                self.attention(spec, *source, *out);
            }
            // Two halves in, one out.
            Op::GatedAct { out, .. } => self.elementwise(*out, 3.0),
            Op::Act { out, .. } | Op::GatherLast { out, .. } | Op::L2Normalize { out, .. } => {
                self.elementwise(*out, 2.0);
            }
            Op::Pool { x, .. } => self.elementwise(*x, 1.0),
            Op::SoftCap { x, .. } => self.elementwise(*x, 2.0),
        }
    }

    /// Bytes of a row of a buffer on this rank.
    fn row_bytes(&self, id: BufferId) -> f64 {
        let buffer = self.program.buffer(id);
        let width = if buffer.sharded { buffer.width.div_ceil(self.tp) } else { buffer.width };
        (width * served_dtype(self.spec).bytes()) as f64
    }

    fn elementwise(&mut self, id: BufferId, passes: f64) {
        let rows = self.program.buffer(id).rows;
        self.push(Work::Elementwise { rows, row_bytes: passes * self.row_bytes(id) });
    }

    fn exchange(&mut self, id: BufferId) {
        if self.tp > 1 {
            let rows = self.program.buffer(id).rows;
            self.push(Work::Exchange { rows, row_bytes: self.row_bytes(id) });
        }
    }

    fn weights(&self, ids: &[WeightId]) -> RankWeight {
        let parts = ids.iter().map(|&id| rank_weight(self.program, self.spec, id, self.tp));
        parts.fold(RankWeight::default(), |sum, part| RankWeight {
            elements: sum.elements + part.elements,
            bytes: sum.bytes + part.bytes,
        })
    }

    fn linear(&mut self, x: BufferId, weights: &LinearWeights, out: BufferId) {
        let rank = self.weights(&weights.parts);
        self.push(Work::Product {
            kind: OpKind::Products,
            rows: self.program.buffer(x).rows,
            flops_per_row: 2.0 * rank.elements as f64,
            weight_bytes: rank.bytes as f64,
            row_bytes: self.row_bytes(x) + self.row_bytes(out),
            rate: rate(rank, self.gpu),
        });
        if weights.parts.iter().any(|&id| self.program.weight(id).shard == Shard::Row) {
            self.exchange(out);
        }
    }

    fn head(&mut self, x: BufferId, weight: WeightId, out: BufferId) {
        let rank = self.weights(&[weight]);
        self.push(Work::Product {
            kind: OpKind::Head,
            rows: self.program.buffer(x).rows,
            flops_per_row: 2.0 * rank.elements as f64,
            weight_bytes: rank.bytes as f64,
            row_bytes: self.row_bytes(x) + self.row_bytes(out) / self.tp as f64,
            rate: rate(rank, self.gpu),
        });
        // Logits are gathered: half of what an all-reduce of them would move.
        if self.tp > 1 {
            self.push(Work::Exchange { rows: Rows::Sequences, row_bytes: self.row_bytes(out) / 2.0 });
        }
    }

    fn attention(&mut self, a: &AttentionSpec, source: KvSource, out: BufferId) {
        let heads = a.num_heads.div_ceil(self.tp);
        let kv_heads = (a.num_kv_heads / self.tp).max(1);
        let dtype = match source {
            KvSource::Cache => self.kv_dtype,
            KvSource::Step => served_dtype(self.spec),
        };
        let flops_per_pair = (4 * heads * a.head_dim) as f64;
        let reach = match a.mask {
            Mask::Sliding { window } => Some(window as f64),
            Mask::Causal | Mask::Bidirectional => None,
        };
        self.push(Work::Attention(AttentionWork {
            kv_bytes_per_token: (2 * kv_heads * a.head_dim * dtype.bytes()) as f64,
            flops_per_pair,
            prefill_flops_per_pair: flops_per_pair,
            reach,
            bidirectional: a.mask == Mask::Bidirectional,
            row_bytes: 2.0 * self.row_bytes(out),
        }));
    }
}

/// What a card multiplies weights of this density in.
fn rate(weights: RankWeight, gpu: &GpuModel) -> Rate {
    let bits = 8.0 * weights.bytes as f64 / weights.elements.max(1) as f64;
    match bits {
        b if b > 12.0 => Rate::Half,
        // Eight bits and their scales.
        b if b > 6.0 && gpu.rates.fp8_flops_per_s.is_some() => Rate::Fp8,
        _ => Rate::WeightOnly,
    }
}
