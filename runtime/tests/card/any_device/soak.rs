//! Thousands of requests of every kind at once, with clients that leave at any time, over a pool too small for them.

use super::steps::random_tokens;
use super::texts::{engine_config, wait_until_empty};
use super::{Device, Failure, Lent, Model, Noise, Outcome, Sizes};
use mserve_runtime::engine::{
    AdmissionError, Engine, EngineConfig, EngineHandle, FinishReason, GenerateRequest, SampledToken, SamplingParams,
    TokenEvent, TokenStream, Usage,
};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub requests: usize,
    pub clients: usize,
    pub longest_prompt: usize,
    pub longest_output: usize,
    /// Of the pool that the engine may use.
    pub num_blocks: usize,
    /// Finished requests that are asked for again, alone.
    pub repeated: usize,
}

/// What a client does with its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    ReadAll,
    DropAtOnce,
    /// Before the first token is there, or soon after.
    DropAfterWaiting(Duration),
    DropAfter(usize),
    /// As the server does when it meets a stop string.
    StopAfter(usize),
    /// Nothing is read before the engine is idle.
    LeaveUnread,
}

/// One request, made from its number alone. Two neighbours share parameters and seed, as the prompts of one call do.
struct Ask {
    prompt: Vec<u32>,
    params: Arc<SamplingParams>,
    eos: u32,
    fate: Fate,
}

impl Ask {
    fn new(number: usize, load: &Load, vocab: usize) -> Self {
        let pair = number as u64 / 2;
        let params = params(&mut fastrand::Rng::with_seed(pair), load, vocab);
        let mut random = fastrand::Rng::with_seed(1_000_000 + number as u64);
        let half = load.longest_prompt / 2;
        let mut prompt = random_tokens(pair % 7, random.usize(0..half), vocab);
        prompt.extend(random_tokens(2_000_000 + number as u64, random.usize(1..=half), vocab));
        let fate = match random.u32(0..20) {
            0 => Fate::DropAtOnce,
            1 => Fate::DropAfterWaiting(Duration::from_micros(random.u64(0..3000))),
            2 | 3 => Fate::DropAfter(random.usize(1..=load.longest_output)),
            4 => Fate::StopAfter(random.usize(1..=load.longest_output)),
            5 => Fate::LeaveUnread,
            _ => Fate::ReadAll,
        };
        Self { prompt, params: Arc::new(params), eos: (vocab - 1) as u32, fate }
    }

    fn request(&self) -> GenerateRequest {
        GenerateRequest {
            request_id: "soak".to_owned(),
            prompt_token_ids: self.prompt.clone(),
            params: Arc::clone(&self.params),
            eos_token_ids: Arc::from([self.eos]),
            choice_index: 0,
        }
    }
}

/// A bias that rules a token out, for all that matters.
const NEVER: f32 = -100.0;
/// A presence penalty that rules out every token that was generated: one that is lost, or that another sequence's
/// tokens got into, shows at once.
const ONLY_ONCE: f32 = 200.0;

fn params(random: &mut fastrand::Rng, load: &Load, vocab: usize) -> SamplingParams {
    let mut one_of = |choices: &[f32]| choices[random.usize(0..choices.len())];
    let mut params = SamplingParams {
        temperature: one_of(&[0.0, 0.7, 1.0, 1.5]),
        top_p: one_of(&[1.0, 1.0, 0.9, 0.5]),
        min_p: one_of(&[0.0, 0.0, 0.05]),
        repetition_penalty: one_of(&[1.0, 1.0, 1.1]),
        presence_penalty: one_of(&[0.0, 0.0, 0.5, ONLY_ONCE]),
        frequency_penalty: one_of(&[0.0, 0.0, 0.3]),
        ..SamplingParams::default()
    };
    params.top_k = [0, 0, 1, 5, 40][random.usize(0..5)];
    params.seed = Some(random.u64(..));
    params.max_tokens = random.usize(1..=load.longest_output);
    params.min_tokens = [0, 0, 3][random.usize(0..3)];
    params.ignore_eos = random.bool();
    params.logprobs = [None, None, Some(0), Some(5)][random.usize(0..4)];
    let mut ids = |count: usize| (0..count).map(|_| random.u32(0..vocab as u32)).collect::<Vec<_>>();
    params.stop_token_ids = ids(4);
    let biased = ids(3);
    if random.u32(0..3) == 0 {
        params.logit_bias = vec![(biased[0], 3.0), (biased[1], -3.0), (biased[2], NEVER)];
    }
    params
}

