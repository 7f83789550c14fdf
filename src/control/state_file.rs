//! One file per running launcher: `deployment-<pid>.json`. A file that cannot be read, or whose process is gone,
//! is as good as absent.

use anyhow::Context;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
/// A real file has a few hundred bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Where a launcher can be reached, and enough to tell it from a later process with the same pid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    pub version: u32,
    pub pid: u32,
    /// Field 22 of /proc/`PID`/stat: clock ticks since boot.
    pub start_ticks: u64,
    pub boot_id: String,
    /// The control socket.
    pub socket: PathBuf,
    /// `http://127.0.0.1:8000`
    pub endpoint: String,
    pub port: u16,
    pub started_unix_s: u64,
}

impl Deployment {
    /// This process, answering on `socket` and serving at `endpoint`.
    pub fn of_this_process(socket: PathBuf, endpoint: String, port: u16) -> anyhow::Result<Self> {
        let pid = std::process::id();
        let start_ticks = process_start_ticks(pid).context("cannot read /proc/self/stat")?;
        let started_unix_s = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since_epoch| since_epoch.as_secs());
        Ok(Self { version: VERSION, pid, start_ticks, boot_id: boot_id(), socket, endpoint, port, started_unix_s })
    }

    /// The same process still runs: same pid, same start, same boot.
    pub fn is_alive(&self) -> bool {
        self.boot_id == boot_id() && process_start_ticks(self.pid) == Some(self.start_ticks)
    }

    /// Write beside and rename, so that a reader never sees half a file.
    pub fn write(&self, dir: &Path) -> anyhow::Result<PathBuf> {
        let path = dir.join(format!("deployment-{}.json", self.pid));
        let tmp = path.with_extension("tmp");
        std::fs::write(&tmp, serde_json::to_vec_pretty(self)?)
            .and_then(|()| std::fs::rename(&tmp, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// All launchers that still run, by port. Files and sockets of dead ones are removed on the way.
    pub fn list(dir: &Path) -> Vec<Self> {
        let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
        let mut found: Vec<Self> = entries.flatten().filter_map(|entry| Self::read_or_clear(&entry.path())).collect();
        found.sort_by_key(|deployment| deployment.port);
        found
    }

    fn read_or_clear(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        if !(name.starts_with("deployment-") && name.ends_with(".json")) {
            return None;
        }
        let Some(deployment) = Self::read(path) else {
            tracing::warn!(path = %path.display(), "ignoring a state file that cannot be read");
            return None;
        };
        if deployment.is_alive() {
            return Some(deployment);
        }
        // Left by a launcher that was killed. Nothing is signalled by these numbers.
        let _ = std::fs::remove_file(path);
        let named = deployment.socket.file_name().and_then(|name| name.to_str()).unwrap_or("");
        if named.starts_with("control-") && named.ends_with(".sock") {
            let _ = std::fs::remove_file(&deployment.socket);
        }
        None
    }

    fn read(path: &Path) -> Option<Self> {
        let meta = std::fs::symlink_metadata(path).ok()?;
        if !meta.is_file() || meta.len() > MAX_FILE_BYTES {
            return None;
        }
        let deployment: Self = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (deployment.version == VERSION).then_some(deployment)
    }
}

/// Start of a process in clock ticks since boot; `None` when there is no such process or it is a zombie.
pub fn process_start_ticks(pid: u32) -> Option<u64> {
    parse_start_ticks(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_start_ticks(stat: &str) -> Option<u64> {
    // The second field is the command in parentheses and may hold spaces and parentheses itself.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn here(dir: &Path) -> Deployment {
        Deployment::of_this_process(dir.join("control.sock"), "http://127.0.0.1:8000".into(), 8000).unwrap()
    }

    #[test]
    fn reads_back_what_it_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let deployment = here(dir.path());
        deployment.write(dir.path()).unwrap();
        assert_eq!(Deployment::list(dir.path()), [deployment]);
    }

    #[test]
    fn garbage_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("deployment-1.json", "{"), ("deployment-2.json", "[]"), ("deployment-3.json", "\0")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        std::fs::create_dir(dir.path().join("deployment-4.json")).unwrap();
        assert_eq!(Deployment::list(dir.path()), []);
    }

    #[test]
    fn a_recycled_pid_is_not_the_launcher() {
        let dir = tempfile::tempdir().unwrap();
        let mut deployment = here(dir.path());
        deployment.start_ticks += 1;
        let path = deployment.write(dir.path()).unwrap();
        assert_eq!(Deployment::list(dir.path()), []);
        assert!(!path.exists(), "the stale file should be cleared");
    }

    #[test]
    fn start_ticks_survive_odd_command_names() {
        let fields = (4..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(parse_start_ticks(&format!("7 (a) b (c)) S {fields}")), Some(22));
        assert_eq!(parse_start_ticks(&format!("7 (zombie) Z {fields}")), None);
        assert_eq!(parse_start_ticks("7 (short) S 1 2"), None);
    }
}
