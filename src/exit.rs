//! Exit codes and how an error is shown: what happened, where, and what to do.

use mserve_runtime::worker::FailureKind;
use std::process::ExitCode;

/// Everything worked.
pub const OK: u8 = 0;
/// Something failed while running.
pub const FAILURE: u8 = 1;
/// The command line, `mserve.toml` or the model's files are wrong.
pub const USAGE: u8 = 2;
/// The model does not fit the machine.
pub const DOES_NOT_FIT: u8 = 3;
/// Some replicas are up, some failed.
pub const PARTLY_UP: u8 = 4;

/// The code of a command for what the runtime met. A worker's own codes are finer.
pub const fn code_of(kind: FailureKind) -> u8 {
    match kind {
        FailureKind::DoesNotFit | FailureKind::CardTooSmall | FailureKind::CardFull => DOES_NOT_FIT,
        FailureKind::Config | FailureKind::NoDriver | FailureKind::DriverTooOld | FailureKind::LibraryMissing => USAGE,
        FailureKind::Device
        | FailureKind::Internal
        | FailureKind::KernelFailure
        | FailureKind::DeviceOutOfMemory
        | FailureKind::ContextLost => FAILURE,
    }
}

/// An error that knows its exit code, with an optional hint on its own line.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: u8,
    pub message: String,
    pub hint: Option<String>,
}

impl Failure {
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: USAGE, message: message.into(), hint: None }
    }

    pub fn does_not_fit(message: impl Into<String>) -> Self {
        Self { code: DOES_NOT_FIT, message: message.into(), hint: None }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Print the error with its causes and return its code: the first [`Failure`] in the chain decides.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
    eprintln!("error: {error:#}");
    if let Some(hint) = failure.and_then(|f| f.hint.as_deref()) {
        eprintln!("  hint: {hint}");
    }
    ExitCode::from(failure.map_or(FAILURE, |f| f.code))
}
