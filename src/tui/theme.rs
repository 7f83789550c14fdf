//! Colours and characters, two separate switches.

use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::{bar, border};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Palette {
    /// The terminal's own 16 colours, foreground only: readable on dark and on light backgrounds.
    Ansi,
    /// No colour at all, only bold, dim and reverse.
    Mono,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Charset {
    Unicode,
    Ascii,
}

/// How good or bad something is; drawn as colour and, because colour is never the only carrier, as a glyph or word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Not taking part: stopped, idle.
    Off,
    Good,
    /// On its way: starting, draining.
    Busy,
    Warn,
    Bad,
}

#[derive(Debug, Clone, Copy)]
pub struct Theme {
    pub palette: Palette,
    pub charset: Charset,
}

impl Theme {
    pub const fn new(palette: Palette, charset: Charset) -> Self {
        Self { palette, charset }
    }

    fn colour(self, colour: Color) -> Style {
        match self.palette {
            Palette::Ansi => Style::new().fg(colour),
            Palette::Mono => Style::new(),
        }
    }

    pub fn level(self, level: Level) -> Style {
        match level {
            Level::Off => self.dim(),
            Level::Good => self.colour(Color::Green),
            Level::Busy => self.colour(Color::Cyan),
            Level::Warn => self.colour(Color::Yellow),
            Level::Bad => self.colour(Color::Red).add_modifier(Modifier::BOLD),
        }
    }

    pub fn dim(self) -> Style {
        Style::new().add_modifier(Modifier::DIM)
    }

    pub fn strong(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    pub fn accent(self) -> Style {
        self.colour(Color::Cyan).add_modifier(Modifier::BOLD)
    }

    pub fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    pub fn glyph(self, level: Level) -> &'static str {
        match (self.charset, level) {
            (Charset::Unicode, Level::Off) => "○",
            (Charset::Unicode, Level::Good) => "●",
            (Charset::Unicode, Level::Busy) => "◌",
            (Charset::Unicode, Level::Warn) => "▲",
            (Charset::Unicode, Level::Bad) => "✗",
            (Charset::Ascii, Level::Off) => "-",
            (Charset::Ascii, Level::Good) => "*",
            (Charset::Ascii, Level::Busy) => "~",
            (Charset::Ascii, Level::Warn) => "!",
            (Charset::Ascii, Level::Bad) => "x",
        }
    }

    pub fn borders(self) -> border::Set<'static> {
        match self.charset {
            Charset::Unicode => border::PLAIN,
            Charset::Ascii => ASCII_BORDERS,
        }
    }

    pub fn bars(self) -> bar::Set<'static> {
        match self.charset {
            Charset::Unicode => bar::NINE_LEVELS,
            Charset::Ascii => ASCII_BARS,
        }
    }

    pub fn ellipsis(self) -> &'static str {
        match self.charset {
            Charset::Unicode => "…",
            Charset::Ascii => "~",
        }
    }

    /// A bar of `width` cells split in its filled and its empty part.
    pub fn gauge(self, share: f64, width: u16) -> (String, String) {
        let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
        let (full, part, empty, steps) = match self.charset {
            Charset::Unicode => ("█", ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"].as_slice(), "░", 8),
            Charset::Ascii => ("#", [""].as_slice(), ".", 1),
        };
        let eighths = (share * f64::from(width) * f64::from(steps)).round() as usize;
        let (whole, rest) = (eighths / steps as usize, eighths % steps as usize);
        let filled = format!("{}{}", full.repeat(whole), part[rest]);
        let used = whole + usize::from(rest > 0);
        (filled, empty.repeat(usize::from(width).saturating_sub(used)))
    }
}

const ASCII_BORDERS: border::Set<'static> = border::Set {
    top_left: "+",
    top_right: "+",
    bottom_left: "+",
    bottom_right: "+",
    vertical_left: "|",
    vertical_right: "|",
    horizontal_top: "-",
    horizontal_bottom: "-",
};

const ASCII_BARS: bar::Set<'static> = bar::Set {
    full: "#",
    seven_eighths: "%",
    three_quarters: "*",
    five_eighths: "+",
    half: "=",
    three_eighths: "-",
    one_quarter: ":",
    one_eighth: ".",
    empty: " ",
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gauge_always_fills_its_width() {
        for charset in [Charset::Unicode, Charset::Ascii] {
            let theme = Theme::new(Palette::Mono, charset);
            for share in [-1.0, 0.0, 0.01, 0.5, 0.99, 1.0, 7.0, f64::NAN] {
                let (filled, empty) = theme.gauge(share, 10);
                assert_eq!(filled.chars().count() + empty.chars().count(), 10, "{charset:?} {share}");
            }
        }
    }

    #[test]
    fn without_colour_nothing_sets_one() {
        let theme = Theme::new(Palette::Mono, Charset::Ascii);
        for level in [Level::Off, Level::Good, Level::Busy, Level::Warn, Level::Bad] {
            assert_eq!(theme.level(level).fg, None);
        }
        assert_eq!(theme.accent().fg, None);
    }
}
