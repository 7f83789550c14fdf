//! The replicas' output: a bounded ring, and the view on it (which replica, which text, where).

use crate::status::LogLine;
use std::collections::VecDeque;

/// Lines kept for all replicas together.
pub const LINES_KEPT: usize = 5_000;
/// Characters kept of one line.
const LINE_CHARS: usize = 1_000;

#[derive(Debug, Default)]
pub struct LogStore {
    lines: VecDeque<LogLine>,
    /// Number of the first line of `lines` since the dashboard began.
    first: u64,
    /// Lines that the source had and that never came here.
    pub missed: u64,
    last_seq: Option<u64>,
}

/// What of the store is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogView {
    /// Only this replica's lines.
    pub only: Option<String>,
    /// Only lines that contain this, whatever the case of its letters.
    pub needle: String,
    /// Number of the bottom line; `None` follows the newest.
    pub bottom: Option<u64>,
}

impl LogStore {
    pub fn extend(&mut self, lines: Vec<LogLine>) {
        for line in lines {
            if self.last_seq.is_some_and(|last| line.seq <= last) {
                continue;
            }
            let expected = self.last_seq.map_or(line.seq, |last| last + 1);
            self.missed += line.seq - expected;
            self.last_seq = Some(line.seq);
            if self.lines.len() == LINES_KEPT {
                self.lines.pop_front();
                self.first += 1;
            }
            self.lines.push_back(LogLine { text: printable(&line.text), ..line });
        }
    }

    /// The source began anew: its numbers start over.
    pub fn expect_new_sequence(&mut self) {
        self.last_seq = None;
    }

    /// Lines kept.
    pub fn kept(&self) -> usize {
        self.lines.len()
    }

    /// Numbered lines that the view lets through, oldest first.
    fn matching<'a>(&'a self, view: &'a LogView) -> impl DoubleEndedIterator<Item = (u64, &'a LogLine)> {
        let numbered = self.lines.iter().enumerate().map(|(i, line)| (self.first + i as u64, line));
        numbered.filter(|(_, line)| view.admits(line))
    }

    pub fn count(&self, view: &LogView) -> usize {
        self.matching(view).count()
    }

    /// The last `height` lines of the view, oldest first. A view above the oldest kept line shows the oldest.
    pub fn page<'a>(&'a self, view: &'a LogView, height: usize) -> Vec<&'a LogLine> {
        let bottom = self.bottom_of(view, height);
        let mut page: Vec<&LogLine> =
            self.matching(view).rev().skip_while(|(n, _)| *n > bottom).take(height).map(|(_, line)| line).collect();
        page.reverse();
        page
    }

    /// Number of the bottom line shown, low enough for a full page.
    fn bottom_of(&self, view: &LogView, height: usize) -> u64 {
        let Some(bottom) = view.bottom else { return u64::MAX };
        let full_page = self.matching(view).take(height).last().map_or(0, |(n, _)| n);
        bottom.max(full_page)
    }

    /// Move the view by `lines` (negative is up, towards older). At the newest line it follows again.
    pub fn scroll(&self, view: &mut LogView, lines: i64, height: usize) {
        let numbers: Vec<u64> = self.matching(view).map(|(n, _)| n).collect();
        let Some(newest) = numbers.len().checked_sub(1) else { return };
        let bottom = self.bottom_of(view, height);
        let at = numbers.partition_point(|&n| n <= bottom).saturating_sub(1);
        let lowest = height.min(numbers.len()).saturating_sub(1);
        let target = (at as i64).saturating_add(lines).clamp(lowest as i64, newest as i64) as usize;
        view.bottom = (target < newest).then(|| numbers[target]);
    }

    /// Hold the view where it is, or let it follow.
    pub fn hold(&self, view: &mut LogView) {
        let newest = self.matching(view).next_back().map(|(n, _)| n);
        view.bottom = newest;
    }
}

impl LogView {
    pub fn follows(&self) -> bool {
        self.bottom.is_none()
    }

    fn admits(&self, line: &LogLine) -> bool {
        self.only.as_ref().is_none_or(|id| *id == line.replica) && contains_ignoring_case(&line.text, &self.needle)
    }
}

fn contains_ignoring_case(text: &str, needle: &str) -> bool {
    needle.is_empty() || text.as_bytes().windows(needle.len()).any(|part| part.eq_ignore_ascii_case(needle.as_bytes()))
}

