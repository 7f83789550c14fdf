//! JSON as this parser needs it: text is borrowed from the file, and a file has only so many values. A tree of owned
//! maps takes ten times as long for the largest files (22,000 quantised modules).

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Number;
use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

/// Half as many again as the largest published file has (MiniMax-M3-NVFP4: 67,072).
pub(super) const MAX_VALUES: u32 = 98_304;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    Null,
    Bool(bool),
    Number(Number),
    String(Cow<'a, str>),
    Array(Vec<Value<'a>>),
    Object(Object<'a>),
}

/// Sorted by name; of equal names the last counts.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Object<'a> {
    entries: Vec<(Cow<'a, str>, Value<'a>)>,
}

impl<'a> Object<'a> {
    pub(super) fn get(&self, name: &str) -> Option<&Value<'a>> {
        let behind = self.entries.partition_point(|(key, _)| key.as_ref() <= name);
        self.entries[..behind].last().filter(|(key, _)| key == name).map(|(_, value)| value)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &Value<'a>)> {
        self.entries.iter().map(|(key, value)| (key.as_ref(), value))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

impl Value<'_> {
    pub(super) fn as_u64(&self) -> Option<u64> {
        if let Self::Number(number) = self { number.as_u64() } else { None }
    }

    pub(super) fn as_i64(&self) -> Option<i64> {
        if let Self::Number(number) = self { number.as_i64() } else { None }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        if let Self::String(text) = self { Some(text) } else { None }
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }

    pub(super) fn is_string(&self) -> bool {
        matches!(self, Self::String(_))
    }

    pub(super) fn is_array(&self) -> bool {
        matches!(self, Self::Array(_))
    }
}

#[derive(Debug)]
pub(super) enum ParseError {
    Json(serde_json::Error),
    TooManyValues,
}

/// Parse all of `json`.
pub(super) fn parse(json: &[u8]) -> Result<Value<'_>, ParseError> {
    // Looked through once as a whole: otherwise each text is by itself, which takes ten times as long.
    match std::str::from_utf8(json) {
        Ok(text) => read(serde_json::Deserializer::from_str(text)),
        Err(_) => read(serde_json::Deserializer::from_slice(json)),
    }
}

fn read<'de, R: serde_json::de::Read<'de>>(
    mut deserializer: serde_json::Deserializer<R>,
) -> Result<Value<'de>, ParseError> {
    let left = Cell::new(MAX_VALUES);
    let value = Seed { left: &left }.deserialize(&mut deserializer);
    match value.and_then(|value| deserializer.end().map(|()| value)) {
        Ok(value) => Ok(value),
        Err(_) if left.get() == 0 => Err(ParseError::TooManyValues),
        Err(error) => Err(ParseError::Json(error)),
    }
}

/// Builds one value, and counts it.
#[derive(Clone, Copy)]
struct Seed<'c> {
    left: &'c Cell<u32>,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let left = self.left.get().saturating_sub(1);
        self.left.set(left);
        if left == 0 {
            return Err(D::Error::custom("too many values"));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Value::String(Cow::Borrowed(text)))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Value::String(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        // Files have tens of thousands of objects with a field or two.
        let mut entries = Vec::with_capacity(2);
        while let Some(name) = map.next_key_seed(Name)? {
            entries.push((name, map.next_value_seed(self)?));
        }
        // Stable: the last of equal names stays last.
        if !entries.is_sorted_by(|(a, _), (b, _)| a <= b) {
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        Ok(Value::Object(Object { entries }))
    }
}

/// A field's name, borrowed unless it holds escapes.
struct Name;

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Name {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn object(json: &str) -> Object<'_> {
        match parse(json.as_bytes()).unwrap() {
            Value::Object(object) => object,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn values_are_those_of_serde_json() {
        let json = r#" {"b": [1, -2, 3.5, true, null, "xé\n"], "a": {"b": {}}, "ké": 18446744073709551615} "#;
        let theirs: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(to_serde(&parse(json.as_bytes()).unwrap()), theirs);
        for broken in ["", "{", "[1,]", "{\"a\":}", "1 2", "{} x", "\u{1}"] {
            assert!(matches!(parse(broken.as_bytes()), Err(ParseError::Json(_))), "{broken}");
        }
    }

    fn to_serde(value: &Value<'_>) -> serde_json::Value {
        match value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(b) => (*b).into(),
            Value::Number(n) => n.clone().into(),
            Value::String(s) => s.as_ref().into(),
            Value::Array(list) => list.iter().map(to_serde).collect(),
            Value::Object(map) => map.entries().map(|(name, value)| (name.to_owned(), to_serde(value))).collect(),
        }
    }

    #[test]
    fn fields_are_found_and_the_last_of_two_counts() {
        let map = object(r#"{"z":1,"a":2,"m":3,"a":4,"aa":5}"#);
        assert_eq!(map.get("a").and_then(Value::as_u64), Some(4));
        assert_eq!(map.get("aa").and_then(Value::as_u64), Some(5));
        assert_eq!(map.get("z").and_then(Value::as_u64), Some(1));
        assert_eq!((map.get(""), map.get("b"), map.get("zz")), (None, None, None));
    }

    #[test]
    fn a_file_has_only_so_many_values() {
        let list = |n: u32| format!("[{}0]", "0,".repeat(n as usize - 1));
        assert!(parse(list(MAX_VALUES - 2).as_bytes()).is_ok());
        assert!(matches!(parse(list(MAX_VALUES).as_bytes()), Err(ParseError::TooManyValues)));
        // Deeper than any file: refused by the parser's own limit, not by the stack.
        assert!(parse("[".repeat(100_000).as_bytes()).is_err());
    }
}
