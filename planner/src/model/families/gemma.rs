//! Gemma 2 and Gemma 3: a norm before and after each block, the residual added behind the second.
//! They differ in attributes of the spec (soft caps, QK norm, window pattern), not in structure.

use super::{Parts, llama};
use crate::model::{BufferId, Builder, ModelSpec, Program, Shard};

pub fn program(spec: &ModelSpec) -> Program {
    let mut p = Builder::new(spec);
    // Image-and-text checkpoints keep the language model under a name of its own.
    p.name_prefixes(&["model.", "language_model."]);
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
    let o = llama::attention(p, h, a, w);
    let bias = a.output_bias;
    let o = p.project(o, &format!("{w}.self_attn.o_proj"), hidden, Shard::Row, bias, None);
    let x = p.norm_then_add(o, &format!("{w}.post_attention_layernorm"), Some(x));
    let h = p.norm(x, &format!("{w}.pre_feedforward_layernorm"));
    let act = llama::gated_mlp(p, h, mlp, w);
    let down = p.project(act, &format!("{w}.mlp.down_proj"), hidden, Shard::Row, mlp.bias, None);
    p.norm_then_add(down, &format!("{w}.post_feedforward_layernorm"), Some(x))
}
