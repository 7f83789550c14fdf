//! `--write`: the plan as the `mserve.toml` that `mserve launch` runs.

use crate::exit::Failure;
use anyhow::Context;
use mserve_planner::memory::KvCacheDtype;
use mserve_planner::model::{ModelSpec, Task, families};
use mserve_planner::perf::Engine;
use mserve_planner::plan::{Plan, PlanOption, PlanRequest};
use mserve_planner::split::{SlmKind, SmallModel, Split, SplitOption};
use mserve_planner::units::{format_bytes, format_count};
use mserve_runtime::cuda;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// As many as the file may say.
const MOST_SEQUENCES: u64 = 1024;

/// One `[[model]]` table.
#[derive(Debug)]
struct Table {
    path: PathBuf,
    devices: &'static str,
    kind: Option<&'static str>,
    replicas: u64,
    max_model_len: Option<u64>,
    max_num_seqs: Option<u64>,
    max_num_batched_tokens: Option<u64>,
    gpu_memory_utilization: f64,
}

/// Where `launch` runs a small model that was planned on a card.
#[derive(Debug)]
struct Placement {
    not_on_gpu: Option<String>,
}

impl Placement {
    /// `auto` moves to the card with the version that can.
    fn devices(&self) -> &'static str {
        if self.not_on_gpu.is_some() { "auto" } else { "gpu" }
    }
}

/// The best option that `launch` can run: one card a replica.
pub(super) fn deployment(file: &Path, model: &Path, request: &PlanRequest<'_>, plan: &Plan) -> anyhow::Result<()> {
    can_run(request)?;
    launchable(request.model_name, request.spec)?;
    let option = runnable(&plan.options)?;
    let mut text = format!("# Planned by mserve for {} x {}: {}.\n", plan.gpus, plan.card.name, plan.model.name);
    text.push_str(&figures(option));
    if let Some(better) = plan.options.first().filter(|best| best.tensor_parallel_size > 1) {
        let tp = better.tensor_parallel_size;
        let _ = writeln!(text, "# The plan ranks TP {tp} above this: `mserve launch` runs a replica on one card.");
    }
    text.push('\n');
    text.push_str(&llm_table(absolute(model)?, option, request));
    save(file, &text)
}

/// The best split that `launch` can run: small models on cards of their own, one replica a card.
pub(super) fn shared(
    file: &Path,
    llm: &Path,
    slms: &[(&PathBuf, &SmallModel)],
    request: &PlanRequest<'_>,
    split: &Split,
) -> anyhow::Result<()> {
    can_run(request)?;
    launchable(request.model_name, request.spec)?;
    let placements = slms.iter().map(|(_, small)| placement(small)).collect::<Result<Vec<_>, _>>()?;
    let apart = |o: &&SplitOption| o.llm.tensor_parallel_size == 1 && !o.co_located && o.slm_gpus >= slms.len() as u64;
    let option = split.options.iter().find(apart).ok_or_else(|| {
        let message = "no option gives the LLM and each small model cards of their own, which is what `launch` runs";
        Failure::does_not_fit(message).hint("more cards (--gpus), or plan without --write")
    })?;
    let mut text = format!(
        "# Planned by mserve for {} x {}, {} ({} small requests for each large one).\n# {} requests/s served: the LLM \
         side could do {}, the small models {}.\n",
        split.gpus,
        request.card.name,
        split.workload.name(),
        split.ratio,
        option.served_requests_per_s,
        option.llm_requests_per_s,
        option.slm_requests_per_s
    );
    text.push_str(&figures(&option.llm));
    text.push('\n');
    text.push_str(&llm_table(absolute(llm)?, &option.llm, request));
    for (i, ((path, small), placed)) in slms.iter().zip(&split.slm_card.models).enumerate() {
        // Cards that do not divide evenly go to the first.
        let (each, left) = (option.slm_gpus / slms.len() as u64, option.slm_gpus % slms.len() as u64);
        let replicas = each + u64::from((i as u64) < left);
        let _ = writeln!(text, "\n# {}: {} requests/s a card", placed.kind.label(), placed.requests_per_s);
        if let Some(why) = &placements[i].not_on_gpu {
            let told = format!("{}: planned on a GPU, and this version serves it on the CPU: {why}", small.name);
            let _ = writeln!(text, "# {told}.");
            eprintln!("note: {told}");
        }
        text.push_str(&table(&Table {
            path: absolute(path)?,
            devices: placements[i].devices(),
            kind: (placed.kind == SlmKind::Embedding).then_some("embedding"),
            replicas,
            max_model_len: None,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            gpu_memory_utilization: request.limits.gpu_memory_utilization,
        }));
    }
    save(file, &text)
}

