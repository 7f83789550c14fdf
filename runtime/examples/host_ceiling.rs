//! How many tokens a second the host can handle: the real engine, and the real server with `serve`, over a device whose
//! steps take no time, or as long as is asked: STEP is microseconds a step, then, after colons, nanoseconds a prompt token
//! and a decode (`700:1600:6000` is about what a model of 0.5 B takes on an H200).
//!
//!     cargo run --release -p mserve-runtime --example host_ceiling -- engine [SEQUENCES] [INPUT_LEN] [OUTPUT_LEN] [STEP]
//!     cargo run --release -p mserve-runtime --example host_ceiling -- serve PORT TOKENIZER_DIR [STEP] [ASYNC_THREADS]
//!
//! Load for `serve`: `mserve bench --url http://127.0.0.1:PORT --users 256`.
#![allow(clippy::unwrap_used)]

use mserve_runtime::engine::{
    Backend, BackendError, BackendInfo, Engine, EngineConfig, EngineHandle, GenerateRequest, RowOutput, SampledToken,
    SamplingParams, StepBatch, TokenEvent,
};
use mserve_runtime::server::{ConnectionLimits, ServedKind, ServedModel, ServerConfig, ServerState, router, serve};
use mserve_runtime::tokenizer::{GenerationDefaults, ModelFiles, Tokenizer, eos_token_ids};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const VOCAB: usize = 4096;
const MAX_MODEL_LEN: usize = 4096;

/// Chooses ids that depend on the row only. Steps follow one another as on a card.
struct FakeDevice {
    info: BackendInfo,
    cost: Cost,
    free_at: Instant,
    /// Output rows, end and duration of the steps under way.
    under_way: VecDeque<(usize, Instant, Duration)>,
    last: Duration,
    next_token: u32,
}

#[derive(Clone, Copy, Default)]
struct Cost {
    step_ns: u64,
    prompt_token_ns: u64,
    decode_ns: u64,
}

impl Cost {
    fn parse(text: &str) -> Self {
        let mut numbers = text.split(':').map(|number| number.parse::<u64>().unwrap());
        let mut next = || numbers.next().unwrap_or(0);
        Self { step_ns: 1000 * next(), prompt_token_ns: next(), decode_ns: next() }
    }

    fn of(self, batch: &StepBatch) -> Duration {
        let decodes = batch.sequences.iter().filter(|s| s.query_len == 1).count();
        let prompt_tokens = batch.token_ids.len() - decodes;
        let ns = self.prompt_token_ns * prompt_tokens as u64 + self.decode_ns * decodes as u64;
        Duration::from_nanos(self.step_ns + ns)
    }
}

impl FakeDevice {
    fn new(cost: Cost) -> Self {
        let info = BackendInfo {
            output_width: VOCAB,
            vocab_size: VOCAB,
            block_size: 16,
            num_blocks: 1024 * MAX_MODEL_LEN / 16,
            kv_cache_bytes: 0,
            max_model_len: MAX_MODEL_LEN,
            device: "a device that does nothing".to_owned(),
        };
        Self { info, cost, free_at: Instant::now(), under_way: VecDeque::new(), last: Duration::ZERO, next_token: 0 }
    }
}

impl Backend for FakeDevice {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
        self.submit(batch)?;
        self.collect()
    }

    fn max_steps_in_flight(&self) -> usize {
        2
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), BackendError> {
        let rows = batch.sequences.iter().filter(|s| s.wants_output).count();
        let step = self.cost.of(batch);
        self.free_at = self.free_at.max(Instant::now()) + step;
        self.under_way.push_back((rows, self.free_at, step));
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<RowOutput>, BackendError> {
        let Some((rows, end, step)) = self.under_way.pop_front() else { return Ok(Vec::new()) };
        self.last = step;
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
        let mut token = || {
            self.next_token = (self.next_token + 7) % 3000;
            RowOutput::Token(SampledToken { token_id: 300 + self.next_token, logprob: None, top_logprobs: Vec::new() })
        };
        Ok((0..rows).map(|_| token()).collect())
    }

    fn last_step_time(&self) -> Option<Duration> {
        Some(self.last)
    }
}

