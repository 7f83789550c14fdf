use clap::Args;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct TopArgs {}

pub fn run(_args: TopArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("mserve top is not built yet")
}
