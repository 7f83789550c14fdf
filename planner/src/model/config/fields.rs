//! Typed, range-checked reading of one JSON object. `null` counts as absent, as in transformers.

use super::ConfigError;
use super::json::{self, MAX_VALUES, Object, ParseError, Value};
use std::ops::RangeInclusive;
use std::rc::Rc;

/// Real configs are a few KiB; quantised mixture-of-experts ones reach a few hundred.
const MAX_FILE_BYTES: usize = 4 << 20;

/// Parse the bytes of a file into its top-level object. `quoted` is room for a copy, where the file needs one.
pub(super) fn parse_object<'a>(json: &'a [u8], quoted: &'a mut Vec<u8>) -> Result<Rc<Object<'a>>, ConfigError> {
    if json.len() > MAX_FILE_BYTES {
        return Err(ConfigError::TooLarge { size_bytes: json.len() as u64, limit_bytes: MAX_FILE_BYTES as u64 });
    }
    let parsed = match json::parse(json) {
        Err(ParseError::Json(_)) if quote_literals(json, quoted) => json::parse(quoted),
        parsed => parsed,
    };
    match parsed {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(ConfigError::NotAnObject { found: kind(&other) }),
        Err(ParseError::TooManyValues) => Err(ConfigError::TooManyValues { limit: MAX_VALUES }),
        Err(ParseError::Json(error)) => {
            Err(ConfigError::Json { line: error.line(), column: error.column(), problem: error.to_string() })
        }
    }
}

/// Python writes NaN and Infinity, which JSON does not know (`time_step_limit` of Mamba models). They are read as
/// text, so that a field that needs a number still refuses them by name. False: there are none.
fn quote_literals(json: &[u8], quoted: &mut Vec<u8>) -> bool {
    quoted.clear();
    let (mut in_string, mut escaped, mut found, mut at) = (false, false, false, 0);
    while at < json.len() {
        let byte = json[at];
        let literal = if in_string { None } else { NOT_NUMBERS.iter().find(|l| json[at..].starts_with(l.as_bytes())) };
        if let Some(literal) = literal {
            found = true;
            quoted.push(b'"');
            quoted.extend_from_slice(literal.as_bytes());
            quoted.push(b'"');
            at += literal.len();
            continue;
        }
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ => {}
        }
        quoted.push(byte);
        at += 1;
    }
    found
}

