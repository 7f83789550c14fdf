//! Any model as a Program whose mixers and FFNs are planned ops: right in weights, shapes and sharding, not executed.

use super::naming::{Naming, naming};
use super::{experts, mixers};
use crate::model::{
    BufferId, Builder, Family, Feature, Ffn, LayerSpec, MlpSpec, ModelSpec, PerLayerInput, PlannedOp, Positions,
    Program, Role, Rows, Shard, Task, WeightId,
};

pub fn program(spec: &ModelSpec) -> Program {
    let names = naming(spec.family);
    let mut p = Builder::new(spec);
    p.name_prefixes(&["model.", "language_model.", "model.language_model."]);
    let (mut x, table) = p.embed(names.embed);
    if let Positions::Learned { rows, .. } = spec.positions {
        p.weight(format!("{}.weight", names.positions), &[rows, spec.hidden_size], Shard::Replicated);
    }
    for (i, layer) in spec.layers.iter().enumerate() {
        let path = format!("{}.{i}", names.layers);
        let mut emit = Emit { p: &mut p, spec, names: &names, layer: i, path };
        x = emit.layer(layer, x);
    }
    let out = head(&mut p, spec, &names, x, table);
    p.finish(out)
}

/// What a layer's ops are written with.
pub(super) struct Emit<'a, 'b> {
    pub p: &'a mut Builder<'b>,
    pub spec: &'a ModelSpec,
    pub names: &'a Naming,
    pub layer: usize,
    /// `model.layers.3`
    pub path: String,
}

impl Emit<'_, '_> {
    fn layer(&mut self, layer: &LayerSpec, x: BufferId) -> BufferId {
        let names = self.names.norms;
        let mixes = layer.mixer != crate::model::Mixer::None;
        let mut h = x;
        let mut out = x;
        if mixes {
            h = self.norm(names.first(), x);
            out = mixers::mixer(self, &layer.mixer, h, x);
            out = self.norm(names.get(2), out);
        }
        if layer.ffn == Ffn::None {
            return out;
        }
        let before = match names {
            [] => out,
            // One norm for both: they run side by side, or the layer has one of them only.
            [_] if mixes => h,
            [only] => self.norm(Some(only), out),
            [_, second, ..] => self.norm(Some(second), out),
        };
        let out = match &layer.ffn {
            Ffn::Dense(mlp) => self.dense(mlp, before, out),
            Ffn::Experts(moe) => experts::experts(self, moe, before, out),
            Ffn::None => out,
        };
        let out = self.norm(names.get(3), out);
        self.per_layer(out)
    }

    fn norm(&mut self, name: Option<&&str>, x: BufferId) -> BufferId {
        match name {
            Some(name) => {
                let name = format!("{}.{name}", self.path);
                self.p.norm(x, &name)
            }
            None => x,
        }
    }

    /// `model.layers.3.self_attn.q_proj`
    pub(super) fn name(&self, parent: &str, part: &str) -> String {
        match (parent, part) {
            ("", part) => format!("{}.{part}", self.path),
            (parent, "") => format!("{}.{parent}", self.path),
            (parent, part) => format!("{}.{parent}.{part}", self.path),
        }
    }

    /// A matrix that quantisation may pack.
    pub(super) fn matrix(&mut self, name: &str, out: u64, width: u64, shard: Shard) -> WeightId {
        self.p.weight_as(Role::Linear, format!("{name}.weight"), &[out, width], shard)
    }

    /// A norm's weight, a bias, a per-head constant.
    pub(super) fn vector(&mut self, name: &str, len: u64, shard: Shard) -> WeightId {
        self.p.weight(name.to_owned(), &[len], shard)
    }

    /// The op itself; `width` elements per token are held while it runs.
    pub(super) fn op(
        &mut self,
        feature: Feature,
        detail: &str,
        (x, add): (BufferId, Option<BufferId>),
        weights: Vec<WeightId>,
        width: u64,
    ) -> BufferId {
        let scratch = self.p.buffer(Rows::Tokens, width, true);
        let out = self.p.buffer(Rows::Tokens, self.spec.hidden_size, false);
        let detail = detail.to_owned();
        self.p.planned(PlannedOp { feature, detail, layer: self.layer, x, weights, scratch, add, out })
    }

    fn dense(&mut self, mlp: &MlpSpec, x: BufferId, add: BufferId) -> BufferId {
        let mut weights = Vec::new();
        self.mlp(mlp, self.names.mlp, self.names.mlp_parts, self.spec.hidden_size, &mut weights);
        let width = mlp.intermediate_size * if mlp.gated { 2 } else { 1 };
        self.op(Feature::Mlp, "this family's MLP", (x, Some(add)), weights, width)
    }

    /// Weights of one MLP on vectors of `width`.
    pub(super) fn mlp(
        &mut self,
        mlp: &MlpSpec,
        parent: &str,
        [gate, up, down]: [&str; 3],
        width: u64,
        weights: &mut Vec<WeightId>,
    ) {
        let inner = mlp.intermediate_size;
        let mut project = |name: &str, out: u64, width: u64, shard: Shard| {
            let name = self.name(parent, name);
            weights.push(self.matrix(&name, out, width, shard));
            if mlp.bias {
                let shard = if shard == Shard::Row { Shard::Replicated } else { shard };
                weights.push(self.vector(&format!("{name}.bias"), out, shard));
            }
        };
        match (mlp.gated, up) {
            (true, "") => project(gate, 2 * inner, width, Shard::FusedGateUp),
            (true, up) => {
                project(gate, inner, width, Shard::Column);
                project(up, inner, width, Shard::Column);
            }
            (false, "") => project(gate, inner, width, Shard::Column),
            (false, up) => project(up, inner, width, Shard::Column),
        }
        project(down, width, inner, Shard::Row);
    }

