//! A plan to standard output: text, or JSON.

use super::args::PlanArgs;
use super::cards::{CardSource, ChosenCards, FreeCard};
use super::render;
use crate::exit::{self, Failure};
use anyhow::Context;
use mserve_planner::engine::EngineBudget;
use mserve_planner::explain::{Explained, explain};
use mserve_planner::plan::{self, CardRow, DoesNotFit, Plan, PlanRequest};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

/// The plan as `--json` prints it.
#[derive(Debug, Serialize)]
struct PlanJson<'a> {
    #[serde(flatten)]
    plan: &'a Plan,
    card_source: CardSource,
    /// One row for each common card, when the plan had to be made for the default one.
    other_cards: &'a [CardRow],
    /// Of the best option, for other engines than the bundled one.
    engine_account: Option<&'a EngineBudget>,
    /// With `--explain`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    explained: Vec<Explained>,
}

#[derive(Debug, Serialize)]
struct DoesNotFitJson<'a> {
    schema: u32,
    does_not_fit: &'a DoesNotFit,
    card_source: CardSource,
    other_cards: &'a [CardRow],
    largest_free: Option<&'a FreeCard>,
}

/// What every form of output needs.
#[derive(Debug)]
pub(super) struct Shown<'a> {
    pub args: &'a PlanArgs,
    pub chosen: &'a ChosenCards,
    pub other_cards: &'a [CardRow],
}

impl Shown<'_> {
    pub fn plan(&self, request: &PlanRequest<'_>, plan: &Plan) -> anyhow::Result<ExitCode> {
        let theirs = self.theirs(request, plan);
        let explained = if self.args.output.explain { explain(request, plan) } else { Vec::new() };
        let text = if self.args.output.json {
            let (card_source, other_cards) = (self.chosen.source, self.other_cards);
            json(&PlanJson { plan, card_source, other_cards, engine_account: theirs.as_ref(), explained })?
        } else {
            let mut text = render::plan(plan, &self.chosen.headline, theirs.as_ref(), self.other_cards, look());
            text.push_str(&render::explained(&explained));
            text
        };
        print(&text)?;
        Ok(ExitCode::from(exit::OK))
    }

    /// What the engine itself would say of the best option.
    fn theirs(&self, request: &PlanRequest<'_>, plan: &Plan) -> Option<EngineBudget> {
        let best = plan.options.first()?;
        plan::engine_budget(request, &request.demand.engine.program(request.spec), best.tensor_parallel_size)
    }

    pub fn does_not_fit(&self, error: &DoesNotFit) -> anyhow::Result<ExitCode> {
        let largest_free = self.chosen.largest_free.as_ref();
        if self.args.output.json {
            print(&json(&DoesNotFitJson {
                schema: plan::SCHEMA,
                does_not_fit: error,
                card_source: self.chosen.source,
                other_cards: self.other_cards,
                largest_free,
            })?)?;
        } else {
            let mut text = render::cards_only(&self.chosen.headline, self.other_cards);
            text.push_str(&render::does_not_fit(error, largest_free));
            print(&text)?;
        }
        let failure = Failure::does_not_fit(error.to_string());
        let changes: Vec<String> = error.changes.iter().map(ToString::to_string).collect();
        let hint = match changes.as_slice() {
            [] => "no single change makes it fit: a smaller or quantised model would".to_owned(),
            changes => format!("any one of these makes it fit: {}", changes.join("; ")),
        };
        Err(failure.hint(hint).into())
    }
}

pub(super) fn look() -> render::Look {
    let terminal = std::io::stdout().is_terminal();
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    if terminal && !dumb { render::Look::Blocks } else { render::Look::Plain }
}

pub(super) fn json(value: &impl Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// A reader that has seen enough (`mserve plan | head`) is no error.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}
