//! Phi-3: Llama's structure with q, k and v in one checkpoint tensor, and gate and up in another.

use super::{Parts, llama};
use crate::model::{BufferId, Builder, ModelSpec, Program, Shard};

pub fn program(spec: &ModelSpec) -> Program {
    let mut p = Builder::new(spec);
    p.name_prefixes(&["model."]);
    let (mut x, table) = p.embed("model.embed_tokens");
    for (i, parts) in spec.layers.iter().map(super::plain_parts).enumerate() {
        let Some(parts) = parts else { continue };
        x = decoder_layer(&mut p, x, parts, &format!("model.layers.{i}"));
    }
    let out = llama::head(&mut p, spec, x, table);
    p.finish(out)
}

fn decoder_layer(p: &mut Builder<'_>, x: BufferId, (a, mlp): Parts<'_>, w: &str) -> BufferId {
    let hidden = p.width(x);
    let h = p.norm(x, &format!("{w}.input_layernorm"));
    let rows = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
    let fused = Shard::FusedQkv { heads: a.num_heads, kv_heads: a.num_kv_heads };
    let qkv = p.project(h, &format!("{w}.self_attn.qkv_proj"), rows, fused, a.qkv_bias, None);
    let id = p.attention_spec(a);
    p.rope_and_store_kv(qkv, id, None);
    let o = p.attention(qkv, id);
    let x = p.project(o, &format!("{w}.self_attn.o_proj"), hidden, Shard::Row, a.output_bias, Some(x));
    let h = p.norm(x, &format!("{w}.post_attention_layernorm"));
    let inner = mlp.intermediate_size;
    let gate_up = p.project(h, &format!("{w}.mlp.gate_up_proj"), 2 * inner, Shard::FusedGateUp, false, None);
    let act = p.gated_act(gate_up, mlp.activation);
    p.project(act, &format!("{w}.mlp.down_proj"), hidden, Shard::Row, false, Some(x))
}
