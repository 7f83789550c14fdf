//! Values that people write in `mserve.toml` and on the command line, checked as they are read.

use crate::status::ModelKind;
use mserve_planner::units::{GIB, KIB, MIB, parse_tokens};
use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};

/// `512MiB`, `4GiB`, `1.5g`, `1073741824`: bytes, in powers of 1,024.
///
/// # Errors
/// A sentence for people.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => KIB,
        "m" | "mb" | "mib" => MIB,
        "g" | "gb" | "gib" => GIB,
        "t" | "tb" | "tib" => 1024 * GIB,
        _ => 0,
    };
    let bytes = number.parse::<f64>().map_or(0.0, |number| number * factor as f64);
    // 2^50: beyond any machine, within the exact range of a double.
    if !(1.0..=(1u64 << 50) as f64).contains(&bytes) {
        let text: String = text.chars().take(40).collect();
        return Err(format!("`{text}` is not a size; write one such as 512MiB or 4GiB"));
    }
    Ok(bytes as u64)
}

/// # Errors
/// A sentence for people.
pub fn parse_kind(text: &str) -> Result<ModelKind, String> {
    match text {
        "chat" => Ok(ModelKind::Chat),
        "embedding" => Ok(ModelKind::Embedding),
        _ => Err(format!("`{text}` is not a kind of model; known: chat, embedding")),
    }
}

/// 1 to 1,024: replicas, threads, sequences.
///
/// # Errors
/// A sentence for people.
pub fn parse_count(text: &str) -> Result<u32, String> {
    let number = text.parse().map_err(|_| format!("`{text}` is not a whole number"))?;
    count(number)
}

const MAX_COUNT: u64 = 1024;

fn count(number: u64) -> Result<u32, String> {
    match u32::try_from(number) {
        Ok(n) if (1..=MAX_COUNT).contains(&number) => Ok(n),
        _ => Err(format!("{number} is out of range, expected 1 to {MAX_COUNT}")),
    }
}

/// Where replicas run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Devices {
    /// GPUs when there are any and the runtime can use them, else the CPU.
    #[default]
    Auto,
    Cpu,
    Gpu,
    /// What `--devices gpu` means to one of several models: a GPU, unless the runtime has no kernels for such a model.
    GpuWhereSupported,
}

/// A share of a card's memory, in millionths: settings are compared, which a float does not like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(u32);

impl Share {
    const WHOLE: f64 = 1e6;

    pub fn ratio(self) -> f64 {
        f64::from(self.0) / Self::WHOLE
    }
}

/// `0.9`: more than nothing, at most all of it.
///
/// # Errors
/// A sentence for people.
pub fn parse_share(text: &str) -> Result<Share, String> {
    let ratio: f64 = text.trim().parse().unwrap_or(0.0);
    if !(0.01..=1.0).contains(&ratio) {
        let text: String = text.chars().take(40).collect();
        return Err(format!("`{text}` is not a share of memory; write one from 0.01 to 1, such as 0.9"));
    }
    Ok(Share((ratio * Share::WHOLE).round() as u32))
}

/// # Errors
/// A sentence for people.
pub fn parse_devices(text: &str) -> Result<Devices, String> {
    match text {
        "auto" => Ok(Devices::Auto),
        "cpu" => Ok(Devices::Cpu),
        "gpu" => Ok(Devices::Gpu),
        _ => Err(format!("`{text}` is not a device; known: auto, cpu, gpu")),
    }
}

/// How an embedding model makes one vector of a text's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingChoice {
    Cls,
    LastToken,
    Mean,
}

impl PoolingChoice {
    /// As `mserve worker --pooling` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cls => "cls",
            Self::LastToken => "last-token",
            Self::Mean => "mean",
        }
    }
}

