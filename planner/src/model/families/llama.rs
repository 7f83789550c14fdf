//! Llama, Mistral, Qwen2 and Qwen3: pre-norm decoder, grouped-query attention, gated MLP.
//! They differ in attributes of the spec (biases, QK norm, window), not in structure.

use super::Parts;
use crate::model::{
    AttentionSpec, BufferId, Builder, MlpSpec, ModelSpec, Program, QkNorm, Role, Shard, Task, WeightId,
};

pub fn program(spec: &ModelSpec) -> Program {
    let mut p = Builder::new(spec);
    p.name_prefixes(&["model."]);
    let (mut x, table) = p.embed("model.embed_tokens");
    for (i, parts) in spec.layers.iter().map(super::plain_parts).enumerate() {
        let Some(parts) = parts else { continue };
        x = decoder_layer(&mut p, x, parts, &format!("model.layers.{i}"));
    }
    let out = head(&mut p, spec, x, table);
    p.finish(out)
}

fn decoder_layer(p: &mut Builder<'_>, x: BufferId, (a, mlp): Parts<'_>, w: &str) -> BufferId {
    let hidden = p.width(x);
    let h = p.norm(x, &format!("{w}.input_layernorm"));
    let o = attention(p, h, a, w);
    let bias = a.output_bias;
    let x = p.project(o, &format!("{w}.self_attn.o_proj"), hidden, Shard::Row, bias, Some(x));
    let h = p.norm(x, &format!("{w}.post_attention_layernorm"));
    let act = gated_mlp(p, h, mlp, w);
    p.project(act, &format!("{w}.mlp.down_proj"), hidden, Shard::Row, mlp.bias, Some(x))
}

/// q, k and v from separate tensors, normalised, rotated and stored, then attended: `[T, q]`, before `o_proj`.
pub(super) fn attention(p: &mut Builder<'_>, h: BufferId, a: &AttentionSpec, w: &str) -> BufferId {
    let (q, kv) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
    let kv_shard = Shard::KvHeads { heads: a.num_kv_heads };
    let parts = [
        (&*format!("{w}.self_attn.q_proj"), q, Shard::Column),
        (&*format!("{w}.self_attn.k_proj"), kv, kv_shard),
        (&*format!("{w}.self_attn.v_proj"), kv, kv_shard),
    ];
    let weights = p.declare(h, &parts, a.qkv_bias);
    let qkv = p.linear(h, weights, None);
    let id = p.attention_spec(a);
    let norms = (format!("{w}.self_attn.q_norm"), format!("{w}.self_attn.k_norm"));
    let normed = a.qk_norm == QkNorm::PerHead;
    p.rope_and_store_kv(qkv, id, normed.then_some((&norms.0, &norms.1)));
    p.attention(qkv, id)
}

/// activation(gate) * up: `[T, intermediate]`, before `down_proj`.
pub(super) fn gated_mlp(p: &mut Builder<'_>, h: BufferId, mlp: &MlpSpec, w: &str) -> BufferId {
    let inner = mlp.intermediate_size;
    let parts =
        [(&*format!("{w}.mlp.gate_proj"), inner, Shard::Column), (&*format!("{w}.mlp.up_proj"), inner, Shard::Column)];
    let weights = p.declare(h, &parts, mlp.bias);
    let gate_up = p.linear(h, weights, None);
    p.gated_act(gate_up, mlp.activation)
}

/// Final norm, then what the task asks for: logits, one vector, or scores.
pub(super) fn head(p: &mut Builder<'_>, spec: &ModelSpec, x: BufferId, table: WeightId) -> BufferId {
    match spec.task {
        Task::Generate => {
            let h = p.norm(x, "model.norm");
            let last = p.gather_last(h);
            let weight = if spec.tied_embeddings {
                table
            } else {
                p.weight_as(Role::Head, "lm_head.weight", &[spec.vocab_size, spec.hidden_size], Shard::Vocab)
            };
            p.lm_head(last, weight)
        }
        Task::Embed { pooling } => {
            let h = p.norm(x, "model.norm");
            let pooled = p.pool(h, pooling);
            p.l2_normalize(pooled)
        }
        Task::Classify { labels } => {
            let h = p.norm(x, "model.norm");
            let last = p.gather_last(h);
            p.project(last, "score", labels, Shard::Replicated, false, None)
        }
    }
}
