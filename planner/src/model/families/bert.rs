//! BERT and XLM-RoBERTa: post-norm encoder, learned positions, every token sees every token, nothing cached.

use super::Parts;
use crate::model::{Activation, BufferId, Builder, ModelSpec, Pooling, Positions, Program, Shard, Task};

pub fn program(spec: &ModelSpec) -> Program {
    let mut p = Builder::new(spec);
    p.name_prefixes(&["bert.", "roberta."]);
    let mut x = embeddings(&mut p, spec);
    for (i, parts) in spec.layers.iter().map(super::plain_parts).enumerate() {
        let Some(parts) = parts else { continue };
        x = encoder_layer(&mut p, x, parts, &format!("encoder.layer.{i}"));
    }
    let out = head(&mut p, spec, x);
    p.finish(out)
}

fn embeddings(p: &mut Builder<'_>, spec: &ModelSpec) -> BufferId {
    let hidden = spec.hidden_size;
    let table = p.weight("embeddings.word_embeddings.weight", &[spec.vocab_size, hidden], Shard::Vocab);
    let (rows, offset, token_types) = match spec.positions {
        Positions::Learned { rows, offset, token_types } => (rows, offset, token_types),
        Positions::Rope => (0, 0, 0),
    };
    let positions = p.weight("embeddings.position_embeddings.weight", &[rows, hidden], Shard::Replicated);
    let types = p.weight("embeddings.token_type_embeddings.weight", &[token_types, hidden], Shard::Replicated);
    let x = p.embed_with_tables(table, positions, offset, Some(types));
    p.norm(x, "embeddings.LayerNorm")
}

fn encoder_layer(p: &mut Builder<'_>, x: BufferId, (a, mlp): Parts<'_>, w: &str) -> BufferId {
    let hidden = p.width(x);
    let parts = [
        (&*format!("{w}.attention.self.query"), hidden, Shard::Column),
        (&*format!("{w}.attention.self.key"), hidden, Shard::Column),
        (&*format!("{w}.attention.self.value"), hidden, Shard::Column),
    ];
    let weights = p.declare(x, &parts, a.qkv_bias);
    let qkv = p.linear(x, weights, None);
    let attention = p.attention_spec(a);
    let o = p.attention(qkv, attention);
    let x = p.project(o, &format!("{w}.attention.output.dense"), hidden, Shard::Row, true, Some(x));
    let x = p.norm(x, &format!("{w}.attention.output.LayerNorm"));
    let inner = mlp.intermediate_size;
    let h = p.project(x, &format!("{w}.intermediate.dense"), inner, Shard::Column, true, None);
    let h = p.act(h, mlp.activation);
    let x = p.project(h, &format!("{w}.output.dense"), hidden, Shard::Row, true, Some(x));
    p.norm(x, &format!("{w}.output.LayerNorm"))
}

/// Embedding models stop at the pooled vector. Cross-encoders go on: BERT through its pooler, RoBERTa through the
/// classification head's own dense layer.
fn head(p: &mut Builder<'_>, spec: &ModelSpec, x: BufferId) -> BufferId {
    let hidden = spec.hidden_size;
    match spec.task {
        Task::Generate => x,
        Task::Embed { pooling } => {
            let pooled = p.pool(x, pooling);
            p.l2_normalize(pooled)
        }
        Task::Classify { labels } => {
            let (dense, out) = match spec.family {
                crate::model::Family::XlmRoberta => ("classifier.dense", "classifier.out_proj"),
                _ => ("pooler.dense", "classifier"),
            };
            let first = p.pool(x, Pooling::Cls);
            let h = p.project(first, dense, hidden, Shard::Replicated, true, None);
            let h = p.act(h, Activation::Tanh);
            p.project(h, out, labels, Shard::Replicated, true, None)
        }
    }
}
