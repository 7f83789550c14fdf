//! Choosing a token on the host. Order of operations is vLLM's: raw logprobs, penalties, bias, temperature, min_p,
//! top-k, top-p.

mod weights;

use super::{RowSampling, SampledToken, TokenLogprob};
use std::cmp::Ordering;
use weights::Weigh;

/// Below this temperature sampling is greedy, as in vLLM.
const GREEDY_TEMPERATURE: f32 = 1e-5;

/// Candidates that are sorted rather than halved once more.
const NUCLEUS_SORTED: usize = 32;

/// Tokens that are summed before the next look at where the drawn number lies.
const PICK_BLOCK: usize = 256;

/// Choose the next token from `logits` (`[vocab]`), which are changed in place.
///
/// Never fails: NaN counts as impossible, +inf as the largest finite number, and when no token is possible the lowest
/// id that is not forbidden is taken. Ties go to the lower id. `logits` must not be empty.
pub fn sample(logits: &mut [f32], row: &RowSampling) -> SampledToken {
    for logit in logits.iter_mut() {
        *logit = tame(*logit);
    }
    let raw = row.params.logprobs.map(|_| logits.to_vec());
    apply_penalties(logits, row);
    apply_bias(logits, row);
    let choice = choose(logits, row);
    let token_id = choice.unwrap_or_else(|| first_allowed(logits.len(), &row.forbidden_token_ids));
    match raw {
        None => SampledToken { token_id, logprob: None, top_logprobs: Vec::new() },
        Some(raw) => {
            let (logprob, top_logprobs) = logprobs(&raw, token_id, row.params.logprobs.unwrap_or(0) as usize);
            SampledToken { token_id, logprob: Some(logprob), top_logprobs }
        }
    }
}

fn tame(logit: f32) -> f32 {
    // Adding 0 makes -0 equal to 0 in every order.
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) + 0.0 }
}

fn apply_penalties(logits: &mut [f32], row: &RowSampling) {
    let params = &*row.params;
    if params.repetition_penalty != 1.0 {
        let mut seen = vec![false; logits.len()];
        for &token_id in row.prompt_token_ids.iter().chain(&row.output_token_ids) {
            let (Some(seen), Some(logit)) = (seen.get_mut(token_id as usize), logits.get_mut(token_id as usize)) else {
                continue;
            };
            if !std::mem::replace(seen, true) {
                let penalty = params.repetition_penalty;
                *logit = tame(if *logit > 0.0 { *logit / penalty } else { *logit * penalty });
            }
        }
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        let mut counts = vec![0_u32; logits.len()];
        for &token_id in &row.output_token_ids {
            if let Some(count) = counts.get_mut(token_id as usize) {
                *count += 1;
            }
        }
        for (logit, &count) in logits.iter_mut().zip(&counts).filter(|(_, count)| **count > 0) {
            *logit = tame(*logit - params.frequency_penalty * count as f32 - params.presence_penalty);
        }
    }
}

