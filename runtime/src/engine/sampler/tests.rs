#![allow(clippy::unwrap_used)]
use super::*;
use crate::engine::SamplingParams;
use proptest::prelude::*;
use std::sync::Arc;

fn row(params: SamplingParams) -> RowSampling {
    RowSampling {
        params: Arc::new(params),
        seed: 42,
        step: 0,
        prompt_token_ids: Arc::new([]),
        output_token_ids: Vec::new(),
        forbidden_token_ids: Vec::new(),
    }
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

fn choose_from(logits: &[f32], row: &RowSampling) -> u32 {
    sample(&mut logits.to_vec(), row).token_id
}

/// Shares of each token over many steps.
fn shares(logits: &[f32], params: SamplingParams) -> Vec<f64> {
    let mut row = row(params);
    let mut counts = vec![0.0; logits.len()];
    let draws = 20_000;
    for step in 0..draws {
        row.step = step;
        counts[choose_from(logits, &row) as usize] += 1.0 / draws as f64;
    }
    counts
}

/// Within five standard deviations of a fair draw.
fn assert_near(actual: &[f64], expected: &[f64]) {
    for (actual, expected) in actual.iter().zip(expected) {
        let slack = 5.0 * (expected * (1.0 - expected) / 20_000.0).sqrt() + 1e-9;
        assert!((actual - expected).abs() <= slack, "{actual:.4} is not {expected:.4}");
    }
}

/// Logits whose softmax is these shares.
fn logits_of(shares: &[f64]) -> Vec<f32> {
    shares.iter().map(|share| share.ln() as f32 + 3.0).collect()
}

#[test]
fn greedy_takes_the_likeliest_and_the_lowest_of_equals() {
    assert_eq!(choose_from(&[1.0, 3.0, 2.0], &row(greedy())), 1);
    assert_eq!(choose_from(&[1.0, 3.0, 3.0], &row(greedy())), 1);
    let nearly = SamplingParams { temperature: 1e-6, ..SamplingParams::default() };
    assert_eq!(choose_from(&[0.0, 0.1], &row(nearly)), 1);
}

#[test]
fn what_is_not_a_number_is_impossible() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for temperature in [0.0, 1.0, inf] {
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        assert_eq!(choose_from(&[nan, -inf, 0.5, nan], &row(params.clone())), 2, "{temperature}");
        assert_eq!(choose_from(&[nan, -inf, nan], &row(params.clone())), 0, "{temperature}");
        let forbidding = RowSampling { forbidden_token_ids: vec![0, 1], ..row(params) };
        assert_eq!(choose_from(&[nan, nan, nan], &forbidding), 2);
    }
    assert_eq!(choose_from(&[0.0, inf, inf], &row(greedy())), 1);
    let not_a_temperature = SamplingParams { temperature: nan, ..SamplingParams::default() };
    assert_eq!(choose_from(&[0.0, 1.0], &row(not_a_temperature)), 1);
}

#[test]
fn shares_are_those_of_the_softmax() {
    let expected = [0.5, 0.25, 0.15, 0.1];
    assert_near(&shares(&logits_of(&expected), SamplingParams::default()), &expected);
}

#[test]
fn temperature_sharpens_and_flattens() {
    let logits = logits_of(&[0.8, 0.2]);
    let sharp = SamplingParams { temperature: 0.5, ..SamplingParams::default() };
    assert_near(&shares(&logits, sharp), &[16.0 / 17.0, 1.0 / 17.0]);
    let flat = SamplingParams { temperature: 2.0, ..SamplingParams::default() };
    assert_near(&shares(&logits, flat), &[2.0 / 3.0, 1.0 / 3.0]);
}

