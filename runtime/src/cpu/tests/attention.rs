use super::{archs, assert_close, poisoned, random};
use crate::cpu::attention::{AttentionContext, AttentionScratch, StepBlocks};
use crate::cpu::kernels::attention::Scores;
use crate::cpu::kv_cache::{LayerCache, PackedRows};
use crate::cpu::loaded::{AttentionOp, Heads};
use crate::engine::{StepBatch, StepSequence};
use mserve_planner::model::Mask;

/// A sequence of a step: `context` tokens, the last `query` of them in this step.
#[derive(Clone, Copy)]
struct Text {
    context: usize,
    query: usize,
}

struct Case {
    heads: Heads,
    block_size: usize,
    mask: Mask,
    scores: Scores,
    texts: Vec<Text>,
}

fn random_case(rng: &mut fastrand::Rng, mask: Mask) -> Case {
    let num_kv_heads = rng.usize(1..4);
    let heads = Heads {
        num_heads: num_kv_heads * rng.usize(1..8),
        num_kv_heads,
        head_dim: [4, 8, 16, 20, 33, 64][rng.usize(0..6)],
    };
    let texts = (0..rng.usize(1..5))
        .map(|_| {
            let context = rng.usize(1..80);
            let query =
                if mask == Mask::Bidirectional { context } else { [1, rng.usize(1..=context)][rng.usize(0..2)] };
            Text { context, query }
        })
        .collect();
    let scores = Scores { scale: 0.1 + rng.f32(), softcap: rng.bool().then_some(2.0) };
    Case { heads, block_size: [1, 4, 16, 24, 32][rng.usize(0..5)], mask, scores, texts }
}

/// All rows of every text, `[text][position][width]`.
type Packed = Vec<Vec<Vec<f32>>>;

fn exact(case: &Case, packed: &Packed) -> Vec<f64> {
    let Heads { num_heads, num_kv_heads, head_dim } = case.heads;
    let column = |row: &[f32], first: usize, d: usize| f64::from(row[first * head_dim + d]);
    let mut out = Vec::new();
    for (text, rows) in case.texts.iter().zip(packed) {
        for position in text.context - text.query..text.context {
            let visible = match case.mask {
                Mask::Causal => 0..position + 1,
                Mask::Sliding { window } => (position + 1).saturating_sub(window as usize)..position + 1,
                Mask::Chunked { chunk } => position / chunk as usize * chunk as usize..position + 1,
                Mask::Bidirectional => 0..text.context,
                Mask::BidirectionalSliding { window } => {
                    position.saturating_sub(window as usize / 2)..(position + window as usize / 2 + 1).min(text.context)
                }
            };
            for head in 0..num_heads {
                let kv = head / (num_heads / num_kv_heads);
                let score = |p: usize| {
                    let dot = |d| column(&rows[position], head, d) * column(&rows[p], num_heads + kv, d);
                    let score = (0..head_dim).map(dot).sum::<f64>() * f64::from(case.scores.scale);
                    case.scores.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                };
                let weights: Vec<f64> = visible.clone().map(|p| score(p).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let value = |p: usize| column(&rows[p], num_heads + num_kv_heads + kv, d);
                    out.push(visible.clone().zip(&weights).map(|(p, w)| w * value(p)).sum::<f64>() / sum);
                }
            }
        }
    }
    out
}

/// The step's batch and its query rows, with blocks dealt out to texts in turn.
fn step(case: &Case, packed: &Packed) -> (StepBatch, Vec<f32>) {
    let block = |text: usize, i: usize| (i * case.texts.len() + text) as u32;
    let (mut batch, mut qkv) = (StepBatch::default(), Vec::new());
    for (i, text) in case.texts.iter().enumerate() {
        let first_table = batch.block_tables.len();
        batch.block_tables.extend((0..text.context.div_ceil(case.block_size)).map(|b| block(i, b)));
        batch.sequences.push(StepSequence {
            query_start: batch.token_ids.len(),
            query_len: text.query,
            context_len: text.context,
            block_table: first_table..batch.block_tables.len(),
            wants_output: true,
            sampling: None,
        });
        for row in &packed[i][text.context - text.query..] {
            batch.token_ids.push(0);
            qkv.extend(row);
        }
    }
    (batch, qkv)
}

fn filled_cache(case: &Case, packed: &Packed) -> LayerCache {
    let blocks_each = case.texts.iter().map(|t| t.context.div_ceil(case.block_size)).max().unwrap();
    let mut cache = LayerCache::new(case.heads.kv_shape(case.block_size), blocks_each * case.texts.len());
    cache.poison();
    for (i, rows) in packed.iter().enumerate() {
        let slot = |p: usize| {
            let block = p / case.block_size * case.texts.len() + i;
            (block * case.block_size + p % case.block_size) as u32
        };
        let slots: Vec<u32> = (0..rows.len()).map(slot).collect();
        let flat = rows.concat();
        let (width, key_column) = (case.heads.width(), case.heads.key_column());
        cache.write(PackedRows { rows: &flat, width, key_column }, &slots);
    }
    cache
}

fn check(rng: &mut fastrand::Rng, case: &Case, from_step: bool) {
    let row = |rng: &mut fastrand::Rng| random(rng, case.heads.width());
    let packed: Packed = case.texts.iter().map(|t| (0..t.context).map(|_| row(rng)).collect()).collect();
    let (batch, qkv) = step(case, &packed);
    let caches = if from_step { Vec::new() } else { vec![filled_cache(case, &packed)] };
    let cache = (!from_step).then_some(0);
    let op = AttentionOp { heads: case.heads, scores: case.scores, mask: case.mask, cache };
    let mut step_blocks = StepBlocks::default();
    step_blocks.fill(&batch);
    let exact = exact(case, &packed);
    for arch in archs() {
        let mut out = poisoned(exact.len());
        let context = AttentionContext { arch, batch: &batch, caches: &caches, step_blocks: &step_blocks };
        op.run(context, &mut AttentionScratch::default(), &qkv, &mut out);
        let what =
            format!("{:?}, {:?}, blocks of {}, {} texts", case.heads, case.mask, case.block_size, case.texts.len());
        assert_close(&out, &exact, &what);
    }
}

#[test]
fn paged_attention() {
    let mut rng = fastrand::Rng::with_seed(2);
    for i in 0..60 {
        let mask = if i % 2 == 0 { Mask::Causal } else { Mask::Sliding { window: rng.u64(1..40) } };
        let case = random_case(&mut rng, mask);
        check(&mut rng, &case, false);
    }
}

#[test]
fn attention_within_the_step() {
    let mut rng = fastrand::Rng::with_seed(3);
    for i in 0..40 {
        let mut case = random_case(&mut rng, if i % 2 == 0 { Mask::Bidirectional } else { Mask::Causal });
        case.texts.iter_mut().for_each(|t| t.query = t.context);
        check(&mut rng, &case, true);
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut rng = fastrand::Rng::with_seed(4);
    let mut case = random_case(&mut rng, Mask::Causal);
    case.scores = Scores { scale: 40.0, softcap: None };
    check(&mut rng, &case, false);
}