/// The line without escape sequences and control characters, cut at [`LINE_CHARS`]: what a replica prints must not
/// drive the operator's terminal.
pub fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len().min(LINE_CHARS));
    let mut chars = text.chars();
    let mut kept = 0;
    while let Some(c) = chars.next() {
        if kept == LINE_CHARS {
            break;
        }
        match c {
            '\u{1b}' => skip_escape(&mut chars),
            '\t' => {
                clean.push_str("    ");
                kept += 4;
            }
            c if c.is_control() || is_bidi_control(c) => {}
            c => {
                clean.push(c);
                kept += 1;
            }
        }
    }
    clean
}

/// Consume what follows ESC: CSI up to its final byte, OSC and the other strings up to BEL or ST, else one character.
fn skip_escape(chars: &mut std::str::Chars<'_>) {
    match chars.next() {
        Some('[') => {
            chars.by_ref().find(|c| ('\u{40}'..='\u{7e}').contains(c));
        }
        Some(']' | 'P' | 'X' | '^' | '_') => {
            while let Some(c) = chars.next() {
                if c == '\u{7}' || c == '\u{9c}' {
                    break;
                }
                if c == '\u{1b}' {
                    chars.next();
                    break;
                }
            }
        }
        _ => {}
    }
}

const fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(seq: u64, replica: &str, text: &str) -> LogLine {
        LogLine { seq, at_unix_ms: seq * 1_000, replica: replica.into(), text: text.into() }
    }

    fn store(n: u64) -> LogStore {
        let mut store = LogStore::default();
        store.extend((0..n).map(|i| line(i, if i % 2 == 0 { "a" } else { "b" }, &format!("line {i}"))).collect());
        store
    }

    fn texts<'a>(store: &'a LogStore, view: &'a LogView, height: usize) -> Vec<&'a str> {
        store.page(view, height).iter().map(|l| l.text.as_str()).collect()
    }

    #[test]
    fn the_ring_is_bounded_and_gaps_are_counted() {
        let mut store = store(LINES_KEPT as u64 + 10);
        assert_eq!(store.kept(), LINES_KEPT);
        assert_eq!(store.missed, 0);
        store.extend(vec![line(LINES_KEPT as u64 + 15, "a", "x"), line(3, "a", "seen already")]);
        assert_eq!(store.missed, 5);
        assert_eq!(texts(&store, &LogView::default(), 1), ["x"]);
    }

    #[test]
    fn filters_by_replica_and_text() {
        let store = store(20);
        let view = LogView { only: Some("a".into()), needle: "LINE 1".into(), bottom: None };
        assert_eq!(texts(&store, &view, 3), ["line 14", "line 16", "line 18"]);
        assert_eq!(store.count(&view), 5);
    }

    #[test]
    fn scrolling_holds_still_while_lines_arrive_and_follows_at_the_end() {
        let mut store = store(10);
        let mut view = LogView::default();
        store.scroll(&mut view, -2, 3);
        assert_eq!(texts(&store, &view, 3), ["line 5", "line 6", "line 7"]);
        store.extend(vec![line(10, "a", "line 10")]);
        assert_eq!(texts(&store, &view, 3), ["line 5", "line 6", "line 7"]);
        store.scroll(&mut view, -100, 3);
        assert_eq!(texts(&store, &view, 3), ["line 0", "line 1", "line 2"]);
        store.scroll(&mut view, 1, 3);
        assert_eq!(texts(&store, &view, 3), ["line 1", "line 2", "line 3"]);
        store.scroll(&mut view, 100, 3);
        assert!(view.follows());
    }

    #[test]
    fn scrolling_nothing_is_nothing() {
        let mut view = LogView::default();
        LogStore::default().scroll(&mut view, -5, 10);
        assert!(view.follows());
        assert!(texts(&LogStore::default(), &view, 0).is_empty());
    }

    #[test]
    fn a_page_above_the_kept_lines_shows_the_oldest() {
        let store = store(LINES_KEPT as u64 + 100);
        let view = LogView { bottom: Some(5), ..LogView::default() };
        assert_eq!(texts(&store, &view, 2), ["line 100", "line 101"]);
    }

    #[test]
    fn control_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("\u{1b}[31mred\u{1b}[0m\tend\r\n"), "red    end");
        assert_eq!(printable("a\u{1b}]0;title\u{7}b\u{1b}]8;;x\u{1b}\\c"), "abc");
        assert_eq!(printable("\u{202e}abc\u{1b}"), "abc");
        assert_eq!(printable(&"x".repeat(5_000)).len(), LINE_CHARS);
    }
}