    /// Gemma's second embedding: a gate, a projection and a norm in each layer.
    fn per_layer(&mut self, x: BufferId) -> BufferId {
        let hidden = self.spec.hidden_size;
        let mut weights = Vec::new();
        if let Some(input) = self.spec.extras.per_layer_input {
            for (name, out, width) in
                [("per_layer_input_gate", input.width, hidden), ("per_layer_projection", hidden, input.width)]
            {
                let name = self.name("", name);
                weights.push(self.matrix(&name, out, width, Shard::Replicated));
            }
            self.laurel_and_altup(input, &mut weights);
            let name = self.name("", "post_per_layer_input_norm.weight");
            weights.push(self.vector(&name, hidden, Shard::Replicated));
            let tables = input.vocab_size.saturating_mul(input.width);
            let name = format!("model.embed_tokens_per_layer.{}", self.layer);
            self.p.weight(format!("{name}.weight"), &[input.vocab_size, tables / input.vocab_size], Shard::Vocab);
            let name = format!("model.per_layer_model_projection.{}", self.layer);
            weights.push(self.matrix(&name, input.width, hidden, Shard::Replicated));
            return self.op(Feature::PerLayerInput, "embeddings for each layer", (x, None), weights, input.width);
        }
        let Some(streams) = self.spec.extras.residual_streams else { return x };
        // Two mixings a layer: each maps all streams to the factors in, out and between them.
        for part in ["hc_attn", "hc_ffn"] {
            let rows = (2 + streams) * streams;
            let name = self.name("", part);
            weights.push(self.p.weight(format!("{name}_fn"), &[rows, streams * hidden], Shard::Replicated));
            weights.push(self.vector(&format!("{name}_base"), rows, Shard::Replicated));
            weights.push(self.vector(&format!("{name}_scale"), 3, Shard::Replicated));
        }
        self.op(Feature::HyperConnections, "several residual streams", (x, None), weights, streams * hidden)
    }
}

impl Emit<'_, '_> {
    /// Gemma 3n: a low-rank residual, and the small matrices that predict and correct the copies of the stream.
    fn laurel_and_altup(&mut self, input: PerLayerInput, weights: &mut Vec<WeightId>) {
        let (hidden, rank, inputs) = (self.spec.hidden_size, input.laurel_rank, input.altup_inputs);
        if rank > 0 {
            for (part, out, width) in [("linear_left", rank, hidden), ("linear_right", hidden, rank)] {
                let name = self.name("laurel", part);
                weights.push(self.matrix(&name, out, width, Shard::Replicated));
            }
        }
        if inputs > 0 {
            let parts = [
                ("modality_router", inputs, hidden),
                ("prediction_coefs", inputs * inputs, inputs),
                ("correction_coefs", inputs, inputs),
            ];
            for (part, out, width) in parts {
                let name = self.name("altup", part);
                weights.push(self.p.weight(format!("{name}.weight"), &[out, width], Shard::Replicated));
            }
            // Once for the model: a projection in and out for each further copy.
            for i in 1..if self.layer == 0 { inputs } else { 0 } {
                for part in ["altup_projections", "altup_unembed_projections"] {
                    let name = format!("model.{part}.{}", i - 1);
                    weights.push(self.matrix(&name, hidden, hidden, Shard::Replicated));
                }
            }
        }
    }
}

/// Final norm, then what the task asks for.
fn head(p: &mut Builder<'_>, spec: &ModelSpec, names: &Naming, x: BufferId, table: WeightId) -> BufferId {
    match spec.task {
        Task::Generate => {
            let h = if names.norms.is_empty() { x } else { p.norm(x, names.final_norm) };
            let last = p.gather_last(h);
            let weight = if spec.tied_embeddings {
                table
            } else {
                let name = format!("{}.weight", names.head);
                p.weight_as(Role::Head, name, &[spec.vocab_size, spec.hidden_size], Shard::Vocab)
            };
            if spec.extras.lm_head_bias {
                p.weight(format!("{}.bias", names.head), &[spec.vocab_size], Shard::Vocab);
            }
            p.lm_head(last, weight)
        }
        Task::Embed { pooling } => {
            let h = p.norm(x, names.final_norm);
            let pooled = p.pool(h, pooling);
            p.l2_normalize(pooled)
        }
        Task::Classify { labels } => {
            let h = p.norm(x, names.final_norm);
            let h = p.gather_last(h);
            // Encoders go through a dense layer as wide as they are.
            let encoder = matches!(spec.family, Family::BertLike | Family::DistilBert | Family::ModernBert);
            let h = match encoder {
                true => p.project(h, "pooler.dense", spec.hidden_size, Shard::Replicated, true, None),
                false => h,
            };
            p.project(h, "score", labels, Shard::Replicated, encoder, None)
        }
    }
}
