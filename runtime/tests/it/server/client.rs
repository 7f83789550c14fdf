//! Requests to a router without a socket.

use super::alphabet::Setup;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::Response;
use mserve_runtime::server::{ServerState, router};
use serde_json::{Value, json};
use std::sync::Arc;
use tower::ServiceExt;

const MAX_ANSWER_BYTES: usize = 64 << 20;

pub struct Client {
    pub state: Arc<ServerState>,
    router: Router,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Client {
    pub fn new(setup: Setup) -> Self {
        Self::of(setup.start())
    }

    pub fn of(state: Arc<ServerState>) -> Self {
        Self { router: router(Arc::clone(&state)), state }
    }

    pub async fn send(&self, request: Request<Body>) -> Response {
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(self.send(Request::get(path).body(Body::empty()).unwrap()).await).await
    }

    /// The response with its body still to come.
    pub async fn open(&self, path: &str, body: &Value) -> Response {
        let mut body = body.clone();
        if body.get("model").is_none() {
            body["model"] = json!("alphabet");
        }
        self.send(json_post(path, body.to_string())).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::of(self.open(path, body).await).await
    }

    pub async fn chat(&self, content: &str, more: &Value) -> Answer {
        let messages = json!([{"role": "user", "content": content}]);
        self.post("/v1/chat/completions", &merge(json!({"messages": messages}), more)).await
    }

    pub async fn complete(&self, prompt: &Value, more: &Value) -> Answer {
        self.post("/v1/completions", &merge(json!({"prompt": prompt}), more)).await
    }
}

pub fn json_post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

fn merge(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

impl Answer {
    pub async fn of(response: Response) -> Self {
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, MAX_ANSWER_BYTES).await.unwrap();
        Self { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    pub fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        self.json()
    }

    /// `status code param` of an error in OpenAI's shape.
    pub fn error(&self) -> String {
        let body = self.json();
        let error = body["error"].as_object().unwrap_or_else(|| panic!("no error in {}", self.text));
        assert_eq!(body.as_object().unwrap().len(), 1);
        let keys: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(keys.len(), 4, "{keys:?}");
        assert!(!error["message"].as_str().unwrap().is_empty() && error["type"].is_string());
        let word = |name: &str| error[name].as_str().unwrap_or("-").to_owned();
        format!("{} {} {}", self.status.as_u16(), word("code"), word("param"))
    }

    /// Data of the server-sent events, in order.
    pub fn events(&self) -> Vec<String> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text);
        assert!(self.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
        assert!(self.text.ends_with("\n\n"), "{:?}", self.text);
        let data = |event: &str| event.strip_prefix("data: ").unwrap().to_owned();
        self.text.trim_end_matches('\n').split("\n\n").map(data).collect()
    }

    /// Events before `[DONE]`, which must be the last.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}
