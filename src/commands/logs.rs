use clap::Args;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct LogsArgs {}

pub fn run(_args: LogsArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("mserve logs is not built yet")
}
