//! The supervisor over real processes: see [`super::mock_worker`].
#![allow(clippy::unwrap_used)]

use super::mock_worker::spec;
use mserve::status::ReplicaState;
use mserve::supervisor::{HealthLimits, LogBook, ReplicaView, RestartPolicy, Supervisor, SupervisorLimits};
use mserve_runtime::worker::FailureKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::Duration;

/// Far longer than anything takes here: a test that waits this long has failed.
const DEADLINE: Duration = Duration::from_secs(60);

fn limits() -> SupervisorLimits {
    SupervisorLimits {
        start_silence: Duration::from_secs(30),
        health: HealthLimits {
            interval: Duration::from_millis(20),
            timeout: Duration::from_secs(1),
            ..HealthLimits::default()
        },
        restart: RestartPolicy {
            first: Duration::from_millis(10),
            base: Duration::from_millis(10),
            max: Duration::from_millis(50),
            max_crashes: 3,
            ..RestartPolicy::default()
        },
        drain: Duration::from_secs(30),
    }
}

fn start(script: &str, limits: &SupervisorLimits) -> Supervisor {
    Supervisor::start(vec![spec("mock-0", script)], limits, Arc::new(LogBook::default())).unwrap()
}

async fn wait_for(supervisor: &Supervisor, what: impl FnMut(&ReplicaView) -> bool) -> ReplicaView {
    let (_, mut view) = supervisor.watch().remove(0);
    let waited = tokio::time::timeout(DEADLINE, view.wait_for(what)).await;
    let Ok(found) = waited.map(|found| found.unwrap().clone()) else {
        panic!("still {:?}; events: {:?}", supervisor.views(), supervisor.log_book().events());
    };
    found
}

fn is_running(pid: u32) -> bool {
    mserve::control::process_start_ticks(pid).is_some()
}

fn events(supervisor: &Supervisor) -> String {
    supervisor.log_book().events().iter().map(|event| event.text.clone() + "\n").collect()
}

#[tokio::test]
async fn becomes_ready_reports_load_and_stops() {
    let supervisor = start("log:hello phase:weights serve ready", &limits());
    let view = wait_for(&supervisor, |view| view.is_ready() && view.load.is_some()).await;
    let pid = view.pid.unwrap();
    assert!(view.port.is_some() && view.ready.is_some_and(|info| info.device == "mock"));
    assert!(supervisor.log_book().lines(Some("mock-0"), 0, 100).iter().any(|line| line.text == "hello"));
    supervisor.stop(DEADLINE).await;
    assert_eq!(supervisor.views()[0].1.state, ReplicaState::Stopped);
    assert!(!is_running(pid), "a stopped worker must be gone and reaped");
}

#[tokio::test]
async fn a_killed_worker_comes_back_as_another_process() {
    let supervisor = start("serve ready", &limits());
    let first = wait_for(&supervisor, ReplicaView::is_ready).await.pid.unwrap();
    kill(Pid::from_raw(first.cast_signed()), Signal::SIGKILL).unwrap();
    let view = wait_for(&supervisor, |view| view.is_ready() && view.pid != Some(first)).await;
    assert_eq!((view.restarts, view.last_exit.unwrap().starts_with("killed by SIGKILL")), (1, true));
    supervisor.stop(DEADLINE).await;
}

#[tokio::test]
async fn a_configuration_error_is_not_tried_again() {
    let supervisor = start("fail:config.json:num_attention_heads_is_0", &limits());
    let view = wait_for(&supervisor, ReplicaView::is_given_up).await;
    assert_eq!((view.restarts, view.permanent), (0, Some(FailureKind::Config)));
    let why = "configuration: config.json:num_attention_heads_is_0".to_owned();
    assert_eq!(view.state, ReplicaState::Failed { why });
    supervisor.stop(DEADLINE).await;
}

#[tokio::test]
async fn a_crash_loop_ends_and_a_restart_by_hand_tries_again() {
    let supervisor = start("log:cannot_find_it exit:7", &limits());
    let view = wait_for(&supervisor, ReplicaView::is_given_up).await;
    let why = "3 crashes in a row; the last one: ended with exit code 7; its last words: cannot_find_it";
    assert_eq!((view.restarts, view.state), (2, ReplicaState::Failed { why: why.into() }));
    supervisor.restart("mock-0").unwrap();
    wait_for(&supervisor, |view| view.is_given_up() && view.restarts == 5).await;
    assert!(supervisor.restart("mock-9").unwrap_err().to_string().contains("mock-0"));
}

