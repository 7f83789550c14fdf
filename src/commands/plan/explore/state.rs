//! What the explorer knows: the request as it was, as it is, and what comes of it.

use super::Beside;
use crossterm::event::KeyCode;
use mserve_planner::gpus::{self, GPUS};
use mserve_planner::memory::KvCacheDtype;
use mserve_planner::model::Task;
use mserve_planner::perf::Engine;
use mserve_planner::plan::{Card, Plan, PlanError, PlanOption, PlanRequest, Rank, plan};
use mserve_planner::split::{Split, SplitError, Workload, split};
use mserve_planner::units::format_count;

/// What can be changed, in the order of the screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Gpu,
    Gpus,
    TensorParallel,
    KvDtype,
    Input,
    Output,
    MaxModelLen,
    MaxNumSeqs,
    MemoryRatio,
    Engine,
    SlmRatio,
}

const FIELDS: [Field; 11] = [
    Field::Gpu,
    Field::Gpus,
    Field::TensorParallel,
    Field::KvDtype,
    Field::Input,
    Field::Output,
    Field::MaxModelLen,
    Field::MaxNumSeqs,
    Field::MemoryRatio,
    Field::Engine,
    Field::SlmRatio,
];

impl Field {
    pub fn label(self) -> &'static str {
        match self {
            Self::Gpu => "GPU",
            Self::Gpus => "GPUs",
            Self::TensorParallel => "TP",
            Self::KvDtype => "KV cache",
            Self::Input => "prompt tokens",
            Self::Output => "output tokens",
            Self::MaxModelLen => "max_model_len",
            Self::MaxNumSeqs => "max_num_seqs",
            Self::MemoryRatio => "memory share",
            Self::Engine => "engine",
            Self::SlmRatio => "SLM per LLM req",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Less,
    More,
}

#[derive(Debug)]
pub(super) struct Explorer<'a> {
    start: PlanRequest<'a>,
    pub now: PlanRequest<'a>,
    pub beside: Option<Beside>,
    start_workload: Option<Workload>,
    pub fields: Vec<Field>,
    pub selected: usize,
    pub plan: Result<Plan, PlanError>,
    pub split: Option<Result<Split, SplitError>>,
    /// The best option at the start, to compare with.
    pub before: Option<PlanOption>,
}

impl<'a> Explorer<'a> {
    pub fn new(mut request: PlanRequest<'a>, beside: Option<Beside>) -> Self {
        request.demand.rank = Rank::RequestRate;
        let generates = request.spec.task == Task::Generate;
        let hidden = |field: &Field| match field {
            Field::SlmRatio => beside.is_none(),
            Field::Output | Field::KvDtype => !generates,
            _ => false,
        };
        let fields = FIELDS.into_iter().filter(|field| !hidden(field)).collect();
        let plan = plan(&request);
        let before = plan.as_ref().ok().and_then(|plan| plan.options.first().cloned());
        let start_workload = beside.as_ref().map(|beside| beside.workload);
        let start = request.clone();
        let mut explorer =
            Self { start, now: request, beside, start_workload, fields, selected: 0, plan, split: None, before };
        explorer.compute();
        explorer
    }

