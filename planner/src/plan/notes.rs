//! Sentences that go with a plan: what was assumed and what may differ.

use super::{Plan, PlanRequest};
use crate::memory::{CacheKind, KvLayout, SlidingLayers, WeightSource, rank_weight_bytes};
use crate::model::{Mixer, ModelSpec, Program};
use crate::units::{format_bytes, format_count};

pub(super) fn notes(request: &PlanRequest<'_>, program: &Program, plan: &Plan) -> Vec<String> {
    [
        stored_dtype(plan),
        super::support::note(request),
        super::support::half_note(request),
        image_tower(request.spec, request.weights),
        checkpoint_differs(request, program),
        sliding(request, plan),
        cannot_run(program),
        compressed(request.spec),
        replicated_heads(request, plan),
        sequence_limit(plan),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn cannot_run(program: &Program) -> Option<String> {
    let op = program.first_planned()?;
    Some(format!(
        "The bundled engine cannot run this model yet ({}: {}); the plan holds for others.",
        op.feature.name(),
        op.detail
    ))
}

fn compressed(spec: &ModelSpec) -> Option<String> {
    let compressed = spec.layers.iter().any(|layer| matches!(layer.mixer, Mixer::Compressed(_)));
    compressed.then(|| {
        "Compressed attention keeps states whose paging differs between engines: concurrency is an estimate.".to_owned()
    })
}

fn stored_dtype(plan: &Plan) -> Option<String> {
    let model = &plan.model;
    (model.stored_dtype != model.served_dtype).then(|| {
        format!("The checkpoint is stored as {:?} and planned as {:?}.", model.stored_dtype, model.served_dtype)
    })
}

fn image_tower(spec: &ModelSpec, weights: WeightSource) -> Option<String> {
    let multimodal = spec.extras.image_text || spec.architecture.ends_with("ForConditionalGeneration");
    (multimodal && weights == WeightSource::Program)
        .then(|| "The language model alone is planned: the image tower is not counted.".to_owned())
}

fn checkpoint_differs(request: &PlanRequest<'_>, program: &Program) -> Option<String> {
    let WeightSource::Checkpoint { bytes } = request.weights else { return None };
    let described = rank_weight_bytes(program, request.spec, 1);
    let differs = bytes.abs_diff(described) > described / 10;
    differs.then(|| {
        let (held, described) = (format_bytes(bytes), format_bytes(described));
        format!("The checkpoint holds {held} and config.json describes {described}: the larger part may not be loaded.")
    })
}

/// The bundled engine has one block table for all layers and keeps sliding ones whole.
fn sliding(request: &PlanRequest<'_>, plan: &Plan) -> Option<String> {
    let layers = plan.model.kv.groups.iter().filter(|g| matches!(g.kind, CacheKind::Sliding { .. }));
    let layers: u64 = layers.map(|g| g.layers).sum();
    if layers == 0 {
        return None;
    }
    let best = plan.options.first()?;
    let whole = KvLayout::new(
        request.spec,
        best.tensor_parallel_size,
        best.kv.dtype,
        best.kv.block_size_tokens,
        SlidingLayers::KeepAll,
    );
    let limits = &request.limits;
    let blocks = whole.num_blocks(best.per_gpu.kv_pool_bytes);
    let concurrency = whole.concurrency(blocks, limits.max_model_len, limits.max_num_batched_tokens);
    Some(format!(
        "{layers} of {} layers keep their window only; an engine that keeps them whole, as the bundled one does, holds \
         {concurrency:.2} requests of {} tokens a replica.",
        plan.model.layers,
        format_count(limits.max_model_len)
    ))
}

fn replicated_heads(request: &PlanRequest<'_>, plan: &Plan) -> Option<String> {
    let whole = plan.model.kv_bytes_per_token;
    let replicated = |o: &&super::PlanOption| o.kv.bytes_per_token() * o.tensor_parallel_size > whole;
    let sizes: Vec<_> = plan.options.iter().filter(replicated).map(|o| o.tensor_parallel_size.to_string()).collect();
    let latent = plan.model.kv.groups.iter().any(|group| group.kind == CacheKind::Full)
        && request.spec.layers.iter().any(|layer| matches!(layer.mixer, Mixer::Latent(_)));
    (!sizes.is_empty()).then(|| {
        let sizes = sizes.join(", ");
        match latent {
            true => format!("At TP {sizes} each rank keeps the whole cache: a latent is not divided between ranks."),
            false => format!("At TP {sizes} there are fewer KV heads than ranks: each rank keeps a copy of one."),
        }
    })
}

fn sequence_limit(plan: &Plan) -> Option<String> {
    let best = plan.options.first()?;
    let held = best.typical.kv_per_replica? as u64;
    let limit = plan.limits.max_num_seqs;
    (held > limit).then(|| {
        format!(
            "KV would hold {} requests of {} tokens a replica; max_num_seqs stops at {limit}.",
            format_count(held),
            format_count(plan.typical_len_tokens)
        )
    })
}
