//! Server-sent events of a streamed answer, read at a hundred thousand a second.

use serde::Deserialize;
use serde::de::IgnoredAny;

/// An event is a few hundred bytes; more is no answer to a benchmark's request.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// Cuts a body that comes in any pieces into the data of its events.
#[derive(Debug, Default)]
pub struct EventReader {
    /// The begin of an event whose end has not come.
    rest: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event is longer than {MAX_EVENT_BYTES} bytes")]
pub struct EventTooLong;

impl EventReader {
    /// `event` gets the data of every event that is complete now, line by line.
    ///
    /// # Errors
    /// An event that does not end.
    pub fn push(&mut self, mut piece: &[u8], mut event: impl FnMut(&[u8])) -> Result<(), EventTooLong> {
        while let Some(end) = piece.iter().position(|&byte| byte == b'\n') {
            let (line, after) = (&piece[..end], &piece[end + 1..]);
            if self.rest.is_empty() {
                data(line).into_iter().for_each(&mut event);
            } else {
                self.rest.extend_from_slice(line);
                data(&self.rest).into_iter().for_each(&mut event);
                self.rest.clear();
            }
            piece = after;
        }
        self.rest.extend_from_slice(piece);
        if self.rest.len() > MAX_EVENT_BYTES { Err(EventTooLong) } else { Ok(()) }
    }
}

fn data(line: &[u8]) -> Option<&[u8]> {
    line.strip_prefix(b"data:").map(<[u8]>::trim_ascii)
}

/// One event of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A piece of the answer; as in vLLM's benchmark its text may be empty (a special token, half a character).
    Output,
    /// Nothing of an answer.
    Empty,
    Usage(Usage),
    Failed(String),
    Done,
    Unreadable,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
}

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    choices: Vec<IgnoredAny>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

impl Event {
    pub fn parse(data: &[u8]) -> Self {
        if data == b"[DONE]" {
            return Self::Done;
        }
        let Ok(body) = serde_json::from_slice::<Body>(data) else { return Self::Unreadable };
        if let Some(error) = body.error {
            let message = error.get("message").and_then(serde_json::Value::as_str);
            return Self::Failed(message.map_or_else(|| error.to_string(), str::to_owned));
        }
        match body.usage {
            Some(usage) => Self::Usage(usage),
            None if !body.choices.is_empty() => Self::Output,
            None => Self::Empty,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn read(pieces: &[&[u8]]) -> Vec<String> {
        let (mut reader, mut found) = (EventReader::default(), Vec::new());
        for piece in pieces {
            reader.push(piece, |data| found.push(String::from_utf8(data.to_vec()).unwrap())).unwrap();
        }
        found
    }

    #[test]
    fn events_with_either_line_end_and_comments_between() {
        assert_eq!(read(&[b": ping\n\ndata: {}\r\n\r\ndata:x\n\nevent: y\n"]), ["{}", "x"]);
        assert_eq!(read(&[b"data: not ended"]), [""; 0]);
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut reader = EventReader::default();
        let piece = vec![b'x'; MAX_EVENT_BYTES];
        assert_eq!(reader.push(&piece, |_| {}), Ok(()));
        assert_eq!(reader.push(b"x", |_| {}), Err(EventTooLong));
    }

    #[test]
    fn what_events_say() {
        let usage = Usage { prompt_tokens: 3, completion_tokens: 4 };
        for (data, event) in [
            (r#"{"choices":[{"text":"a\n"}],"usage":null}"#, Event::Output),
            (r#"{"choices":[{"delta":{"content":"é"}}]}"#, Event::Output),
            (r#"{"choices":[{"text":"","finish_reason":"length"}]}"#, Event::Output),
            (r#"{"choices":[]}"#, Event::Empty),
            (r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}"#, Event::Usage(usage)),
            (r#"{"error":{"message":"lost"}}"#, Event::Failed("lost".to_owned())),
            ("[DONE]", Event::Done),
            ("{", Event::Unreadable),
        ] {
            assert_eq!(Event::parse(data.as_bytes()), event, "{data}");
        }
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_events(cuts in prop::collection::vec(0_usize..60, 0..6)) {
            let body = b"data: one\n\ndata: two\r\n\r\n: no\ndata: {\"three\": 3}\n\ndata: [DONE]\n\n";
            let mut at: Vec<usize> = cuts.into_iter().chain([0, body.len()]).collect();
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &body[w[0]..w[1]]).collect();
            prop_assert_eq!(read(&pieces), ["one", "two", "{\"three\": 3}", "[DONE]"]);
        }
    }
}
