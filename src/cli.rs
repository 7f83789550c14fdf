//! The command line. Each verb's flags stand beside the verb, in `commands/`.

use crate::commands;
use clap::{Parser, Subcommand};
use std::ffi::OsString;

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
    /// What of this machine can be used, and what is missing.
    Doctor(commands::doctor::DoctorArgs),
    /// One replica. Started by `launch`; its standard output is for the supervisor.
    #[command(hide = true)]
    Worker(commands::worker::WorkerArgs),
}

/// `-tp 2` and `-dp 2`, as users of other engines type them; clap knows one dash with one letter only.
pub fn expand_short_words(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut literal = false;
    let expand = |arg: OsString| {
        literal |= arg == "--";
        match arg.to_str() {
            Some("-tp") if !literal => "--tensor-parallel-size".into(),
            Some("-dp") if !literal => "--data-parallel-size".into(),
            _ => arg,
        }
    };
    args.into_iter().map(expand).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn short_words_are_long_flags() {
        let args = ["mserve", "launch", "-dp", "2", "--", "-dp"].map(OsString::from);
        assert_eq!(expand_short_words(args), ["mserve", "launch", "--data-parallel-size", "2", "--", "-dp"]);
        let parsed =
            Cli::try_parse_from(expand_short_words(["mserve", "launch", "--model", "m", "-dp", "2"].map(Into::into)));
        assert!(parsed.is_ok());
    }
}
