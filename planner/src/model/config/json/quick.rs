//! JSON as nearly all files have it, in one pass over the text. What this does not read, faults and rarities alike, is
//! left to serde_json, which says what is wrong and where.

use super::{MAX_VALUES, Object, Value};
use std::borrow::Cow;
use std::rc::Rc;

/// Files nest a few levels.
const MAX_DEPTH: u32 = 32;

/// `None`: serde_json has to read it.
pub(super) fn read(text: &str) -> Option<Value<'_>> {
    let mut reader = Reader { text, at: 0, values_left: MAX_VALUES - 1, depth_left: MAX_DEPTH };
    let value = reader.value()?;
    reader.peek().is_none().then_some(value)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    values_left: u32,
    depth_left: u32,
}

/// The object that a field before held, and how it was written.
struct Before<'a> {
    text: &'a [u8],
    values: u32,
    object: Rc<Object<'a>>,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.at..]
    }

    /// The next byte that is not space, which stays to be read. `None` at the end.
    fn peek(&mut self) -> Option<u8> {
        let rest = self.rest();
        let space = rest.iter().position(|b| !matches!(b, b' ' | b'\n' | b'\t' | b'\r')).unwrap_or(rest.len());
        self.at += space;
        rest.get(space).copied()
    }

    fn take(&mut self, expected: u8) -> Option<()> {
        (self.peek()? == expected).then(|| self.at += 1)
    }

    /// True after a comma, false after the end of a list or object.
    fn another(&mut self, end: u8) -> Option<bool> {
        let byte = self.peek()?;
        self.at += 1;
        match byte {
            b',' => Some(true),
            _ => (byte == end).then_some(false),
        }
    }

    fn value(&mut self) -> Option<Value<'a>> {
        self.values_left = self.values_left.checked_sub(1)?;
        match self.peek()? {
            b'"' => self.string().map(Value::String),
            b'{' => self.nested(Self::object),
            b'[' => self.nested(Self::list),
            b't' => self.word("true", Value::Bool(true)),
            b'f' => self.word("false", Value::Bool(false)),
            b'n' => self.word("null", Value::Null),
            _ => self.number(),
        }
    }

    fn nested(&mut self, read: fn(&mut Self) -> Option<Value<'a>>) -> Option<Value<'a>> {
        self.depth_left = self.depth_left.checked_sub(1)?;
        self.at += 1;
        let value = read(self);
        self.depth_left += 1;
        value
    }

    fn list(&mut self) -> Option<Value<'a>> {
        let mut values = Vec::new();
        let mut more = self.peek()? != b']' || self.another(b']')?;
        while more {
            values.push(self.value()?);
            more = self.another(b']')?;
        }
        Some(Value::Array(values.into()))
    }

    fn object(&mut self) -> Option<Value<'a>> {
        let mut entries = Vec::new();
        let mut before = None;
        let mut more = self.peek()? != b'}' || self.another(b'}')?;
        while more {
            if self.peek()? != b'"' {
                return None;
            }
            let name = self.string()?;
            self.take(b':')?;
            entries.push((name, self.field(&mut before)?));
            more = self.another(b'}')?;
        }
        Some(Value::Object(Rc::new(Object::new(entries))))
    }

    /// Tens of thousands of modules have the same few fields: what is written like the object before is that object.
    fn field(&mut self, before: &mut Option<Before<'a>>) -> Option<Value<'a>> {
        if self.peek()? != b'{' {
            return self.value();
        }
        if let Some(before) = before.as_ref().filter(|before| self.rest().starts_with(before.text)) {
            self.at += before.text.len();
            self.values_left = self.values_left.checked_sub(before.values)?;
            return Some(Value::Object(Rc::clone(&before.object)));
        }
        let (rest, at, values_left) = (self.rest(), self.at, self.values_left);
        let value = self.value()?;
        if let Value::Object(object) = &value {
            let (text, values) = (&rest[..self.at - at], values_left - self.values_left);
            *before = Some(Before { text, values, object: Rc::clone(object) });
        }
        Some(value)
    }

    fn string(&mut self) -> Option<Cow<'a, str>> {
        let start = self.at + 1;
        let end = start + plain(self.text.as_bytes().get(start..)?);
        if self.text.as_bytes().get(end) != Some(&b'"') {
            return self.escaped();
        }
        self.at = end + 1;
        self.text.get(start..end).map(Cow::Borrowed)
    }

    fn escaped(&mut self) -> Option<Cow<'a, str>> {
        let bytes = self.text.as_bytes();
        let mut end = self.at + 1;
        loop {
            end += plain(bytes.get(end..)?);
            match bytes.get(end)? {
                b'"' => break,
                b'\\' => end += 2,
                _ => return None,
            }
        }
        let quoted = self.text.get(self.at..=end)?;
        self.at = end + 1;
        serde_json::from_str(quoted).ok().map(Cow::Owned)
    }

    fn number(&mut self) -> Option<Value<'a>> {
        let rest = self.rest();
        let part = |b: &u8| matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
        let length = rest.iter().position(|b| !part(b)).unwrap_or(rest.len());
        self.at += length;
        serde_json::from_slice(&rest[..length]).ok().map(Value::Number)
    }

    fn word(&mut self, word: &str, value: Value<'a>) -> Option<Value<'a>> {
        let fits = self.rest().starts_with(word.as_bytes());
        self.at += word.len();
        fits.then_some(value)
    }
}

/// Bytes before the first that ends a text or needs a closer look: a quote, a backslash or a control character.
fn plain(bytes: &[u8]) -> usize {
    const WORD: usize = 8;
    let words = bytes.chunks_exact(WORD);
    let rest = words.remainder();
    for (i, word) in words.enumerate() {
        let special = special(word.iter().rev().fold(0, |word, &b| word << 8 | u64::from(b)));
        if special != 0 {
            return i * WORD + special.trailing_zeros() as usize / 8;
        }
    }
    let special = |b: &u8| matches!(b, b'"' | b'\\' | 0..b' ');
    bytes.len() - rest.len() + rest.iter().position(special).unwrap_or(rest.len())
}

/// The high bit of the first of eight bytes that is special, maybe with others above it; 0 when none is.
fn special(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    let below = |word: u64, limit: u8| word.wrapping_sub(ONES * u64::from(limit)) & !word;
    let equal = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    (below(word, b' ') | equal(b'"') | equal(b'\\')) & (ONES << 7)
}
