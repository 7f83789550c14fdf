//! How an embedding model makes one vector of a text, and how long the text may be.

use super::WorkerError;
use mserve_planner::model::Pooling;
use serde_json::{Map, Value};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// `1_Pooling/config.json` of sentence-transformers; `None` when there is no such file.
///
/// # Errors
/// A file that is no JSON object, or asks for a pooling that is not known.
pub fn from_files(dir: &Path) -> Result<Option<Pooling>, WorkerError> {
    let path = dir.join("1_Pooling").join("config.json");
    let Some(object) = read_object(&path)? else { return Ok(None) };
    let on = |field: &str| object.get(field) == Some(&Value::Bool(true));
    let wrong =
        |what: &str| WorkerError::ModelFile { path: path.clone(), field: "pooling_mode", what: what.to_owned() };
    let known = [
        ("pooling_mode_cls_token", Pooling::Cls),
        ("pooling_mode_mean_tokens", Pooling::Mean),
        ("pooling_mode_lasttoken", Pooling::LastToken),
    ];
    let other = object.iter().any(|(field, value)| {
        field.starts_with("pooling_mode_") && value == &Value::Bool(true) && known.iter().all(|(name, _)| name != field)
    });
    let chosen: Vec<Pooling> = known.into_iter().filter(|(name, _)| on(name)).map(|(_, pooling)| pooling).collect();
    match chosen.as_slice() {
        [pooling] if !other => Ok(Some(*pooling)),
        _ => Err(wrong("exactly one of cls_token, mean_tokens and lasttoken can be served")),
    }
}

/// Tokens a sentence-transformers model was made for: `max_seq_length` of `sentence_bert_config.json`.
///
/// # Errors
/// A file that is no JSON object.
pub fn max_seq_length(dir: &Path) -> Result<Option<usize>, WorkerError> {
    let object = read_object(&dir.join("sentence_bert_config.json"))?;
    let length = object.and_then(|object| object.get("max_seq_length")?.as_u64());
    Ok(length.and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0))
}

fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, WorkerError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(WorkerError::Read { path: path.to_owned(), source }),
    };
    let parsed = serde_json::from_str(&text);
    parsed.map(Some).map_err(|e| WorkerError::ModelFile { path: path.to_owned(), field: "(file)", what: e.to_string() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pooling(json: &str) -> Result<Option<Pooling>, WorkerError> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("1_Pooling")).unwrap();
        fs::write(dir.path().join("1_Pooling/config.json"), json).unwrap();
        from_files(dir.path())
    }

    #[test]
    fn one_known_mode_or_an_error_that_names_the_file() {
        let cls =
            r#"{"word_embedding_dimension": 384, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#;
        assert_eq!(pooling(cls).unwrap(), Some(Pooling::Cls));
        for json in [
            r#"{"pooling_mode_max_tokens": true}"#,
            "{}",
            "[",
            r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#,
        ] {
            assert!(pooling(json).unwrap_err().to_string().contains("1_Pooling/config.json"));
        }
        assert_eq!(from_files(Path::new("/nonexistent")).unwrap(), None);
    }
}
