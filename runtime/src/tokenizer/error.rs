use std::path::PathBuf;

/// A model's tokenizer files cannot be used. Every variant names the file and what would do.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("{}: no such file; a model needs a tokenizer.json (a tokenizer.model alone has to be converted)", path.display())]
    Missing { path: PathBuf },
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{}: {bytes} bytes, and the limit is {limit_bytes}", path.display())]
    TooLarge { path: PathBuf, bytes: u64, limit_bytes: u64 },
    #[error("{}: not a tokenizer: {what}", path.display())]
    Parse { path: PathBuf, what: String },
    #[error("{}: {what}", path.display())]
    Json { path: PathBuf, what: String },
    #[error(
        "{}: the tokenizer does not match the vocabulary: token {token:?} has id {token_id}, and config.json says \
         vocab_size {vocab_size}",
        path.display()
    )]
    VocabularyMismatch { path: PathBuf, token: String, token_id: u32, vocab_size: usize },
    #[error("{}: the tokenizer has no tokens", path.display())]
    Empty { path: PathBuf },
    #[error("{}: {field}: {what}", path.display())]
    Field { path: PathBuf, field: &'static str, what: String },
}
