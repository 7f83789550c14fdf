use super::conversation::Message;
use crate::exit::Failure;
use anyhow::Context;
use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Longest silence of a server within an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(600);
/// An event is a few hundred bytes.
const MAX_EVENT_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Copy)]
pub(super) struct Sampling {
    pub max_tokens: u32,
    pub temperature: Option<f32>,
}

#[derive(Debug)]
pub(super) struct ChatClient {
    http: reqwest::Client,
    endpoint: String,
    key: Option<String>,
    model: String,
    sampling: Sampling,
}

#[derive(Debug)]
pub(super) struct Answer {
    pub text: String,
    first_token: Option<Duration>,
    total: Duration,
    usage: Option<Usage>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<ModelCard>,
}

#[derive(Deserialize)]
struct ModelCard {
    id: String,
    /// Only mserve tells.
    kind: Option<String>,
}

impl ChatClient {
    /// Find out which model to talk to.
    ///
    /// # Errors
    /// When the endpoint does not answer, or has no such model.
    pub async fn connect(endpoint: String, model: Option<String>, sampling: Sampling) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(5))
            .read_timeout(READ_TIMEOUT)
            .no_proxy()
            .build()
            .context("cannot set up the client")?;
        let key = std::env::var("MSERVE_API_KEY").ok();
        let mut client = Self { http, endpoint, key, model: String::new(), sampling };
        let cards = client.models().await?;
        client.model = choose(&cards, model)?;
        Ok(client)
    }

    pub fn model(&self) -> &str {
        &self.model
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn models(&self) -> anyhow::Result<Vec<ModelCard>> {
        let response = self.send(self.http.get(format!("{}/v1/models", self.endpoint))).await?;
        let models: Models = response.json().await.context("the list of models cannot be read")?;
        Ok(models.data)
    }

    /// Stream an answer; `piece` sees its text as it comes.
    pub async fn answer(&self, messages: &[Message], mut piece: impl FnMut(&str)) -> anyhow::Result<Answer> {
        let mut body = json!({
            "model": self.model,
            "messages": messages,
            "max_tokens": self.sampling.max_tokens,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let Some(temperature) = self.sampling.temperature {
            body["temperature"] = json!(temperature);
        }
        let started = Instant::now();
        let response = self.send(self.http.post(format!("{}/v1/chat/completions", self.endpoint)).json(&body)).await?;
        let mut stream = response.bytes_stream();
        let (mut events, mut text, mut first_token, mut usage) = (Events::default(), String::new(), None, None);
        while let Some(chunk) = stream.next().await {
            for event in events.push(&chunk.context("the connection broke off")?)? {
                if let Some(message) = event["error"]["message"].as_str() {
                    anyhow::bail!("the server broke off: {message}");
                }
                if let Some(delta) = event["choices"][0]["delta"]["content"].as_str()
                    && !delta.is_empty()
                {
                    first_token.get_or_insert_with(|| started.elapsed());
                    piece(delta);
                    text.push_str(delta);
                }
                usage = Usage::deserialize(&event["usage"]).ok().or(usage);
            }
        }
        anyhow::ensure!(events.done, "the answer ended without an end");
        Ok(Answer { text, first_token, total: started.elapsed(), usage })
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<reqwest::Response> {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.with_context(|| format!("{} does not answer", self.endpoint))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body: Value = response.json().await.unwrap_or_default();
        anyhow::bail!("{}: {}", status, body["error"]["message"].as_str().unwrap_or("no message"))
    }
}

/// The named model, or the first that chats.
fn choose(cards: &[ModelCard], wanted: Option<String>) -> Result<String, Failure> {
    let chats = || cards.iter().filter(|card| card.kind.as_deref().is_none_or(|kind| kind == "chat"));
    let known = || chats().map(|card| card.id.as_str()).collect::<Vec<_>>().join(", ");
    match wanted {
        Some(name) if chats().any(|card| card.id == name) => Ok(name),
        Some(name) => Err(Failure::usage(format!("no chat model is called {name:?}; there are: {}", known()))),
        None => chats().next().map(|card| card.id.clone()).ok_or_else(|| {
            Failure::usage("this deployment serves no chat model").hint("mserve ps shows what it serves")
        }),
    }
}

/// Server-sent events out of a stream of bytes, however it is cut.
#[derive(Debug, Default)]
struct Events {
    held: Vec<u8>,
    /// `[DONE]` was there.
    done: bool,
}

impl Events {
    fn push(&mut self, bytes: &[u8]) -> anyhow::Result<Vec<Value>> {
        self.held.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.held.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.held.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            let data = data.trim_ascii();
            if data == b"[DONE]" {
                self.done = true;
            } else {
                events.push(serde_json::from_slice(data).context("an event of the stream is not JSON")?);
            }
        }
        anyhow::ensure!(self.held.len() <= MAX_EVENT_BYTES, "an event of the stream has no end");
        Ok(events)
    }
}

impl Answer {
    /// One line: tokens, their rate, the time to the first.
    pub fn figures(&self) -> String {
        let first = self.first_token.map_or_else(|| "-".to_owned(), |first| format!("{} ms", first.as_millis()));
        let Some(usage) = self.usage else {
            return format!("[{:.1} s, first token {first}]", self.total.as_secs_f64());
        };
        let decoding = self.first_token.map_or(self.total, |first| self.total.saturating_sub(first)).as_secs_f64();
        let after_first = usage.completion_tokens.saturating_sub(1) as f64;
        let rate = if decoding > 0.0 { after_first / decoding } else { 0.0 };
        format!(
            "[{} prompt + {} answer tokens, first token {first}, {rate:.0} tokens/s]",
            usage.prompt_tokens, usage.completion_tokens
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn events_come_out_whole_however_they_are_cut() {
        let text = ": ping\n\ndata: {\"n\":\"ä\"}\r\n\r\ndata:{\"n\":2}\n\ndata: [DONE]\n\n".as_bytes();
        for size in 1..text.len() {
            let mut events = Events::default();
            let all: Vec<Value> = text.chunks(size).flat_map(|chunk| events.push(chunk).unwrap()).collect();
            assert_eq!((all, events.done), (vec![json!({"n": "ä"}), json!({"n": 2})], true), "chunks of {size}");
        }
    }

    #[test]
    fn an_endless_line_is_an_error() {
        let mut events = Events::default();
        assert!((0..20).any(|_| events.push(&[b'x'; 100_000]).is_err()));
        assert!(Events::default().push(b"data: {\n").is_err());
    }

    #[test]
    fn the_first_chat_model_is_the_default() {
        let card = |id: &str, kind: Option<&str>| ModelCard { id: id.into(), kind: kind.map(Into::into) };
        let cards = [card("e", Some("embedding")), card("c", Some("chat")), card("d", Some("chat"))];
        assert_eq!(choose(&cards, None).unwrap(), "c");
        assert_eq!(choose(&cards, Some("d".into())).unwrap(), "d");
        assert!(choose(&cards, Some("e".into())).unwrap_err().message.contains("there are: c, d"));
        assert!(choose(&cards[..1], None).is_err());
        assert_eq!(choose(&[card("any", None)], None).unwrap(), "any");
    }
}
