//! `mserve worker` as a process: its events, its answers, and the ways it ends.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

struct Worker {
    child: Child,
    events: BufReader<ChildStdout>,
    seen: Vec<Value>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    fn start(args: &[&str], parent_pid: Option<u32>) -> Self {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo-model");
        let mut command = Command::new(env!("CARGO_BIN_EXE_mserve"));
        command.args(["worker", "--threads", "1"]).args(args);
        if !args.contains(&"--model") {
            command.arg("--model").arg(model);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some(pid) = parent_pid {
            command.env("MSERVE_PARENT_PID", pid.to_string());
        }
        let mut child = command.spawn().unwrap();
        let events = BufReader::new(child.stdout.take().unwrap());
        Self { child, events, seen: Vec::new() }
    }

    /// Read events up to one of this name.
    fn until(&mut self, name: &str) -> Value {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.events.read_line(&mut line).unwrap() > 0, "no {name} in {:?}", self.seen);
            let event: Value = serde_json::from_str(&line).unwrap();
            self.seen.push(event.clone());
            if event["event"] == name {
                return event;
            }
        }
    }

    fn ready(args: &[&str]) -> (Self, u16) {
        let mut worker = Self::start(args, None);
        let port = u16::try_from(worker.until("listening")["port"].as_u64().unwrap()).unwrap();
        worker.until("ready");
        (worker, port)
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the worker does not end");
    }
}

fn send(port: u16, body: &Value) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = body.to_string();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    BufReader::new(stream)
}

#[test]
fn a_worker_tells_its_port_its_phases_and_what_it_took() {
    let mut worker = Worker::start(&["--served-model-name", "demo"], None);
    assert_eq!(worker.until("listening"), worker.seen[0], "health answers before anything is loaded");
    let ready = worker.until("ready");
    assert!(ready["weight_bytes"].as_u64().unwrap() > 10_000_000, "{ready}");
    assert_eq!((&ready["max_model_len"], &ready["block_size"]), (&json!(2048), &json!(16)));
    let weights: Vec<&Value> = worker.seen.iter().filter(|event| event["phase"] == "weights").collect();
    assert!(weights.last().is_some_and(|event| event["done"] == event["total"] && event["total"] != 0), "{weights:?}");
}

#[test]
fn greedy_text_over_http_is_the_golden_one() {
    let golden = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo-model/golden.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let (_worker, port) = Worker::ready(&["--served-model-name", "demo"]);
    let body = json!({"model": "demo", "prompt": golden["prompt"], "temperature": 0, "max_tokens": 48});
    let mut answer = String::new();
    send(port, &body).read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["choices"][0]["text"], golden["text"]);
}

#[test]
fn asked_to_end_it_finishes_what_runs_and_exits_with_0() {
    let (mut worker, port) = Worker::ready(&["--served-model-name", "demo"]);
    let body = json!({"model": "demo", "prompt": "And", "max_tokens": 400, "ignore_eos": true, "stream": true});
    let mut stream = send(port, &body);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0);
    }
    worker.signal("-TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(worker.end().code(), Some(0));
}

#[test]
fn when_the_time_is_up_the_rest_is_cut_with_an_error_event() {
    let (mut worker, port) = Worker::ready(&["--served-model-name", "demo", "--shutdown-timeout", "0"]);
    let body =
        json!({"model": "demo", "prompt": "And", "max_tokens": 2000, "ignore_eos": true, "stream": true, "n": 4});
    let mut stream = send(port, &body);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(stream.read_line(&mut line).unwrap() > 0);
    }
    worker.signal("-TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"error\"") && rest.contains("shutting") && !rest.contains("[DONE]"), "{rest}");
    assert_eq!(worker.end().code(), Some(0));
}

#[test]
fn the_end_of_its_standard_input_ends_it() {
    let mut worker = Worker::start(&["--die-with-parent"], Some(std::process::id()));
    worker.until("ready");
    drop(worker.child.stdin.take());
    assert_eq!(worker.end().code(), Some(1));
}

#[test]
fn a_launcher_that_is_already_gone_is_noticed() {
    let mut worker = Worker::start(&["--die-with-parent"], Some(1));
    assert_eq!(worker.end().code(), Some(1));
    let mut told = String::new();
    worker.events.read_to_string(&mut told).unwrap();
    assert_eq!(told, "", "nothing was begun");
}

#[test]
fn failures_are_told_and_have_their_exit_code() {
    for (args, kind, code, word) in [
        (&["--max-model-len", "1000000"][..], "config", 2, "2048"),
        (&["--model", "/nonexistent"][..], "config", 2, "/nonexistent/config.json"),
        (&["--kv-cache-bytes", "1000000000000000"][..], "does_not_fit", 3, "do not fit"),
    ] {
        let mut worker = Worker::start(args, None);
        let failed = worker.until("failed");
        assert_eq!(failed["kind"], kind);
        assert!(failed["message"].as_str().unwrap().contains(word), "{failed}");
        assert_eq!(worker.end().code(), Some(code));
    }
}
