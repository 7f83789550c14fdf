//! Tokens are chosen as the parameters say: by the device's own logits, against the host sampler and the definition.

use super::steps::{Piece, Places, batch, random_tokens, sampling, tokens};
use super::{Device, Failure, Inspect, Model, Outcome, Sizes};
use mserve_runtime::engine::{RowSampling, SampledToken, SamplingParams, TokenLogprob, sample};
use std::sync::Arc;

const CONTEXT: usize = 21;

/// Many rows with the same context, so that only the way of choosing differs.
struct Rows<B> {
    backend: B,
    text: Vec<u32>,
    places: Places,
}

impl<B: Inspect> Rows<B> {
    fn new<D: Device<Backend = B>>(device: &D, model: &Model, rows: usize) -> Result<Self, Failure> {
        let (places, longest) = (Places { sequences: rows }, 2 * CONTEXT);
        let sizes = Sizes {
            max_model_len: 64,
            max_num_seqs: rows,
            max_num_batched_tokens: rows.max(64),
            num_blocks: places.blocks(longest.max(64)),
        };
        let mut backend = device.load(model, sizes)?;
        let text = random_tokens(5, CONTEXT, model.spec.vocab_size as usize);
        for sequence in 0..rows {
            let piece = Piece { sequence, tokens: &text, start: 0, end: CONTEXT - 1, sampling: None };
            backend.step(&batch(&[piece], places))?;
        }
        Ok(Self { backend, text, places })
    }

    /// The token after the context, chosen in each of these ways.
    fn choose(&mut self, ways: &[RowSampling]) -> Result<(Vec<SampledToken>, Vec<Vec<f32>>), Failure> {
        let piece = |(sequence, way): (usize, &RowSampling)| Piece {
            sequence,
            tokens: &self.text,
            start: CONTEXT - 1,
            end: CONTEXT,
            sampling: Some(way.clone()),
        };
        let pieces: Vec<Piece<'_>> = ways.iter().enumerate().map(piece).collect();
        let (outputs, logits) = self.backend.step_and_logits(&batch(&pieces, self.places))?;
        Ok((tokens(outputs)?, logits))
    }
}

/// How far choices were from the host sampler's over the same logits.
#[derive(Debug, Default)]
struct Tally {
    rows: usize,
    /// Sampled rows with another token, which is possible too: the device may go through the tokens in another order.
    parted: usize,
    worst_logprob: f32,
}

impl Tally {
    fn check(&mut self, way: &RowSampling, logits: &[f32], found: &SampledToken, noise: f32) -> Outcome {
        let wanted = sample(&mut logits.to_vec(), way);
        self.rows += 1;
        if wanted.token_id != found.token_id {
            self.parted += 1;
            if way.params.temperature < 1e-5 || !is_possible(logits, way, found.token_id) {
                return Err(format!("{found:?}, not {wanted:?}, for {:?}", way.params).into());
            }
        } else {
            self.logprob(wanted.logprob.as_slice(), found.logprob.as_slice(), noise)?;
        }
        self.logprob(&wanted.top_logprobs, &found.top_logprobs, noise)
    }

    fn logprob(&mut self, wanted: &[TokenLogprob], found: &[TokenLogprob], noise: f32) -> Outcome {
        let same = |(w, f): (&TokenLogprob, &TokenLogprob)| (w.token_id, w.rank) == (f.token_id, f.rank);
        let apart = wanted.iter().zip(found).map(|(w, f)| (w.logprob - f.logprob).abs()).fold(0.0, f32::max);
        self.worst_logprob = self.worst_logprob.max(apart);
        match wanted.len() == found.len() && wanted.iter().zip(found).all(same) && apart <= noise {
            true => Ok(()),
            false => Err(format!("logprobs {found:?}, not {wanted:?}").into()),
        }
    }
}

