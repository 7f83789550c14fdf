//! JSON as Python's `json.dumps` writes it: templates were made against that.

use serde::Serialize;
use serde_json::ser::Formatter;
use std::io;

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
///
/// # Errors
/// A value that is no JSON, e.g. a map with keys that are not strings.
pub(super) fn dumps<T: Serialize>(value: &T, indent: Option<usize>) -> serde_json::Result<String> {
    let mut out = Vec::new();
    let formatter = PythonFormatter { indent, depth: 0, empty: true };
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
    String::from_utf8(out).map_err(|e| serde_json::Error::io(io::Error::other(e)))
}

/// Separators `", "` and `": "` on one line; with an indent `","` and new lines.
struct PythonFormatter {
    indent: Option<usize>,
    depth: usize,
    empty: bool,
}

impl PythonFormatter {
    fn open<W: io::Write + ?Sized>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        writer.write_all(bracket)
    }

    fn item<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        match (self.indent, first) {
            (None, true) => Ok(()),
            (None, false) => writer.write_all(b", "),
            (Some(_), true) => self.line(writer),
            (Some(_), false) => {
                writer.write_all(b",")?;
                self.line(writer)
            }
        }
    }

    fn close<W: io::Write + ?Sized>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.indent.is_some() && !self.empty {
            self.line(writer)?;
        }
        self.empty = false;
        writer.write_all(bracket)
    }

    fn line<W: io::Write + ?Sized>(&self, writer: &mut W) -> io::Result<()> {
        let spaces = self.indent.unwrap_or(0).saturating_mul(self.depth);
        writer.write_all(b"\n")?;
        writer.write_all(" ".repeat(spaces).as_bytes())
    }
}

impl Formatter for PythonFormatter {
    fn begin_array<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn begin_array_value<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.item(writer, first)
    }

    fn end_array_value<W: io::Write + ?Sized>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn end_array<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_object<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn begin_object_key<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object_value<W: io::Write + ?Sized>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn end_object<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn like_python() {
        let value = json!({"a": [1, "é<"], "b": {}, "c": [], "d": [{}]});
        assert_eq!(dumps(&value, None).unwrap(), r#"{"a": [1, "é<"], "b": {}, "c": [], "d": [{}]}"#);
        let indented =
            "{\n  \"a\": [\n    1,\n    \"é<\"\n  ],\n  \"b\": {},\n  \"c\": [],\n  \"d\": [\n    {}\n  ]\n}";
        assert_eq!(dumps(&value, Some(2)).unwrap(), indented);
    }
}
