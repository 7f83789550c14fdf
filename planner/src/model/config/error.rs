/// Why a `config.json` cannot be used. Every variant names the field and says what would do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("the file has {size_bytes} bytes; a model's config.json has at most {limit_bytes}")]
    TooLarge { size_bytes: u64, limit_bytes: u64 },
    #[error("the file holds more than {limit} values, which no model's config does")]
    TooManyValues { limit: u32 },
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
    #[error("unknown architecture `{architecture}`; known: {}", shortlist(architecture, known))]
    UnknownArchitecture { architecture: String, known: Vec<&'static str> },
    /// A real setting that nothing here can plan or run; going on would mean guessing.
    #[error("field `{field}` is `{value}`, which is not supported; {supported}")]
    Unsupported { field: String, value: String, supported: String },
}

/// The names that look most like the one asked for, and how many others there are.
fn shortlist(architecture: &str, known: &[&str]) -> String {
    const SHOWN: usize = 5;
    let alike = |name: &&&str| {
        let shared = name.bytes().zip(architecture.bytes()).take_while(|(a, b)| a.eq_ignore_ascii_case(b)).count();
        std::cmp::Reverse(shared)
    };
    let mut names: Vec<&&str> = known.iter().collect();
    names.sort_by_key(alike);
    let shown: Vec<&str> = names.iter().take(SHOWN).map(|name| **name).collect();
    let others = known.len().saturating_sub(shown.len());
    format!("{} and {others} others", shown.join(", "))
}
