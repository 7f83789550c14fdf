use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// `0.11.0`, `0.15.2rc1`: an engine's release. Suffixes do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub patch: u32,
}

impl Version {
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a version such as 0.11.0")]
pub struct NotAVersion(pub String);

impl FromStr for Version {
    type Err = NotAVersion;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAVersion(text.chars().take(40).collect());
        let digits = |part: &str| {
            let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..end].parse::<u32>().ok()
        };
        let mut parts = text.trim().trim_start_matches('v').split('.');
        let major = parts.next().and_then(digits).ok_or_else(wrong)?;
        let minor = parts.next().and_then(digits).ok_or_else(wrong)?;
        let patch = parts.next().map_or(Some(0), digits).ok_or_else(wrong)?;
        Ok(Self { major, minor, patch })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn releases_are_read_and_ordered() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        assert_eq!(version("v0.11.0"), Version::new(0, 11, 0));
        assert_eq!(version("0.15.2rc1+cu129"), Version::new(0, 15, 2));
        assert!(version("0.6.4.post1") < version("0.21") && version("1.0.0") > version("0.33.0"));
        for wrong in ["", "latest", "1", "x.y", "0.", "99999999999.1"] {
            assert!(wrong.parse::<Version>().is_err(), "{wrong}");
        }
    }
}
