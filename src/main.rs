use clap::Parser;
use mserve::{cli, commands, exit};
use std::process::ExitCode;

fn main() -> ExitCode {
    match commands::run(cli::Cli::parse_from(cli::expand_short_words(std::env::args_os()))) {
        Ok(code) => code,
        Err(error) => exit::report(&error),
    }
}
