//! Checks the CUDA backend against the CPU's on a machine with a card, then times it on known shapes.
//!
//!     cargo run --release -p mserve-runtime --example cuda_check -- [libraries] [parity] [demo DIR] [load DIR] [qwen] [llama] [ops] [few [BATCH ...]]
//!
//! Without arguments: everything but `demo`, `load`, `ops` and `few`. Each section stands alone; one that fails is reported and the next goes on.
#![allow(clippy::unwrap_used)]

use mserve_planner::model::*;
use mserve_runtime::cpu::{CpuBackend, CpuOptions};
use mserve_runtime::cuda::{CudaBackend, CudaOptions, GraphCapture, WeightOrigin, report};
use mserve_runtime::engine::{Backend, RowOutput, RowSampling, SampledToken, SamplingParams, StepBatch, StepSequence};
use mserve_runtime::weights::{Checkpoint, RandomWeights, StoredType};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let asked = |name: &str| args.is_empty() || args.iter().any(|a| a == name);
    let demo = args.iter().position(|a| a == "demo").and_then(|at| args.get(at + 1));
    if asked("libraries") {
        section("libraries", || {
            report().iter().for_each(|line| println!("{:?}: {:?}", line.library, line.found));
            Ok(())
        });
    }
    if asked("parity") {
        parity_cases().into_iter().for_each(|(name, spec)| section(name, || parity(&spec)));
    }
    if let Some(dir) = demo {
        section("demo", || demo_model(Path::new(dir)));
    }
    if let Some(dir) = args.iter().position(|a| a == "load").and_then(|at| args.get(at + 1)) {
        section("load", || load_checkpoint(Path::new(dir)));
    }
    if asked("qwen") {
        section("Qwen2.5-0.5B shape", || {
            speed(&qwen_0_5b(), &[1, 8, 32, 64, 128, 256], &[(1, 128), (1, 2048), (1, 8000), (8, 1024)])
        });
    }
    if args.iter().any(|a| a == "few") {
        let asked: Vec<(usize, usize)> = args.iter().filter_map(|a| Some((a.parse().ok()?, 0))).collect();
        let steps = if asked.is_empty() { vec![(1, 0), (8, 0), (16, 0)] } else { asked };
        section("ops of a small step, Qwen2.5-0.5B shape", || ops(&qwen_0_5b(), &steps));
        section("ops of a small step, Llama-3.1-8B shape", || ops(&llama_8b(), &steps));
    }
    if args.iter().any(|a| a == "ops") {
        section("ops of a step, Qwen2.5-0.5B shape", || {
            ops(&qwen_0_5b(), &[(1, 0), (8, 0), (32, 0), (64, 0), (256, 0), (512, 0), (0, 8), (256, 8)])
        });
        section("ops of a step, Llama-3.1-8B shape", || {
            ops(&llama_8b(), &[(1, 0), (64, 0), (128, 0), (256, 0), (512, 0), (0, 8), (256, 8)])
        });
    }
    if asked("llama") {
        section("Llama-3.1-8B shape", || {
            speed(&llama_8b(), &[1, 8, 32, 64, 128, 256], &[(1, 128), (1, 2048), (1, 8000), (8, 1024)])
        });
    }
}

fn section(name: &str, run: impl FnOnce() -> Outcome) {
    println!("\n== {name}");
    let begin = Instant::now();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    let seconds = begin.elapsed().as_secs_f64();
    match result {
        Ok(Ok(())) => println!("[{name}: {seconds:.1} s]"),
        Ok(Err(error)) => println!("[{name}: FAILED after {seconds:.1} s: {error}]"),
        Err(_) => println!("[{name}: PANICKED after {seconds:.1} s]"),
    }
}

/// Sequences over a backend, with blocks given out in order.
struct Runner<'a, B> {
    backend: &'a mut B,
    sequences: Vec<Sequence>,
    params: Arc<SamplingParams>,
}

struct Sequence {
    tokens: Vec<u32>,
    computed: usize,
    blocks: Vec<u32>,
    prompt_len: usize,
}

impl<'a, B: Backend> Runner<'a, B> {
    fn new(backend: &'a mut B, prompts: &[Vec<u32>], room: usize, logprobs: Option<u32>) -> Self {
        let block_size = backend.info().block_size;
        let mut next = 0_u32;
        let sequences = prompts
            .iter()
            .map(|prompt| {
                let count = (prompt.len() + room).div_ceil(block_size) as u32;
                next += count;
                // Backwards: a kernel that took blocks for contiguous would be seen.
                let blocks = (next - count..next).rev().collect();
                Sequence { tokens: prompt.clone(), computed: 0, blocks, prompt_len: prompt.len() }
            })
            .collect();
        let params = Arc::new(SamplingParams { temperature: 0.0, logprobs, ..SamplingParams::default() });
        Self { backend, sequences, params }
    }

