//! `mserve chat`: a conversation with a served model, at the terminal or through pipes.

mod client;
mod conversation;

use crate::control::Client as Control;
use crate::exit::Failure;
use anyhow::Context;
use clap::Args;
use client::{ChatClient, Sampling};
use conversation::{Conversation, Input};
use std::io::{BufRead, IsTerminal, Read, Write};
use std::process::ExitCode;

/// A prompt from a pipe; the router takes bodies of 8 MiB.
const MAX_PIPED_BYTES: u64 = 4 << 20;

#[derive(Debug, Args)]
pub struct ChatArgs {
    /// What to say; without it a conversation at the terminal, or the prompt from standard input
    #[arg(value_name = "PROMPT")]
    prompt: Vec<String>,
    /// Model to talk to [default: the first chat model]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// System text
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: u32,
    /// 0 always takes the likeliest token [default: the model's own]
    #[arg(long)]
    temperature: Option<f32>,
    /// The deployment on this port, where several run
    #[arg(short, long)]
    port: Option<u16>,
    /// An endpoint that this machine's mserve did not start, such as http://10.0.0.7:8000; its key from MSERVE_API_KEY
    #[arg(long, value_name = "URL", conflicts_with = "port")]
    url: Option<String>,
}

pub fn run(args: ChatArgs) -> anyhow::Result<ExitCode> {
    let endpoint = match args.url {
        Some(url) => url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
        None => Control::discover(args.port)?.deployment().endpoint.clone(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let sampling = Sampling { max_tokens: args.max_tokens, temperature: args.temperature };
    runtime.block_on(async {
        let client = ChatClient::connect(endpoint, args.model, sampling).await?;
        let conversation = Conversation::new(args.system);
        if !args.prompt.is_empty() {
            return once(&client, conversation, args.prompt.join(" ")).await;
        }
        if std::io::stdin().is_terminal() {
            return converse(&client, conversation).await;
        }
        let mut prompt = String::new();
        std::io::stdin().take(MAX_PIPED_BYTES).read_to_string(&mut prompt).context("cannot read the prompt")?;
        once(&client, conversation, prompt).await
    })
}

async fn once(client: &ChatClient, mut conversation: Conversation, prompt: String) -> anyhow::Result<ExitCode> {
    if prompt.trim().is_empty() {
        return Err(Failure::usage("the prompt is empty").into());
    }
    conversation.user(prompt);
    answer(client, &mut conversation).await?;
    Ok(ExitCode::SUCCESS)
}

async fn converse(client: &ChatClient, mut conversation: Conversation) -> anyhow::Result<ExitCode> {
    eprintln!("{} at {}; /clear /system TEXT /exit", client.model(), client.endpoint());
    let stdin = std::io::stdin();
    loop {
        eprint!("> ");
        let mut line = String::new();
        if stdin.lock().read_line(&mut line).context("cannot read from the terminal")? == 0 {
            eprintln!();
            return Ok(ExitCode::SUCCESS);
        }
        match Input::parse(&line) {
            Input::Nothing => {}
            Input::Exit => return Ok(ExitCode::SUCCESS),
            Input::Clear => conversation.clear(),
            Input::System(text) => conversation.system(text),
            Input::Unknown(command) => eprintln!("there is no {command}; known: /clear /system /exit"),
            Input::Say(text) => {
                conversation.user(text);
                if let Err(error) = answer(client, &mut conversation).await {
                    // What was asked in vain is not part of the conversation.
                    conversation.forget_last();
                    eprintln!("error: {error:#}");
                }
            }
        }
    }
}

/// The answer to standard output as it comes, figures to standard error.
async fn answer(client: &ChatClient, conversation: &mut Conversation) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    let answered = client
        .answer(conversation.messages(), |piece| {
            let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
        })
        .await;
    let _ = writeln!(std::io::stdout());
    let answered = answered?;
    eprintln!("{}", answered.figures());
    conversation.assistant(answered.text);
    Ok(())
}
