//! A recorded deployment as a [`Source`]: what `top --json` wrote, with log lines between the snapshots if there are
//! any. For demonstrations, bug reports and tests.

use super::source::{Action, Source};
use crate::exit::Failure;
use crate::status::{LogLine, SCHEMA, Status};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const LARGEST_FILE_BYTES: u64 = 256 << 20;

#[derive(Debug)]
pub struct Replay {
    records: Vec<Record>,
    /// Records before this one have been shown.
    next: Mutex<usize>,
}

#[derive(Debug)]
enum Record {
    Status(Box<Status>),
    Log(LogLine),
}

impl Replay {
    /// Read a file of one JSON object a line.
    ///
    /// # Errors
    /// [`Failure`] with the usage code: the file cannot be read, is too large, holds no snapshot, or a line of it is
    /// neither a snapshot nor a log line.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let fail = |what: String| Failure::usage(format!("--replay {shown}: {what}"));
        let size = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?.len();
        if size > LARGEST_FILE_BYTES {
            return Err(fail(format!("{size} bytes, at most {LARGEST_FILE_BYTES} are read")).into());
        }
        let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
        Ok(Self::parse(&text).map_err(fail)?)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut records = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            records.push(parse_record(line).map_err(|error| format!("line {}: {error}", number + 1))?);
        }
        if !records.iter().any(|record| matches!(record, Record::Status(_))) {
            return Err("no snapshot in it; `mserve top --json` writes them".to_owned());
        }
        Ok(Self { records, next: Mutex::new(0) })
    }

    /// Move past the next snapshot and return it.
    fn advance(&self) -> Option<Status> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(record) = self.records.get(*next) {
            *next += 1;
            if let Record::Status(status) = record {
                return Some(Status::clone(status));
            }
        }
        None
    }

    fn lines_so_far(&self, after: Option<u64>) -> Vec<LogLine> {
        let next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = self.records[..next].iter().filter_map(|record| match record {
            Record::Log(line) if after.is_none_or(|seq| line.seq > seq) => Some(line.clone()),
            _ => None,
        });
        lines.collect()
    }
}

fn parse_record(line: &str) -> Result<Record, String> {
    let status = match serde_json::from_str::<Status>(line) {
        Ok(status) => status,
        Err(error) => {
            return serde_json::from_str(line).map(Record::Log).map_err(|_| format!("not a snapshot: {error}"));
        }
    };
    if status.schema != SCHEMA {
        return Err(format!("schema {}, this mserve reads {SCHEMA}", status.schema));
    }
    Ok(Record::Status(Box::new(status)))
}

impl Source for Replay {
    async fn status(&self) -> anyhow::Result<Option<Status>> {
        Ok(self.advance())
    }

    async fn logs(&self, after: Option<u64>) -> anyhow::Result<Vec<LogLine>> {
        Ok(self.lines_so_far(after))
    }

    async fn act(&self, _action: Action) -> anyhow::Result<String> {
        anyhow::bail!("this is a replay: there is nothing to act on")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::tui::fixtures;

    fn line(value: &impl serde::Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn snapshots_come_in_order_with_the_log_lines_between_them() {
        let log = LogLine { seq: 7, at_unix_ms: 0, replica: "demo-0".into(), text: "hello".into() };
        let text = format!("{}\n{}\n\n{}\n", line(&fixtures::starting()), line(&log), line(&fixtures::under_load()));
        let replay = Replay::parse(&text).unwrap();
        assert_eq!(replay.advance(), Some(fixtures::starting()));
        assert_eq!(replay.lines_so_far(None), []);
        assert_eq!(replay.advance(), Some(fixtures::under_load()));
        assert_eq!(replay.lines_so_far(None), [log]);
        assert_eq!(replay.lines_so_far(Some(7)), []);
        assert_eq!(replay.advance(), None);
    }

    #[test]
    fn a_bad_file_is_named_by_line() {
        let good = line(&fixtures::empty());
        let error = Replay::parse(&format!("{good}\n{{\"schema\":1}}\n")).unwrap_err();
        assert!(error.starts_with("line 2: not a snapshot: missing field"), "{error}");
        let newer = line(&Status { schema: SCHEMA + 1, ..fixtures::empty() });
        assert_eq!(Replay::parse(&newer).unwrap_err(), "line 1: schema 2, this mserve reads 1");
        assert!(Replay::parse("").unwrap_err().contains("no snapshot"));
    }
}