    /// A step of the next `lens[i]` tokens of each sequence (0: not in it). `guess`: the token is on the device still.
    fn batch(&self, lens: &[usize], guess: bool) -> StepBatch {
        let block_size = self.backend.info().block_size;
        let mut batch = StepBatch::default();
        for (at, (sequence, &len)) in self.sequences.iter().zip(lens).enumerate() {
            if len == 0 {
                continue;
            }
            let end = sequence.computed + len;
            let (query_start, table) = (batch.token_ids.len(), batch.block_tables.len());
            for position in sequence.computed..end {
                let known = if guess { !(at as u32) } else { sequence.tokens[position] };
                batch.token_ids.push(known);
                batch.positions.push(position as u32);
                let block = sequence.blocks[position / block_size];
                batch.slot_mapping.push(block * block_size as u32 + (position % block_size) as u32);
            }
            batch.block_tables.extend(&sequence.blocks[..end.div_ceil(block_size)]);
            let sampling = RowSampling {
                params: self.params.clone(),
                seed: at as u64,
                step: end.saturating_sub(sequence.prompt_len) as u64,
                prompt_token_ids: Arc::from([]),
                output_token_ids: Vec::new(),
                forbidden_token_ids: Vec::new(),
            };
            batch.sequences.push(StepSequence {
                query_start,
                query_len: len,
                context_len: end,
                block_table: table..batch.block_tables.len(),
                wants_output: end >= sequence.prompt_len,
                sampling: Some(sampling),
            });
        }
        batch
    }

    fn step(&mut self, lens: &[usize]) -> Result<Vec<(usize, SampledToken)>, Box<dyn std::error::Error>> {
        let batch = self.batch(lens, false);
        let outputs = self.backend.step(&batch)?;
        Ok(self.advance(lens, outputs))
    }

    fn advance(&mut self, lens: &[usize], outputs: Vec<RowOutput>) -> Vec<(usize, SampledToken)> {
        let mut outputs = outputs.into_iter();
        let mut chosen = Vec::new();
        for (at, (sequence, &len)) in self.sequences.iter_mut().zip(lens).enumerate() {
            if len == 0 {
                continue;
            }
            sequence.computed += len;
            if sequence.computed >= sequence.prompt_len
                && let Some(RowOutput::Token(token)) = outputs.next()
            {
                sequence.tokens.truncate(sequence.computed);
                sequence.tokens.push(token.token_id);
                chosen.push((at, token));
            }
        }
        chosen
    }

    fn generate(&mut self, count: usize) -> Result<Vec<Vec<u32>>, Box<dyn std::error::Error>> {
        let lens: Vec<usize> = self.sequences.iter().map(|s| s.tokens.len()).collect();
        self.step(&lens)?;
        for _ in 1..count {
            self.step(&vec![1; lens.len()])?;
        }
        Ok(self.sequences.iter().map(|s| s.tokens[s.prompt_len..].to_vec()).collect())
    }
}

fn options(max_model_len: usize, graphs: GraphCapture) -> CudaOptions {
    CudaOptions {
        max_model_len: Some(max_model_len),
        max_num_seqs: 16,
        max_num_batched_tokens: 1024,
        kv_cache_bytes: Some(512 << 20),
        graphs,
        tuning_budget: Duration::from_millis(500),
        ..CudaOptions::default()
    }
}

fn prompts(lens: &[usize], vocab: u64) -> Vec<Vec<u32>> {
    let mut random = fastrand::Rng::with_seed(7);
    lens.iter().map(|&n| (0..n).map(|_| random.u32(..vocab as u32)).collect()).collect()
}