    pub fn key(&mut self, key: KeyCode) {
        match key {
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.selected = (self.selected + 1).min(self.fields.len() - 1),
            KeyCode::Left | KeyCode::Char('h' | '-') => self.change(Direction::Less),
            KeyCode::Right | KeyCode::Char('l' | '+' | ' ') => self.change(Direction::More),
            KeyCode::Char('r') => self.reset(),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.now = self.start.clone();
        if let (Some(beside), Some(workload)) = (&mut self.beside, self.start_workload) {
            beside.workload = workload;
        }
        self.compute();
    }

    fn change(&mut self, direction: Direction) {
        let Some(&field) = self.fields.get(self.selected) else { return };
        self.step(field, direction);
        self.compute();
    }

    fn compute(&mut self) {
        // A longer request wants a longer context.
        let now = &mut self.now;
        let wanted = now.demand.shape.total_tokens().min(now.spec.max_position_embeddings);
        if wanted > now.limits.max_model_len && matches!(self.fields[self.selected], Field::Input | Field::Output) {
            now.limits = now.limits.with_max_model_len(now.spec, wanted);
        }
        self.plan = plan(&self.now);
        self.split = self.beside.as_ref().map(|b| split(&self.now, &b.models, b.workload, b.tokens));
    }

    fn step(&mut self, field: Field, direction: Direction) {
        let context = self.now.spec.max_position_embeddings;
        let now = &mut self.now;
        let shape = &mut now.demand.shape;
        match field {
            Field::Gpu => now.card = Card::from(other_gpu(&now.card, direction)),
            Field::Gpus => {
                now.gpus = add(now.gpus, direction).clamp(1, 64);
                now.tensor_parallel_size = now.tensor_parallel_size.filter(|&tp| tp <= now.gpus);
            }
            Field::TensorParallel => now.tensor_parallel_size = other_tp(now, direction),
            Field::KvDtype => now.kv_cache_dtype = other_dtype(now.kv_cache_dtype, direction),
            Field::Input => shape.input_tokens = scale(shape.input_tokens, direction).clamp(16, context),
            Field::Output => shape.output_tokens = scale(shape.output_tokens, direction).clamp(1, context),
            Field::MaxModelLen => {
                let max_model_len = scale(now.limits.max_model_len, direction).clamp(256.min(context), context);
                now.limits = now.limits.with_max_model_len(now.spec, max_model_len);
            }
            Field::MaxNumSeqs => now.limits.max_num_seqs = scale(now.limits.max_num_seqs, direction).clamp(1, 4096),
            Field::MemoryRatio => {
                let percent = (now.limits.gpu_memory_utilization * 100.0).round();
                let percent = if direction == Direction::More { percent + 1.0 } else { percent - 1.0 };
                now.limits.gpu_memory_utilization = percent.clamp(5.0, 98.0) / 100.0;
            }
            Field::Engine => now.demand.engine = other_engine(now.demand.engine, direction),
            Field::SlmRatio => {
                if let Some(beside) = &mut self.beside {
                    let ratio = beside.workload.ratio().round() as u64;
                    beside.workload = Workload::Ratio(add(ratio, direction).clamp(1, 500) as f64);
                }
            }
        }
    }

    pub fn value(&self, field: Field) -> String {
        self.value_of(field, &self.now, self.beside.as_ref().map(|beside| beside.workload))
    }

    pub fn is_changed(&self, field: Field) -> bool {
        self.value(field) != self.value_of(field, &self.start, self.start_workload)
    }

    fn value_of(&self, field: Field, request: &PlanRequest<'_>, workload: Option<Workload>) -> String {
        let shape = request.demand.shape;
        match field {
            Field::Gpu => gpus::find(&request.card.name).map_or(&*request.card.name, |gpu| gpu.name).to_owned(),
            Field::Gpus => request.gpus.to_string(),
            Field::TensorParallel => request.tensor_parallel_size.map_or("best".to_owned(), |tp| tp.to_string()),
            Field::KvDtype => format!("{:?}", request.kv_cache_dtype).to_ascii_lowercase(),
            Field::Input => format_count(shape.input_tokens),
            Field::Output => format_count(shape.output_tokens),
            Field::MaxModelLen => format_count(request.limits.max_model_len),
            Field::MaxNumSeqs => format_count(request.limits.max_num_seqs),
            Field::MemoryRatio => format!("{:.2}", request.limits.gpu_memory_utilization),
            Field::Engine => request.demand.engine.to_string(),
            Field::SlmRatio => workload.map_or_else(String::new, |workload| workload.ratio().to_string()),
        }
    }
}

fn add(value: u64, direction: Direction) -> u64 {
    match direction {
        Direction::Less => value.saturating_sub(1),
        Direction::More => value + 1,
    }
}

/// Half or twice, on powers of two.
fn scale(value: u64, direction: Direction) -> u64 {
    match direction {
        Direction::Less if value.is_power_of_two() => value / 2,
        Direction::Less => value.next_power_of_two() / 2,
        Direction::More => (value + 1).next_power_of_two(),
    }
}

fn neighbour<T: Copy + PartialEq>(all: &[T], at: T, direction: Direction) -> T {
    let index = all.iter().position(|&other| other == at).unwrap_or(0);
    let other = match direction {
        Direction::Less => index.saturating_sub(1),
        Direction::More => (index + 1).min(all.len() - 1),
    };
    all[other]
}

fn other_gpu(card: &Card, direction: Direction) -> &'static gpus::GpuModel {
    let index = gpus::find(&card.name).ok().and_then(|gpu| GPUS.iter().position(|other| other == gpu)).unwrap_or(0);
    let indices: Vec<usize> = (0..GPUS.len()).collect();
    &GPUS[neighbour(&indices, index, direction)]
}

/// `None` (the best), then every legal size.
fn other_tp(request: &PlanRequest<'_>, direction: Direction) -> Option<u64> {
    let legal = mserve_planner::tensor_parallel::legal_sizes(request.spec, request.gpus);
    let sizes: Vec<Option<u64>> = std::iter::once(None).chain(legal.into_iter().map(Some)).collect();
    neighbour(&sizes, request.tensor_parallel_size, direction)
}

fn other_dtype(dtype: KvCacheDtype, direction: Direction) -> KvCacheDtype {
    let all = [KvCacheDtype::Auto, KvCacheDtype::Fp16, KvCacheDtype::Bf16, KvCacheDtype::Fp8];
    neighbour(&all, dtype, direction)
}

fn other_engine(engine: Engine, direction: Direction) -> Engine {
    neighbour(&[Engine::Mserve, Engine::Vllm, Engine::Sglang], engine, direction)
}