/// A request that was read to its end.
struct Finished {
    number: usize,
    tokens: Vec<SampledToken>,
}

struct Soak<'a> {
    engine: &'a EngineHandle,
    load: Load,
    next: AtomicUsize,
    refused: AtomicUsize,
    finished: Mutex<Vec<Finished>>,
    unread: Mutex<Vec<(usize, TokenStream)>>,
}

/// # Errors
/// Anything that is left behind, counted wrongly, or not as it was asked for.
pub fn soak<D: Device>(device: &D, model: &Model, sizes: Sizes, load: Load) -> Outcome {
    let lent = Lent::new(device.load(model, sizes)?);
    // Clients have two requests each: the queue is full at times.
    let config = EngineConfig { max_num_queued_reqs: load.clients, ..engine_config(sizes, true) };
    let engine = Engine::start(Box::new(lent.with_blocks(load.num_blocks)), config)?;
    let soak = Soak {
        engine: &engine,
        load,
        next: AtomicUsize::new(0),
        refused: AtomicUsize::new(0),
        finished: Mutex::default(),
        unread: Mutex::default(),
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..load.clients).map(|_| scope.spawn(|| soak.client())).collect();
        clients.into_iter().try_for_each(|client| client.join().unwrap_or_else(|_| Err("a client panicked".into())))
    })?;
    wait_until_empty(&engine)?;
    for (number, stream) in std::mem::take(&mut *lock(&soak.unread)) {
        soak.read(number, stream)?;
    }
    let finished = std::mem::take(&mut *lock(&soak.finished));
    check_figures(&engine, &load, &finished)?;
    println!(
        "{} requests ({} read to the end, {} times refused for the queue), {} preemptions, prefix hits {:.2}",
        load.requests,
        finished.len(),
        soak.refused.load(Relaxed),
        engine.load().preemptions_total,
        engine.load().prefix_cache_hit_rate.unwrap_or(0.0)
    );
    let repeat = Engine::start(Box::new(lent.all_blocks()), engine_config(sizes, false))?;
    reproduce(&repeat, &load, &finished, device.noise())?;
    wait_until_empty(&repeat)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Soak<'_> {
    /// Takes pairs of requests until there are no more; both of a pair are under way together.
    fn client(&self) -> Outcome {
        loop {
            let first = self.next.fetch_add(2, Relaxed);
            if first >= self.load.requests {
                return Ok(());
            }
            let vocab = self.engine.info().vocab_size;
            let mut asks = [0, 1].map(|i| Ask::new(first + i, &self.load, vocab));
            asks[1].params = Arc::clone(&asks[0].params);
            let streams = [self.ask(&asks[0])?, self.ask(&asks[1])?];
            for ((number, ask), stream) in (first..).zip(asks).zip(streams) {
                self.meet_fate(number, &ask, stream)?;
            }
        }
    }

    fn ask(&self, ask: &Ask) -> Result<TokenStream, Failure> {
        loop {
            match self.engine.generate(ask.request()) {
                Err(AdmissionError::QueueFull { .. }) => {
                    self.refused.fetch_add(1, Relaxed);
                    std::thread::sleep(Duration::from_micros(500));
                }
                other => return Ok(other?),
            }
        }
    }

    fn meet_fate(&self, number: usize, ask: &Ask, mut stream: TokenStream) -> Outcome {
        match ask.fate {
            Fate::ReadAll => return self.read(number, stream),
            Fate::LeaveUnread => lock(&self.unread).push((number, stream)),
            Fate::DropAtOnce => drop(stream),
            Fate::DropAfterWaiting(time) => {
                std::thread::sleep(time);
                drop(stream);
            }
            Fate::DropAfter(count) | Fate::StopAfter(count) => {
                for _ in 0..count {
                    match stream.blocking_next() {
                        Some(TokenEvent::Failed(error)) => return Err(error.into()),
                        Some(_) => {}
                        None => break,
                    }
                }
                if matches!(ask.fate, Fate::StopAfter(_)) {
                    stream.stop();
                }
            }
        }
        Ok(())
    }

    fn read(&self, number: usize, mut stream: TokenStream) -> Outcome {
        let ask = Ask::new(number, &self.load, self.engine.info().vocab_size);
        let tokens = read_all(&mut stream, &ask).map_err(|e| format!("request {number} ({:?}): {e}", ask.params))?;
        lock(&self.finished).push(Finished { number, tokens });
        Ok(())
    }
}