fn spec(family: Family, heads: (u64, u64, u64), hidden: u64, inner: u64, vocab: u64, layers: usize) -> ModelSpec {
    let (num_heads, num_kv_heads, head_dim) = heads;
    let attention = AttentionSpec {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: (head_dim as f64).powf(-0.5),
        mask: Mask::Causal,
        softcap: None,
        rope: Some(RopeSpec { theta: 500_000.0, rotary_dim: head_dim, scaling: RopeScaling::None }),
        qk_norm: if family == Family::Qwen3 { QkNorm::PerHead } else { QkNorm::None },
        qkv_bias: family == Family::Qwen2,
        output_bias: false,
        ..AttentionSpec::grouped(num_heads, num_kv_heads, head_dim)
    };
    let mlp = MlpSpec { intermediate_size: inner, activation: Activation::Silu, gated: true, bias: false };
    ModelSpec {
        architecture: format!("{family:?}"),
        family,
        task: Task::Generate,
        hidden_size: hidden,
        vocab_size: vocab,
        max_position_embeddings: 32_768,
        dtype: DType::BF16,
        norm: Norm { kind: NormKind::Rms, eps: 1e-5, unit_offset: false },
        positions: Positions::Rope,
        embedding_scale: None,
        tied_embeddings: family == Family::Qwen2,
        final_logit_softcap: None,
        layers: vec![LayerSpec { mixer: Mixer::Attention(attention), ffn: Ffn::Dense(mlp) }; layers],
        quantization: Quantization::None,
        extras: Extras::default(),
    }
}

fn llama_8b() -> ModelSpec {
    spec(Family::Llama, (32, 8, 128), 4096, 14_336, 128_256, 32)
}

fn qwen_0_5b() -> ModelSpec {
    spec(Family::Qwen2, (14, 2, 64), 896, 4864, 151_936, 24)
}

fn parity_cases() -> Vec<(&'static str, ModelSpec)> {
    let mut sliding = spec(Family::Mistral, (4, 2, 32), 128, 256, 1003, 2);
    sliding.layers.iter_mut().for_each(|l| l.attention_mut().unwrap().mask = Mask::Sliding { window: 40 });
    vec![
        ("parity: llama, head_dim 128, group 4", spec(Family::Llama, (8, 2, 128), 512, 1024, 5000, 2)),
        ("parity: qwen2, head_dim 64, group 7, biases, tied", spec(Family::Qwen2, (14, 2, 64), 896, 1216, 3001, 2)),
        ("parity: qwen3, head_dim 128, QK norm", spec(Family::Qwen3, (4, 1, 128), 256, 512, 2000, 2)),
        ("parity: llama, head_dim 80 and 1 layer", spec(Family::Llama, (4, 4, 80), 320, 640, 1111, 1)),
        ("parity: sliding window, head_dim 32", sliding),
    ]
}

/// Logprobs of the 20 likeliest tokens, CPU against CUDA, over prefill, chunks, mixed steps and decodes.
fn parity(spec: &ModelSpec) -> Outcome {
    let weights = RandomWeights { seed: 3, stored: StoredType::BF16 };
    let cpu_options = CpuOptions { max_model_len: Some(2048), kv_cache_bytes: 256 << 20, ..CpuOptions::default() };
    let mut cpu = CpuBackend::load(spec, &weights, &cpu_options, &mut |_, _| {})?;
    let graphs = GraphCapture::WhenNeeded;
    let mut cuda = CudaBackend::load(spec, &WeightOrigin::Source(&weights), &options(2048, graphs), &mut |_, _| {})?;
    println!("{}", cuda.info().device);
    let texts = prompts(&[5, 130, 64, 300], spec.vocab_size);
    // Whole prompts and chunks, decodes beside chunks, then decodes alone (3 of 4 sequences: a padded bucket).
    let schedule: [[usize; 4]; 8] = [
        [5, 130, 0, 0],
        [1, 1, 60, 0],
        [1, 1, 4, 200],
        [1, 1, 1, 100],
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 1],
    ];
    let mut on_cpu = Runner::new(&mut cpu, &texts, 64, Some(20));
    let mut on_cuda = Runner::new(&mut cuda, &texts, 64, Some(20));
    let (mut worst, mut ids, mut same, mut sum, mut count) = (0_f32, 0, 0, 0_f64, 0_u32);
    for lens in schedule {
        let expected = on_cpu.step(&lens)?;
        let found = on_cuda.step(&lens)?;
        for ((_, a), (_, b)) in expected.iter().zip(&found) {
            ids += 1;
            same += usize::from(a.token_id == b.token_id);
            for x in &a.top_logprobs {
                let Some(y) = b.top_logprobs.iter().find(|y| y.token_id == x.token_id) else { continue };
                let error = (x.logprob - y.logprob).abs();
                worst = worst.max(error);
                sum += f64::from(error);
                count += 1;
            }
        }
        // Both go on from the same text.
        for (a, b) in on_cpu.sequences.iter().zip(&mut on_cuda.sequences) {
            b.tokens.clone_from(&a.tokens);
        }
    }
    let mean = sum / f64::from(count.max(1));
    println!("tokens equal {same}/{ids}; logprobs: {count} compared, mean error {mean:.4}, worst {worst:.4}");
    batch_equals_single(spec, &weights)?;
    if same * 10 < ids * 8 || mean > 0.03 || !mean.is_finite() {
        return Err("CUDA and CPU differ by more than bf16 explains".into());
    }
    Ok(())
}

