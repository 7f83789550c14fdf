//! A real `mserve launch` for a test: its own runtime directory, gone with the test.
#![allow(clippy::unwrap_used)]

use mserve::control::{Client, process_start_ticks};
use mserve::status::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Far longer than anything takes here.
pub const DEADLINE: Duration = Duration::from_secs(90);
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model");

pub struct Launched {
    pub child: Child,
    pub home: tempfile::TempDir,
}

/// `mserve` with directories of its own and nothing of the caller's settings.
pub fn mserve(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mserve"));
    command.args(args).current_dir(home).env("XDG_RUNTIME_DIR", home).env("XDG_CACHE_HOME", home.join("cache"));
    for name in ["MSERVE_API_KEY", "MSERVE_PORT", "MSERVE_HOST", "MSERVE_CONFIG"] {
        command.env_remove(name);
    }
    command
}

pub fn home() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Run a command that ends by itself.
pub fn run(home: &Path, args: &[&str]) -> Output {
    mserve(home, args).stdin(Stdio::null()).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn is_running(pid: u32) -> bool {
    process_start_ticks(pid).is_some()
}

/// Poll until `condition` gives something; panic with `what` after the deadline.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "not within {} s: {what}", DEADLINE.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Launched {
    /// One model, the demo's, with small caches.
    pub fn demo(args: &[&str]) -> Self {
        let mut all = vec!["launch", "--model", DEMO, "--served-model-name", "m", "--port", "0"];
        all.extend(["--kv-cache-memory", "16MiB", "--threads", "1"]);
        all.extend(args);
        Self::start(&all, &[])
    }

    pub fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        let home = home();
        let out = std::fs::File::create(home.path().join("out")).unwrap();
        let mut command = mserve(home.path(), args);
        command.envs(env.iter().copied()).stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
        Self { child: command.spawn().unwrap(), home }
    }

    pub fn output(&self) -> String {
        std::fs::read_to_string(self.home.path().join("out")).unwrap()
    }

    pub fn client(&self) -> Client {
        wait_for("the control socket", || Client::discover_in(&self.home.path().join("mserve"), None).ok())
    }

    pub fn status(&self) -> Status {
        block_on(self.client().status()).unwrap()
    }

    /// Wait until all replicas are ready.
    pub fn ready(&mut self) -> Status {
        wait_for("all replicas ready", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("launch ended: {status}\n{}", self.output());
            }
            let client = Client::discover_in(&self.home.path().join("mserve"), None).ok()?;
            let status = block_on(client.status()).ok()?;
            let ready = |replica: &mserve::status::ReplicaStatus| replica.state == mserve::status::ReplicaState::Ready;
            (self.output().contains("ready in") && status.replicas.iter().all(ready)).then_some(status)
        })
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Wait for the end; its exit code.
    pub fn exit_code(&mut self) -> i32 {
        let status = wait_for("the launcher to end", || self.child.try_wait().unwrap());
        status.code().unwrap_or_else(|| panic!("{status}"))
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

/// All that a process was started with: arguments and environment.
pub fn arguments_and_environment(pid: u32) -> (String, String) {
    let read = |name: &str| {
        let mut bytes = Vec::new();
        std::fs::File::open(format!("/proc/{pid}/{name}")).unwrap().read_to_end(&mut bytes).unwrap();
        text(&bytes)
    };
    (read("cmdline"), read("environ"))
}
