//! `mserve top` as a process: on a pseudo-terminal, and without any.
#![allow(clippy::unwrap_used)]

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(20);
const LEAVE_ALTERNATE_SCREEN: &str = "\u{1b}[?1049l";
const SHOW_CURSOR: &str = "\u{1b}[?25h";

fn replay() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/data/top.ndjson")
}

fn top(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mserve"));
    command.args(["top", "--replay"]).arg(replay()).args(["--refresh", "0.1"]).args(args);
    command.env("TERM", "xterm-256color").env("TZ", "UTC");
    for name in ["NO_COLOR", "COLUMNS", "LINES", "SSH_CONNECTION"] {
        command.env_remove(name);
    }
    command
}

fn piped(args: &[&str]) -> Output {
    top(args).stdin(Stdio::null()).output().unwrap()
}

/// The dashboard on a pseudo-terminal that never said its size.
struct OnTerminal {
    child: Child,
    master: File,
    slave: OwnedFd,
    screen: Arc<Mutex<Vec<u8>>>,
}

impl OnTerminal {
    fn start(mut command: Command) -> Self {
        let pty = openpty(None, None).unwrap();
        let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        let screen = Arc::new(Mutex::new(Vec::new()));
        let mut output = File::from(pty.master.try_clone().unwrap());
        let seen = screen.clone();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(n) = output.read(&mut chunk) {
                seen.lock().unwrap().extend_from_slice(&chunk[..n]);
            }
        });
        Self { child, master: File::from(pty.master), slave: pty.slave, screen }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, text: &str) {
        let start = Instant::now();
        while !self.text().contains(text) {
            assert!(start.elapsed() < DEADLINE, "no {text:?} in {:?}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_flags.contains(LocalFlags::ICANON)
    }

    fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "still running");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn assert_given_back(&self) {
        self.wait_for(LEAVE_ALTERNATE_SCREEN);
        self.wait_for(SHOW_CURSOR);
        assert!(!self.is_raw(), "the terminal is still raw");
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn q_gives_the_terminal_back() {
    let mut screen = OnTerminal::start(top(&[]));
    screen.wait_for("demo-embed-0");
    assert!(screen.is_raw());
    screen.press("?");
    screen.wait_for("leave the dashboard");
    screen.press("xq");
    assert_eq!(screen.ended().code(), Some(0));
    screen.assert_given_back();
}

#[test]
fn sigterm_gives_the_terminal_back() {
    let mut screen = OnTerminal::start(top(&[]));
    screen.wait_for("demo-embed-0");
    kill(Pid::from_raw(screen.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(screen.ended().code(), Some(128 + Signal::SIGTERM as i32));
    screen.assert_given_back();
}

#[test]
fn no_color_keeps_bold_and_reverse_and_sends_no_colour() {
    let mut command = top(&[]);
    command.env("NO_COLOR", "1");
    let mut screen = OnTerminal::start(command);
    screen.wait_for("demo-embed-0");
    screen.press("q");
    screen.ended();
    let text = screen.text();
    assert!(text.contains("\u{1b}[7m"), "no reverse in {text:?}");
    assert!(!text.contains("\u{1b}[38;5;"), "a colour in {text:?}");
    assert!(!text.contains("\u{1b}[;m"), "a reset that undoes bold in {text:?}");
}

#[test]
fn a_dumb_terminal_gets_plain_lines() {
    let mut command = top(&[]);
    command.env("TERM", "dumb");
    let mut screen = OnTerminal::start(command);
    assert_eq!(screen.ended().code(), Some(0));
    screen.wait_for("demo-0 ready run=3 wait=1");
    assert!(!screen.text().contains('\u{1b}'), "{:?}", screen.text());
}

#[test]
fn a_pipe_gets_plain_lines() {
    let output = piped(&[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(!text.contains('\u{1b}'));
    let lines: Vec<&str> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(
        lines,
        [
            "demo-0 weights 50% restarts=0",
            "demo-embed-0 ready run=0 wait=0 kv=- in=0/s ttft_p95=- itl_p95=- restarts=0",
            "demo-0 ready run=3 wait=1 kv=42% in=120/s out=85/s ttft_p95=64ms itl_p95=9.8ms restarts=0",
            "demo-embed-0 backoff 4s restarts=1 reason=\"signal 9 (killed)\"",
        ]
    );
}

#[test]
fn once_is_a_table() {
    let output = piped(&["--once"]);
    insta::assert_snapshot!(String::from_utf8(output.stdout).unwrap(), @r"
    STARTING  1/2 ready  http://127.0.0.1:8000  up 2s
    requests 0  in flight 0  errors 0  retries 0

    replica       kind   device  state        for  run  wait  KV  in t/s  out t/s  TTFT95  ITL95  prefix  restarts
    demo-0        chat   cpu     weights 50%   3s    -     -   -       -        -       -      -       -         0
    demo-embed-0  embed  cpu     ready         3s    0     0   -       0        -       -      -       -         0

    cpu 38% of 8 cores  mem 12.0 of 32.0 GiB
    14:02:11  demo-embed-0 ready after 0.8 s
    ");
}

#[test]
fn json_is_the_recording_again() {
    let output = piped(&["--json"]);
    let parse = |text: &str| -> Vec<serde_json::Value> {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|v: &serde_json::Value| v["schema"] == 1)
            .collect()
    };
    let written = parse(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(written, parse(&std::fs::read_to_string(replay()).unwrap()));
    let once = piped(&["--json", "--once"]);
    assert_eq!(parse(&String::from_utf8(once.stdout).unwrap()), written[..1]);
}

#[test]
fn bad_usage_ends_with_two() {
    for (args, said) in [(["--refresh", "0"], "between 0.1 and 3600"), (["--color", "pink"], "possible values")] {
        let output = Command::new(env!("CARGO_BIN_EXE_mserve")).arg("top").args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains(said));
    }
    let output = Command::new(env!("CARGO_BIN_EXE_mserve")).args(["top", "--replay", "/no/such"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--replay /no/such: No such file"));
}

#[test]
fn without_a_deployment_it_says_how_to_get_one() {
    let dir = tempfile::tempdir().unwrap();
    let output =
        Command::new(env!("CARGO_BIN_EXE_mserve")).arg("top").env("XDG_RUNTIME_DIR", dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("no deployment is running") && said.contains("mserve launch"), "{said}");
}
