use crate::exit::Failure;
use std::path::Path;

/// The key that clients must show. Its text never reaches a log, a state file or an argument list.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// # Errors
    /// [`Failure`] when it could not be sent in a header; `source` says where it came from.
    pub fn new(text: &str, source: &str) -> Result<Self, Failure> {
        let text = text.trim();
        if text.is_empty() || text.len() > 4096 || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            let message =
                format!("the API key from {source} must be 1 to 4096 visible ASCII characters without spaces");
            return Err(Failure::usage(message));
        }
        Ok(Self(text.to_owned()))
    }

    pub fn from_env(name: &str) -> Result<Self, Failure> {
        let value = std::env::var(name);
        let value = value.map_err(|_| Failure::usage(format!("api_key_env names {name}, which is not set")))?;
        Self::new(&value, name)
    }

    pub fn from_file(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::usage(format!("cannot read api_key_file {}: {error}", path.display())))?;
        Self::new(&text, &path.display().to_string())
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}
