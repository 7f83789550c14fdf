//! The command line. Each verb's flags stand beside the verb, in `commands/`.

use crate::commands;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "mserve", version, about = "Plan, launch and watch LLM serving on one box.", propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// What fits: KV bytes per token, concurrency, every legal TP x replicas, ranked.
    Plan(commands::plan::PlanArgs),
    /// Plan, pick devices, start replicas and serve them on one port.
    #[command(visible_alias = "serve")]
    Launch(commands::launch::LaunchArgs),
    /// Dashboard of a running deployment.
    Top(commands::top::TopArgs),
    /// Replicas of running deployments.
    Ps(commands::ps::PsArgs),
    /// Stop a running deployment.
    Stop(commands::stop::StopArgs),
    /// Output of the replicas.
    Logs(commands::logs::LogsArgs),
    /// Talk to a served model.
    Chat(commands::chat::ChatArgs),
    /// Tokens per second of the bundled engine on this machine.
    Bench(commands::bench::BenchArgs),
    /// One replica. Started by `launch`; its standard output is for the supervisor.
    #[command(hide = true)]
    Worker(commands::worker::WorkerArgs),
}
