//! Why a worker ended, in words, and whether starting it again can help.

use mserve_runtime::worker::FailureKind;
use nix::sys::signal::Signal;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// All that is known about the end of a process.
#[derive(Debug, Clone, PartialEq)]
pub struct ExitEvidence {
    pub status: ExitStatus,
    /// The worker's own last word, if it had one.
    pub reported: Option<(FailureKind, String)>,
    /// Why the supervisor killed it, if it did.
    pub killed_because: Option<String>,
    /// The kernel's out-of-memory killer has struck since the process was started.
    pub oom_kill_seen: bool,
    /// Last line of its log, for ends that say nothing themselves.
    pub last_log_line: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitCause {
    /// One line for people.
    pub text: String,
    /// Set for ends that a new process would meet again, see [`FailureKind::restart_can_help`].
    pub permanent: Option<FailureKind>,
}

impl ExitEvidence {
    pub fn cause(&self) -> ExitCause {
        if let Some(why) = &self.killed_because {
            return ExitCause { text: format!("killed by the supervisor: {why}"), permanent: None };
        }
        let by_code = self.status.code().and_then(kind_of_code);
        let kind = self.reported.as_ref().map(|(kind, _)| *kind).or(by_code);
        let permanent = kind.filter(|kind| !kind.restart_can_help());
        let text = match &self.reported {
            Some((kind, message)) => format!("{}: {message}", kind.name()),
            None => self.describe_status(by_code),
        };
        ExitCause { text, permanent }
    }

    fn describe_status(&self, kind: Option<FailureKind>) -> String {
        let (what, telling) = match (self.status.signal(), self.status.code()) {
            (Some(libc_sigkill), _) if libc_sigkill == Signal::SIGKILL as i32 && self.oom_kill_seen => {
                ("out of memory: killed by the kernel (SIGKILL)".to_owned(), true)
            }
            // Who is killed from outside had no say in it: its last line would only mislead.
            (Some(signal), _) if [Signal::SIGKILL as i32, Signal::SIGTERM as i32].contains(&signal) => {
                (format!("killed by {}", signal_name(signal)), true)
            }
            (Some(signal), _) => (format!("killed by {}", signal_name(signal)), false),
            (None, Some(0)) => ("ended by itself with exit code 0".to_owned(), false),
            (None, Some(code)) => match kind {
                Some(kind) => (format!("{} (exit code {code})", kind.name()), false),
                None => (format!("ended with exit code {code}"), false),
            },
            (None, None) => (format!("ended: {}", self.status), false),
        };
        match &self.last_log_line {
            Some(line) if !telling && !line.is_empty() => format!("{what}; its last words: {line}"),
            _ => what,
        }
    }
}

/// 1 says nothing: any failing process may end with it.
fn kind_of_code(code: i32) -> Option<FailureKind> {
    let known = FailureKind::ALL.into_iter().filter(|kind| *kind != FailureKind::Internal);
    known.into_iter().find(|kind| i32::from(kind.exit_code()) == code)
}

fn signal_name(number: i32) -> String {
    Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |signal| signal.as_str().to_owned())
}

/// Processes that the kernel has killed for want of memory since boot (all of them, or our control group's).
pub(super) fn oom_kills() -> u64 {
    let in_cgroup = std::fs::read_to_string("/sys/fs/cgroup/memory.events").ok();
    let of_host = || std::fs::read_to_string("/proc/vmstat").ok();
    in_cgroup.or_else(of_host).and_then(|text| counter(&text, "oom_kill")).unwrap_or(0)
}

fn counter(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(raw: i32) -> ExitEvidence {
        ExitEvidence {
            status: ExitStatus::from_raw(raw),
            reported: None,
            killed_because: None,
            oom_kill_seen: false,
            last_log_line: None,
        }
    }

    const fn exited(code: i32) -> i32 {
        code << 8
    }

    #[test]
    fn names_the_cause() {
        let table = [
            (evidence(9), "killed by SIGKILL", None),
            (
                ExitEvidence { oom_kill_seen: true, ..evidence(9) },
                "out of memory: killed by the kernel (SIGKILL)",
                None,
            ),
            (ExitEvidence { oom_kill_seen: true, ..evidence(11) }, "killed by SIGSEGV", None),
            (ExitEvidence { last_log_line: Some("ready".into()), ..evidence(9) }, "killed by SIGKILL", None),
            (evidence(exited(0)), "ended by itself with exit code 0", None),
            (evidence(exited(1)), "ended with exit code 1", None),
            (evidence(exited(2)), "configuration (exit code 2)", Some(FailureKind::Config)),
            (evidence(exited(3)), "does not fit in memory (exit code 3)", Some(FailureKind::DoesNotFit)),
            (evidence(exited(4)), "device failure (exit code 4)", None),
            (evidence(exited(10)), "no driver (exit code 10)", Some(FailureKind::NoDriver)),
            (evidence(exited(11)), "driver too old (exit code 11)", Some(FailureKind::DriverTooOld)),
            (evidence(exited(12)), "library missing (exit code 12)", Some(FailureKind::LibraryMissing)),
            (evidence(exited(13)), "kernel failure (exit code 13)", Some(FailureKind::KernelFailure)),
            (evidence(exited(14)), "card too small (exit code 14)", Some(FailureKind::CardTooSmall)),
            (evidence(exited(15)), "card full (exit code 15)", None),
            (evidence(exited(16)), "out of device memory (exit code 16)", None),
            (
                ExitEvidence {
                    reported: Some((FailureKind::ContextLost, "H200: an illegal address".into())),
                    ..evidence(exited(17))
                },
                "CUDA context lost: H200: an illegal address",
                None,
            ),
            (
                ExitEvidence { last_log_line: Some("panicked at x".into()), ..evidence(exited(101)) },
                "ended with exit code 101; its last words: panicked at x",
                None,
            ),
            (
                ExitEvidence { reported: Some((FailureKind::Config, "no config.json".into())), ..evidence(exited(2)) },
                "configuration: no config.json",
                Some(FailureKind::Config),
            ),
            (
                ExitEvidence { killed_because: Some("no answer".into()), ..evidence(9) },
                "killed by the supervisor: no answer",
                None,
            ),
        ];
        for (evidence, text, permanent) in table {
            assert_eq!(evidence.cause(), ExitCause { text: text.into(), permanent }, "{evidence:?}");
        }
    }

    #[test]
    fn reads_the_kernel_counter_by_whole_name() {
        let text = "oom 7\noom_kill 3\noom_group_kill 0\n";
        assert_eq!(counter(text, "oom_kill"), Some(3));
        assert_eq!(counter(text, "oom_k"), None);
    }
}
