use clap::Args;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct PsArgs {}

pub fn run(_args: PsArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("mserve ps is not built yet")
}
