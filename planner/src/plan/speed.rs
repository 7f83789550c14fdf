//! How fast an option is: the load that its memory, its limits and the targets allow, and what users see then.

use super::targets::{Demand, Miss, TargetKind};
use super::{Concurrency, PlanRequest};
use crate::gpus::{self, GpuModel};
use crate::model::Program;
use crate::perf::serving::{Rates, Replica, round};
use crate::perf::{Basis, Counted, Engine, EngineSpeed, Machine, OpKind, extract};
use serde::{Deserialize, Serialize};

/// All replicas of an option at the load of the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptionSpeed {
    pub engine: Engine,
    pub basis: Basis,
    pub requests_per_s: f64,
    pub output_tokens_per_s: f64,
    /// One replica at that load.
    pub replica: Rates,
    /// One replica with one request.
    pub alone: Rates,
    pub load_limit: LoadLimit,
    pub bottleneck: Bottleneck,
    /// Cards that meet the targets of rate and concurrency; all of the option's when there are none.
    pub gpus_needed: u64,
}

/// Why no more requests run at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadLimit {
    KvMemory,
    MaxNumSeqs,
    /// Texts that one step's tokens hold, for models without a cache.
    StepTokens,
    Ttft,
    Tpot,
    /// The target of rate or concurrency needs no more.
    Target,
}

impl LoadLimit {
    pub fn label(self) -> &'static str {
        match self {
            Self::KvMemory => "KV memory",
            Self::MaxNumSeqs => "max_num_seqs",
            Self::StepTokens => "step's tokens",
            Self::Ttft => "TTFT target",
            Self::Tpot => "TPOT target",
            Self::Target => "target",
        }
    }
}

/// What takes most of a decode step (of a step, for models that do not generate).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bottleneck {
    /// `None`: the engine's host code.
    pub kind: Option<OpKind>,
    pub bound: Bound,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    Memory,
    Compute,
    Latency,
    Link,
    Host,
}

impl Bottleneck {
    pub fn label(self) -> String {
        let bound = match self.bound {
            Bound::Memory => "memory bandwidth",
            Bound::Compute => "compute",
            Bound::Latency => "latency",
            Bound::Link => "links",
            Bound::Host => "host",
        };
        self.kind.map_or_else(|| bound.to_owned(), |kind| format!("{}: {bound}", kind.label()))
    }
}

/// One TP size of a request, ready to be timed. `None` from [`Timed::new`]: the card's rates are not known.
#[derive(Debug)]
pub struct Timed {
    work: Vec<Counted>,
    gpu: &'static GpuModel,
    engine: &'static EngineSpeed,
    basis: Basis,
    tensor_parallel_size: u64,
    demand: Demand,
    max_model_len: u64,
    max_num_batched_tokens: u64,
}

impl Timed {
    pub fn new(request: &PlanRequest<'_>, program: &Program, tensor_parallel_size: u64) -> Option<Self> {
        let gpu = gpus::find(&request.card.name).ok()?;
        let engine = request.demand.engine.speed();
        let dtype = request.kv_cache_dtype.resolve(request.spec);
        Some(Self {
            work: extract(program, request.spec, gpu, engine, tensor_parallel_size, dtype),
            gpu,
            engine,
            basis: Basis::of(request.demand.engine, gpu, tensor_parallel_size, program, &request.spec.quantization),
            tensor_parallel_size,
            demand: request.demand,
            max_model_len: request.limits.max_model_len,
            max_num_batched_tokens: request.limits.max_num_batched_tokens,
        })
    }

    pub fn basis(&self) -> Basis {
        self.basis
    }

