//! Lines of a child's output: bounded in length, cleaned of what could disturb a terminal.

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// Longer lines are cut; the rest up to the line's end is thrown away.
pub const MAX_LINE_BYTES: usize = 16 * 1024;

#[derive(Debug)]
pub struct BoundedLines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
}

impl<R: AsyncRead + Unpin> BoundedLines<R> {
    pub fn new(reader: R) -> Self {
        Self { reader: BufReader::new(reader), line: Vec::new() }
    }

    /// The next line without its end, invalid UTF-8 replaced; `None` at the end of the stream or when it breaks.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            let bytes = self.reader.fill_buf().await.unwrap_or_default();
            if bytes.is_empty() {
                return (!self.line.is_empty()).then(|| self.take());
            }
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let part = &bytes[..end.unwrap_or(bytes.len())];
            let room = MAX_LINE_BYTES - self.line.len();
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            let used = end.map_or(bytes.len(), |end| end + 1);
            self.reader.consume(used);
            if end.is_some() {
                return Some(self.take());
            }
        }
    }

    fn take(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned()
    }
}

/// Drop escape sequences and control characters; of a line redrawn with carriage returns keep the last version.
pub fn strip_control(line: &str) -> String {
    let line = line.trim_end_matches('\r');
    let last = line.rsplit('\r').next().unwrap_or(line);
    let mut clean = String::with_capacity(last.len());
    let mut chars = last.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => skip_escape(&mut chars),
            '\t' => clean.push_str("    "),
            c if c.is_control() || is_bidi_control(c) => {}
            c => clean.push(c),
        }
    }
    clean
}

/// After ESC: `[ ... final byte` (CSI), `] ... BEL or ESC \` (OSC and its kin), or one more character.
fn skip_escape(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    match chars.next() {
        Some('[') => while chars.next().is_some_and(|c| !('\u{40}'..='\u{7e}').contains(&c)) {},
        Some(']' | 'P' | '^' | '_' | 'X') => {
            while let Some(c) = chars.next() {
                if c == '\u{7}' || (c == '\u{1b}' && chars.next_if_eq(&'\\').is_some()) {
                    break;
                }
            }
        }
        // Character sets and the like take a second byte after an intermediate one.
        Some('\u{20}'..='\u{2f}') => drop(chars.next()),
        _ => {}
    }
}

/// Characters that reorder text on screen: a log line must not be able to look like another.
fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(text: &[u8]) -> Vec<String> {
        let mut reader = BoundedLines::new(text);
        let mut all = Vec::new();
        while let Some(line) = reader.next().await {
            all.push(line);
        }
        all
    }

    #[tokio::test]
    async fn splits_and_bounds() {
        assert_eq!(lines(b"a\n\nb").await, ["a", "", "b"]);
        assert_eq!(lines(b"\xff\n").await, ["\u{fffd}"]);
        let mut long = vec![b'x'; MAX_LINE_BYTES * 3];
        long.extend_from_slice(b"\nnext\n");
        let got = lines(&long).await;
        assert_eq!((got[0].len(), got[1].as_str()), (MAX_LINE_BYTES, "next"));
    }

    #[test]
    fn strips_what_disturbs_a_terminal() {
        for (dirty, clean) in [
            ("\u{1b}[31mred\u{1b}[0m", "red"),
            ("\u{1b}]0;title\u{7}text", "text"),
            ("\u{1b}]8;;http://x\u{1b}\\link\u{1b}]8;;\u{1b}\\", "link"),
            ("10%\r50%\r100%\r", "100%"),
            ("a\tb\u{0}c\u{9b}d", "a    bcd"),
            ("\u{1b}(Btext", "text"),
            ("safe\u{202e}exe", "safeexe"),
            ("cut \u{1b}[3", "cut "),
            ("grüße", "grüße"),
        ] {
            assert_eq!(strip_control(dirty), clean, "{dirty:?}");
        }
    }
}
