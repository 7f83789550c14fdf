//! Numbers as short text. Whatever is unknown is `-`, never 0.

use chrono::{DateTime, FixedOffset};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

pub const UNKNOWN: &str = "-";

/// A rate or a large count in at most five characters: `6.9`, `210`, `1.6k`, `38.1k`, `1.2M`.
pub fn short(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        return UNKNOWN.to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let (scaled, unit) = match value {
        v if v < 999.5 => (v, ""),
        v if v < 999_500.0 => (v / 1e3, "k"),
        v if v < 999_500_000.0 => (v / 1e6, "M"),
        v => (v / 1e9, "G"),
    };
    if scaled >= 99.95 || (unit.is_empty() && scaled >= 9.95) {
        format!("{scaled:.0}{unit}")
    } else {
        format!("{scaled:.1}{unit}")
    }
}

/// A count in at most five characters; exact below ten thousand.
pub fn whole(value: u64) -> String {
    if value < 10_000 { value.to_string() } else { short(value as f64) }
}

/// An axis mark: as [`short`], without a decimal that says nothing.
pub fn mark(value: f64) -> String {
    short(value).replace(".0", "")
}

/// The text in `width` cells. What is too long loses its end, and `ellipsis` says so.
pub fn cut(text: &str, width: usize, ellipsis: &str) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let room = width.saturating_sub(ellipsis.width());
    let mut used = 0;
    let kept = text.chars().take_while(|c| {
        used += c.width().unwrap_or(0);
        used <= room
    });
    format!("{}{ellipsis}", kept.collect::<String>())
}

/// As [`cut`], but the end stays: replicas of one model differ in the index at the end of their names.
pub fn cut_front(text: &str, width: usize, ellipsis: &str) -> String {
    let reversed = |text: &str| text.chars().rev().collect::<String>();
    if text.width() <= width { text.to_owned() } else { reversed(&cut(&reversed(text), width, ellipsis)) }
}

/// Milliseconds: `0.4ms`, `23ms`, `1.2s`, `95s`.
pub fn millis(value: f64) -> String {
    if !value.is_finite() || value < 0.0 {
        UNKNOWN.to_owned()
    } else if value < 9.95 {
        format!("{value:.1}ms")
    } else if value < 999.5 {
        format!("{value:.0}ms")
    } else if value < 99_950.0 {
        format!("{:.1}s", value / 1e3)
    } else {
        format!("{:.0}s", value / 1e3)
    }
}

/// Seconds as the two largest units: `48s`, `12m03s`, `2h14m`, `3d04h`.
pub fn span(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return UNKNOWN.to_owned();
    }
    let s = seconds as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3_600 => format!("{}m{:02}s", s / 60, s % 60),
        3_600..86_400 => format!("{}h{:02}m", s / 3_600, s % 3_600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3_600),
    }
}

/// A share of 1. Drivers sometimes report more than the whole: the excess is shown, not hidden by clamping.
pub fn percent(share: f64) -> String {
    if !share.is_finite() || share < 0.0 {
        UNKNOWN.to_owned()
    } else if share > 1.0 {
        ">100%".to_owned()
    } else {
        format!("{:.0}%", share * 100.0)
    }
}

/// `12,345`
pub fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in GiB without the unit: `0.4`, `22.4`, `140`.
pub fn gib(bytes: u64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib < 99.95 { format!("{gib:.1}") } else { format!("{gib:.0}") }
}

/// `14:02:11` at the given offset from UTC.
pub fn clock(unix_s: f64, utc_offset: FixedOffset) -> String {
    if !unix_s.is_finite() {
        return UNKNOWN.to_owned();
    }
    DateTime::from_timestamp(unix_s as i64, 0)
        .map_or_else(|| UNKNOWN.to_owned(), |t| t.with_timezone(&utc_offset).format("%H:%M:%S").to_string())
}

/// The value's text, or `-`.
pub fn or_unknown<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rates_stay_within_five_characters() {
        let text = |v: f64| short(v);
        assert_eq!(text(0.0), "0");
        assert_eq!(text(0.04), "0.0");
        assert_eq!(text(6.94), "6.9");
        assert_eq!(text(9.96), "10");
        assert_eq!(text(210.4), "210");
        assert_eq!(text(999.6), "1.0k");
        assert_eq!(text(1_640.0), "1.6k");
        assert_eq!(text(38_100.0), "38.1k");
        assert_eq!(text(999_999.0), "1.0M");
        assert_eq!(text(f64::NAN), "-");
        assert_eq!(text(-1.0), "-");
        for power in 0..12 {
            assert!(text(9.99 * 10f64.powi(power)).len() <= 5, "{}", text(9.99 * 10f64.powi(power)));
        }
    }

    #[test]
    fn long_text_is_cut_where_it_matters_least() {
        assert_eq!(cut("signal 9", 8, "…"), "signal 9");
        assert_eq!(cut("signal 9", 5, "…"), "sign…");
        assert_eq!(cut("日本語", 5, "~"), "日本~");
        assert_eq!(cut_front("reranker-large-12", 8, "…"), "…arge-12");
        assert_eq!(cut_front("demo-0", 8, "…"), "demo-0");
        assert_eq!(whole(9_999), "9999");
        assert_eq!(whole(10_000), "10.0k");
        assert_eq!(mark(5_000.0), "5k");
        assert_eq!(mark(50.0), "50");
    }

    #[test]
    fn times_and_shares() {
        assert_eq!(millis(0.44), "0.4ms");
        assert_eq!(millis(280.2), "280ms");
        assert_eq!(millis(1_234.0), "1.2s");
        assert_eq!(millis(f64::INFINITY), "-");
        assert_eq!(span(59.9), "59s");
        assert_eq!(span(723.0), "12m03s");
        assert_eq!(span(8_040.0), "2h14m");
        assert_eq!(span(3.0 * 86_400.0 + 4.0 * 3_600.0), "3d04h");
        assert_eq!(percent(0.784), "78%");
        assert_eq!(percent(1.7), ">100%");
        assert_eq!(percent(f64::NAN), "-");
        assert_eq!(count(12_345_678), "12,345,678");
        assert_eq!(count(999), "999");
        assert_eq!(gib(150_323_855_360), "140");
    }

    #[test]
    fn the_clock_follows_the_offset() {
        let east = FixedOffset::east_opt(2 * 3_600).unwrap();
        assert_eq!(clock(0.0, east), "02:00:00");
        assert_eq!(clock(f64::MAX, east), "-");
    }
}
