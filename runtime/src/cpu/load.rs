//! From a [`Program`] and a source of tensors to [`LoadedOp`]s.

use super::kernels::attention::Scores;
use super::kernels::panel::PanelMatrix;
use super::linear::{Linear, Matrix};
use super::loaded::{AttentionOp, Embed, Heads, LoadedOp, PrepareQkv, Table};
use super::quantized::QuantizedMatrix;
use super::{LoadError, WeightFormat};
use crate::backend::rope::Rope;
use crate::weights::{HostTensor, StoredType, TensorSource};
use mserve_planner::model::{AttentionId, KvSource, LinearWeights, Norm, Op, Program, RopeSpec, WeightId};
use std::collections::HashMap;
use std::sync::Arc;

/// All ops of a model, and what they share.
#[derive(Debug)]
pub struct LoadedModel {
    pub ops: Vec<LoadedOp>,
    /// Each rope once, however many layers use it.
    pub ropes: Vec<Rope>,
}

pub struct Loader<'a> {
    program: &'a Program,
    source: &'a dyn TensorSource,
    format: WeightFormat,
    max_model_len: usize,
    progress: &'a mut (dyn FnMut(u64, u64) + Send),
    done_bytes: u64,
    total_bytes: u64,
    rope_specs: Vec<RopeSpec>,
    /// Packed output heads by weight, for embeddings that share them.
    heads: HashMap<WeightId, Arc<PanelMatrix>>,
    /// The attentions that keep a cache, in layer order.
    cached: Vec<AttentionId>,
}

impl<'a> Loader<'a> {
    /// Checks the source against the program before anything is read.
    pub fn new(
        program: &'a Program,
        source: &'a dyn TensorSource,
        format: WeightFormat,
        max_model_len: usize,
        progress: &'a mut (dyn FnMut(u64, u64) + Send),
    ) -> Result<Self, LoadError> {
        let total_bytes = source.check(program)?;
        let cached = program.cached_attentions().collect();
        Ok(Self {
            program,
            source,
            format,
            max_model_len,
            progress,
            done_bytes: 0,
            total_bytes,
            rope_specs: Vec::new(),
            heads: HashMap::new(),
            cached,
        })
    }

    /// Bytes that the weights will take in memory, about: vectors are counted as if they were matrices.
    pub fn weight_bytes(&self) -> u64 {
        let parameters = self.program.parameters();
        match self.format {
            WeightFormat::Auto => self.total_bytes,
            WeightFormat::F32 => parameters.saturating_mul(4),
            WeightFormat::Bf16 => parameters.saturating_mul(2),
            // 32 bytes and an f16 scale for every 32 weights.
            WeightFormat::Q8_0 => parameters.saturating_add(parameters / 16),
        }
    }

    pub fn load(mut self) -> Result<LoadedModel, LoadError> {
        (self.progress)(0, self.total_bytes);
        // Output heads first, so that embeddings find the packed table they share.
        let mut head_linears: HashMap<usize, Linear> = HashMap::new();
        for (i, op) in self.program.ops.iter().enumerate() {
            if let Op::LmHead { weight, .. } = op {
                head_linears.insert(i, self.lm_head(*weight)?);
            }
        }
        let mut ops = Vec::with_capacity(self.program.ops.len());
        for (i, op) in self.program.ops.iter().enumerate() {
            ops.push(match (op, head_linears.remove(&i)) {
                (Op::LmHead { x, out, .. }, Some(linear)) => LoadedOp::Linear { x: *x, linear, add: None, out: *out },
                _ => self.op(op)?,
            });
        }
        let ropes = self.rope_specs.iter().map(|spec| Rope::new(spec, self.max_model_len)).collect();
        Ok(LoadedModel { ops, ropes })
    }

    fn op(&mut self, op: &Op) -> Result<LoadedOp, LoadError> {
        Ok(match op {
            Op::Embed { .. } => LoadedOp::Embed(self.embed(op)?),
            Op::Norm { x, norm, weight, bias, add, out } => LoadedOp::Norm {
                x: *x,
                norm: *norm,
                weight: self.norm_weight(*weight, *norm)?,
                bias: bias.map(|b| self.vector(b)).transpose()?,
                add: *add,
                out: *out,
            },
            Op::Linear { x, weights, add, out } => {
                LoadedOp::Linear { x: *x, linear: self.linear(weights)?, add: *add, out: *out }
            }
            Op::LmHead { x, weight, out } => {
                LoadedOp::Linear { x: *x, linear: self.lm_head(*weight)?, add: None, out: *out }
            }
            Op::QkNormRopeKvWrite { qkv, attention, q_norm, k_norm, norm, store } => LoadedOp::PrepareQkv {
                qkv: *qkv,
                prepare: PrepareQkv {
                    heads: heads(self.program, *attention),
                    q_norm: q_norm.map(|w| self.norm_weight(w, *norm)).transpose()?,
                    k_norm: k_norm.map(|w| self.norm_weight(w, *norm)).transpose()?,
                    eps: norm.eps as f32,
                    rope: self.rope(*attention),
                    cache: self.cache(*attention, *store),
                },
            },
            Op::Attention { qkv, attention, source, out } => {
                let spec = self.program.attention(*attention);
                let scores = Scores { scale: spec.scale as f32, softcap: spec.softcap.map(|c| c as f32) };
                let cache = self.cache(*attention, *source);
                let attention = AttentionOp { heads: heads(self.program, *attention), scores, mask: spec.mask, cache };
                LoadedOp::Attention { qkv: *qkv, attention, out: *out }
            }
            Op::GatedAct { gate_up, activation, out } => {
                LoadedOp::GatedAct { gate_up: *gate_up, activation: *activation, out: *out }
            }
            Op::Act { x, activation, out } => LoadedOp::Act { x: *x, activation: *activation, out: *out },
            Op::GatherLast { x, out } => LoadedOp::GatherLast { x: *x, out: *out },
            Op::Pool { x, pooling, out } => LoadedOp::Pool { x: *x, pooling: *pooling, out: *out },
            Op::L2Normalize { x, out } => LoadedOp::L2Normalize { x: *x, out: *out },
            Op::SoftCap { x, cap } => LoadedOp::SoftCap { x: *x, cap: *cap as f32 },
            Op::Planned(op) => {
                return Err(LoadError::Unsupported { op: op.feature.name(), what: op.detail.clone() });
            }
        })
    }

