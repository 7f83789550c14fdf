//! Load on an OpenAI-compatible server: many users at once, or requests at a rate, prompts as token ids, streamed.

mod client;
mod sse;

use super::figures::{Answered, Figures};
use crate::exit::Failure;
use anyhow::Context;
use bytes::Bytes;
use client::{Client, Expected};
use mserve_runtime::engine::EngineLoad;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// Each of so many users sends its next request when the last was answered.
    Users(usize),
    /// So many a second on average, at random times (a Poisson process), whatever is under way.
    PerSecond(f64),
}

#[derive(Debug, Clone)]
pub struct LoadOptions {
    pub url: String,
    /// The server's only or first model when `None`.
    pub model: Option<String>,
    pub pace: Pace,
    pub num_prompts: usize,
    pub input_len: usize,
    pub output_len: usize,
    /// Prompts are random ids below it.
    pub vocab_size: u32,
    pub seed: u64,
    pub timeout: Duration,
    /// Threads that send and read.
    pub threads: usize,
}

#[derive(Debug, Serialize)]
pub struct LoadReport {
    pub url: String,
    pub model: String,
    pub figures: Figures,
    /// Reasons of failed requests, each with how often.
    pub errors: BTreeMap<String, usize>,
    /// What an mserve worker says of itself over the run.
    pub engine: Option<super::engine_share::EngineShare>,
}

/// # Errors
/// When the server does not answer at all. Requests that fail are counted.
pub fn run(options: &LoadOptions) -> anyhow::Result<LoadReport> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(options.threads).enable_all().build()?;
    runtime.block_on(load(options))
}

async fn load(options: &LoadOptions) -> anyhow::Result<LoadReport> {
    let client = Client::connect(&options.url, options.model.clone(), options.timeout).await?;
    let model = client.model().to_owned();
    let bodies: Vec<Bytes> = (0..options.num_prompts).map(|at| body(options, &model, at)).collect();
    if let Pace::Users(users) = options.pace {
        client.open_connections(users).await;
    }
    let before = client.engine_load().await;
    let begin = Instant::now();
    let run = Arc::new(Run {
        client,
        bodies,
        expected: Expected { prompt_tokens: options.input_len, output_tokens: options.output_len },
        next: AtomicUsize::new(0),
        begin,
    });
    let outcomes = match options.pace {
        Pace::Users(users) => by_users(&run, users).await?,
        Pace::PerSecond(rate) => at_rate(&run, rate, options.seed).await?,
    };
    let wall = begin.elapsed();
    let after = run.client.engine_load().await;
    let mut errors = BTreeMap::new();
    let mut answered = Vec::with_capacity(outcomes.len());
    for outcome in outcomes {
        match outcome {
            Ok(request) => answered.push(request),
            Err(error) => *errors.entry(error).or_insert(0) += 1,
        }
    }
    let share =
        |(before, after): (EngineLoad, EngineLoad)| super::engine_share::EngineShare::new(&before, &after, wall);
    Ok(LoadReport {
        url: options.url.clone(),
        model,
        figures: Figures::new(&answered, errors.values().sum()),
        errors,
        engine: before.zip(after).map(share),
    })
}

type Outcome = Result<Answered, String>;

struct Run {
    client: Client,
    /// Made before the clock starts.
    bodies: Vec<Bytes>,
    expected: Expected,
    next: AtomicUsize,
    begin: Instant,
}

impl Run {
    async fn one(&self, at: usize) -> Outcome {
        let body = self.bodies[at].clone();
        let sent_at = self.begin.elapsed();
        let arrivals = self.client.complete(body, self.expected).await?;
        let Expected { prompt_tokens, output_tokens } = self.expected;
        Ok(Answered { sent_at, prompt_tokens, output_tokens, arrivals })
    }
}

async fn by_users(run: &Arc<Run>, users: usize) -> anyhow::Result<Vec<Outcome>> {
    let user = |run: Arc<Run>| async move {
        let mut outcomes = Vec::new();
        loop {
            let at = run.next.fetch_add(1, Relaxed);
            if at >= run.bodies.len() {
                return outcomes;
            }
            outcomes.push(run.one(at).await);
        }
    };
    let tasks: Vec<_> = (0..users).map(|_| tokio::spawn(user(Arc::clone(run)))).collect();
    let mut all = Vec::with_capacity(run.bodies.len());
    for task in tasks {
        all.extend(task.await.context("a user ended by itself")?);
    }
    Ok(all)
}

async fn at_rate(run: &Arc<Run>, per_second: f64, seed: u64) -> anyhow::Result<Vec<Outcome>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut due = Duration::ZERO;
    let mut tasks = Vec::with_capacity(run.bodies.len());
    for at in 0..run.bodies.len() {
        tokio::time::sleep_until((run.begin + due).into()).await;
        let run = Arc::clone(run);
        tasks.push(tokio::spawn(async move { run.one(at).await }));
        due += Duration::from_secs_f64(-(1.0 - random.f64()).ln() / per_second);
    }
    let mut all = Vec::with_capacity(tasks.len());
    for task in tasks {
        all.push(task.await.context("a request ended by itself")?);
    }
    Ok(all)
}

fn body(options: &LoadOptions, model: &str, at: usize) -> Bytes {
    let prompt = super::measure::prompt(options.seed, at, options.vocab_size as usize, options.input_len);
    let body = serde_json::json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": options.output_len,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    Bytes::from(body.to_string())
}

impl LoadReport {
    /// # Errors
    /// When not one request was answered.
    pub fn check(&self) -> Result<(), Failure> {
        if self.figures.completed > 0 {
            return Ok(());
        }
        let reason = self.errors.keys().next().map_or("no reason given", String::as_str);
        let message = format!("{}: every request failed: {reason}", self.url);
        Err(Failure { code: crate::exit::FAILURE, message, hint: None })
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} at {}", self.model, self.url)?;
        write!(f, "{}", self.figures)?;
        if let Some(engine) = &self.engine {
            write!(f, "{engine}")?;
        }
        for (error, count) in self.errors.iter().take(5) {
            writeln!(f, "error ({count}): {error}")?;
        }
        Ok(())
    }
}
