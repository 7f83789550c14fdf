//! Breaks things on a card on purpose and shows what comes of it: the lines and exit codes that a worker would end with.
//!
//!     cargo run --release -p mserve-runtime --example cuda_faults -- MODEL_DIR
//!
//! A kernel that does not compile, one that writes to an address that is none, and the same in the middle of generation.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use mserve_planner::model::parse_config;
use mserve_runtime::cuda::compile::{KernelSource, compile};
use mserve_runtime::cuda::device::Device;
use mserve_runtime::cuda::module::{Arg, Geometry, Kernel, Module};
use mserve_runtime::cuda::{CudaBackend, CudaError, CudaOptions, WeightOrigin};
use mserve_runtime::engine::{
    Backend, BackendError, BackendInfo, Engine, EngineConfig, GenerateRequest, RowOutput, SamplingParams, StepBatch,
};
use mserve_runtime::weights::Checkpoint;
use mserve_runtime::worker::FailureKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const POKE: &str = r#"extern "C" __global__ void poke(int* at) { *at = 1; }"#;
const BROKEN: &str = r#"extern "C" __global__ void broken(int* at) { *at = undeclared; }"#;
const ONE_THREAD: Geometry = Geometry { grid: [1, 1, 1], block: 1, shared_bytes: 0, overlap: false, cluster: 1 };

fn main() {
    let dir: PathBuf = std::env::args().nth(1).expect("a model's directory").into();
    let device = Arc::new(Device::open(0).unwrap());
    println!("opened: {:?}", device.opening);
    let source = |name: &str, text: &str| KernelSource { name: name.into(), text: text.into(), options: Vec::new() };
    let error = compile(&source("broken", BROKEN), &device.arch()).unwrap_err();
    tell(error.kind(), &error.to_string());
    let module = Module::load(&device, &compile(&source("poke", POKE), &device.arch()).unwrap()).unwrap();
    let poke = module.kernel("poke", 0).unwrap();
    let (kind, why) = in_the_middle(&dir, &device, poke);
    tell(kind, &why);
    // Sticky: nothing works in this process any more.
    let again = Device::open(0).and_then(|device| device.memory()).unwrap_err();
    tell(again.kind(), &again.to_string());
}

fn tell(kind: FailureKind, line: &str) {
    let restart = if kind.restart_can_help() { "restarted" } else { "not restarted" };
    println!("{kind:?}, exit code {}, {restart}: {line}", kind.exit_code());
}

/// Generates until the fault; what the engine says of its end.
fn in_the_middle(dir: &Path, device: &Arc<Device>, poke: Kernel) -> (FailureKind, String) {
    let spec = parse_config(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let options = CudaOptions { kv_cache_bytes: Some(64 << 20), ..CudaOptions::default() };
    let inner =
        CudaBackend::load_on(device, &spec, &WeightOrigin::Source(&checkpoint), &options, &mut |_, _| {}).unwrap();
    let max_model_len = inner.info().max_model_len;
    let config = EngineConfig {
        model_name: "faulty".into(),
        max_num_seqs: options.max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens,
        max_model_len,
        max_num_queued_reqs: 8,
        enable_prefix_caching: false,
    };
    let engine = Engine::start(Box::new(Faulty { inner, poke, steps_left: 20 }), config).unwrap();
    let params = SamplingParams { temperature: 0.0, max_tokens: 100, ignore_eos: true, ..SamplingParams::default() };
    let mut stream = engine
        .generate(GenerateRequest {
            request_id: "one".into(),
            prompt_token_ids: vec![1, 2, 3],
            params: Arc::new(params),
            eos_token_ids: Arc::from([]),
            choice_index: 0,
        })
        .unwrap();
    let mut events = 0;
    let mut last = None;
    while let Some(event) = stream.blocking_next() {
        events += 1;
        last = Some(event);
    }
    println!("{events} events, the last: {last:?}");
    futures::executor::block_on(engine.stopped())
}

/// A backend one of whose steps writes to an address that is none.
struct Faulty {
    inner: CudaBackend,
    poke: Kernel,
    steps_left: usize,
}

impl Faulty {
    fn count(&mut self) -> Result<(), BackendError> {
        self.steps_left = self.steps_left.wrapping_sub(1);
        if self.steps_left == 0 {
            // SAFETY: not safe at all, which is what this is for; the process ends with it.
            let launched: Result<(), CudaError> = unsafe { self.poke.launch(&ONE_THREAD, &[Arg::Pointer(0x10)]) };
            launched.map_err(|e| e.into_backend_error(&self.inner.info().device))?;
        }
        Ok(())
    }
}

impl Backend for Faulty {
    fn info(&self) -> &BackendInfo {
        self.inner.info()
    }
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
        self.count()?;
        self.inner.step(batch)
    }
    fn max_steps_in_flight(&self) -> usize {
        self.inner.max_steps_in_flight()
    }
    fn submit(&mut self, batch: &StepBatch) -> Result<(), BackendError> {
        self.count()?;
        self.inner.submit(batch)
    }
    fn collect(&mut self) -> Result<Vec<RowOutput>, BackendError> {
        self.inner.collect()
    }
    fn idle(&mut self) -> Result<bool, BackendError> {
        self.inner.idle()
    }
}
