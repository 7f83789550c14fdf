use clap::Args;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct StopArgs {}

pub fn run(_args: StopArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("mserve stop is not built yet")
}