fn all_ways(vocab: usize, count: usize) -> Vec<RowSampling> {
    let mut random = fastrand::Rng::with_seed(17);
    let mut ways = Vec::new();
    for number in 0..count {
        let mut one_of = |choices: &[f32]| choices[random.usize(0..choices.len())];
        let mut params = SamplingParams {
            temperature: one_of(&[0.0, 1e-6, 0.3, 1.0, 2.0]),
            top_p: one_of(&[1.0, 0.95, 0.5, 0.01, 0.0]),
            min_p: one_of(&[0.0, 0.0, 0.02, 0.5, 1.0]),
            repetition_penalty: one_of(&[1.0, 1.3, 0.8]),
            presence_penalty: one_of(&[0.0, 1.5, -1.0]),
            frequency_penalty: one_of(&[0.0, 0.4, -0.4]),
            ..SamplingParams::default()
        };
        params.top_k = [0, 0, 1, 7, 300, u32::MAX][random.usize(0..6)];
        params.logprobs = [None, Some(0), Some(1), Some(20)][random.usize(0..4)];
        let mut some = |most: usize| random_tokens(number as u64 ^ 0x55, random.usize(0..=most), vocab);
        let (prompt, output, mut forbidden) = (some(40), some(30), some(3));
        if let Some(&again) = output.first() {
            forbidden.push(again);
        }
        params.logit_bias = some(5).into_iter().zip([4.0, -4.0, 1.5, 30.0, -100.0]).collect();
        ways.push(RowSampling {
            step: output.len() as u64,
            prompt_token_ids: prompt.into(),
            output_token_ids: output,
            forbidden_token_ids: forbidden,
            ..sampling(params, number as u64)
        });
    }
    ways
}

/// Every combination of parameters, `steps` times `rows` of them.
pub fn as_the_host_chooses<D: Device>(device: &D, model: &Model, rows: usize, steps: usize) -> Outcome {
    let noise = device.noise().sampling;
    let mut on = Rows::new(device, model, rows)?;
    let mut tally = Tally::default();
    for ways in all_ways(model.spec.vocab_size as usize, rows * steps).chunks(rows) {
        let (found, logits) = on.choose(ways)?;
        for ((way, logits), found) in ways.iter().zip(&logits).zip(&found) {
            tally.check(way, logits, found, noise)?;
        }
    }
    println!("{}: {tally:?}", model.name);
    Ok(())
}

/// Whether a token is among those that the parameters leave; on their borders f32 decides either way.
fn is_possible(logits: &[f32], way: &RowSampling, token_id: u32) -> bool {
    let mut adjusted = logits.to_vec();
    let params = &*way.params;
    let output = &way.output_token_ids;
    for (id, x) in (0..).zip(&mut adjusted) {
        let count = output.iter().filter(|o| **o == id).count() as f32;
        if params.repetition_penalty != 1.0 && (count > 0.0 || way.prompt_token_ids.contains(&id)) {
            *x = if *x > 0.0 { *x / params.repetition_penalty } else { *x * params.repetition_penalty };
        }
        if count > 0.0 {
            *x = *x - params.frequency_penalty * count - params.presence_penalty;
        }
        params.logit_bias.iter().filter(|bias| bias.0 == id).for_each(|bias| *x += bias.1);
        if way.forbidden_token_ids.contains(&id) {
            *x = f32::NEG_INFINITY;
        }
    }
    let wider = SamplingParams { top_p: params.top_p + 1e-4, min_p: params.min_p * (1.0 - 1e-5), ..params.clone() };
    let (shares, id) = (shares(&adjusted, &wider), token_id as usize);
    // Equal to the last that top_k keeps is as good.
    shares[id] > 0.0 || shares.iter().zip(&adjusted).any(|(share, x)| *share > 0.0 && *x == adjusted[id])
}

/// A text of several tokens whose counts the device keeps itself, two of them side by side with the same parameters.
pub fn counts_are_kept<D: Device>(device: &D, model: &Model, count: usize) -> Outcome {
    let noise = device.noise().sampling;
    let vocab = model.spec.vocab_size as usize;
    let mut on = Rows::new(device, model, 2)?;
    let params = Arc::new(SamplingParams {
        temperature: 0.0,
        repetition_penalty: 1.2,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        logit_bias: vec![(3, 2.0), (9, -5.0)],
        logprobs: Some(3),
        ..SamplingParams::default()
    });
    let mut ways = [1, 2].map(|seed| RowSampling {
        params: Arc::clone(&params),
        prompt_token_ids: random_tokens(seed, 12, vocab).into(),
        ..sampling(SamplingParams::default(), 7)
    });
    let mut tally = Tally::default();
    for step in 0..count {
        let (found, logits) = on.choose(&ways)?;
        for ((way, logits), found) in ways.iter_mut().zip(&logits).zip(&found) {
            tally.check(way, logits, found, noise).map_err(|e| format!("step {step}: {e}"))?;
            way.output_token_ids.push(found.token_id);
            way.step += 1;
        }
    }
    println!("{}: counts over {count} steps: {tally:?}", model.name);
    Ok(())
}

