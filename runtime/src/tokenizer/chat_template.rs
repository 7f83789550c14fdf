//! Chat messages to prompt text, by the model's own Jinja template or one of ours.
//!
//! A template comes with the model's files and is treated as hostile: instructions, recursion, source and output are
//! capped, and there is no loader that could read other files. Templates from clients are never rendered.

use super::{ModelFiles, SpecialTokens, TokenizerError, files, python_json};
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use serde_json::Value as Json;
use std::io;
use std::path::Path;

const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Instructions of one rendering: some 50 a message, with room for 10,000 messages.
const FUEL: u64 = 20_000_000;
const RECURSION_LIMIT: usize = 100;
const MAX_ERROR_CHARS: usize = 500;
const NAME: &str = "chat_template";

/// The prompt forms in the binary, chosen with `--chat-template NAME`.
pub const BUILTIN_TEMPLATES: &[(&str, &str)] = &[
    ("chatml", include_str!("../../../templates/chat/chatml.jinja")),
    ("gemma", include_str!("../../../templates/chat/gemma.jinja")),
    ("llama-2", include_str!("../../../templates/chat/llama-2.jinja")),
    ("llama-3", include_str!("../../../templates/chat/llama-3.jinja")),
    ("mistral", include_str!("../../../templates/chat/mistral.jinja")),
    ("phi-3", include_str!("../../../templates/chat/phi-3.jinja")),
    ("qwen", include_str!("../../../templates/chat/qwen.jinja")),
    ("vicuna", include_str!("../../../templates/chat/vicuna.jinja")),
];

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateSource {
    Builtin(&'static str),
    /// A file's path, with the entry's name when the file holds several.
    File(String),
}

#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: SpecialTokens,
    pub source: TemplateSource,
}

/// What one rendering gets beside the special tokens.
#[derive(Debug)]
pub struct RenderInput<'a> {
    /// Objects with at least `role` and `content`.
    pub messages: &'a [Json],
    /// Switches that the template may know, e.g. `enable_thinking`.
    pub switches: &'a [(String, bool)],
    pub max_output_bytes: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template called `raise_exception`: these messages are not for this model.
    #[error("{0}")]
    Raised(String),
    #[error("the rendered prompt is longer than {limit_bytes} bytes")]
    OutputTooLong { limit_bytes: usize },
    #[error("the chat template failed: {0}")]
    Failed(String),
}

impl ChatTemplate {
    /// The template `choice` names (built in, an entry of the model's list, or a file), else the model's own.
    /// `None` when the model has none.
    ///
    /// # Errors
    /// A choice that is nothing of these, a file that cannot be read, a template that does not parse.
    pub fn load(files: &ModelFiles, choice: Option<&str>) -> Result<Option<Self>, TokenizerError> {
        let found = match choice {
            Some(choice) => Some(chosen(files, choice)?),
            None => own(files)?,
        };
        found.map(|(source, text)| Self::parse(source, &text, files.special_tokens())).transpose()
    }

    fn parse(source: TemplateSource, text: &str, special_tokens: SpecialTokens) -> Result<Self, TokenizerError> {
        let path = match &source {
            TemplateSource::Builtin(name) => (*name).into(),
            TemplateSource::File(path) => path.into(),
        };
        let wrong = |what: String| TokenizerError::Field { path, field: "chat_template", what };
        if text.len() > MAX_SOURCE_BYTES {
            return Err(wrong(format!("{} bytes, and the limit is {MAX_SOURCE_BYTES}", text.len())));
        }
        let mut environment = environment();
        environment
            .add_template_owned(NAME, without_generation_tags(text))
            .map_err(|e| wrong(format!("not a template: {e}")))?;
        Ok(Self { environment, special_tokens, source })
    }

    /// Prompt text up to where the assistant's answer begins.
    ///
    /// # Errors
    /// The template refuses the messages, fails, or exceeds a limit.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        let template = self.environment.get_template(NAME).map_err(|e| TemplateError::Failed(describe(&e)))?;
        let mut output = CappedOutput { bytes: Vec::new(), limit: input.max_output_bytes };
        let result = template.render_captured_to(self.context(input), &mut output).map(drop);
        match result {
            Ok(()) => String::from_utf8(output.bytes).map_err(|e| TemplateError::Failed(e.to_string())),
            Err(e) if e.kind() == ErrorKind::WriteFailure => {
                Err(TemplateError::OutputTooLong { limit_bytes: input.max_output_bytes })
            }
            Err(e) => Err(raised(&e).unwrap_or_else(|| TemplateError::Failed(describe(&e)))),
        }
    }

    fn context(&self, input: &RenderInput<'_>) -> Value {
        let text = |token: &Option<String>| Value::from(token.as_deref().unwrap_or_default());
        let mut entries = vec![
            ("messages".to_owned(), input.messages.iter().map(to_value).collect()),
            ("add_generation_prompt".to_owned(), Value::from(true)),
            // transformers passes these as None, and templates ask `is not none`.
            ("tools".to_owned(), Value::from(())),
            ("documents".to_owned(), Value::from(())),
            ("bos_token".to_owned(), text(&self.special_tokens.bos_token)),
            ("eos_token".to_owned(), text(&self.special_tokens.eos_token)),
        ];
        let tokens = &self.special_tokens;
        for (name, token) in [("unk_token", &tokens.unk_token), ("pad_token", &tokens.pad_token)] {
            if token.is_some() {
                entries.push((name.to_owned(), text(token)));
            }
        }
        entries.extend(input.switches.iter().map(|(name, on)| (name.clone(), Value::from(*on))));
        Value::from_pairs(entries)
    }
}