fn read_all(stream: &mut TokenStream, ask: &Ask) -> Result<Vec<SampledToken>, Failure> {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_next() {
            Some(TokenEvent::Token(token)) => tokens.push(token),
            Some(TokenEvent::Finished { reason, usage }) => {
                check_end(ask, &tokens, reason, usage)?;
                tokens.iter().try_for_each(|token| check_token(ask, token))?;
                check_only_once(ask, &tokens)?;
                return match stream.blocking_next() {
                    None => Ok(tokens),
                    Some(event) => Err(format!("{event:?} after the last event").into()),
                };
            }
            Some(TokenEvent::Failed(error)) => return Err(error.into()),
            None => return Err("no last event".into()),
        }
    }
}

fn check_end(ask: &Ask, tokens: &[SampledToken], reason: FinishReason, usage: Usage) -> Outcome {
    let params = &ask.params;
    let as_asked = match reason {
        FinishReason::Length => tokens.len() == params.max_tokens && usage.completion_tokens == tokens.len(),
        FinishReason::Stop { stop_token_id } => {
            let by_eos = stop_token_id.is_none() && !params.ignore_eos;
            let by_token = stop_token_id.is_some_and(|id| params.stop_token_ids.contains(&id));
            let enough = tokens.len() >= params.min_tokens && tokens.len() < params.max_tokens;
            (by_eos || by_token) && enough && usage.completion_tokens == tokens.len() + 1
        }
    };
    let prompt = usage.prompt_tokens == ask.prompt.len() && usage.cached_tokens < usage.prompt_tokens;
    if as_asked && prompt {
        return Ok(());
    }
    Err(format!("{} tokens, {reason:?}, {usage:?} for a prompt of {}", tokens.len(), ask.prompt.len()).into())
}

fn check_token(ask: &Ask, token: &SampledToken) -> Outcome {
    let params = &ask.params;
    let stops = params.stop_token_ids.contains(&token.token_id) || (!params.ignore_eos && token.token_id == ask.eos);
    let ruled_out = params.logit_bias.iter().any(|&(id, bias)| id == token.token_id && bias == NEVER);
    if stops || ruled_out {
        return Err(format!("{token:?} was chosen, and could not be").into());
    }
    let top = &token.top_logprobs;
    let complete = match (params.logprobs, token.logprob) {
        (None, None) => top.is_empty(),
        (Some(count), Some(own)) => {
            let ranks = top.iter().zip(1..).all(|(t, rank)| t.rank == rank);
            let falling = top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob);
            let listed = top.get((own.rank as usize).wrapping_sub(1)).is_none_or(|t| *t == own);
            top.len() == count as usize
                && ranks
                && falling
                && listed
                && own.logprob <= 1e-3
                && own.token_id == token.token_id
        }
        _ => false,
    };
    if complete { Ok(()) } else { Err(format!("logprobs of {token:?}").into()) }
}

