//! Choosing a token on the host. Order of operations is vLLM's: raw logprobs, penalties, bias, temperature, min_p,
//! top-k, top-p.

use super::{RowSampling, SampledToken, SamplingParams, TokenLogprob};
use std::cmp::Ordering;

/// Below this temperature sampling is greedy, as in vLLM.
const GREEDY_TEMPERATURE: f32 = 1e-5;

/// First guess at how many tokens top-p keeps; grown by [`NUCLEUS_GROWTH`] while it is too small.
const NUCLEUS_START: usize = 128;
const NUCLEUS_GROWTH: usize = 8;

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
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
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

/// `None` when no token is possible.
fn choose(logits: &[f32], row: &RowSampling) -> Option<u32> {
    let (best, max) = argmax(logits)?;
    // Not a plain `<`: a temperature that is not a number is greedy too.
    let sampled = row.params.temperature >= GREEDY_TEMPERATURE;
    if !sampled {
        return Some(best);
    }
    let weigh = Weigh { max, temperature: row.params.temperature };
    let kept = truncate(logits, &row.params, weigh);
    let uniform = uniform(row.seed, row.step);
    Some(pick(&kept, uniform).unwrap_or(best))
}

/// Highest logit, lowest id first. `None` when all are -inf.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&logit| logit == max).map(|at| (at as u32, max))
}

fn first_allowed(vocab: usize, forbidden: &[u32]) -> u32 {
    (0..vocab as u32).find(|token_id| !forbidden.contains(token_id)).unwrap_or(0)
}

/// Unnormalised probability after temperature; the likeliest token has 1.
#[derive(Clone, Copy)]
struct Weigh {
    max: f32,
    temperature: f32,
}

impl Weigh {
    fn of(self, logit: f32) -> f32 {
        // max(0) also turns the NaN of -inf over an infinite temperature into "impossible".
        ((logit - self.max) / self.temperature).exp().max(0.0)
    }
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

/// min_p, then top-k, then top-p over what is left; values are weights. Never empty: the likeliest passes each.
fn truncate(logits: &[f32], params: &SamplingParams, weigh: Weigh) -> Vec<Candidate> {
    let top_k = params.top_k as usize;
    let all_or_likeliest =
        if top_k > 0 && top_k < logits.len() { likeliest(logits, top_k) } else { candidates(logits).collect() };
    // The likeliest token weighs 1, so min_p bounds the weight itself. A prefix of one order each, min_p and top-k commute.
    let least = params.min_p.min(1.0);
    let mut kept = all_or_likeliest;
    kept.retain_mut(|candidate| {
        candidate.value = weigh.of(candidate.value);
        candidate.value > 0.0 && (candidate.value >= least || candidate.value >= 1.0)
    });
    if params.top_p < 1.0 {
        keep_nucleus(&mut kept, params.top_p);
    }
    kept
}

/// Keep the fewest likeliest candidates whose share reaches `top_p`, at least one. Sorts only as many as it must.
fn keep_nucleus(kept: &mut Vec<Candidate>, top_p: f32) {
    let total: f64 = kept.iter().map(|candidate| f64::from(candidate.value)).sum();
    let target = f64::from(top_p.max(0.0)) * total;
    let (mut done, mut sum) = (0, 0.0);
    let mut size = NUCLEUS_START;
    while done < kept.len() {
        let rest = &mut kept[done..];
        let count = size.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count - 1, likeliest_first);
        }
        rest[..count].sort_unstable_by(likeliest_first);
        for (at, candidate) in rest[..count].iter().enumerate() {
            sum += f64::from(candidate.value);
            if sum >= target {
                kept.truncate(done + at + 1);
                return;
            }
        }
        done += count;
        size *= NUCLEUS_GROWTH;
    }
}

fn pick(kept: &[Candidate], uniform: f64) -> Option<u32> {
    let total: f64 = kept.iter().map(|candidate| f64::from(candidate.value)).sum();
    let target = uniform * total;
    let mut sum = 0.0;
    for candidate in kept {
        sum += f64::from(candidate.value);
        if sum > target {
            return Some(candidate.token_id);
        }
    }
    kept.last().map(|candidate| candidate.token_id)
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
    let chosen = Candidate { token_id, value: raw.get(token_id as usize).copied().unwrap_or(f32::NEG_INFINITY) };
    let rank = 1 + candidates(raw).filter(|other| likeliest_first(other, &chosen) == Ordering::Less).count();
    let likeliest = if count == 0 { Vec::new() } else { likeliest(raw, count.min(raw.len())) };
    let top = likeliest.iter().zip(1..).map(|(candidate, rank)| {
        let token_id = candidate.token_id;
        TokenLogprob { token_id, logprob: logprob_of(token_id), rank }
    });
    (TokenLogprob { token_id, logprob: logprob_of(token_id), rank: rank as u32 }, top.collect())
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if max == f64::NEG_INFINITY {
        return max;
    }
    max + logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests;