const NOT_NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a> {
    map: &'a Object<'a>,
    /// The object that `map` was found in, for messages: `text_config`.
    parent: Option<&'static str>,
    /// What fields hold that the object leaves out.
    defaults: &'static [(&'static str, u64)],
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Object<'a>) -> Self {
        Self { map, parent: None, defaults: &[] }
    }

    /// The field's full name for messages: `rope_scaling.factor`.
    pub(super) fn path(&self, name: &str) -> String {
        match self.parent {
            Some(parent) => format!("{parent}.{name}"),
            None => name.to_owned(),
        }
    }

    /// The first of `names` that is present, with its name.
    fn find(&self, names: &[&'static str]) -> Option<(&'static str, &'a Value<'a>)> {
        names.iter().find_map(|&name| Some((name, self.map.get(name).filter(|v| !v.is_null())?)))
    }

    /// The same object, with what its class has for fields that it leaves out.
    pub(super) fn with_defaults(self, defaults: &'static [(&'static str, u64)]) -> Self {
        Self { defaults, ..self }
    }

    fn default_of(&self, names: &[&'static str], range: &RangeInclusive<u64>) -> Option<u64> {
        let default = self.defaults.iter().find(|(name, _)| names.contains(name));
        default.map(|&(_, value)| value).filter(|value| range.contains(value))
    }

    pub(super) fn value(&self, name: &'static str) -> Option<&'a Value<'a>> {
        self.find(&[name]).map(|(_, value)| value)
    }

    pub(super) fn uint(&self, names: &[&'static str], range: RangeInclusive<u64>) -> Result<Option<u64>, ConfigError> {
        let Some((name, value)) = self.find(names) else { return Ok(self.default_of(names, &range)) };
        let expected = || format!("a whole number from {} to {}", range.start(), range.end());
        let number = match value {
            Value::Number(n) => n,
            other => return Err(self.wrong_type(name, other, expected())),
        };
        // Some exporters write whole numbers as 4096.0.
        let whole = number.as_u64().or_else(|| number.as_f64().and_then(whole_number));
        match whole.filter(|n| range.contains(n)) {
            Some(n) => Ok(Some(n)),
            None => Err(self.out_of_range(name, number, expected())),
        }
    }

    pub(super) fn required_uint(&self, names: &[&'static str], range: RangeInclusive<u64>) -> Result<u64, ConfigError> {
        let mut expected = format!("a whole number from {} to {}", range.start(), range.end());
        if names.len() > 1 {
            expected.push_str(&format!(" (also read: {})", names[1..].join(", ")));
        }
        self.uint(names, range)?.ok_or_else(|| ConfigError::Missing { field: self.path(names[0]), expected })
    }

    pub(super) fn float(&self, names: &[&'static str], range: RangeInclusive<f64>) -> Result<Option<f64>, ConfigError> {
        let Some((name, value)) = self.find(names) else { return Ok(None) };
        self.checked_float(name, value, range).map(Some)
    }

    pub(super) fn required_float(&self, name: &'static str, range: RangeInclusive<f64>) -> Result<f64, ConfigError> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.float(&[name], range)?.ok_or_else(|| ConfigError::Missing { field: self.path(name), expected })
    }

    fn checked_float(&self, name: &str, value: &Value<'_>, range: RangeInclusive<f64>) -> Result<f64, ConfigError> {
        let expected = || format!("a number from {} to {}", range.start(), range.end());
        match value {
            Value::Number(n) => match n.as_f64().filter(|x| range.contains(x)) {
                Some(x) => Ok(x),
                None => Err(self.out_of_range(name, n, expected())),
            },
            other => Err(self.wrong_type(name, other, expected())),
        }
    }

    /// A list of exactly `len` numbers.
    pub(super) fn floats(
        &self,
        name: &'static str,
        len: u64,
        range: RangeInclusive<f64>,
    ) -> Result<Vec<f64>, ConfigError> {
        let expected = format!("a list of {len} numbers from {} to {}", range.start(), range.end());
        let list = match self.value(name) {
            None => return Err(ConfigError::Missing { field: self.path(name), expected }),
            Some(Value::Array(list)) => &list[..],
            Some(other) => return Err(self.wrong_type(name, other, expected)),
        };
        if list.len() as u64 != len {
            return Err(self.out_of_range(name, &format!("a list of {}", list.len()), expected));
        }
        list.iter().map(|value| self.checked_float(name, value, range.clone())).collect()
    }

    pub(super) fn boolean(&self, name: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.wrong_type(name, other, "true or false")),
        }
    }

    pub(super) fn string(&self, names: &[&'static str]) -> Result<Option<(&'static str, &'a str)>, ConfigError> {
        match self.find(names) {
            None => Ok(None),
            Some((name, Value::String(s))) => Ok(Some((name, s))),
            Some((name, other)) => Err(self.wrong_type(name, other, "a string")),
        }
    }

    pub(super) fn list(&self, name: &'static str) -> Result<Option<&'a [Value<'a>]>, ConfigError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(&list[..])),
            Some(other) => Err(self.wrong_type(name, other, "a list")),
        }
    }

    pub(super) fn object(&self, name: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { map, parent: Some(name), defaults: &[] })),
            Some(other) => Err(self.wrong_type(name, other, "an object")),
        }
    }

    /// All fields, `null` ones too.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a str, &'a Value<'a>)> {
        self.map.entries()
    }

    /// Whether both are one object, as fields that are written alike may be.
    pub(super) fn is(&self, other: &Self) -> bool {
        std::ptr::eq(self.map, other.map)
    }

    pub(super) fn keys(&self) -> usize {
        self.map.len()
    }

    pub(super) fn wrong_type(&self, name: &str, found: &Value<'_>, expected: impl Into<String>) -> ConfigError {
        ConfigError::WrongType { field: self.path(name), found: kind(found).to_owned(), expected: expected.into() }
    }

    pub(super) fn out_of_range(
        &self,
        name: &str,
        value: &(impl ToString + ?Sized),
        expected: impl Into<String>,
    ) -> ConfigError {
        ConfigError::OutOfRange { field: self.path(name), value: value.to_string(), expected: expected.into() }
    }

    pub(super) fn unsupported(
        &self,
        name: &str,
        value: &(impl ToString + ?Sized),
        supported: impl Into<String>,
    ) -> ConfigError {
        let value = printable(&value.to_string());
        ConfigError::Unsupported { field: self.path(name), value, supported: supported.into() }
    }
}

/// Any text of a file, short enough for a message and without what a terminal would act on.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(120).map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn whole_number(x: f64) -> Option<u64> {
    // 2^53: whole numbers above it are not exact in a double.
    (x.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(&x)).then_some(x as u64)
}

fn kind(value: &Value<'_>) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(text) if NOT_NUMBERS.contains(&text.as_ref()) => "not a finite number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
