//! Over real sockets: what a client can do to a connection.

use super::alphabet::Setup;
use mserve_runtime::server::{ConnectionLimits, ServerState, router, serve};
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(30);

struct Server {
    state: Arc<ServerState>,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn start(limits: ConnectionLimits) -> Server {
    let state = Setup::default().start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let router = router(Arc::clone(&state));
    let task = tokio::spawn(async move {
        serve(listener, router, limits, async move {
            let _ = stopped.await;
        })
        .await;
    });
    Server { state, address, stop, task }
}

fn chat(content: &str, stream: bool) -> String {
    let body = json!({"model": "alphabet", "messages": [{"role": "user", "content": content}], "stream": stream,
                      "temperature": 0, "max_tokens": 300})
    .to_string();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    tokio::time::timeout(PATIENCE, async {
        while !String::from_utf8_lossy(&text).contains(end) {
            let n = stream.read(&mut buffer).await.unwrap();
            if n == 0 {
                break;
            }
            text.extend_from_slice(&buffer[..n]);
        }
    })
    .await
    .unwrap();
    String::from_utf8(text).unwrap()
}

async fn until_idle(state: &ServerState) {
    let engine = &state.model().unwrap().engine;
    let idle = async {
        while engine.load().running + engine.load().waiting > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        state.wait_until_idle().await;
    };
    tokio::time::timeout(PATIENCE, idle).await.unwrap();
}

#[tokio::test]
async fn a_connection_serves_several_requests() {
    let server = start(ConnectionLimits::default()).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for _ in 0..2 {
        stream.write_all(chat("y", false).as_bytes()).await.unwrap();
        let text = read_until(&mut stream, "}}}").await;
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("z é!"), "{text}");
        assert!(text.contains("\r\ncontent-length: "), "{text}");
    }
}

#[tokio::test]
async fn closing_the_connection_frees_the_request_streaming_or_not() {
    let server = start(ConnectionLimits::default()).await;
    for streaming in [true, false] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(chat("&", streaming).as_bytes()).await.unwrap();
        if streaming {
            read_until(&mut stream, "data: ").await;
        }
        let engine = &server.state.model().unwrap().engine;
        while engine.load().running == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(stream);
        until_idle(&server.state).await;
    }
}

#[tokio::test]
async fn too_many_headers_and_a_slow_head_are_cut() {
    let limits = ConnectionLimits { header_timeout: Duration::from_millis(200), ..ConnectionLimits::default() };
    let server = start(limits).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let headers: String = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect();
    stream.write_all(format!("GET /health HTTP/1.1\r\nhost: x\r\n{headers}\r\n").as_bytes()).await.unwrap();
    let text = read_until(&mut stream, "\r\n\r\n").await;
    assert!(text.starts_with("HTTP/1.1 431 "), "{text}");

    let mut slow = TcpStream::connect(server.address).await.unwrap();
    slow.write_all(b"GET /health HTTP/1.1\r\n").await.unwrap();
    read_until(&mut slow, "never").await;
}

#[tokio::test]
async fn stopping_lets_a_running_stream_end_and_closes_idle_connections() {
    let server = start(ConnectionLimits::default()).await;
    let mut idle = TcpStream::connect(server.address).await.unwrap();
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    read_until(&mut idle, "}").await;
    let mut running = TcpStream::connect(server.address).await.unwrap();
    running.write_all(chat("&", true).as_bytes()).await.unwrap();
    read_until(&mut running, "data: ").await;
    server.stop.send(()).unwrap();
    let mut rest = String::new();
    tokio::time::timeout(PATIENCE, running.read_to_string(&mut rest)).await.unwrap().unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");
    read_until(&mut idle, "never").await;
    tokio::time::timeout(PATIENCE, server.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}