fn check_only_once(ask: &Ask, tokens: &[SampledToken]) -> Outcome {
    let ids: Vec<u32> = tokens.iter().map(|t| t.token_id).collect();
    let again = (1..ids.len()).find(|&at| ids[..at].contains(&ids[at]));
    match again.filter(|_| ask.params.presence_penalty == ONLY_ONCE) {
        Some(at) => Err(format!("token {} at {at} was there before: {ids:?}", ids[at]).into()),
        None => Ok(()),
    }
}

fn check_figures(engine: &EngineHandle, load: &Load, finished: &[Finished]) -> Outcome {
    let text = engine.metrics();
    let sum = |name: &str, label: &str| -> f64 {
        let lines = text.lines().filter(|l| l.starts_with(name) && l.contains(label));
        lines.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    let ended = |reason: &str| sum("vllm:request_success_total", &format!("finished_reason=\"{reason}\""));
    let requests = load.requests as f64;
    let all: f64 = ["stop", "length", "abort", "error"].map(ended).iter().sum();
    let tokens: usize = finished.iter().map(|f| f.tokens.len()).sum();
    let counted = sum("vllm:generation_tokens_total", "");
    let now = engine.load();
    let faults = [
        (all != requests, format!("{all} requests ended of {requests}")),
        (ended("error") != 0.0, format!("{} ended by an error", ended("error"))),
        (ended("stop") + ended("length") < finished.len() as f64, "fewer ended well than were read".to_owned()),
        (ended("abort") == 0.0, "nobody left before the end".to_owned()),
        (now.requests_total != load.requests as u64, format!("{} requests in all", now.requests_total)),
        (counted < tokens as f64, format!("{counted} tokens counted, {tokens} read")),
        (sum("vllm:request_generation_tokens_count", "") != requests, "requests without a count of tokens".to_owned()),
        (now.kv_cache_usage != 0.0, "blocks are in use".to_owned()),
        (now.preemptions_total == 0, "nothing was preempted".to_owned()),
        (now.prefix_cache_hit_rate.is_none_or(|r| r < 0.05), "the prefix cache was not used".to_owned()),
        (finished.len() * 2 < load.requests, format!("only {} read to the end", finished.len())),
    ];
    match faults.into_iter().find(|(is, _)| *is) {
        Some((_, what)) => Err(what.into()),
        None => Ok(()),
    }
}

/// Some of the finished requests again, alone, and once more: alone they are the same each time; among the others up to
/// where rounding moved a drawn number to the next token, and with logprobs as near as rounding allows.
fn reproduce(engine: &EngineHandle, load: &Load, finished: &[Finished], noise: Noise) -> Outcome {
    let every = (finished.len() / load.repeated.max(1)).max(1);
    let (mut asked, mut same, mut worst) = (0, 0, 0.0_f32);
    for before in finished.iter().step_by(every) {
        let ask = Ask::new(before.number, load, engine.info().vocab_size);
        let alone = read_all(&mut engine.generate(ask.request())?, &ask)?;
        if read_all(&mut engine.generate(ask.request())?, &ask)? != alone {
            return Err(format!("request {} is another each time, alone ({:?})", before.number, ask.params).into());
        }
        let pairs = || alone.iter().zip(&before.tokens);
        let common = pairs().take_while(|(a, b)| a.token_id == b.token_id).count();
        for (a, b) in pairs().take(common).filter_map(|(a, b)| a.logprob.zip(b.logprob)) {
            worst = worst.max((a.logprob - b.logprob).abs());
        }
        if worst > noise.logprob {
            let apart = format!("logprobs {worst} apart, alone and among the others");
            return Err(format!("request {}: {apart} ({:?})", before.number, ask.params).into());
        }
        asked += 1;
        same += usize::from(common == alone.len() && common == before.tokens.len());
    }
    println!("{same} of {asked} requests gave the same tokens alone as among the others; logprobs within {worst:.4}");
    match same as f64 >= noise.same_texts * f64::from(asked) {
        true => Ok(()),
        false => {
            Err(format!("{same} of {asked} are the same, at least a share of {} must be", noise.same_texts).into())
        }
    }
}