    pub fn machine(&self) -> Machine<'_> {
        Machine { gpu: self.gpu, tensor_parallel_size: self.tensor_parallel_size, engine: self.engine }
    }

    pub fn replica(&self) -> Replica<'_> {
        Replica {
            work: &self.work,
            machine: self.machine(),
            shape: self.demand.shape.within(self.max_model_len),
            max_num_batched_tokens: self.max_num_batched_tokens,
        }
    }

    /// The speed of `replicas` that hold `held` each, or the target that they miss.
    pub fn speed(&self, held: &Concurrency, replicas: u64, max_num_seqs: u64) -> Result<OptionSpeed, Miss> {
        let replica = self.replica();
        let (most, mut load_limit) = self.most(held, max_num_seqs)?;
        let mut load = most;
        let targets = &self.demand.targets;
        let mut gpus_needed = replicas * self.tensor_parallel_size;
        if let Some(asked) = targets.concurrency {
            let each = asked.div_ceil(replicas.max(1));
            if each > most {
                return Err(Miss::new(TargetKind::Concurrency, asked as f64, (most * replicas) as f64));
            }
            gpus_needed = asked.div_ceil(most.max(1)) * self.tensor_parallel_size;
            (load, load_limit) = (each, LoadLimit::Target);
        }
        if let Some(asked) = targets.request_rate {
            let each = asked / replicas as f64;
            let best = replica.at(most as f64).requests_per_s;
            if best < each {
                return Err(Miss::new(TargetKind::RequestRate, asked, best * replicas as f64));
            }
            let least = smallest(most, |n| replica.at(n as f64).requests_per_s >= each);
            let needed = (asked / best).ceil().max(1.0) as u64 * self.tensor_parallel_size;
            gpus_needed = if targets.concurrency.is_some() { gpus_needed.max(needed) } else { needed };
            (load, load_limit) = (load.min(most).max(least), LoadLimit::Target);
            if targets.concurrency.is_none() {
                load = least;
            }
        }
        let rates = replica.at(load as f64);
        Ok(OptionSpeed {
            engine: self.demand.engine,
            basis: self.basis,
            requests_per_s: round(rates.requests_per_s * replicas as f64),
            output_tokens_per_s: round(rates.output_tokens_per_s * replicas as f64),
            replica: rates.rounded(),
            alone: replica.at(1.0).rounded(),
            load_limit,
            bottleneck: self.bottleneck(rates.concurrency),
            gpus_needed,
        })
    }

    /// Requests at once that memory, `max_num_seqs` and the latency targets allow one replica.
    fn most(&self, held: &Concurrency, max_num_seqs: u64) -> Result<(u64, LoadLimit), Miss> {
        let replica = self.replica();
        let most = held.requests_per_replica.max(1);
        let limit = match held.kv_per_replica {
            _ if most >= max_num_seqs => LoadLimit::MaxNumSeqs,
            Some(_) => LoadLimit::KvMemory,
            None => LoadLimit::StepTokens,
        };
        let mut allowed = (most, limit);
        let targets = &self.demand.targets;
        for (kind, asked, limit) in
            [(TargetKind::Ttft, targets.ttft_ms, LoadLimit::Ttft), (TargetKind::Tpot, targets.tpot_ms, LoadLimit::Tpot)]
        {
            let Some(asked) = asked else { continue };
            let reached = |n: u64| match kind {
                TargetKind::Ttft => replica.at(n as f64).ttft_ms,
                _ => replica.at(n as f64).tpot_ms,
            };
            if reached(1) > asked {
                return Err(Miss::new(kind, asked, reached(1)));
            }
            // Latency grows with the load: the largest that still meets the target.
            let fitting = smallest(allowed.0 + 1, |n| reached(n) > asked) - 1;
            if fitting < allowed.0 {
                allowed = (fitting, limit);
            }
        }
        Ok(allowed)
    }

    fn bottleneck(&self, load: f64) -> Bottleneck {
        let replica = self.replica();
        let generates = replica.shape.output_tokens > 0;
        let step = if generates { replica.decode_step(load) } else { replica.prompt_step(load) };
        let Some(op) = step.longest().filter(|op| op.seconds > step.host_seconds) else {
            return Bottleneck { kind: None, bound: Bound::Host };
        };
        let machine = self.machine();
        let memory_s = op.bytes / (self.engine.memory * machine.gpu.memory_bandwidth_bytes_per_s as f64);
        let compute_s = op.flops / (self.engine.matrix * machine.gpu.rates.half_flops_per_s as f64);
        let bound = match op.kind {
            OpKind::Exchange => Bound::Link,
            _ if memory_s.max(compute_s) < op.seconds / 2.0 => Bound::Latency,
            _ if compute_s > memory_s => Bound::Compute,
            _ => Bound::Memory,
        };
        Bottleneck { kind: Some(op.kind), bound }
    }
}

/// The smallest n of 1..=most for which `is` holds (it holds from there on); `most` when it never does.
fn smallest(most: u64, is: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (1, most.max(1));
    while low < high {
        let middle = low + (high - low) / 2;
        if is(middle) { high = middle } else { low = middle + 1 }
    }
    low
}
