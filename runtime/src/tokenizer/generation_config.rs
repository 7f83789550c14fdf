//! What `generation_config.json` says about ending and sampling.

use super::{ModelFiles, Tokenizer, TokenizerError};
use serde_json::{Map, Value};
use std::path::PathBuf;

const MAX_EOS_TOKENS: usize = 1024;

/// Sampling values a request gets when it names none. Only what the model's file says; nothing is invented.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GenerationDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// # Errors
    /// A value outside its range.
    pub fn read(files: &ModelFiles) -> Result<Self, TokenizerError> {
        let reader = Reader { path: files.dir.join("generation_config.json"), object: &files.generation_config };
        let mut defaults = Self {
            temperature: reader.number("temperature", 0.0, 100.0)?,
            top_p: reader.number("top_p", 0.0, 1.0)?,
            top_k: reader.number("top_k", -1.0, f64::from(u32::MAX))?.map(|k| if k < 0.0 { 0 } else { k as u32 }),
            min_p: reader.number("min_p", 0.0, 1.0)?,
            repetition_penalty: reader.number("repetition_penalty", 0.01, 100.0)?,
        };
        if files.generation_config.get("do_sample") == Some(&Value::Bool(false)) {
            // transformers ignores the sampling values then; they are often left-overs.
            defaults = Self { repetition_penalty: defaults.repetition_penalty, ..Self::default() };
        }
        Ok(defaults)
    }
}

struct Reader<'a> {
    path: PathBuf,
    object: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn number(&self, field: &'static str, low: f64, high: f64) -> Result<Option<f32>, TokenizerError> {
        let value = match self.object.get(field) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        match value.as_f64() {
            Some(x) if (low..=high).contains(&x) => Ok(Some(x as f32)),
            _ => Err(self.wrong(field, format!("{value}; a number from {low} to {high} would do"))),
        }
    }

    fn token_ids(&self, field: &'static str, vocab_size: usize) -> Result<Vec<u32>, TokenizerError> {
        let values = match self.object.get(field) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        if values.len() > MAX_EOS_TOKENS {
            return Err(self.wrong(field, format!("{} ids, and the limit is {MAX_EOS_TOKENS}", values.len())));
        }
        let id = |value: &Value| {
            value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| (id as usize) < vocab_size)
        };
        values
            .iter()
            .map(|value| {
                id(value).ok_or_else(|| self.wrong(field, format!("{value}; a token id below {vocab_size} would do")))
            })
            .collect()
    }

    fn wrong(&self, field: &'static str, what: String) -> TokenizerError {
        TokenizerError::Field { path: self.path.clone(), field, what }
    }
}

/// Tokens that end an answer: `generation_config.json`'s list, else `config.json`'s, and the tokenizer's own
/// `eos_token` beside them. May be empty.
///
/// # Errors
/// An id outside the vocabulary.
pub fn eos_token_ids(files: &ModelFiles, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Vec<u32>, TokenizerError> {
    let generation = Reader { path: files.dir.join("generation_config.json"), object: &files.generation_config };
    let config = Reader { path: files.dir.join("config.json"), object: &files.config };
    let mut ids = generation.token_ids("eos_token_id", vocab_size)?;
    if ids.is_empty() {
        ids = config.token_ids("eos_token_id", vocab_size)?;
    }
    let own = files.special_tokens().eos_token.and_then(|text| tokenizer.token_to_id(&text));
    if let Some(id) = own
        && !ids.contains(&id)
    {
        ids.push(id);
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn files(generation: &Value) -> ModelFiles {
        ModelFiles { generation_config: generation.as_object().unwrap().clone(), ..ModelFiles::default() }
    }

    #[test]
    fn only_what_the_file_says() {
        let read = GenerationDefaults::read(&files(&json!({"temperature": 0.6, "top_k": 20}))).unwrap();
        assert_eq!(read, GenerationDefaults { temperature: Some(0.6), top_k: Some(20), ..Default::default() });
    }

    #[test]
    fn greedy_files_have_no_sampling_values() {
        let read = GenerationDefaults::read(&files(&json!({"do_sample": false, "temperature": 0.6}))).unwrap();
        assert_eq!(read, GenerationDefaults::default());
    }

    #[test]
    fn values_out_of_range_name_file_and_field() {
        for (field, value) in [("temperature", json!(-1)), ("top_p", json!(1.5)), ("min_p", json!("a"))] {
            let error = GenerationDefaults::read(&files(&json!({field: value}))).unwrap_err().to_string();
            assert!(error.contains("generation_config.json") && error.contains(field), "{error}");
        }
    }
}
