//! `mserve plan --slm`: the cards shared out between the LLM and small models.

use super::args::PlanArgs;
use super::cards::{CardSource, ChosenCards};
use super::explore::{self, Beside};
use super::{model, output, render, write};
use crate::exit::{self, Failure};
use mserve_planner::plan::{self, PlanError, PlanRequest};
use mserve_planner::split::{self, SmallModel, Split, SplitError, split};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;

#[derive(Debug, Serialize)]
struct SplitJson<'a> {
    schema: u32,
    model: &'a str,
    card: &'a plan::Card,
    card_source: CardSource,
    split: &'a Split,
    notes: &'a [String],
}

pub(super) fn run(
    args: &PlanArgs,
    path: &Path,
    llm: &model::Model,
    chosen: &ChosenCards,
    request: &PlanRequest<'_>,
) -> anyhow::Result<ExitCode> {
    let workload = args.split.workload()?;
    let mut small = Vec::new();
    let mut notes: Vec<String> = chosen.notes.iter().chain(&llm.notes).cloned().collect();
    for path in &args.split.slm {
        let loaded = model::load(path)?;
        notes.extend(loaded.notes);
        let model = SmallModel::new(&loaded.name, loaded.spec, loaded.weights);
        small.push(model.map_err(|error| Failure::usage(format!("--slm {}: {error}", path.display())))?);
    }
    if args.output.interactive {
        let beside = Beside { models: small, workload, tokens: args.split.slm_tokens };
        return explore::run(request.clone(), Some(beside));
    }
    let split = split(request, &small, workload, args.split.slm_tokens)
        .map_err(|error| failure(&error, || split::changes(request, &small, workload, args.split.slm_tokens)))?;
    if let Some(file) = &args.output.write {
        let slms: Vec<_> = args.split.slm.iter().zip(&small).collect();
        write::shared(file, path, &slms, request, &split)?;
    }
    let text = if args.output.json {
        let (card, card_source, notes) = (&request.card, chosen.source, &notes[..]);
        output::json(&SplitJson { schema: plan::SCHEMA, model: &llm.name, card, card_source, split: &split, notes })?
    } else {
        render::split(&split, &chosen.headline, &notes, request)
    };
    output::print(&text)?;
    Ok(ExitCode::from(exit::OK))
}

fn failure(error: &SplitError, changes: impl FnOnce() -> Vec<plan::Change>) -> Failure {
    match error {
        SplitError::Plan(PlanError::DoesNotFit(_))
        | SplitError::NoOption { .. }
        | SplitError::SmallModelsDoNotFit { .. } => {
            let changes: Vec<String> = changes().iter().map(ToString::to_string).collect();
            let hint = match changes.as_slice() {
                [] => "no number or kind of cards makes it fit: fewer or smaller models would".to_owned(),
                changes => format!("any one of these makes it fit: {}", changes.join("; ")),
            };
            Failure::does_not_fit(error.to_string()).hint(hint)
        }
        _ => Failure::usage(error.to_string()),
    }
}