#[tokio::test]
async fn a_hung_worker_is_killed_and_replaced() {
    for (behaviour, why) in [
        ("stalled", "no step finished for 3600 s"),
        ("failing", "3 health checks in a row failed, the last one: /load answered 500"),
        ("silent", "3 health checks in a row failed, the last one: /load did not answer in time"),
    ] {
        let mut quick = limits();
        quick.health.timeout = Duration::from_millis(200);
        let supervisor = start(&format!("serve:{behaviour} ready"), &quick);
        let view = wait_for(&supervisor, |view| view.restarts > 0).await;
        let last_exit = view.last_exit.unwrap();
        assert!(last_exit.starts_with("killed by the supervisor: ") && last_exit.contains(why), "{last_exit}");
    }
}

#[tokio::test]
async fn silence_while_starting_has_an_end() {
    let mut quick = limits();
    quick.start_silence = Duration::from_millis(300);
    let supervisor = start("phase:weights", &quick);
    let view = wait_for(&supervisor, |view| view.last_exit.is_some()).await;
    assert!(view.last_exit.unwrap().contains("no progress for"), "{}", events(&supervisor));
}

#[tokio::test]
async fn noise_on_the_event_pipe_is_log_text() {
    let supervisor = start("garbage serve ready", &limits());
    wait_for(&supervisor, ReplicaView::is_ready).await;
    let lines = supervisor.log_book().lines(None, 0, usize::MAX);
    assert!(lines.iter().any(|line| line.text.starts_with("{\"event\":")));
    assert!(lines.iter().all(|line| line.text.len() <= 16 * 1024));
    supervisor.stop(DEADLINE).await;
}

#[tokio::test]
async fn a_worker_deaf_to_sigterm_is_killed() {
    let supervisor = start("deaf serve ready", &limits());
    let pid = wait_for(&supervisor, ReplicaView::is_ready).await.pid.unwrap();
    tokio::time::timeout(DEADLINE, supervisor.stop(Duration::from_millis(100))).await.unwrap();
    assert!(!is_running(pid));
}

#[tokio::test]
async fn a_second_stop_does_not_wait() {
    let supervisor = start("deaf serve ready", &limits());
    let pid = wait_for(&supervisor, ReplicaView::is_ready).await.pid.unwrap();
    let (stopped, ()) = tokio::join!(tokio::time::timeout(DEADLINE, supervisor.stop(DEADLINE * 10)), async {
        wait_for(&supervisor, |view| view.state == ReplicaState::Draining).await;
        supervisor.kill();
    });
    stopped.unwrap();
    assert!(!is_running(pid));
}

#[tokio::test]
async fn draining_one_replica_leaves_the_others() {
    let specs = vec![spec("a-0", "serve ready"), spec("a-1", "serve ready")];
    let supervisor = Supervisor::start(specs, &limits(), Arc::new(LogBook::default())).unwrap();
    wait_for(&supervisor, ReplicaView::is_ready).await;
    supervisor.drain("a-0").unwrap();
    wait_for(&supervisor, |view| view.state == ReplicaState::Stopped).await;
    let (_, mut other) = supervisor.watch().remove(1);
    tokio::time::timeout(DEADLINE, other.wait_for(ReplicaView::is_ready)).await.unwrap().unwrap();
    supervisor.restart("a-0").unwrap();
    wait_for(&supervisor, ReplicaView::is_ready).await;
    supervisor.stop(DEADLINE).await;
}

#[tokio::test]
async fn dropping_the_supervisor_kills_its_workers() {
    let supervisor = start("deaf serve ready", &limits());
    let pid = wait_for(&supervisor, ReplicaView::is_ready).await.pid.unwrap();
    drop(supervisor);
    let gone = async {
        while is_running(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.unwrap();
}

#[tokio::test]
async fn a_program_that_cannot_be_started_is_a_crash_with_its_name() {
    let mut broken = spec("mock-0", "");
    broken.command.program = "/nonexistent/mserve".into();
    let supervisor = Supervisor::start(vec![broken], &limits(), Arc::new(LogBook::default())).unwrap();
    let view = wait_for(&supervisor, ReplicaView::is_given_up).await;
    assert!(view.last_exit.unwrap().contains("cannot start /nonexistent/mserve"));
}
