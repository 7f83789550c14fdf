//! From what ops cost ([`crate::model::work`]) to the work of one rank, equal ops counted together.

use super::EngineSpeed;
use super::work::{AttentionWork, Counted, OpKind, Rate, Work};
use crate::gpus::GpuModel;
use crate::memory::served_dtype;
use crate::model::work::{ContextWork, OpWork, WorkKind, work};
use crate::model::{DType, Element, Mask, Mixer, ModelSpec, Program, Rows, Storage, Task};

/// The ops of one rank.
pub fn extract(
    program: &Program,
    spec: &ModelSpec,
    gpu: &GpuModel,
    engine: &EngineSpeed,
    tensor_parallel_size: u64,
    kv_dtype: DType,
) -> Vec<Counted> {
    let mut extractor = Extractor { spec, gpu, tp: tensor_parallel_size.max(1), found: Vec::new() };
    for op in work(program, spec, extractor.tp, kv_dtype.into()) {
        extractor.op(&op);
    }
    if spec.task == Task::Generate {
        let row_bytes = spec.vocab_size as f64 * engine.sampler_bytes_per_logit;
        extractor.push(Work::Elementwise { rows: Rows::Sequences, row_bytes });
    }
    extractor.found
}

struct Extractor<'a> {
    spec: &'a ModelSpec,
    gpu: &'a GpuModel,
    tp: u64,
    found: Vec<Counted>,
}

impl Extractor<'_> {
    fn push(&mut self, work: Work) {
        match self.found.iter_mut().find(|counted| counted.work == work) {
            Some(counted) => counted.count += 1.0,
            None => self.found.push(Counted { work, count: 1.0 }),
        }
    }

    fn op(&mut self, op: &OpWork) {
        let row_bytes = self.bytes(op.activation_elements_per_row);
        match op.kind {
            WorkKind::Embedding => {
                self.push(Work::Elementwise { rows: op.rows, row_bytes: 2.0 * row_bytes });
                // Each rank has a part of the vocabulary: the rows are summed.
                self.exchange(op.rows, row_bytes);
            }
            WorkKind::Elementwise => self.push(Work::Elementwise { rows: op.rows, row_bytes }),
            WorkKind::Projection | WorkKind::FeedForward | WorkKind::Head => self.product(op, row_bytes),
            WorkKind::Experts => self.experts(op, row_bytes),
            WorkKind::Attention => {
                if let Some(context) = &op.context {
                    let attention = self.attention(context, op.layer, row_bytes);
                    self.push(Work::Attention(attention));
                }
            }
            WorkKind::State => self.push(Work::Recurrent {
                state_bytes: op.state_bytes_per_sequence as f64,
                flops_per_row: op.flops_per_row as f64,
                row_bytes,
            }),
        }
        self.exchange(op.rows, self.bytes(op.all_reduce_elements_per_row));
    }

    fn bytes(&self, elements: u64) -> f64 {
        (elements * served_dtype(self.spec).bytes()) as f64
    }

    fn exchange(&mut self, rows: Rows, row_bytes: f64) {
        if self.tp > 1 && row_bytes > 0.0 {
            self.push(Work::Exchange { rows, row_bytes });
        }
    }

    fn product(&mut self, op: &OpWork, row_bytes: f64) {
        let head = op.kind == WorkKind::Head;
        self.push(Work::Product {
            kind: if head { OpKind::Head } else { OpKind::Products },
            rows: op.rows,
            flops_per_row: op.flops_per_row as f64,
            weight_bytes: op.weight_bytes as f64,
            row_bytes,
            rate: rate(op.storage, self.gpu),
            kernels: op.kernels,
        });
        if head {
            // Logits are gathered: half of what an all-reduce of them would move.
            self.exchange(op.rows, self.bytes(self.spec.vocab_size) / 2.0);
        }
    }

    fn experts(&mut self, op: &OpWork, row_bytes: f64) {
        let Some(experts) = &op.experts else { return self.product(op, row_bytes) };
        self.push(Work::Experts {
            rows: op.rows,
            experts: experts.num_experts as f64,
            top_k: experts.top_k as f64,
            always_bytes: experts.always_bytes as f64,
            flops_per_row: op.flops_per_row as f64,
            weight_bytes: op.weight_bytes as f64,
            row_bytes,
            rate: rate(op.storage, self.gpu),
            kernels: op.kernels,
        });
    }

    fn attention(&self, context: &ContextWork, layer: Option<usize>, row_bytes: f64) -> AttentionWork {
        let mixer = layer.and_then(|layer| self.spec.layers.get(layer)).map(|layer| &layer.mixer);
        let flops_per_pair = context.flops_per_context_token as f64;
        let (bidirectional, prefill_flops_per_pair) = match mixer {
            Some(Mixer::Attention(a) | Mixer::Parallel { attention: a, .. }) => {
                (matches!(a.mask, Mask::Bidirectional | Mask::BidirectionalSliding { .. }), flops_per_pair)
            }
            // Prompts are read with keys and values unpacked from the latent.
            Some(Mixer::Latent(a)) => {
                let dims = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim;
                (false, (a.num_heads.div_ceil(self.tp) * 2 * dims) as f64)
            }
            _ => (false, flops_per_pair),
        };
        AttentionWork {
            kv_bytes_per_token: context.bytes_per_context_token as f64,
            flops_per_pair,
            prefill_flops_per_pair,
            reach: context.reach_tokens.map(|tokens| tokens as f64),
            tokens_per_entry: context.tokens_per_entry.max(1) as f64,
            bidirectional,
            row_bytes,
        }
    }
}

/// What a card multiplies weights of this form in.
fn rate(storage: Storage, gpu: &GpuModel) -> Rate {
    let Storage::Packed(packed) = storage else { return Rate::Half };
    match (packed.element, packed.bits) {
        (Element::Float, 8) if gpu.rates.fp8_flops_per_s.is_some() => Rate::Fp8,
        (Element::Float, 4) if gpu.rates.fp4_flops_per_s.is_some() => Rate::Fp4,
        _ => Rate::WeightOnly,
    }
}
