//! One verb, one file.

pub mod bench;
pub mod chat;
pub mod doctor;
pub mod launch;
pub mod logs;
pub mod plan;
pub mod ps;
pub mod stop;
pub mod top;
pub mod worker;

use crate::cli::{Cli, Command};
use std::process::ExitCode;

/// Run one parsed command line.
///
/// # Errors
/// Whatever the verb could not do; [`crate::exit::report`] turns it into text and exit code.
pub fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Plan(args) => plan::run(args),
        Command::Launch(args) => launch::run(args),
        Command::Top(args) => top::run(args),
        Command::Ps(args) => ps::run(args),
        Command::Stop(args) => stop::run(args),
        Command::Logs(args) => logs::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Worker(args) => worker::run(args),
    }
}