fn batch_equals_single(spec: &ModelSpec, weights: &RandomWeights) -> Outcome {
    let texts = prompts(&[33, 7, 150], spec.vocab_size);
    let run = |texts: &[Vec<u32>], graphs: GraphCapture| -> Result<Vec<Vec<u32>>, Box<dyn std::error::Error>> {
        let mut backend =
            CudaBackend::load(spec, &WeightOrigin::Source(weights), &options(2048, graphs), &mut |_, _| {})?;
        Runner::new(&mut backend, texts, 64, None).generate(20)
    };
    let together = run(&texts, GraphCapture::WhenNeeded)?;
    let launched = run(&texts, GraphCapture::Never)?;
    let alone = run(&texts[2..], GraphCapture::AtStart)?;
    let agree = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(x, y)| x == y).count();
    println!(
        "graph == launches: {}; batch and single agree for {} of 20 tokens",
        together == launched,
        agree(&together[2], &alone[0])
    );
    if together != launched {
        return Err("a replayed step differs from a launched one".into());
    }
    Ok(())
}

fn demo_model(dir: &Path) -> Outcome {
    let spec = parse_config(&std::fs::read(dir.join("config.json"))?)?;
    let checkpoint = Checkpoint::open(dir)?;
    let origin = WeightOrigin::Source(&checkpoint);
    let mut backend = CudaBackend::load(&spec, &origin, &options(1024, GraphCapture::AtStart), &mut |_, _| {})?;
    println!("load: {:?}", backend.timings());
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json"))?)?;
    let ids: Vec<u32> = golden["token_ids"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
    for prompt_len in [5, 7, 20] {
        let count = ids.len() - prompt_len;
        let text = Runner::new(&mut backend, &[ids[..prompt_len].to_vec()], 128, None).generate(count)?.remove(0);
        let agree = text.iter().zip(&ids[prompt_len..]).take_while(|(a, b)| a == b).count();
        println!("greedy from {prompt_len} tokens: {agree} of {count} as in golden.json");
    }
    Ok(())
}

/// From nothing to the first token, with weights from files.
fn load_checkpoint(dir: &Path) -> Outcome {
    let begin = Instant::now();
    let ms = || begin.elapsed().as_secs_f64() * 1e3;
    let spec = parse_config(&std::fs::read(dir.join("config.json"))?)?;
    let checkpoint = Checkpoint::open(dir)?;
    println!("checkpoint open after {:.0} ms", ms());
    let options = CudaOptions { max_model_len: Some(8192), ..CudaOptions::default() };
    let mut backend = CudaBackend::load(&spec, &WeightOrigin::Source(&checkpoint), &options, &mut |_, _| {})?;
    println!("loaded after {:.0} ms: {:?}", ms(), backend.timings());
    println!("products (remembered, measured, own, left): {:?}", backend.tuned_products());
    let text = Runner::new(&mut backend, &prompts(&[16], spec.vocab_size), 16, None).generate(4)?;
    println!("four tokens {text:?} after {:.0} ms", ms());
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn speed(spec: &ModelSpec, batches: &[usize], prefills: &[(usize, usize)]) -> Outcome {
    let options =
        CudaOptions { max_model_len: Some(8192), tuning_budget: Duration::from_secs(4), ..CudaOptions::default() };
    let begin = Instant::now();
    let mut backend = CudaBackend::load(spec, &WeightOrigin::Random { seed: 1 }, &options, &mut |_, _| {})?;
    println!("loaded in {:.0} ms: {:?}", begin.elapsed().as_secs_f64() * 1e3, backend.timings());
    println!("products (remembered, measured, own, left): {:?}", backend.tuned_products());
    let planned: u64 = backend.planned_memory().iter().map(|t| t.bytes).sum();
    println!("planned {:?}", backend.planned_memory().iter().map(|t| (t.name, t.bytes >> 20)).collect::<Vec<_>>());
    println!(
        "planned {} MiB, in use {} MiB, {} blocks",
        planned >> 20,
        backend.used_bytes()? >> 20,
        backend.info().num_blocks
    );
    for &(count, len) in prefills {
        let texts = prompts(&vec![len; count], spec.vocab_size);
        let mut times = Vec::new();
        for _ in 0..4 {
            let mut runner = Runner::new(&mut backend, &texts, 16, None);
            let begin = Instant::now();
            runner.step(&vec![len; count])?;
            times.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        let (first, ms) = (times[0], median(times[1..].to_vec()));
        println!(
            "prefill {count} x {len}: {ms:.2} ms ({:.0} tok/s), first {first:.1} ms",
            (count * len) as f64 / ms * 1e3
        );
    }
    let most = batches.iter().copied().max().unwrap_or(1);
    let texts = prompts(&vec![1024; most], spec.vocab_size);
    let mut runner = Runner::new(&mut backend, &texts, 256, None);
    let begin = Instant::now();
    for from in (0..most).step_by(8) {
        let lens: Vec<usize> = (0..most).map(|i| if (from..from + 8).contains(&i) { 1024 } else { 0 }).collect();
        runner.step(&lens)?;
        let done = from + 8;
        if [32, most].contains(&done) {
            let rate = (done * 1024) as f64 / begin.elapsed().as_secs_f64();
            println!("prefill of {done} x 1024 by 8: {rate:.0} tok/s");
        }
    }
    for &batch in batches {
        let lens: Vec<usize> = (0..most).map(|i| usize::from(i < batch)).collect();
        runner.step(&lens)?;
        let mut times = Vec::new();
        for _ in 0..10 {
            let begin = Instant::now();
            runner.step(&lens)?;
            times.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        let one_by_one = median(times);
        let ahead = pipelined(&mut runner, &lens, 16)?;
        println!("decode batch {batch}: {one_by_one:.3} ms a step one by one, {ahead:.3} ms with one step ahead");
    }
    Ok(())
}

/// Where the time of steps goes: decode rows at contexts of 1,024, and prompts of 1,024.
fn ops(spec: &ModelSpec, steps: &[(usize, usize)]) -> Outcome {
    const BYTES_PER_US: f64 = 4.36e6;
    let options = CudaOptions {
        max_model_len: Some(8192),
        max_num_seqs: 512,
        graphs: GraphCapture::WhenNeeded,
        tuning_budget: Duration::from_secs(4),
        ..CudaOptions::default()
    };
    let mut backend = CudaBackend::load(spec, &WeightOrigin::Random { seed: 1 }, &options, &mut |_, _| {})?;
    while Backend::idle(&mut backend)? {}
    for &(decodes, prefills) in steps {
        // The cache holds zeros: the time does not depend on what stands in it.
        let texts = prompts(&vec![1024; decodes + prefills], spec.vocab_size);
        let mut runner = Runner::new(&mut backend, &texts, 16, None);
        runner.sequences[..decodes].iter_mut().for_each(|s| s.computed = 1023);
        let lens = [vec![1; decodes], vec![1024; prefills]].concat();
        let batch = runner.batch(&lens, false);
        runner.step(&lens)?;
        let times = backend.op_times(&batch)?;
        println!("{decodes} decodes, {prefills} prompts: {:.0} us a step", times.step_us);
        for op in times.ops {
            let bound = op.bytes / BYTES_PER_US;
            let share = op.removed_us * op.count as f64 / times.step_us * 100.0;
            println!(
                "  {:3} x {:44} {:7.2} us in the step, {:7.2} in a chain, bytes {:7.2}, {:4.1} % of the step",
                op.count, op.name, op.removed_us, op.chained_us, bound, share
            );
        }
    }
    Ok(())
}

/// Milliseconds of a step when the next is submitted before the tokens of this one are known.
fn pipelined(
    runner: &mut Runner<'_, CudaBackend>,
    lens: &[usize],
    steps: usize,
) -> Result<f64, Box<dyn std::error::Error>> {
    let first = runner.batch(lens, false);
    runner.backend.submit(&first)?;
    runner.sequences.iter_mut().zip(lens).for_each(|(s, len)| s.computed += len);
    let begin = Instant::now();
    for _ in 0..steps {
        let next = runner.batch(lens, true);
        runner.backend.submit(&next)?;
        let outputs = runner.backend.collect()?;
        for ((sequence, _), output) in runner.sequences.iter_mut().zip(lens).filter(|(_, len)| **len > 0).zip(outputs) {
            if let RowOutput::Token(token) = output {
                sequence.tokens.push(token.token_id);
            }
            sequence.computed += 1;
        }
    }
    let ms = begin.elapsed().as_secs_f64() * 1e3 / steps as f64;
    for ((sequence, _), output) in
        runner.sequences.iter_mut().zip(lens).filter(|(_, l)| **l > 0).zip(runner.backend.collect()?)
    {
        if let RowOutput::Token(token) = output {
            sequence.tokens.push(token.token_id);
        }
    }
    Ok(ms)
}
