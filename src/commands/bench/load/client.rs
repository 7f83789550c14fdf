//! One server, asked for streamed completions.

use super::sse::{Event, EventReader, Usage};
use crate::exit::Failure;
use anyhow::Context;
use bytes::Bytes;
use mserve_runtime::engine::EngineLoad;
use reqwest::header::CONTENT_TYPE;
use serde::Deserialize;
use std::time::{Duration, Instant};
use tokio::sync::Barrier;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Events that may come beside those of tokens: a chat's role, a reason to finish.
const EVENTS_WITHOUT_TOKENS: usize = 2;
/// Of an error's body.
const MAX_ERROR_CHARS: usize = 300;

#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
    model: String,
}

/// What every answer must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    pub prompt_tokens: usize,
    pub output_tokens: usize,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<ModelCard>,
}

#[derive(Deserialize)]
struct ModelCard {
    id: String,
}

impl Client {
    /// # Errors
    /// When the server does not answer, or serves nothing.
    pub async fn connect(url: &str, model: Option<String>, timeout: Duration) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).timeout(timeout).no_proxy().build()?;
        let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let key = std::env::var("MSERVE_API_KEY").ok();
        let mut client = Self { http, url, key, model: String::new() };
        client.model = match model {
            Some(model) => model,
            None => client.first_model().await?,
        };
        Ok(client)
    }

    pub fn model(&self) -> &str {
        &self.model
    }

    /// So many at once, for requests to come: users have been there before. One that fails shows when it is needed.
    pub async fn open_connections(&self, count: usize) {
        let all_open = Barrier::new(count);
        let open = || async {
            let request = self.with_key(self.http.get(format!("{}/v1/models", self.url)));
            let response = request.send().await;
            // An answer that is not read to its end keeps its connection from others.
            all_open.wait().await;
            if let Ok(response) = response {
                drop(response.bytes().await);
            }
        };
        futures::future::join_all((0..count).map(|_| open())).await;
    }

    async fn first_model(&self) -> anyhow::Result<String> {
        let request = self.http.get(format!("{}/v1/models", self.url));
        let response = self.with_key(request).send().await.with_context(|| format!("{} does not answer", self.url))?;
        let models: Models = response.error_for_status()?.json().await.context("the list of models cannot be read")?;
        let first = models.data.into_iter().next();
        Ok(first.ok_or_else(|| Failure::usage(format!("{} serves no model", self.url)))?.id)
    }

    /// What an mserve worker says of itself; `None` of any other server.
    pub async fn engine_load(&self) -> Option<EngineLoad> {
        let request = self.with_key(self.http.get(format!("{}/load", self.url)));
        request.send().await.ok()?.error_for_status().ok()?.json().await.ok()
    }

    /// Times from sending at which output came.
    ///
    /// # Errors
    /// Why the answer is none, or not the one that was asked for.
    pub async fn complete(&self, body: Bytes, expected: Expected) -> Result<Vec<Duration>, String> {
        let request = self.http.post(format!("{}/v1/completions", self.url)).header(CONTENT_TYPE, "application/json");
        let sent = Instant::now();
        let mut response = self.with_key(request).body(body).send().await.map_err(chain)?;
        if !response.status().is_success() {
            let status = response.status();
            let text: String = response.text().await.unwrap_or_default().chars().take(MAX_ERROR_CHARS).collect();
            return Err(format!("{status}: {text}"));
        }
        let mut answer = Answer::default();
        let mut reader = EventReader::default();
        while let Some(piece) = response.chunk().await.map_err(chain)? {
            let now = sent.elapsed();
            let mut failed = None;
            let read =
                reader.push(&piece, |data| failed = answer.take(Event::parse(data), now).err().or(failed.take()));
            read.map_err(|error| error.to_string())?;
            if let Some(error) = failed {
                return Err(error);
            }
        }
        answer.check(expected)
    }

    fn with_key(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }
}

/// reqwest's own words leave out the cause.
fn chain(error: reqwest::Error) -> String {
    format!("{:#}", anyhow::Error::new(error.without_url()))
}

#[derive(Debug, Default)]
struct Answer {
    arrivals: Vec<Duration>,
    usage: Option<Usage>,
    done: bool,
}

impl Answer {
    fn take(&mut self, event: Event, now: Duration) -> Result<(), String> {
        match event {
            Event::Output => self.arrivals.push(now),
            Event::Empty => {}
            Event::Usage(usage) => self.usage = Some(usage),
            Event::Done => self.done = true,
            Event::Failed(message) => return Err(message),
            Event::Unreadable => return Err("an event is not JSON".to_owned()),
        }
        Ok(())
    }

    fn check(self, expected: Expected) -> Result<Vec<Duration>, String> {
        let Some(usage) = self.usage.filter(|_| self.done) else {
            return Err("the answer broke off".to_owned());
        };
        if usage.prompt_tokens != expected.prompt_tokens || usage.completion_tokens != expected.output_tokens {
            let Expected { prompt_tokens, output_tokens } = expected;
            return Err(format!(
                "{} prompt and {} output tokens were counted where {prompt_tokens} and {output_tokens} were asked for",
                usage.prompt_tokens, usage.completion_tokens
            ));
        }
        if self.arrivals.is_empty() || self.arrivals.len() > usage.completion_tokens + EVENTS_WITHOUT_TOKENS {
            return Err(format!("{} pieces of text for {} tokens", self.arrivals.len(), usage.completion_tokens));
        }
        Ok(self.arrivals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(events: Vec<Event>) -> Result<Vec<Duration>, String> {
        let mut answer = Answer::default();
        for (at, event) in events.into_iter().enumerate() {
            answer.take(event, Duration::from_millis(at as u64))?;
        }
        answer.check(Expected { prompt_tokens: 3, output_tokens: 2 })
    }

    #[test]
    fn only_a_whole_answer_counts() {
        let usage = |completion_tokens| Event::Usage(Usage { prompt_tokens: 3, completion_tokens });
        let whole = answer(vec![Event::Empty, Event::Output, Event::Output, Event::Empty, usage(2), Event::Done]);
        assert_eq!(whole, Ok(vec![Duration::from_millis(1), Duration::from_millis(2)]));
        for (events, expected) in [
            (vec![Event::Output, usage(2)], "broke off"),
            (vec![Event::Output, Event::Done], "broke off"),
            (vec![Event::Output, usage(1), Event::Done], "1 output tokens were counted"),
            (vec![usage(2), Event::Done], "0 pieces"),
            (
                vec![Event::Output, Event::Output, Event::Output, Event::Output, Event::Output, usage(2), Event::Done],
                "5 pieces",
            ),
            (vec![Event::Output, Event::Failed("lost".to_owned()), usage(2), Event::Done], "lost"),
        ] {
            let found = answer(events);
            assert!(found.as_ref().is_err_and(|error| error.contains(expected)), "{found:?}");
        }
    }
}
