//! The whole of `mserve launch` with real workers: see [`super::launched`].
#![allow(clippy::unwrap_used)]

use super::launched::{
    DEADLINE, Launched, arguments_and_environment, block_on, home, is_running, mserve, run, text, wait_for,
};
use mserve::status::{ReplicaState, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::process::Stdio;
use std::time::Duration;

fn http() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap()
}

async fn complete(http: &reqwest::Client, endpoint: &str, max_tokens: u32) -> (u16, Value) {
    let body = json!({"prompt": "And it came to pass", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
    let response = http.post(format!("{endpoint}/v1/completions")).json(&body).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

fn pids(status: &Status) -> Vec<u32> {
    status.replicas.iter().map(|replica| replica.pid.unwrap()).collect()
}

fn all_gone(pids: &[u32]) {
    wait_for("the replicas to be gone", || (!pids.iter().any(|pid| is_running(*pid))).then_some(()));
}

#[test]
fn without_arguments_the_demo_is_served() {
    let mut launched = Launched::start(&["launch", "--port", "0"], &[]);
    let status = launched.ready();
    let ids: Vec<_> = status.replicas.iter().map(|replica| replica.id.as_str()).collect();
    assert_eq!(ids, ["demo-0", "demo-1", "demo-embed-0"]);
    let http = http();
    block_on(async {
        let (code, body) = complete(&http, &status.endpoint, 8).await;
        assert_eq!((code, body["usage"]["completion_tokens"].as_u64()), (200, Some(8)), "{body}");
        let body = json!({"model": "demo-embed", "input": ["a", "b"]});
        let response = http.post(format!("{}/v1/embeddings", status.endpoint)).json(&body).send().await.unwrap();
        let vectors: Value = response.json().await.unwrap();
        assert_eq!(vectors["data"].as_array().unwrap().len(), 2, "{vectors}");
        let metrics = http.get(format!("{}/metrics", status.endpoint)).send().await.unwrap().text().await.unwrap();
        assert!(metrics.contains("mserve_router_replica_ready{replica=\"demo-embed-0\"} 1"), "{metrics}");
        let generated = |line: &&str| line.starts_with("vllm:generation_tokens_total{replica=\"demo-");
        let tokens: f64 = metrics
            .lines()
            .filter(generated)
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum();
        assert_eq!(tokens, 8.0, "{metrics}");
    });
    let asked = run(launched.home.path(), &["chat", "--max-tokens", "5", "--temperature", "0", "In the beginning"]);
    assert!(asked.status.success() && !asked.stdout.trim_ascii().is_empty(), "{}", text(&asked.stderr));
    assert!(text(&asked.stderr).contains("+ 5 answer tokens"), "{}", text(&asked.stderr));
    let logs = text(&run(launched.home.path(), &["logs", "--replica", "demo-0"]).stdout);
    assert!(logs.contains("demo-0 | ") && !logs.contains("demo-1 | "), "{logs}");
    assert!(!run(launched.home.path(), &["logs", "--replica", "demo-9"]).status.success());

    let port = status.endpoint.rsplit(':').next().unwrap();
    let second = run(launched.home.path(), &["launch", "--port", port]);
    assert_eq!(second.status.code(), Some(2));
    assert!(text(&second.stderr).contains("is in use by mserve"), "{}", text(&second.stderr));

    let pids = pids(&status);
    let stopped = run(launched.home.path(), &["stop"]);
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    assert!(!pids.iter().any(|pid| is_running(*pid)), "stop returns when all is gone");
    assert_eq!(launched.exit_code(), 0);
    let left: Vec<_> = std::fs::read_dir(launched.home.path().join("mserve")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    let after = run(launched.home.path(), &["ps", "--json"]);
    assert_eq!((after.status.code(), text(&after.stdout).trim()), (Some(0), "[]"));
    assert_eq!(run(launched.home.path(), &["stop"]).status.code(), Some(1));
}

#[test]
fn a_port_in_use_costs_nothing() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let home = home();
    let output = run(home.path(), &["launch", "--port", &port.to_string()]);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains(&format!("port {port} is in use")) && err.contains("hint: another port: --port"), "{err}");
    assert!(!out.contains("starting"), "no replica may have been started: {out}");
    let left = std::fs::read_dir(home.path().join("mserve")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "neither socket nor state file is left");
}

#[test]
fn what_is_wrong_is_said_before_anything_starts() {
    let home = home();
    std::fs::write(home.path().join("mserve.toml"), "[[model]]\npath = \"m\"\nreplcias = 2\n").unwrap();
    for (args, code, expected) in [
        (&["launch"][..], 2, "mserve.toml:3: unknown key `replcias`"),
        (&["launch", "nowhere.toml"], 2, "cannot read"),
        (&["launch", "--model", "nowhere"], 2, "no such file or directory"),
        (&["launch", "--no-such-flag"], 2, "--no-such-flag"),
        (&["launch", "--model", "m", "--max-model-len", "many"], 2, "`many` is not a number of tokens"),
        (&["launch", "--model", "m", "--kind", "poem"], 2, "`poem` is not a kind of model"),
    ] {
        let output = run(home.path(), args);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
        assert!(err.contains(expected), "{args:?}: {err}");
        assert!(!err.contains("panicked"), "{err}");
    }
}

#[test]
fn a_model_that_its_worker_refuses_ends_the_launch() {
    let home = home();
    let model = home.path().join("broken");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
        }
    }
    std::fs::write(model.join("tokenizer.json"), "{}").unwrap();
    let output = run(home.path(), &["launch", "--port", "0", "--model", "broken", "-dp", "2"]);
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("broken-0: ") && err.contains("tokenizer.json"), "{err}");
}