/// Shares of tokens among many draws against what the parameters say, in float64 from the definition.
pub fn shares_are_right<D: Device>(device: &D, model: &Model, rows: usize, steps: usize) -> Outcome {
    let plain = SamplingParams::default();
    let kinds = [
        ("temperature 1", plain.clone()),
        (
            "temperature 0.6, top_k 40, top_p 0.9",
            SamplingParams { temperature: 0.6, top_k: 40, top_p: 0.9, ..plain.clone() },
        ),
        ("top_p 0.7", SamplingParams { top_p: 0.7, ..plain.clone() }),
        ("temperature 1.5, min_p 0.05", SamplingParams { temperature: 1.5, min_p: 0.05, ..plain.clone() }),
        ("top_k 1000", SamplingParams { top_k: 1000, ..plain }),
    ];
    let mut on = Rows::new(device, model, rows)?;
    for (name, params) in kinds {
        let (mut counts, mut logits) = (vec![0_u32; model.spec.vocab_size as usize], Vec::new());
        for step in 0..steps {
            let way = |row: usize| sampling(params.clone(), (step * rows + row) as u64);
            let (found, rows) = on.choose(&(0..rows).map(way).collect::<Vec<_>>())?;
            found.iter().for_each(|token| counts[token.token_id as usize] += 1);
            logits = rows.into_iter().next().unwrap_or_default();
        }
        let (chi_square, cells) = chi_square(&counts, &shares(&logits, &params))?;
        println!("{}: {name}: {} draws, chi-square {chi_square:.1} over {cells} cells", model.name, rows * steps);
        // Five standard deviations above the mean: once in some hundred thousand runs by chance.
        if chi_square > cells as f64 + 5.0 * (2.0 * cells as f64).sqrt() {
            return Err(format!("{name}: the shares are not what they should be").into());
        }
    }
    Ok(())
}

fn shares(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let weight = |x: f32| (f64::from(x - most) / f64::from(params.temperature)).exp();
    let mut order: Vec<(usize, f64)> = logits.iter().map(|&x| weight(x)).enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    order.retain(|(_, weight)| *weight >= f64::from(params.min_p));
    let total: f64 = order.iter().map(|o| o.1).sum();
    let mut before = 0.0;
    order.retain(|(_, weight)| {
        let kept = before < f64::from(params.top_p) * total;
        before += weight;
        kept
    });
    let total: f64 = order.iter().map(|o| o.1).sum();
    let mut shares = vec![0.0; logits.len()];
    order.iter().for_each(|(id, weight)| shares[*id] = weight / total);
    shares
}

/// The statistic and its degrees of freedom; tokens that are expected less than five times count together.
fn chi_square(counts: &[u32], shares: &[f64]) -> Result<(f64, usize), Failure> {
    if let Some(id) = counts.iter().zip(shares).position(|(count, share)| *count > 0 && *share == 0.0) {
        return Err(format!("token {id} was drawn {} times and cannot be", counts[id]).into());
    }
    let draws = f64::from(counts.iter().sum::<u32>());
    let (mut sum, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
    let mut add = |count: f64, expected: f64| {
        sum += (count - expected) * (count - expected) / expected;
        cells += 1;
    };
    for (count, share) in counts.iter().map(|&c| f64::from(c)).zip(shares) {
        match share * draws {
            expected if expected >= 5.0 => add(count, expected),
            expected => rare = (rare.0 + count, rare.1 + expected),
        }
    }
    if rare.1 >= 1.0 {
        add(rare.0, rare.1);
    }
    Ok((sum, cells.max(2) - 1))
}
