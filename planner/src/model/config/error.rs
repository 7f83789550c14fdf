/// Why a `config.json` cannot be used. Every variant names the field and says what would do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("the file has {size_bytes} bytes; a model's config.json has at most {limit_bytes}")]
    TooLarge { size_bytes: u64, limit_bytes: u64 },
    #[error("not valid JSON at line {line}, column {column}: {problem}")]
    Json { line: usize, column: usize, problem: String },
    #[error("the file holds {found}, expected a JSON object with the model's fields")]
    NotAnObject { found: &'static str },
    #[error("field `{field}` is missing, expected {expected}")]
    Missing { field: String, expected: String },
    #[error("field `{field}` is {found}, expected {expected}")]
    WrongType { field: String, found: String, expected: String },
    #[error("field `{field}` is {value}, expected {expected}")]
    OutOfRange { field: String, value: String, expected: String },
    #[error("unknown architecture `{architecture}`; known: {}", known.join(", "))]
    UnknownArchitecture { architecture: String, known: Vec<&'static str> },
    /// A real setting that nothing here can plan or run; going on would mean guessing.
    #[error("field `{field}` is `{value}`, which is not supported; {supported}")]
    Unsupported { field: String, value: String, supported: String },
}