#[test]
fn no_replica_outlives_a_killed_launcher() {
    let mut launched = Launched::demo(&["--replicas", "3"]);
    let pids = pids(&launched.ready());
    assert!(pids.len() == 3 && pids.iter().all(|pid| is_running(*pid)));
    launched.signal(Signal::SIGKILL);
    launched.child.wait().unwrap();
    all_gone(&pids);
    let ps = run(launched.home.path(), &["ps"]);
    assert!(
        text(&ps.stdout).contains("no deployment is running"),
        "what a killed launcher left behind is no deployment"
    );
}

#[test]
fn the_interrupt_key_ends_it_with_130() {
    let mut launched = Launched::demo(&[]);
    let pids = pids(&launched.ready());
    launched.signal(Signal::SIGINT);
    assert_eq!(launched.exit_code(), 130);
    assert!(!pids.iter().any(|pid| is_running(*pid)));
}

#[test]
fn interrupted_while_starting_it_leaves_nothing() {
    let mut launched = Launched::demo(&["--replicas", "4"]);
    let started = |launched: &Launched| launched.status().replicas.iter().filter_map(|replica| replica.pid).collect();
    let pids: Vec<u32> =
        wait_for("a first process", || Some(started(&launched)).filter(|pids: &Vec<u32>| !pids.is_empty()));
    launched.signal(Signal::SIGINT);
    assert_eq!(launched.exit_code(), 130);
    all_gone(&pids);
    assert_eq!(std::fs::read_dir(launched.home.path().join("mserve")).unwrap().count(), 0);
}

#[test]
fn running_requests_are_finished_first_and_a_second_signal_does_not_wait() {
    let mut launched = Launched::demo(&[]);
    let status = launched.ready();
    let endpoint = status.endpoint.clone();
    let running = std::thread::spawn(move || block_on(async { complete(&http(), &endpoint, 1500).await }));
    wait_for("the request to run", || (launched.status().router.in_flight > 0).then_some(()));
    launched.signal(Signal::SIGTERM);
    assert_eq!(running.join().unwrap().0, 200, "a request that runs is finished");
    assert_eq!(launched.exit_code(), 0);

    // A replica that can do nothing at all: only the second signal ends the wait for its request.
    let mut launched = Launched::demo(&["--shutdown-timeout", "3600"]);
    let status = launched.ready();
    let pids = pids(&status);
    kill(Pid::from_raw(pids[0].cast_signed()), Signal::SIGSTOP).unwrap();
    let hung = std::thread::spawn(move || {
        let body = json!({"prompt": "x"});
        let url = format!("{}/v1/completions", status.endpoint);
        block_on(async { http().post(url).json(&body).send().await.is_ok() })
    });
    wait_for("the request to hang", || (launched.status().router.in_flight > 0).then_some(()));
    launched.signal(Signal::SIGTERM);
    wait_for("the drain to begin", || launched.output().contains("stopping: ").then_some(()));
    launched.signal(Signal::SIGTERM);
    assert_eq!(launched.exit_code(), 0);
    all_gone(&pids);
    let _ = hung.join();
}

