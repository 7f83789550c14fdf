//! JSON as this parser needs it: text is borrowed from the file, and a file has only so many values. A tree of owned
//! maps takes many times as long for the largest files (22,000 quantised modules).

mod quick;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Number;
use std::borrow::Cow;
use std::cell::{Cell, OnceCell};
use std::fmt;
use std::rc::Rc;

/// Half as many again as the largest published file has (MiniMax-M3-NVFP4: 67,072).
pub(super) const MAX_VALUES: u32 = 98_304;

#[derive(Debug, Clone)]
pub(super) enum Value<'a> {
    Null,
    Bool(bool),
    Number(Number),
    String(Cow<'a, str>),
    Array(Box<[Value<'a>]>),
    /// Shared by fields of one object that are written alike.
    Object(Rc<Object<'a>>),
}

/// Fields in the file's order; of equal names the last counts.
#[derive(Debug, Clone)]
pub(super) struct Object<'a> {
    entries: Vec<(Cow<'a, str>, Value<'a>)>,
    /// Places of the entries, by name: made when an object of many is first asked for one. The largest never are.
    by_name: OnceCell<Vec<u32>>,
}

/// Objects of no more entries are looked through.
const FEW_ENTRIES: usize = 32;

impl<'a> Object<'a> {
    fn new(entries: Vec<(Cow<'a, str>, Value<'a>)>) -> Self {
        Self { entries, by_name: OnceCell::new() }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value<'a>> {
        let last = if self.entries.len() <= FEW_ENTRIES {
            self.entries.iter().rfind(|(key, _)| key == name)
        } else {
            let by_name = self.by_name.get_or_init(|| self.sorted());
            let behind = by_name.partition_point(|&place| self.name(place) <= name);
            by_name[..behind].last().map(|&place| &self.entries[place as usize]).filter(|(key, _)| key == name)
        };
        last.map(|(_, value)| value)
    }

    fn sorted(&self) -> Vec<u32> {
        let mut places: Vec<u32> = (0..self.entries.len() as u32).collect();
        // Stable: the last of equal names stays last.
        places.sort_by(|&a, &b| self.name(a).cmp(self.name(b)));
        places
    }

    fn name(&self, place: u32) -> &str {
        &self.entries[place as usize].0
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
        Ok(text) => match quick::read(text) {
            Some(value) => Ok(value),
            None => read(serde_json::Deserializer::from_str(text)),
        },
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
        Ok(Value::Array(values.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key_seed(Name)? {
            entries.push((name, map.next_value_seed(self)?));
        }
        Ok(Value::Object(Rc::new(Object::new(entries))))
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
mod tests;
