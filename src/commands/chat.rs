use clap::Args;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct ChatArgs {}

pub fn run(_args: ChatArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("mserve chat is not built yet")
}