/// Whether a file can say what was planned: it has no engine and no type of the cache.
fn can_run(request: &PlanRequest<'_>) -> Result<(), Failure> {
    let engine = request.demand.engine;
    if engine != Engine::Mserve {
        let message = format!("an mserve.toml is for mserve's own runtime, and this plan is for {engine}");
        return Err(Failure::usage(message).hint("leave out --engine, or --write"));
    }
    if request.kv_cache_dtype != KvCacheDtype::Auto {
        let message = "mserve's runtime keeps the cache in the model's own type, and this plan is for another";
        return Err(Failure::usage(message).hint("leave out --kv-cache-dtype, or --write"));
    }
    Ok(())
}

/// What `launch` would refuse is not written for it.
fn launchable(name: &str, spec: &ModelSpec) -> Result<(), Failure> {
    cuda::check_model(spec).map_err(|error| {
        let what = "is planned, and this version of `mserve launch` does not run it on a GPU";
        Failure::does_not_fit(format!("{name} {what}: {error}")).hint("plan without --write")
    })
}

fn placement(small: &SmallModel) -> Result<Placement, Failure> {
    let not_served = |why: &str| {
        let message =
            format!("{} is planned, and this version of `mserve launch` does not serve it: {why}", small.name);
        Failure::does_not_fit(message).hint("plan without --write, or without this --slm")
    };
    if let Task::Classify { .. } = small.spec.task {
        return Err(not_served("classifiers and rerankers have no endpoint yet"));
    }
    let not_on_gpu = cuda::check_model(&small.spec).err().map(|error| error.to_string());
    if not_on_gpu.is_some()
        && let Some(op) = families::program(&small.spec).first_planned()
    {
        return Err(not_served(&format!("{} is no kernel of the runtime ({})", op.feature.name(), op.detail)));
    }
    Ok(Placement { not_on_gpu })
}

fn llm_table(path: PathBuf, option: &PlanOption, request: &PlanRequest<'_>) -> String {
    let limits = &request.limits;
    table(&Table {
        path,
        devices: "gpu",
        kind: None,
        replicas: option.replicas,
        max_model_len: Some(limits.max_model_len),
        max_num_seqs: Some(limits.max_num_seqs.min(MOST_SEQUENCES)),
        max_num_batched_tokens: Some(limits.max_num_batched_tokens),
        gpu_memory_utilization: limits.gpu_memory_utilization,
    })
}

fn runnable(options: &[PlanOption]) -> Result<&PlanOption, Failure> {
    options.iter().find(|option| option.tensor_parallel_size == 1).ok_or_else(|| {
        let message = "`mserve launch` runs a replica on one card, and no option with TP 1 fits";
        Failure::does_not_fit(message).hint("a larger card, a shorter --max-model-len, or plan without --write")
    })
}

/// What was promised, for whoever reads the file.
fn figures(option: &PlanOption) -> String {
    let mut text = format!(
        "# Each replica: {} of KV cache, {} tokens, {:.2} requests of {} tokens.\n",
        format_bytes(option.per_gpu.kv_pool_bytes),
        format_count(option.kv_cache_tokens),
        option.full.kv_per_replica.unwrap_or(0.0),
        format_count(option.full.tokens)
    );
    if let Some(speed) = &option.speed {
        let _ = writeln!(
            text,
            "# All replicas: {} requests/s, {} output tokens/s; first token {} ms, {} ms a token.",
            speed.requests_per_s, speed.output_tokens_per_s, speed.replica.ttft_ms, speed.replica.tpot_ms
        );
    }
    text
}

fn table(table: &Table) -> String {
    let path = toml::Value::String(table.path.display().to_string());
    let mut text = format!("[[model]]\nname = \"{}\"\npath = {path}\n", name(&table.path));
    if let Some(kind) = table.kind {
        let _ = writeln!(text, "kind = \"{kind}\"");
    }
    let _ = writeln!(text, "replicas = {}\ndevices = \"{}\"", table.replicas, table.devices);
    for (key, value) in [
        ("max_model_len", table.max_model_len),
        ("max_num_seqs", table.max_num_seqs),
        ("max_num_batched_tokens", table.max_num_batched_tokens),
    ] {
        if let Some(value) = value {
            let _ = writeln!(text, "{key} = {value}");
        }
    }
    let _ = writeln!(text, "gpu_memory_utilization = {}", table.gpu_memory_utilization);
    text
}

/// The directory's name in the letters that a model's name may have.
fn name(path: &Path) -> String {
    let directory = path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy());
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    directory.chars().map(|c| if allowed(c) { c } else { '-' }).take(128).collect()
}

/// Launch may run elsewhere than plan did. A config.json stands for its directory.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    let path = path.canonicalize().with_context(|| path.display().to_string())?;
    let named_config = path.file_name().is_some_and(|name| name == "config.json");
    Ok(if named_config { path.parent().unwrap_or(&path).to_owned() } else { path })
}

fn save(file: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(file, text).map_err(|error| Failure::usage(format!("cannot write {}: {error}", file.display())))?;
    eprintln!("wrote {}; start it with: mserve launch {}", file.display(), file.display());
    Ok(())
}