fn apply_bias(logits: &mut [f32], row: &RowSampling) {
    for &(token_id, bias) in &row.params.logit_bias {
        if let Some(logit) = logits.get_mut(token_id as usize) {
            *logit = tame(*logit + bias);
        }
    }
    for &token_id in &row.forbidden_token_ids {
        if let Some(logit) = logits.get_mut(token_id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// `None` when no token is possible. Leaves weights in place of logits when it had to weigh them all.
fn choose(logits: &mut [f32], row: &RowSampling) -> Option<u32> {
    let greatest = weights::greatest(logits);
    if greatest == f32::NEG_INFINITY {
        return None;
    }
    let params = &*row.params;
    // Not a plain `<`: a temperature that is not a number is greedy too.
    let sampled = params.temperature >= GREEDY_TEMPERATURE;
    if !sampled {
        return logits.iter().position(|&logit| logit == greatest).map(|at| at as u32);
    }
    let weigh = Weigh::new(greatest, params.temperature);
    let uniform = uniform(row.seed, row.step);
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < logits.len() {
        let mut kept = likeliest(logits, top_k);
        kept.iter_mut().for_each(|candidate| candidate.value = weigh.of(candidate.value));
        // Both keep a first part of one order, so min_p may as well come after.
        kept.retain(|candidate| passes_min_p(candidate.value, params.min_p));
        if params.top_p < 1.0 {
            let target = f64::from(params.top_p.max(0.0)) * total(&kept);
            kept.truncate(reach(&kept, target) + 1);
        }
        return pick(&kept, uniform);
    }
    weigh.all(logits);
    if params.min_p > 0.0 {
        logits.iter_mut().filter(|weight| !passes_min_p(**weight, params.min_p)).for_each(|weight| *weight = 0.0);
    }
    if params.top_p < 1.0 {
        keep_nucleus(logits, params.top_p);
    }
    pick_from_all(logits, uniform)
}

/// The likeliest token weighs 1, so min_p bounds the weight itself; the likeliest passes whatever the bound.
fn passes_min_p(weight: f32, min_p: f32) -> bool {
    weight > 0.0 && (weight >= min_p || weight >= 1.0)
}

fn first_allowed(vocab: usize, forbidden: &[u32]) -> u32 {
    (0..vocab as u32).find(|token_id| !forbidden.contains(token_id)).unwrap_or(0)
}

#[derive(Clone, Copy)]
struct Candidate {
    token_id: u32,
    /// A logit while tokens are compared, a weight once they are weighed: the order is the same.
    value: f32,
}

/// Likeliest first, then lowest id: a total order, since values are never NaN.
fn likeliest_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.value.total_cmp(&a.value).then(a.token_id.cmp(&b.token_id))
}

fn candidates(logits: &[f32]) -> impl Iterator<Item = Candidate> + '_ {
    logits.iter().enumerate().map(|(id, &logit)| Candidate { token_id: id as u32, value: logit })
}

/// The `count` (at least 1) likeliest tokens, best first, in one pass that keeps at most twice as many.
fn likeliest(logits: &[f32], count: usize) -> Vec<Candidate> {
    let mut kept: Vec<Candidate> = Vec::with_capacity(count.min(logits.len()) * 2);
    let mut bar = f32::NEG_INFINITY;
    for candidate in candidates(logits) {
        // A later token that only equals the bar has the higher id and loses the tie.
        if candidate.value > bar || kept.len() < count {
            kept.push(candidate);
            if kept.len() >= count * 2 {
                kept.select_nth_unstable_by(count - 1, likeliest_first);
                kept.truncate(count);
                bar = kept[count - 1].value;
            }
        }
    }
    kept.sort_unstable_by(likeliest_first);
    kept.truncate(count);
    kept
}

/// Leave a weight only to the fewest likeliest tokens whose share reaches `top_p`, at least one.
fn keep_nucleus(weights: &mut [f32], top_p: f32) {
    // All tokens below the bar weigh less than 1 - top_p together, and so less than the share of the total that may be
    // left out: none of them is in the nucleus. The likeliest weighs 1 and is above it.
    let bar = ((1.0 - top_p) / weights.len() as f32).max(0.0);
    let mut kept: Vec<Candidate> = candidates(weights).filter(|candidate| candidate.value > bar).collect();
    let Some(end) = nucleus_end(&mut kept, top_p, weights::sum(weights)) else { return };
    for (weight, token_id) in weights.iter_mut().zip(0..) {
        if likeliest_first(&Candidate { token_id, value: *weight }, &end).is_gt() {
            *weight = 0.0;
        }
    }
}

/// The last candidate, in order of likelihood, that is needed to weigh `top_p` of `total`. Halves instead of sorting:
/// a flat distribution needs tens of thousands. `None` of none.
fn nucleus_end(candidates: &mut [Candidate], top_p: f32, total: f64) -> Option<Candidate> {
    let mut target = f64::from(top_p.max(0.0)) * total;
    let mut rest = candidates;
    while rest.len() > NUCLEUS_SORTED {
        // Most are peaked: the end is among the first few.
        let middle = rest.len() / 8;
        rest.select_nth_unstable_by(middle, likeliest_first);
        let (likelier, others) = rest.split_at_mut(middle + 1);
        let sum = self::total(likelier);
        if sum >= target {
            rest = likelier;
        } else {
            target -= sum;
            rest = others;
        }
    }
    rest.sort_unstable_by(likeliest_first);
    rest.get(reach(rest, target)).copied()
}

/// Index of the candidate with which the running sum reaches `target`, or of the last.
fn reach(candidates: &[Candidate], target: f64) -> usize {
    let mut sum = 0.0;
    let reached = candidates.iter().position(|candidate| {
        sum += f64::from(candidate.value);
        sum >= target
    });
    reached.unwrap_or(candidates.len().saturating_sub(1))
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| f64::from(candidate.value)).sum()
}

