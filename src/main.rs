use clap::Parser;
use mserve::{cli::Cli, commands, exit};
use std::process::ExitCode;

fn main() -> ExitCode {
    match commands::run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => exit::report(&error),
    }
}
