//! `mserve plan`: what fits and how fast, on the cards of this machine or on ones that are named.

mod args;
mod cards;
mod explore;
pub(super) mod model;
mod output;
mod render;
mod sharing;
mod write;

pub use args::PlanArgs;

use crate::exit::Failure;
use anyhow::Context;
use cards::CardSource;
use mserve_planner::gpus::GpuModel;
use mserve_planner::memory::DEFAULT_GPU_MEMORY_UTILIZATION;
use mserve_planner::model::{ModelSpec, Task};
use mserve_planner::perf::Engine;
use mserve_planner::plan::{self, Plan, PlanError};
use mserve_runtime::cuda;
use output::Shown;
use std::process::ExitCode;

pub fn run(mut args: PlanArgs) -> anyhow::Result<ExitCode> {
    let path = args.model_path.take().or_else(|| args.model.take()).context("no model was given")?;
    let args = &args;
    let model = model::load(&path)?;
    let mut chosen = cards::choose(
        args.gpu.as_deref(),
        args.gpus,
        args.gpu_memory_utilization.unwrap_or(DEFAULT_GPU_MEMORY_UTILIZATION),
    )?;
    let mut request = args.request(&model, &chosen)?;
    if args.gpus.is_none() && args.targets().any() && args.split.slm.is_empty() {
        let needed = plan::gpus_needed(&request).map_err(|error| failure(&error))?;
        chosen.need(needed);
        request.gpus = needed;
    }
    if !args.split.slm.is_empty() {
        return sharing::run(args, &path, &model, &chosen, &request);
    }
    if args.output.interactive {
        return explore::run(request, None);
    }
    let other_cards = match chosen.source {
        CardSource::Default => plan::across_cards(&request, common_cards()).map_err(|error| failure(&error))?,
        CardSource::Flag | CardSource::Driver => Vec::new(),
    };
    let shown = Shown { args, chosen: &chosen, other_cards: &other_cards };
    match plan::plan(&request) {
        Ok(mut plan) => {
            plan.notes.extend(chosen.notes.iter().chain(&model.notes).cloned());
            plan.notes.extend(not_launched(&model.spec, &plan));
            if let Some(file) = &args.output.write {
                write::deployment(file, &path, &request, &plan)?;
            }
            shown.plan(&request, &plan)
        }
        Err(PlanError::DoesNotFit(error)) => shown.does_not_fit(&error),
        Err(error) => Err(failure(&error).into()),
    }
}

fn common_cards() -> impl Iterator<Item = &'static GpuModel> {
    cards::common()
}

/// What of the best option the bundled runtime does not do, when it was planned for it.
fn not_launched(spec: &ModelSpec, plan: &Plan) -> Option<String> {
    let best = plan.options.first().filter(|_| plan.demand.engine == Engine::Mserve)?;
    if spec.task == Task::Generate
        && let Err(why) = cuda::check_model(spec)
    {
        return Some(format!("Planned, and not launched on a GPU by this version: {why}."));
    }
    (best.tensor_parallel_size > 1)
        .then(|| "`mserve launch` runs a replica on one card: of these options, those with TP 1.".to_owned())
}

/// What is wrong with a request is the user's to mend (2); what no card can do does not fit (3).
fn failure(error: &PlanError) -> Failure {
    match error {
        PlanError::MissesTarget(_) => Failure::does_not_fit(error.to_string())
            .hint("leave --gpus out to see how many cards the targets need, or relax the target"),
        PlanError::Unsupported(unsupported) => {
            let other = "a checkpoint in another form";
            let hint = match &unsupported.smallest_card {
                Some(card) => format!("--gpu {card} is the smallest card of the table that does, or {other}"),
                None => format!("no card of the table holds it: {other}"),
            };
            Failure::does_not_fit(error.to_string()).hint(hint)
        }
        PlanError::TooManyGpus { .. } => {
            Failure::does_not_fit(error.to_string()).hint("a larger card (--gpu), or less to ask of it")
        }
        PlanError::DoesNotFit(_) => Failure::does_not_fit(error.to_string()),
        _ => Failure::usage(error.to_string()),
    }
}