fn chosen(files: &ModelFiles, choice: &str) -> Result<(TemplateSource, String), TokenizerError> {
    if let Some(&(name, text)) = BUILTIN_TEMPLATES.iter().find(|(name, _)| *name == choice) {
        return Ok((TemplateSource::Builtin(name), text.to_owned()));
    }
    if let Some(text) = named(files, choice) {
        return Ok((TemplateSource::File(format!("{} [{choice}]", config_path(files))), text));
    }
    let path = Path::new(choice);
    match files::read_capped(path, MAX_SOURCE_BYTES as u64)? {
        Some(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok((TemplateSource::File(choice.to_owned()), text)),
            Err(e) => Err(TokenizerError::Json { path: path.to_owned(), what: format!("not UTF-8: {e}") }),
        },
        None => {
            let names: Vec<&str> = BUILTIN_TEMPLATES.iter().map(|(name, _)| *name).collect();
            Err(TokenizerError::Field {
                path: path.to_owned(),
                field: "chat_template",
                what: format!("no such file, and no built-in template: {}", names.join(", ")),
            })
        }
    }
}

fn own(files: &ModelFiles) -> Result<Option<(TemplateSource, String)>, TokenizerError> {
    if let Some(text) = &files.chat_template {
        let path = files.dir.join("chat_template.jinja");
        return Ok(Some((TemplateSource::File(path.display().to_string()), text.clone())));
    }
    let source = TemplateSource::File(config_path(files));
    match files.tokenizer_config.get("chat_template") {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some((source, text.clone()))),
        Some(Json::Array(entries)) => {
            let only = || entries.first().filter(|_| entries.len() == 1)?.get("template")?.as_str().map(str::to_owned);
            Ok(named(files, "default").or_else(only).map(|text| (source, text)))
        }
        Some(_) => Err(TokenizerError::Field {
            path: files.dir.join("tokenizer_config.json"),
            field: "chat_template",
            what: "neither a string nor a list of {name, template}".to_owned(),
        }),
    }
}

/// The entry of this name in `tokenizer_config.json`'s list of templates.
fn named(files: &ModelFiles, name: &str) -> Option<String> {
    let entries = files.tokenizer_config.get("chat_template")?.as_array()?;
    let entry = entries.iter().find(|entry| entry.get("name").and_then(Json::as_str) == Some(name))?;
    entry.get("template")?.as_str().map(str::to_owned)
}

fn config_path(files: &ModelFiles) -> String {
    files.dir.join("tokenizer_config.json").display().to_string()
}

fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Value::from(integer),
            (None, float) => Value::from(float),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), to_value(value)))),
    }
}

/// As transformers sets up Jinja for chat templates (`utils/chat_template_utils.py`).
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(RECURSION_LIMIT);
    environment.set_debug(false);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    if let Ok(syntax) = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// transformers marks the assistant's tokens with `{% generation %}`; for the text it means nothing.
fn without_generation_tags(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|at| start + at + 2) else { break };
        let inner = &rest[start + 2..end - 2];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(&rest[..start]);
        match word {
            "generation" => out.push_str(&rest[start..end].replace("generation", "if true")),
            "endgeneration" => out.push_str(&rest[start..end].replace("endgeneration", "endif")),
            _ => out.push_str(&rest[start..end]),
        }
        rest = &rest[end..];
    }
    out + rest
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: &str) -> Result<Value, Error> {
    let raised = Raised(message.chars().take(MAX_ERROR_CHARS).collect());
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(raised))
}

fn raised(error: &Error) -> Option<TemplateError> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(TemplateError::Raised(message.clone()));
        }
        cause = error.source();
    }
    None
}

fn describe(error: &Error) -> String {
    error.to_string().chars().take(MAX_ERROR_CHARS).collect()
}

/// The local time, by `strftime`'s directives.
fn strftime_now(format: &str) -> Result<String, Error> {
    use chrono::format::{Item, StrftimeItems};
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.contains(&Item::Error) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}")));
    }
    Ok(chrono::Local::now().format_with_items(items.into_iter()).to_string())
}

/// Python's `json.dumps(ensure_ascii=False)`: Jinja's own filter would escape `<` and `&`.
fn to_json(_: &mut State<'_, '_>, value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent = options.get::<Option<usize>>("indent")?.map(|n| n.min(16));
    python_json::dumps(value, indent)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, "cannot serialize to JSON").with_source(e))
}

struct CappedOutput {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for CappedOutput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buf.len() > self.limit {
            return Err(io::Error::other("the output is too long"));
        }
        self.bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "chat_template_tests.rs"]
mod tests;