#[test]
fn top_k_top_p_and_min_p_cut_where_they_say() {
    let logits = logits_of(&[0.1, 0.4, 0.2, 0.3]);
    let params = SamplingParams::default();
    let top_k = SamplingParams { top_k: 2, ..params.clone() };
    assert_near(&shares(&logits, top_k), &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
    // 0.4 + 0.3 is not yet 0.75, so 0.2 belongs to it.
    let top_p = SamplingParams { top_p: 0.75, ..params.clone() };
    assert_near(&shares(&logits, top_p), &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
    let min_p = SamplingParams { min_p: 0.6, ..params.clone() };
    assert_near(&shares(&logits, min_p), &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
    // top-p counts within what top-k left: 4/7 reaches a half.
    let both = SamplingParams { top_k: 2, top_p: 0.5, ..params.clone() };
    assert_near(&shares(&logits, both), &[0.0, 1.0, 0.0, 0.0]);
    for least in [SamplingParams { top_p: 0.0, ..params.clone() }, SamplingParams { min_p: 2.0, ..params }] {
        assert_near(&shares(&logits, least), &[0.0, 1.0, 0.0, 0.0]);
    }
}

#[test]
fn penalties_are_vllms() {
    let logits = [2.0, -2.0, 1.0, 0.0];
    let penalized = |params: SamplingParams| {
        let mut row = row(params);
        row.prompt_token_ids = Arc::new([0, 0]);
        row.output_token_ids = vec![1, 2, 2];
        let mut logits = logits;
        apply_penalties(&mut logits, &row);
        logits
    };
    let params = SamplingParams::default();
    assert_eq!(penalized(SamplingParams { repetition_penalty: 2.0, ..params.clone() }), [1.0, -4.0, 0.5, 0.0]);
    assert_eq!(penalized(SamplingParams { presence_penalty: 0.5, ..params.clone() }), [2.0, -2.5, 0.5, 0.0]);
    assert_eq!(penalized(SamplingParams { frequency_penalty: 0.5, ..params.clone() }), [2.0, -2.5, 0.0, 0.0]);
    assert_eq!(
        penalized(SamplingParams { repetition_penalty: 2.0, presence_penalty: 1.0, frequency_penalty: 1.0, ..params }),
        [1.0, -6.0, -2.5, 0.0]
    );
}

#[test]
fn bias_and_bans_decide() {
    let biased = SamplingParams { logit_bias: vec![(2, 100.0), (77, 100.0)], ..greedy() };
    assert_eq!(choose_from(&[5.0, 1.0, 0.0], &row(biased)), 2);
    let banned = SamplingParams { logit_bias: vec![(0, f32::NEG_INFINITY)], ..greedy() };
    assert_eq!(choose_from(&[5.0, 1.0, 0.0], &row(banned.clone())), 1);
    let forbidding = RowSampling { forbidden_token_ids: vec![1, 77], ..row(banned) };
    assert_eq!(choose_from(&[5.0, 1.0, 0.0], &forbidding), 2);
}

#[test]
fn logprobs_are_of_the_model_whatever_is_asked() {
    let shares = [0.5, 0.2, 0.2, 0.1];
    let params = SamplingParams { logprobs: Some(3), logit_bias: vec![(3, 50.0)], top_k: 1, ..greedy() };
    let token = sample(&mut logits_of(&shares), &row(params));
    let logprob = token.logprob.unwrap();
    assert_eq!((token.token_id, logprob.token_id, logprob.rank), (3, 3, 4));
    assert!((logprob.logprob - 0.1_f32.ln()).abs() < 1e-5);
    let top: Vec<_> = token.top_logprobs.iter().map(|top| (top.token_id, top.rank)).collect();
    assert_eq!(top, [(0, 1), (1, 2), (2, 3)]);
    assert!((token.top_logprobs[0].logprob - 0.5_f32.ln()).abs() < 1e-5);

    let none = sample(&mut logits_of(&shares), &row(SamplingParams { logprobs: Some(0), ..greedy() }));
    assert!(none.logprob.is_some() && none.top_logprobs.is_empty());
    let unasked = sample(&mut logits_of(&shares), &row(greedy()));
    assert!(unasked.logprob.is_none());
    let too_many = sample(&mut logits_of(&shares), &row(SamplingParams { logprobs: Some(9), ..greedy() }));
    assert_eq!(too_many.top_logprobs.len(), 4);
}

#[test]
fn seed_and_step_alone_make_the_number() {
    let all: Vec<f64> = (0..1000).flat_map(|seed| (0..10).map(move |step| uniform(seed, step))).collect();
    assert!(all.iter().all(|x| (0.0..1.0).contains(x)));
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    assert!((mean - 0.5).abs() < 0.015, "{mean}");
    let distinct: std::collections::HashSet<u64> = all.iter().map(|x| x.to_bits()).collect();
    assert_eq!(distinct.len(), all.len());
    // The first output of SplitMix64's reference implementation from seed 0.
    assert_eq!(split_mix(0), 0xe220_a839_7b1d_cdaf);
    // Pinned: a seed must give the same text in every release.
    assert_eq!(format!("{:.6} {:.6}", uniform(0, 0), uniform(42, 7)), "0.652448 0.086032");
    assert_ne!(choice_seed(1, 0), choice_seed(1, 1));
}

/// What the fast paths must equal: sort everything, cut, draw.
fn reference(logits: &[f32], row: &RowSampling) -> u32 {
    let params = &row.params;
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut all: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(id, logit)| (id as u32, f64::from(Weigh::new(max, params.temperature).of(*logit))))
        .collect();
    let by_weight = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    all.sort_by(by_weight);
    all.retain(|(_, weight)| *weight >= f64::from(params.min_p));
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let total: f64 = all.iter().map(|(_, weight)| weight).sum();
        let mut sum = 0.0;
        let enough = all.iter().position(|(_, weight)| {
            sum += weight;
            sum >= f64::from(params.top_p) * total
        });
        all.truncate(enough.map_or(all.len(), |at| at + 1));
    }
    if params.top_k == 0 || params.top_k as usize >= logits.len() {
        all.sort_by_key(|(id, _)| *id);
    }
    let total: f64 = all.iter().map(|(_, weight)| weight).sum();
    let target = uniform(row.seed, row.step) * total;
    let mut sum = 0.0;
    let found = all.iter().find(|(_, weight)| {
        sum += weight;
        sum > target
    });
    found.or(all.last()).unwrap().0
}

proptest! {
    #[test]
    fn the_fast_way_is_the_slow_way(
        // Few distinct values, so that there are ties; more tokens than the first guess at a nucleus.
        logits in prop::collection::vec((-40_i32..40).prop_map(|x| x as f32 / 10.0), 1..2000),
        temperature in 0.1_f32..4.0,
        top_k in prop_oneof![Just(0_u32), 1_u32..3000],
        top_p in prop_oneof![Just(1.0_f32), 0.0_f32..1.0],
        min_p in prop_oneof![Just(0.0_f32), 0.0_f32..1.0],
        seed in any::<u64>(),
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
        let row = RowSampling { seed, ..row(params) };
        let expected = reference(&logits, &row);
        prop_assert_eq!(choose_from(&logits, &row), expected);
    }

    #[test]
    fn the_likeliest_are_those_of_a_full_sort(
        logits in prop::collection::vec((-9_i32..9).prop_map(|x| x as f32), 1..300),
        count in 1_usize..400,
    ) {
        let mut sorted: Vec<Candidate> = candidates(&logits).collect();
        sorted.sort_by(likeliest_first);
        sorted.truncate(count);
        let ids = |all: &[Candidate]| all.iter().map(|candidate| candidate.token_id).collect::<Vec<_>>();
        prop_assert_eq!(ids(&likeliest(&logits, count)), ids(&sorted));
    }

    #[test]
    fn anything_at_all_gives_a_token(
        logits in prop::collection::vec(prop::num::f32::ANY, 1..50),
        floats in prop::array::uniform6(prop::num::f32::ANY),
        top_k in any::<u32>(),
        logprobs in prop::option::of(0_u32..60),
        ids in prop::collection::vec(0_u32..60, 0..10),
    ) {
        let [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty] = floats;
        let logit_bias = ids.iter().map(|id| (*id, temperature)).collect();
        let params = SamplingParams {
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, logprobs,
            ..SamplingParams::default()
        };
        let mut row = row(params);
        row.output_token_ids = ids;
        let token = sample(&mut logits.clone(), &row);
        prop_assert!((token.token_id as usize) < logits.len());
        prop_assert!(token.logprob.iter().chain(&token.top_logprobs).all(|top| top.logprob.is_finite()));
    }
}
