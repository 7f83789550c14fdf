//! The replicas' output and the deployment's events, both bounded.

use super::lines::strip_control;
use crate::status::{Event, LogLine};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub const LINES_PER_REPLICA: usize = 5_000;
const MAX_EVENTS: usize = 200;

#[derive(Debug, Default)]
pub struct LogBook {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// One number for all replicas, so that a reader follows them with one cursor.
    last_seq: u64,
    rings: BTreeMap<String, Ring>,
    events: VecDeque<Event>,
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<LogLine>,
    dropped: u64,
}

impl LogBook {
    /// Keep a line of a replica's output; the oldest goes when there are too many.
    pub fn push(&self, replica: &str, text: &str) {
        let mut inner = self.lock();
        inner.last_seq += 1;
        let line = LogLine {
            seq: inner.last_seq,
            at_unix_ms: u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX),
            replica: replica.to_owned(),
            text: strip_control(text),
        };
        let ring = inner.rings.entry(replica.to_owned()).or_default();
        if ring.lines.len() == LINES_PER_REPLICA {
            ring.lines.pop_front();
            ring.dropped += 1;
        }
        ring.lines.push_back(line);
    }

    /// The newest `limit` lines after `after`, oldest first, of one replica or of all.
    pub fn lines(&self, replica: Option<&str>, after: u64, limit: usize) -> Vec<LogLine> {
        let inner = self.lock();
        let wanted = inner.rings.iter().filter(|(id, _)| replica.is_none_or(|replica| replica == *id));
        let mut lines: Vec<&LogLine> = wanted
            .flat_map(|(_, ring)| ring.lines.iter().rev().take_while(|line| line.seq > after).take(limit))
            .collect();
        lines.sort_unstable_by_key(|line| line.seq);
        lines[lines.len().saturating_sub(limit)..].iter().map(|line| (*line).clone()).collect()
    }

    /// Lines of a replica that were thrown away to make room.
    pub fn dropped(&self, replica: &str) -> u64 {
        self.lock().rings.get(replica).map_or(0, |ring| ring.dropped)
    }

    pub fn last_line(&self, replica: &str) -> Option<String> {
        self.lock().rings.get(replica).and_then(|ring| ring.lines.back()).map(|line| line.text.clone())
    }

    pub fn event(&self, replica: Option<&str>, text: impl Into<String>) {
        let event = Event {
            at_unix_s: since_epoch().as_secs_f64(),
            replica: replica.map(str::to_owned),
            text: strip_control(&text.into()),
        };
        let mut inner = self.lock();
        if inner.events.len() == MAX_EVENTS {
            inner.events.pop_front();
        }
        inner.events.push_back(event);
    }

    /// Newest last.
    pub fn events(&self) -> Vec<Event> {
        self.lock().events.iter().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lines: &[LogLine]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn merges_replicas_by_arrival_and_follows_with_a_cursor() {
        let book = LogBook::default();
        for (replica, text) in [("a-0", "1"), ("b-0", "2"), ("a-0", "3"), ("b-0", "4")] {
            book.push(replica, text);
        }
        assert_eq!(texts(&book.lines(None, 0, 100)), ["1", "2", "3", "4"]);
        assert_eq!(texts(&book.lines(None, 0, 3)), ["2", "3", "4"]);
        assert_eq!(texts(&book.lines(Some("a-0"), 0, 100)), ["1", "3"]);
        assert_eq!(texts(&book.lines(None, 2, 100)), ["3", "4"]);
        assert_eq!(book.lines(Some("c-0"), 0, 100), []);
        assert_eq!(book.last_line("a-0").as_deref(), Some("3"));
    }

    #[test]
    fn a_noisy_replica_loses_its_own_oldest_lines_only() {
        let book = LogBook::default();
        book.push("quiet-0", "kept");
        (0..LINES_PER_REPLICA + 10).for_each(|n| book.push("noisy-0", &n.to_string()));
        assert_eq!(texts(&book.lines(Some("quiet-0"), 0, 10)), ["kept"]);
        assert_eq!(book.lines(Some("noisy-0"), 0, usize::MAX).len(), LINES_PER_REPLICA);
        assert_eq!((book.dropped("noisy-0"), book.dropped("quiet-0")), (10, 0));
    }

    #[test]
    fn events_are_bounded() {
        let book = LogBook::default();
        (0..MAX_EVENTS + 5).for_each(|n| book.event(None, n.to_string()));
        let events = book.events();
        assert_eq!((events.len(), events[0].text.as_str()), (MAX_EVENTS, "5"));
    }
}
