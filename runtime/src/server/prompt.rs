//! Prompts in all the forms that OpenAI takes, and how text becomes token ids without holding up other requests.

use super::error::ApiError;
use super::fields::Fields;
use super::state::{ServedModel, ServerState};
use crate::tokenizer::{EncodeError, Tokenizer};
use std::sync::Arc;

/// Prompts of one request: texts or token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompts {
    Texts(Vec<String>),
    TokenIds(Vec<Vec<u32>>),
}

const FORMS: &str = "a string, a list of strings, a list of token ids or a list of such lists";

impl Prompts {
    /// # Errors
    /// 400 when the field is missing, of another form, empty, or holds more than `limit` prompts.
    pub fn parse(fields: &Fields, name: &'static str, limit: usize) -> Result<Self, ApiError> {
        let missing =
            || ApiError::field(name, format!("{name} is required: {FORMS}")).code("missing_required_parameter");
        let text = fields.raw(name).ok_or_else(missing)?;
        let inner = text.strip_prefix('[').map(|rest| rest.trim_start().chars().next());
        let prompts = match inner {
            None => Self::Texts(fields.get::<String>(name, FORMS)?.into_iter().collect()),
            Some(Some('"')) => Self::Texts(fields.get(name, FORMS)?.unwrap_or_default()),
            Some(Some('[')) => Self::TokenIds(fields.get(name, FORMS)?.unwrap_or_default()),
            Some(_) => Self::TokenIds(vec![fields.get(name, FORMS)?.unwrap_or_default()]),
        };
        let empty = match &prompts {
            Self::Texts(texts) => texts.is_empty(),
            Self::TokenIds(lists) => lists.is_empty() || lists.iter().any(Vec::is_empty),
        };
        if empty {
            return Err(ApiError::field(name, format!("{name} is empty")));
        }
        if prompts.len() > limit {
            return Err(ApiError::field(
                name,
                format!("{name} has {} entries, and the limit is {limit}", prompts.len()),
            ));
        }
        Ok(prompts)
    }

    pub fn len(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len(),
            Self::TokenIds(lists) => lists.len(),
        }
    }

    /// Token ids of every prompt.
    ///
    /// # Errors
    /// Text that cannot fit the context or that the tokenizer refuses.
    pub async fn into_token_ids(self, state: &ServerState, model: &ServedModel) -> Result<Vec<Vec<u32>>, ApiError> {
        let texts = match self {
            Self::TokenIds(lists) => return Ok(lists),
            Self::Texts(texts) => texts,
        };
        let (tokenizer, limit) = (Arc::clone(&model.tokenizer), model.max_model_len);
        let encode = move || texts.iter().map(|text| tokenizer.encode(text, limit)).collect::<Result<_, EncodeError>>();
        Ok(text_work(state, encode).await??)
    }

    /// The prompts as text, for `echo`.
    ///
    /// # Errors
    /// Ids that the tokenizer's decoder fails on.
    pub fn texts(&self, tokenizer: &Tokenizer) -> Result<Vec<String>, ApiError> {
        match self {
            Self::Texts(texts) => Ok(texts.clone()),
            Self::TokenIds(lists) => Ok(lists.iter().map(|ids| tokenizer.decode(ids)).collect::<Result<_, _>>()?),
        }
    }
}

/// Run work on text beside the async threads, a few at a time.
///
/// # Errors
/// 500 when the work panics.
pub async fn text_work<T, F>(state: &ServerState, work: F) -> Result<T, ApiError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    // The semaphore is never closed. The permit goes with the work, which outlives a client that leaves.
    let permit = Arc::clone(&state.text_work).acquire_owned().await.ok();
    let run = move || {
        let _permit = permit;
        work()
    };
    tokio::task::spawn_blocking(run).await.map_err(|error| {
        tracing::error!(%error, "work on text failed");
        ApiError::internal("internal error")
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(value: &str) -> Result<Prompts, ApiError> {
        Prompts::parse(&Fields::parse(format!("{{\"prompt\": {value}}}").as_bytes()).unwrap(), "prompt", 3)
    }

    #[test]
    fn the_four_forms() {
        let texts = |texts: &[&str]| Prompts::Texts(texts.iter().map(|&t| t.to_owned()).collect());
        assert_eq!(parse(r#""a""#).unwrap(), texts(&["a"]));
        assert_eq!(parse(r#"[ "a", "b"]"#).unwrap(), texts(&["a", "b"]));
        assert_eq!(parse("[1, 2]").unwrap(), Prompts::TokenIds(vec![vec![1, 2]]));
        assert_eq!(parse("[[1], [2]]").unwrap(), Prompts::TokenIds(vec![vec![1], vec![2]]));
    }

    #[test]
    fn others_are_refused() {
        for value in [
            "null",
            "1",
            "{}",
            "[]",
            "[[]]",
            "[[1], []]",
            "[1, \"a\"]",
            "[\"a\", 1]",
            "[-1]",
            "[1.5]",
            "[4294967296]",
            "[true]",
            "[\"a\", \"b\", \"c\", \"d\"]",
        ] {
            assert_eq!(parse(value).unwrap_err().param.as_deref(), Some("prompt"), "{value}");
        }
    }
}
