//! A replica on a raw socket, so that it can answer in ways no HTTP library would.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// `{"answer":"complete"}`
    Json,
    /// The body and token it was sent.
    Echo,
    Status(u16),
    /// 500 with a body that is no JSON.
    PlainError,
    /// Closes on reading the request.
    Hangup,
    /// Announces more than it sends.
    CutBody,
    /// Neither HTTP nor anything else.
    Garbage,
    /// Three events and `[DONE]`.
    Events,
    /// The same, one byte a write.
    SlowEvents,
    /// Two and a half events.
    CutEvents,
    /// A stream's head and no event.
    NoEvents,
    /// Events until someone hangs up.
    Endless,
    Silent,
    /// Answers one request on a connection, and closes when the next one comes, as some servers do.
    OneRequestPerConnection,
}

pub struct MockUpstream {
    pub address: SocketAddr,
    /// Requests read.
    pub requests: Arc<AtomicUsize>,
    /// Connections now open.
    pub open: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl MockUpstream {
    pub async fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, opened) = (Arc::clone(&requests), Arc::clone(&open));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (counted, opened) = (Arc::clone(&counted), Arc::clone(&opened));
                connections.spawn(async move {
                    opened.fetch_add(1, Ordering::SeqCst);
                    let _ = converse(stream, behaviour, &counted).await;
                    opened.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, requests, open, task }
    }

    /// An address at which nobody listens.
    pub async fn nobody() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

impl Drop for MockUpstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const EVENT_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

fn event(n: usize) -> String {
    format!("data: {{\"n\":{n}}}\n\n")
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

fn whole(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

async fn converse(mut stream: TcpStream, behaviour: Behaviour, requests: &AtomicUsize) -> std::io::Result<()> {
    for answered in 0.. {
        let Some((head, body)) = read_request(&mut stream).await? else { return Ok(()) };
        requests.fetch_add(1, Ordering::SeqCst);
        let answer = match behaviour {
            Behaviour::Json => whole("200 OK", r#"{"answer":"complete"}"#),
            Behaviour::Echo => whole("200 OK", &serde_json::json!({"head": head, "body": body}).to_string()),
            Behaviour::Status(code) => whole(&format!("{code} X"), r#"{"error":{"message":"from the replica"}}"#),
            Behaviour::PlainError => whole("500 X", "<html>stack trace</html>"),
            Behaviour::Hangup => return Ok(()),
            Behaviour::CutBody => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"answer\"").await?;
                return Ok(());
            }
            Behaviour::Garbage => {
                stream.write_all(b"SSH-2.0-OpenSSH\r\n\r\n").await?;
                return Ok(());
            }
            Behaviour::Events => {
                let events: String = (0..3).map(event).map(|event| chunk(&event)).collect();
                format!("{EVENT_HEAD}{events}{}0\r\n\r\n", chunk("data: [DONE]\n\n"))
            }
            Behaviour::SlowEvents => {
                stream.set_nodelay(true)?;
                stream.write_all(EVENT_HEAD.as_bytes()).await?;
                let text: String = (0..3).map(event).collect::<String>() + "data: [DONE]\n\n";
                for n in 0..text.len() {
                    stream.write_all(chunk(&text[n..=n]).as_bytes()).await?;
                    tokio::task::yield_now().await;
                }
                "0\r\n\r\n".into()
            }
            Behaviour::CutEvents => {
                let text = format!("{EVENT_HEAD}{}{}{}", chunk(&event(0)), chunk(&event(1)), chunk("data: {\"n\""));
                stream.write_all(text.as_bytes()).await?;
                return Ok(());
            }
            Behaviour::NoEvents => {
                stream.write_all(EVENT_HEAD.as_bytes()).await?;
                return Ok(());
            }
            Behaviour::Endless => {
                stream.write_all(EVENT_HEAD.as_bytes()).await?;
                for n in 0.. {
                    stream.write_all(chunk(&event(n)).as_bytes()).await?;
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
                return Ok(());
            }
            Behaviour::Silent => {
                // Until the other side hangs up.
                let _ = stream.read(&mut [0]).await?;
                return Ok(());
            }
            Behaviour::OneRequestPerConnection if answered > 0 => return Ok(()),
            Behaviour::OneRequestPerConnection => whole("200 OK", r#"{"answer":"complete"}"#),
        };
        stream.write_all(answer.as_bytes()).await?;
    }
    Ok(())
}

async fn read_request(stream: &mut TcpStream) -> std::io::Result<Option<(String, String)>> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head
            .to_ascii_lowercase()
            .split_once("content-length: ")
            .map_or(0, |(_, rest)| rest.split("\r\n").next().unwrap().trim().parse().unwrap());
        if body.len() >= length {
            return Ok(Some((head.to_owned(), body.to_owned())));
        }
    }
}