fn start(cost: Cost, max_num_seqs: usize) -> EngineHandle {
    let config = EngineConfig {
        model_name: "fake".to_owned(),
        max_num_seqs,
        max_num_batched_tokens: 8192,
        max_model_len: MAX_MODEL_LEN,
        max_num_queued_reqs: 8192,
        enable_prefix_caching: false,
    };
    Engine::start(Box::new(FakeDevice::new(cost)), config).unwrap()
}

async fn drain(engine: EngineHandle, input_len: usize, output_len: usize) -> usize {
    let params = SamplingParams { temperature: 0.0, max_tokens: output_len, ignore_eos: true, ..Default::default() };
    let request = GenerateRequest {
        request_id: "fake".to_owned(),
        prompt_token_ids: vec![7; input_len],
        params: Arc::new(params),
        eos_token_ids: Arc::new([]),
        choice_index: 0,
    };
    let mut stream = engine.generate(request).unwrap();
    let mut tokens = 0;
    while let Some(event) = stream.next().await {
        tokens += usize::from(matches!(event, TokenEvent::Token(_)));
    }
    tokens
}

async fn engine_alone(sequences: usize, input_len: usize, output_len: usize, cost: Cost) {
    let engine = start(cost, sequences);
    let begin = Instant::now();
    let readers: Vec<_> = (0..sequences).map(|_| tokio::spawn(drain(engine.clone(), input_len, output_len))).collect();
    let mut tokens = 0;
    for reader in readers {
        tokens += reader.await.unwrap();
    }
    let (seconds, load) = (begin.elapsed().as_secs_f64(), engine.load());
    println!(
        "{sequences} sequences: {:.0} tok/s, {:.0} steps/s, host {:.3} ms a step over {} steps",
        tokens as f64 / seconds,
        load.steps_total as f64 / seconds,
        load.engine_host_ms / load.steps_total as f64,
        load.steps_total
    );
}

async fn serve_on(port: u16, dir: &Path, cost: Cost) {
    let files = ModelFiles::read(dir).unwrap();
    let tokenizer = Arc::new(Tokenizer::load(&files, VOCAB).unwrap());
    let model = ServedModel {
        engine: start(cost, 256),
        eos_token_ids: eos_token_ids(&files, &tokenizer, VOCAB).unwrap().into(),
        tokenizer,
        chat_template: None,
        generation_defaults: GenerationDefaults::default(),
        kind: ServedKind::Chat,
        max_model_len: MAX_MODEL_LEN,
    };
    let state = ServerState::new(ServerConfig {
        served_model_names: vec!["fake".to_owned()],
        token: None,
        telemetry: None,
        max_body_bytes: 8 << 20,
        stall_limit: Duration::from_secs(60),
    });
    state.set_model(model);
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    println!("listening on {}", listener.local_addr().unwrap());
    serve(listener, router(state), ConnectionLimits::default(), std::future::pending()).await;
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, otherwise: u64| args.get(at).map_or(otherwise, |text| text.parse().unwrap());
    let cost = |at: usize| args.get(at).map_or(Cost::default(), |text| Cost::parse(text));
    let threads = if args[0] == "serve" { number(4, 2) } else { 2 };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(threads as usize).enable_all().build().unwrap();
    match args[0].as_str() {
        "engine" => {
            let cost = cost(4);
            runtime.block_on(engine_alone(
                number(1, 256) as usize,
                number(2, 1024) as usize,
                number(3, 512) as usize,
                cost,
            ));
        }
        "serve" => {
            runtime.block_on(serve_on(number(1, 8099) as u16, Path::new(&args[2]), cost(3)));
        }
        other => panic!("{other}: engine or serve"),
    }
}
