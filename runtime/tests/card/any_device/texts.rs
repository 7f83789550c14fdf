//! A greedy text is the same alone, beside others, in chunks, after preemption and from the prefix cache.

use super::steps::{Piece, Places, batch, greedy, margin, random_tokens};
use super::{BLOCK_SIZE, Device, Failure, Inspect, Lent, Model, Noise, Outcome, Sizes};
use mserve_runtime::engine::{
    Backend, Engine, EngineConfig, EngineHandle, GenerateRequest, RowSampling, SampledToken, SamplingParams,
    TokenEvent, TokenStream,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The texts asked for.
pub struct Asks {
    pub prompts: Vec<Vec<u32>>,
    pub max_tokens: usize,
}

impl Asks {
    /// Prompts of these lengths. The first half of each after the first is that of the one before it, as far as it goes.
    pub fn random(lens: &[usize], vocab: usize, max_tokens: usize) -> Self {
        let mut prompts: Vec<Vec<u32>> = Vec::new();
        for (seed, &len) in (1..).zip(lens) {
            let mut prompt = random_tokens(seed, len, vocab);
            if let Some(before) = prompts.last() {
                let shared = (len / 2).min(before.len());
                prompt[..shared].copy_from_slice(&before[..shared]);
            }
            prompts.push(prompt);
        }
        Self { prompts, max_tokens }
    }

    fn longest(&self) -> usize {
        self.prompts.iter().map(Vec::len).max().unwrap_or(0) + self.max_tokens
    }
}

pub fn engine_config(sizes: Sizes, enable_prefix_caching: bool) -> EngineConfig {
    EngineConfig {
        model_name: "m".to_owned(),
        max_num_seqs: sizes.max_num_seqs,
        max_num_batched_tokens: sizes.max_num_batched_tokens,
        max_model_len: sizes.max_model_len,
        max_num_queued_reqs: 4096,
        enable_prefix_caching,
    }
}

/// Every block free and nothing under way, or an error after a while.
pub fn wait_until_empty(engine: &EngineHandle) -> Outcome {
    let give_up = Instant::now() + Duration::from_secs(20);
    loop {
        let load = engine.load();
        if (load.running, load.waiting) == (0, 0) && load.kv_cache_usage == 0.0 {
            return Ok(());
        }
        if Instant::now() > give_up {
            return Err(format!("blocks or requests are left behind: {load:?}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// All tokens of a stream that must end well.
pub fn read(stream: &mut TokenStream) -> Result<Vec<SampledToken>, Failure> {
    let mut tokens = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            TokenEvent::Token(token) => tokens.push(token),
            TokenEvent::Finished { .. } => return Ok(tokens),
            TokenEvent::Failed(error) => return Err(error.into()),
        }
    }
    Err("the stream ended without a last event".into())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    OneByOne,
    Together,
    /// Each joins when the one before it has had a few tokens.
    Joining,
}

type Texts = Vec<Vec<SampledToken>>;

fn generate(engine: &EngineHandle, asks: &Asks, order: Order) -> Result<Texts, Failure> {
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: asks.max_tokens,
        ignore_eos: true,
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    let params = Arc::new(params);
    let ask = |prompt: &Vec<u32>| {
        engine.generate(GenerateRequest {
            request_id: "text".to_owned(),
            prompt_token_ids: prompt.clone(),
            params: Arc::clone(&params),
            eos_token_ids: Arc::from([]),
            choice_index: 0,
        })
    };
    if order == Order::OneByOne {
        return asks.prompts.iter().map(|prompt| read(&mut ask(prompt)?)).collect();
    }
    let (mut streams, mut begun): (Vec<TokenStream>, Texts) = (Vec::new(), Vec::new());
    for prompt in &asks.prompts {
        streams.push(ask(prompt)?);
        begun.push(Vec::new());
        while let (Order::Joining, Some(stream), Some(begun)) = (order, streams.last_mut(), begun.last_mut())
            && begun.len() < 3
        {
            match stream.blocking_next() {
                Some(TokenEvent::Token(token)) => begun.push(token),
                other => return Err(format!("{other:?} where a token was expected").into()),
            }
        }
    }
    let rest = streams.iter_mut().map(read).collect::<Result<Texts, _>>()?;
    Ok(begun.into_iter().zip(rest).map(|(begun, rest)| [begun, rest].concat()).collect())
}

/// Runs the texts in every way there is and compares each with the first way: alone, one after the other.
pub fn same_however_computed<D: Device>(device: &D, model: &Model, sizes: Sizes, asks: &Asks) -> Outcome {
    let noise = device.noise();
    let lent = Lent::new(device.load(model, sizes)?);
    let run = |what: &str, backend: Lent<D::Backend>, config: EngineConfig, order: Order| {
        let engine = Engine::start(Box::new(backend), config)?;
        let texts = generate(&engine, asks, order)?;
        wait_until_empty(&engine).map_err(|e| format!("{what}: {e}"))?;
        Ok::<_, Failure>((texts, engine))
    };
    let plain = || engine_config(sizes, false);
    let (reference, _) = run("alone", lent.all_blocks(), plain(), Order::OneByOne)?;
    let (again, _) = run("alone again", lent.all_blocks(), plain(), Order::OneByOne)?;
    compare("alone, again", Noise { logprob: 0.0, margin: 0.0, ..noise }, &reference, &again)?;
    let (together, _) = run("together", lent.all_blocks(), plain(), Order::Together)?;
    compare("together", noise, &reference, &together)?;
    let (joining, _) = run("joining", lent.all_blocks(), plain(), Order::Joining)?;
    compare("joining one by one", noise, &reference, &joining)?;
    for budget in [asks.prompts.len().max(sizes.max_num_seqs), 37] {
        let chunks =
            EngineConfig { max_num_batched_tokens: budget, max_num_seqs: plain().max_num_seqs.min(budget), ..plain() };
        let (chunked, _) = run("in chunks", lent.all_blocks(), chunks, Order::Together)?;
        compare(&format!("prefill in chunks, {budget} tokens a step"), noise, &reference, &chunked)?;
    }
    // The longest fits, and not much beside it.
    let few = lent.with_blocks(asks.longest().div_ceil(BLOCK_SIZE) + 2);
    let (preempted, engine) = run("preempted", few, plain(), Order::Together)?;
    let preemptions = engine.load().preemptions_total;
    if preemptions == 0 {
        return Err("nothing was preempted: the pool is too large to show anything".into());
    }
    compare(&format!("after preemption ({preemptions} times)"), noise, &reference, &preempted)?;
    let caching = engine_config(sizes, true);
    let engine = Engine::start(Box::new(lent.all_blocks()), caching)?;
    for what in ["prefixes of others cached", "own prefix cached"] {
        let texts = generate(&engine, asks, Order::OneByOne)?;
        compare(what, noise, &reference, &texts)?;
    }
    wait_until_empty(&engine)?;
    match engine.load().prefix_cache_hit_rate {
        Some(rate) if rate > 0.4 => Ok(()),
        rate => Err(format!("the prefix cache was hardly used: {rate:?}").into()),
    }
}

/// Runs by hand with steps of the same sizes: one text, in another row and beside other texts. Nothing of its logits may
/// change, on any device: a sum is made in one order in every row of a step.
pub fn neighbours_change_nothing<D: Device>(device: &D, model: &Model, counts: &[usize]) -> Outcome {
    let most = counts.iter().copied().max().unwrap_or(1);
    let sizes = Sizes {
        max_model_len: 64,
        max_num_seqs: most,
        max_num_batched_tokens: most * NEIGHBOURS_PROMPT,
        num_blocks: Places { sequences: most }.blocks(64),
    };
    let mut backend = device.load(model, sizes)?;
    let vocab = model.spec.vocab_size as usize;
    for &sequences in counts {
        let first = one_among(&mut backend, vocab, sequences, 0)?;
        for row in [sequences / 2, sequences - 1] {
            let other = one_among(&mut backend, vocab, sequences, row)?;
            if let Some(step) = first.iter().zip(&other).position(|(a, b)| a != b) {
                return Err(
                    format!("{}: of {sequences}, row {row} differs from row 0 in step {step}", model.name).into()
                );
            }
        }
    }
    println!("{}: {counts:?} side by side: the row and the others change nothing", model.name);
    Ok(())
}

const NEIGHBOURS_PROMPT: usize = 33;

/// Logits of one text, in `row` among others that depend on the row too: of its prompt, then of some tokens.
fn one_among<B: Inspect>(
    backend: &mut B,
    vocab: usize,
    sequences: usize,
    row: usize,
) -> Result<Vec<Vec<f32>>, Failure> {
    let (len, places) = (NEIGHBOURS_PROMPT, Places { sequences });
    let seed = |sequence: usize| if sequence == row { 0 } else { (100 * row + sequence + 1) as u64 };
    let texts: Vec<Vec<u32>> = (0..sequences).map(|sequence| random_tokens(seed(sequence), len + 12, vocab)).collect();
    let mut found = Vec::new();
    for (start, end) in std::iter::once((0, len)).chain((len..len + 12).map(|at| (at, at + 1))) {
        let piece = |(sequence, tokens)| Piece { sequence, tokens, start, end, sampling: Some(greedy()) };
        let pieces: Vec<Piece<'_>> = texts.iter().map(Vec::as_slice).enumerate().map(piece).collect();
        found.push(backend.step_and_logits(&batch(&pieces, places))?.1.swap_remove(row));
    }
    Ok(found)
}

/// Greedy texts with penalties, a bias and a least length, through the engine (where a device may count tokens that the
/// host does not know yet) and by hand (where all that was generated is told in every step). Equal, on any device.
pub fn penalised_texts_are_those_by_hand<D: Device>(device: &D, model: &Model, max_tokens: usize) -> Outcome {
    let places = Places { sequences: 1 };
    let sizes = Sizes { max_model_len: 256, max_num_seqs: 4, max_num_batched_tokens: 128, num_blocks: 64 };
    let lent = Lent::new(device.load(model, sizes)?);
    let engine = Engine::start(Box::new(lent.all_blocks()), engine_config(sizes, false))?;
    let vocab = model.spec.vocab_size as usize;
    let plain = SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() };
    let kinds = [
        SamplingParams { repetition_penalty: 1.3, ..plain.clone() },
        SamplingParams { presence_penalty: 0.8, frequency_penalty: 0.4, ..plain.clone() },
        SamplingParams { logit_bias: vec![(5, 3.0), (6, -3.0)], frequency_penalty: 0.7, ..plain.clone() },
        SamplingParams {
            stop_token_ids: (0..200.min(vocab as u32 / 2)).collect(),
            min_tokens: max_tokens / 2,
            ..plain
        },
    ];
    for (params, seed) in kinds.into_iter().zip(70..) {
        let (params, prompt) = (Arc::new(params), random_tokens(seed, 20, vocab));
        let mut stream = engine.generate(GenerateRequest {
            request_id: "penalised".to_owned(),
            prompt_token_ids: prompt.clone(),
            params: Arc::clone(&params),
            eos_token_ids: Arc::from([]),
            choice_index: 0,
        })?;
        let ids = |tokens: &[SampledToken]| tokens.iter().map(|t| t.token_id).collect::<Vec<_>>();
        let found = ids(&read(&mut stream)?);
        wait_until_empty(&engine)?;
        let (mut text, mut start, mut wanted) = (prompt.clone(), 0, Vec::new());
        while wanted.len() < found.len() {
            let forbidden = if wanted.len() < params.min_tokens { params.stop_token_ids.clone() } else { Vec::new() };
            let row = RowSampling {
                params: Arc::clone(&params),
                seed: 0,
                step: wanted.len() as u64,
                prompt_token_ids: Arc::from(prompt.as_slice()),
                output_token_ids: wanted.clone(),
                forbidden_token_ids: forbidden,
            };
            let piece = Piece { sequence: 0, tokens: &text, start, end: text.len(), sampling: Some(row) };
            let outputs = lent.with(|backend| backend.step(&batch(&[piece], places)))?;
            start = text.len();
            let token = super::steps::tokens(outputs)?.remove(0).token_id;
            text.push(token);
            wanted.push(token);
        }
        if wanted != found || (found.len() < max_tokens && found.len() < params.min_tokens) {
            return Err(format!("{found:?} through the engine, {wanted:?} by hand, for {params:?}").into());
        }
    }
    println!("{}: penalised texts through the engine are those by hand", model.name);
    Ok(())
}

/// Equal token by token, or parted where the reference was as good as undecided; logprobs within the noise up to there.
pub fn compare(what: &str, noise: Noise, reference: &[Vec<SampledToken>], other: &[Vec<SampledToken>]) -> Outcome {
    let (mut equal, mut parted, mut worst) = (0, Vec::new(), 0.0_f32);
    for (number, (a, b)) in reference.iter().zip(other).enumerate() {
        let common = a.iter().zip(b).take_while(|(a, b)| a.token_id == b.token_id).count();
        for (a, b) in a.iter().zip(b).take(common) {
            if let (Some(a), Some(b)) = (a.logprob, b.logprob) {
                worst = worst.max((a.logprob - b.logprob).abs());
            }
        }
        if worst > noise.logprob {
            return Err(format!(
                "{what}: text {number} has logprobs {worst} apart, at most {} is right",
                noise.logprob
            )
            .into());
        }
        match (a.get(common), b.get(common)) {
            (None, None) => equal += 1,
            (Some(at), Some(_)) if margin(at) <= noise.margin => parted.push((number, common, margin(at))),
            (at, instead) => {
                return Err(format!("{what}: text {number} at {common}: {instead:?} instead of {at:?}").into());
            }
        }
    }
    println!(
        "{what}: {equal} of {} texts equal, logprobs at most {worst:.2e} apart; (text, place, margin) where parted: {parted:.3?}",
        reference.len()
    );
    Ok(())
}