    fn embed(&mut self, op: &Op) -> Result<Embed, LoadError> {
        let Op::Embed { table, scale, position_table, position_offset, token_type_table, out } = op else {
            unreachable!("called for Embed only");
        };
        let table = match self.heads.get(table) {
            Some(head) => Table::Packed(head.clone()),
            None => Table::Stored(self.read(*table)?),
        };
        let types = token_type_table.map(|t| self.read(t)).transpose()?;
        Ok(Embed {
            table,
            scale: scale.map(|s| s as f32),
            positions: position_table.map(|p| self.read(p)).transpose()?,
            position_offset: *position_offset as usize,
            token_type: types.map(|t| {
                let mut row = vec![0.0; t.row_len()];
                t.row_into(0, &mut row);
                row
            }),
            out: *out,
        })
    }

    fn rope(&mut self, attention: AttentionId) -> Option<usize> {
        let spec = self.program.attention(attention).rope.as_ref()?;
        let known = self.rope_specs.iter().position(|r| r == spec);
        Some(known.unwrap_or_else(|| {
            self.rope_specs.push(spec.clone());
            self.rope_specs.len() - 1
        }))
    }

    fn cache(&self, attention: AttentionId, source: KvSource) -> Option<usize> {
        match source {
            KvSource::Cache => self.cached.iter().position(|id| *id == attention),
            KvSource::Step => None,
        }
    }

    fn lm_head(&mut self, weight: WeightId) -> Result<Linear, LoadError> {
        let matrix = self.matrix(&[weight])?;
        if let Matrix::Panels(panels) = &matrix {
            self.heads.insert(weight, panels.clone());
        }
        Ok(Linear { matrix, bias: None })
    }

    fn linear(&mut self, weights: &LinearWeights) -> Result<Linear, LoadError> {
        let mut bias = Vec::new();
        for &part in &weights.biases {
            bias.extend(self.vector(part)?);
        }
        Ok(Linear { matrix: self.matrix(&weights.parts)?, bias: (!bias.is_empty()).then_some(bias) })
    }

    /// Checkpoint tensors stacked by rows, in the format asked for.
    fn matrix(&mut self, parts: &[WeightId]) -> Result<Matrix, LoadError> {
        let name = &self.program.weight(parts[0]).name;
        let tensors = parts.iter().map(|&w| self.read(w)).collect::<Result<Vec<_>, _>>()?;
        let first = tensors[0].stored;
        let stored = match self.format {
            WeightFormat::Q8_0 if QuantizedMatrix::suits(tensors[0].row_len()) => {
                let quantized = QuantizedMatrix::quantize(&tensors);
                let error = |source| LoadError::Quantize { tensor: name.clone(), source };
                return Ok(Matrix::Quantized(Arc::new(quantized.map_err(error)?)));
            }
            WeightFormat::F32 => StoredType::F32,
            WeightFormat::Bf16 => StoredType::BF16,
            WeightFormat::Auto | WeightFormat::Q8_0 if tensors.iter().all(|t| t.stored == first) => first,
            WeightFormat::Auto | WeightFormat::Q8_0 => StoredType::F32,
        };
        let tensors: Vec<HostTensor> = tensors.into_iter().map(|t| t.convert(stored)).collect();
        Ok(Matrix::Panels(Arc::new(PanelMatrix::pack(&tensors))))
    }

    fn norm_weight(&mut self, weight: WeightId, norm: Norm) -> Result<Vec<f32>, LoadError> {
        let mut values = self.vector(weight)?;
        if norm.unit_offset {
            values.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(values)
    }

    fn vector(&mut self, weight: WeightId) -> Result<Vec<f32>, LoadError> {
        Ok(self.read(weight)?.to_f32())
    }

    fn read(&mut self, weight: WeightId) -> Result<HostTensor, LoadError> {
        let tensor = self.source.read(self.program.weight(weight), &self.program.name_prefixes)?;
        self.done_bytes += tensor.bytes.len() as u64;
        (self.progress)(self.done_bytes.min(self.total_bytes), self.total_bytes);
        Ok(tensor)
    }
}

/// Heads of one attention.
pub fn heads(program: &Program, id: AttentionId) -> Heads {
    let spec = program.attention(id);
    Heads {
        num_heads: spec.num_heads as usize,
        num_kv_heads: spec.num_kv_heads as usize,
        head_dim: spec.head_dim as usize,
    }
}