/// # Errors
/// A sentence for people.
pub fn parse_pooling(text: &str) -> Result<PoolingChoice, String> {
    [PoolingChoice::Cls, PoolingChoice::LastToken, PoolingChoice::Mean]
        .into_iter()
        .find(|pooling| pooling.name() == text.replace('_', "-"))
        .ok_or_else(|| format!("`{text}` is not a pooling; known: cls, last-token, mean"))
}

/// A value that may stand in the file as a number or as text; `T` says what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Written<T>(pub T);

pub(super) trait FromWritten: Sized {
    fn from_text(text: &str) -> Result<Self, String>;
    fn from_number(number: u64) -> Result<Self, String>;
}

/// Sequences, replicas, threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count(pub u32);
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tokens(pub u64);
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bytes(pub u64);

impl FromWritten for Count {
    fn from_text(text: &str) -> Result<Self, String> {
        parse_count(text).map(Self)
    }
    fn from_number(number: u64) -> Result<Self, String> {
        count(number).map(Self)
    }
}

impl FromWritten for Tokens {
    fn from_text(text: &str) -> Result<Self, String> {
        parse_tokens(text).map(Self).map_err(|error| error.to_string())
    }
    fn from_number(number: u64) -> Result<Self, String> {
        Self::from_text(&number.to_string())
    }
}

impl FromWritten for Bytes {
    fn from_text(text: &str) -> Result<Self, String> {
        parse_bytes(text).map(Self)
    }
    fn from_number(number: u64) -> Result<Self, String> {
        Self::from_text(&number.to_string())
    }
}

macro_rules! from_text_only {
    ($type:ty, $parse:path) => {
        impl FromWritten for $type {
            fn from_text(text: &str) -> Result<Self, String> {
                $parse(text)
            }
            fn from_number(number: u64) -> Result<Self, String> {
                $parse(&number.to_string())
            }
        }
    };
}
from_text_only!(ModelKind, parse_kind);
from_text_only!(Devices, parse_devices);
from_text_only!(PoolingChoice, parse_pooling);
from_text_only!(Share, parse_share);

impl<'de, T: FromWritten> Deserialize<'de> for Written<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Both<T>(std::marker::PhantomData<T>);
        impl<T: FromWritten> Visitor<'_> for Both<T> {
            type Value = T;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number or a text")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
                T::from_text(text).map_err(E::custom)
            }
            fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
                T::from_number(number).map_err(E::custom)
            }
            fn visit_f64<E: Error>(self, number: f64) -> Result<T, E> {
                T::from_text(&number.to_string()).map_err(E::custom)
            }
            fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(E::custom(format!("{number} is negative"))),
                }
            }
        }
        deserializer.deserialize_any(Both(std::marker::PhantomData)).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("512MiB", Ok(512 * MIB)),
            ("4 GiB", Ok(4 * GIB)),
            ("1.5g", Ok(3 * GIB / 2)),
            ("1024", Ok(1024)),
            ("2kb", Ok(2048)),
            ("0", Err(())),
            ("", Err(())),
            ("MiB", Err(())),
            ("-1MiB", Err(())),
            ("1.2.3g", Err(())),
            ("9999999TiB", Err(())),
            ("5 parsecs", Err(())),
        ] {
            assert_eq!(parse_bytes(text).map_err(|_| ()), bytes, "{text:?}");
        }
    }

    #[test]
    fn shares_are_more_than_nothing_and_at_most_all() {
        assert_eq!(parse_share("0.925").map(Share::ratio), Ok(0.925));
        assert_eq!(parse_share("1").map(Share::ratio), Ok(1.0));
        for text in ["0", "1.01", "90", "-0.5", "NaN", "inf", "most", ""] {
            assert!(parse_share(text).is_err(), "{text}");
        }
    }

    #[test]
    fn counts_have_an_end() {
        assert_eq!(parse_count("1024"), Ok(1024));
        for text in ["0", "1025", "-1", "two", "", "18446744073709551616"] {
            assert!(parse_count(text).is_err(), "{text}");
        }
    }
}