#[test]
fn replicas_can_be_restarted_one_by_one_under_load() {
    let mut launched = Launched::demo(&["--replicas", "2"]);
    let status = launched.ready();
    let endpoint = status.endpoint.clone();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let load = std::thread::spawn(move || {
        let http = http();
        let mut answers = Vec::new();
        while stopped.try_recv().is_err() {
            answers.extend(block_on(futures::future::join_all((0..4).map(|_| complete(&http, &endpoint, 12)))));
        }
        answers
    });
    for (id, old) in status.replicas.iter().map(|replica| (replica.id.clone(), replica.pid)) {
        block_on(launched.client().restart(&id)).unwrap();
        wait_for("the replica to be back", || {
            let now = launched.status();
            let replica = now.replicas.iter().find(|replica| replica.id == id).unwrap();
            (replica.state == ReplicaState::Ready && replica.pid != old).then_some(())
        });
    }
    stop.send(()).unwrap();
    let answers = load.join().unwrap();
    let failed: Vec<_> = answers.iter().filter(|(code, _)| *code != 200).collect();
    assert!(failed.is_empty(), "{} of {}: {:?}", failed.len(), answers.len(), failed.first());
    assert!(block_on(launched.client().restart("m-7")).unwrap_err().to_string().contains("m-0, m-1"));
}

#[test]
fn a_replica_killed_again_and_again_loses_no_request() {
    let mut launched = Launched::demo(&["--replicas", "2"]);
    let endpoint = launched.ready().endpoint;
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let load = std::thread::spawn(move || {
        let http = http();
        let mut codes = Vec::new();
        while stopped.try_recv().is_err() {
            let answers = block_on(futures::future::join_all((0..8).map(|_| complete(&http, &endpoint, 16))));
            codes.extend(answers.into_iter().map(|(code, _)| code));
        }
        codes
    });
    for round in 0..3 {
        let before = launched.status().replicas[round % 2].clone();
        kill(Pid::from_raw(before.pid.unwrap().cast_signed()), Signal::SIGKILL).unwrap();
        wait_for("the replica to be back", || {
            let now = launched.status().replicas[round % 2].clone();
            (now.state == ReplicaState::Ready && now.pid != before.pid).then_some(())
        });
    }
    stop.send(()).unwrap();
    let codes = load.join().unwrap();
    assert!(codes.len() > 20 && codes.iter().all(|code| *code == 200), "{codes:?}");
    let status = launched.status();
    assert_eq!(status.replicas.iter().map(|replica| replica.restarts).sum::<u32>(), 3);
    assert!(status.replicas[0].last_exit.as_deref().unwrap().contains("SIGKILL"));
}

#[test]
fn a_key_is_asked_for_and_kept() {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model");
    let args = ["launch", "--model", demo, "--port", "0", "--threads", "1", "--kv-cache-memory", "16MiB"];
    let mut launched = Launched::start(&args, &[("MSERVE_API_KEY", "hunter2")]);
    let status = launched.ready();
    let http = http();
    block_on(async {
        let get = async |path: &str, key: Option<&str>| {
            let request = http.get(format!("{}{path}", status.endpoint));
            let request = key.map_or(request.try_clone().unwrap(), |key| request.bearer_auth(key));
            request.send().await.unwrap().status().as_u16()
        };
        assert_eq!(get("/v1/models", None).await, 401);
        assert_eq!(get("/v1/models", Some("hunter3")).await, 401);
        assert_eq!(get("/v1/models", Some("hunter2")).await, 200);
        assert_eq!((get("/health", None).await, get("/ready", None).await), (200, 200));
        // The way round the router is closed too.
        let replica = &status.replicas[0];
        let direct = format!("http://127.0.0.1:{}/v1/models", replica.port.unwrap());
        assert_eq!(http.get(direct).send().await.unwrap().status().as_u16(), 401);
        let (arguments, environment) = arguments_and_environment(replica.pid.unwrap());
        let token = environment.split('\0').find_map(|pair| pair.strip_prefix("MSERVE_WORKER_TOKEN=")).unwrap();
        assert!(!environment.contains("hunter2") && !arguments.contains(token), "{arguments}");
    });
    let mut state = String::new();
    for entry in std::fs::read_dir(launched.home.path().join("mserve")).unwrap() {
        state += &std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
    }
    assert!(state.contains("endpoint") && !state.contains("hunter2") && !launched.output().contains("hunter2"));
}

#[test]
fn a_closed_standard_output_does_not_end_it() {
    let home = home();
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model");
    let mut command = mserve(home.path(), &["launch", "--model", demo, "--port", "0", "--kv-cache-memory", "16MiB"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(child.stdout.take());
    let directory = home.path().join("mserve");
    let ready = || {
        let client = mserve::control::Client::discover_in(&directory, None).ok()?;
        let status = block_on(client.status()).ok()?;
        (status.replicas[0].state == ReplicaState::Ready).then_some(())
    };
    wait_for("ready without a reader", ready);
    std::thread::sleep(Duration::from_millis(50));
    assert!(child.try_wait().unwrap().is_none());
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(wait_for("the end", || child.try_wait().unwrap()).code(), Some(0));
}
