use clap::Args;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct LaunchArgs {}

pub fn run(_args: LaunchArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("mserve launch is not built yet")
}