fn pick(kept: &[Candidate], uniform: f64) -> Option<u32> {
    let target = uniform * total(kept);
    let mut sum = 0.0;
    let picked = kept.iter().find(|candidate| {
        sum += f64::from(candidate.value);
        sum > target
    });
    picked.or(kept.last()).map(|candidate| candidate.token_id)
}

/// Finds the block in which the running sum passes the drawn number, then the token in it.
fn pick_from_all(weights: &[f32], uniform: f64) -> Option<u32> {
    let sums: Vec<f64> = weights.chunks(PICK_BLOCK).map(weights::sum).collect();
    let target = uniform * sums.iter().sum::<f64>();
    let mut before = 0.0;
    for (block, sum) in sums.iter().enumerate() {
        if before + sum > target {
            let start = block * PICK_BLOCK;
            let weights = &weights[start..weights.len().min(start + PICK_BLOCK)];
            return pick_within(weights, target - before).map(|at| (start + at) as u32);
        }
        before += sum;
    }
    // Rounding took the target past the end.
    weights.iter().rposition(|&weight| weight > 0.0).map(|at| at as u32)
}

fn pick_within(weights: &[f32], target: f64) -> Option<usize> {
    let mut sum = 0.0;
    let passed = weights.iter().position(|&weight| {
        sum += f64::from(weight);
        weight > 0.0 && sum > target
    });
    passed.or_else(|| weights.iter().rposition(|&weight| weight > 0.0))
}

/// A number in 0..1 from a counter, so that what else runs in a step cannot change it.
/// Two rounds of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
pub(super) fn uniform(seed: u64, step: u64) -> f64 {
    let bits = split_mix(split_mix(seed) ^ step);
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// The seed of one of a request's outputs.
pub(super) fn choice_seed(seed: u64, choice_index: u32) -> u64 {
    split_mix(seed ^ u64::from(choice_index).rotate_right(32))
}

fn split_mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Logprob of `token_id` and of the `count` likeliest tokens.
fn logprobs(raw: &[f32], token_id: u32, count: usize) -> (TokenLogprob, Vec<TokenLogprob>) {
    let normalizer = log_sum_exp(raw);
    let logprob_of = |id: u32| {
        let logit = raw.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
        // -inf - -inf when nothing is possible; JSON has no place for either, so the least finite number.
        let logprob = (f64::from(logit) - normalizer) as f32;
        if logprob.is_finite() { logprob } else { f32::MIN }
    };
    let (at, value) = (token_id as usize, raw.get(token_id as usize).copied().unwrap_or(f32::NEG_INFINITY));
    let equal_before = raw[..at.min(raw.len())].iter().filter(|&&other| other == value).count();
    let rank = 1 + raw.iter().filter(|&&other| other > value).count() + equal_before;
    let likeliest = if count == 0 { Vec::new() } else { likeliest(raw, count.min(raw.len())) };
    let top = likeliest.iter().zip(1..).map(|(candidate, rank)| {
        let token_id = candidate.token_id;
        TokenLogprob { token_id, logprob: logprob_of(token_id), rank }
    });
    (TokenLogprob { token_id, logprob: logprob_of(token_id), rank: rank as u32 }, top.collect())
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let greatest = weights::greatest(logits);
    if greatest == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let mut weights = logits.to_vec();
    Weigh::new(greatest, 1.0).all(&mut weights);
    f64::from(greatest) + weights::sum(&weights).ln()
}

#[cfg(test)]
mod tests;
