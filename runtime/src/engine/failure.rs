//! Why a device or a worker cannot go on, by what can be done about it.

use serde::{Deserialize, Serialize};

/// Decides the exit code and whether a restart can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// Bad model files or settings.
    Config,
    /// Not enough memory of the host for weights or cache.
    DoesNotFit,
    /// The device failed in a way not listed below.
    Device,
    /// Anything else.
    Internal,
    NoDriver,
    DriverTooOld,
    /// A CUDA library was not found or could not be opened.
    LibraryMissing,
    /// A kernel did not compile, or this build's kernels do not match it.
    KernelFailure,
    /// The model does not fit the card, whoever else uses it.
    CardTooSmall,
    /// The model fits the card, and others hold its memory.
    CardFull,
    /// An allocation on the card failed.
    DeviceOutOfMemory,
    /// An illegal address or another error after which every call of the process fails.
    ContextLost,
}

impl FailureKind {
    pub const ALL: [Self; 12] = [
        Self::Config,
        Self::DoesNotFit,
        Self::Device,
        Self::Internal,
        Self::NoDriver,
        Self::DriverTooOld,
        Self::LibraryMissing,
        Self::KernelFailure,
        Self::CardTooSmall,
        Self::CardFull,
        Self::DeviceOutOfMemory,
        Self::ContextLost,
    ];

    /// Of the worker's process; each kind has its own.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Internal => 1,
            Self::Config => 2,
            Self::DoesNotFit => 3,
            Self::Device => 4,
            Self::NoDriver => 10,
            Self::DriverTooOld => 11,
            Self::LibraryMissing => 12,
            Self::KernelFailure => 13,
            Self::CardTooSmall => 14,
            Self::CardFull => 15,
            Self::DeviceOutOfMemory => 16,
            Self::ContextLost => 17,
        }
    }

    /// Whether a new process may do better: others may leave a card, a lost context is gone with its process.
    pub const fn restart_can_help(self) -> bool {
        match self {
            Self::Device | Self::Internal | Self::CardFull | Self::DeviceOutOfMemory | Self::ContextLost => true,
            Self::Config
            | Self::DoesNotFit
            | Self::NoDriver
            | Self::DriverTooOld
            | Self::LibraryMissing
            | Self::KernelFailure
            | Self::CardTooSmall => false,
        }
    }

    /// In a few words, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Config => "configuration",
            Self::DoesNotFit => "does not fit in memory",
            Self::Device => "device failure",
            Self::Internal => "internal error",
            Self::NoDriver => "no driver",
            Self::DriverTooOld => "driver too old",
            Self::LibraryMissing => "library missing",
            Self::KernelFailure => "kernel failure",
            Self::CardTooSmall => "card too small",
            Self::CardFull => "card full",
            Self::DeviceOutOfMemory => "out of device memory",
            Self::ContextLost => "CUDA context lost",
        }
    }
}
