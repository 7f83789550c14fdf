//! How the screen is divided: a pure function of state and size, so that `update` can ask it for the page height.

use super::super::state::{Focus, State, Zoom};
use ratatui::layout::{Rect, Size};

/// Below this nothing useful fits and a notice is shown.
pub const MIN_WIDTH: u16 = 40;
pub const MIN_HEIGHT: u16 = 10;
/// More GPUs than this stand side by side where one column would take too much of the height, or two have room.
const MANY_GPUS: usize = 4;
const TWO_GPU_COLUMNS: Size = Size::new(116, 32);
const TWO_WIDE_GPU_COLUMNS_WIDTH: u16 = 180;
const EVENTS_SHOWN: usize = 4;

/// Sections from top to bottom; one that has no room has no height.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Areas {
    pub header: Rect,
    pub replicas: Rect,
    pub rates: Rect,
    pub hardware: Rect,
    pub events: Rect,
    pub logs: Rect,
    pub footer: Rect,
}

/// Heights in the order of the screen.
#[derive(Debug, Default, Clone, Copy)]
struct Heights {
    header: u16,
    replicas: u16,
    rates: u16,
    hardware: u16,
    events: u16,
    logs: u16,
    footer: u16,
}

pub fn too_small(area: Rect) -> bool {
    area.width < MIN_WIDTH || area.height < MIN_HEIGHT
}

pub fn areas(state: &State, area: Rect) -> Areas {
    if too_small(area) {
        return Areas::default();
    }
    let mut heights = main_heights(state, area);
    if state.focus == Focus::Logs && (state.log_zoom == Zoom::Screen || heights.logs == 0) {
        heights = log_heights(&heights, area.height);
    }
    place(heights, area)
}

/// Lines of log on the screen.
pub fn log_lines(state: &State) -> usize {
    let screen = Rect::new(0, 0, state.size.width, state.size.height);
    usize::from(areas(state, screen).logs.height.saturating_sub(1))
}

/// GPU rows stand in this many columns.
pub fn gpu_columns(gpus: usize, screen: Size) -> usize {
    let low = screen.height < TWO_GPU_COLUMNS.height && screen.width >= TWO_GPU_COLUMNS.width;
    if gpus > MANY_GPUS && (low || screen.width >= TWO_WIDE_GPU_COLUMNS_WIDTH) { 2 } else { 1 }
}

fn log_heights(main: &Heights, height: u16) -> Heights {
    let logs = height.saturating_sub(main.header + main.footer);
    Heights { header: main.header, logs, footer: main.footer, ..Heights::default() }
}

/// First the least that makes each section useful, in the order of the questions an operator asks; then what each
/// would like; the log takes what is left.
fn main_heights(state: &State, area: Rect) -> Heights {
    let status = state.status.as_ref();
    let gpus = status.map_or(0, |s| s.gpus.len());
    let hardware_rows = gpus.div_ceil(gpu_columns(gpus, area.as_size())).max(1) as u16;
    let events = status.map_or(0, |s| s.events.len()).min(EVENTS_SHOWN) as u16;
    let replicas = state.replicas().len().max(1).min(usize::from(area.height)) as u16;

    let lines = if area.height >= 14 { 2 } else { 1 };
    let mut heights =
        Heights { header: lines + u16::from(!state.concerns().is_empty()), footer: 1, ..Heights::default() };
    let mut left = area.height - heights.header - heights.footer;
    let mut grow = |section: &mut u16, wanted: u16, least: u16| {
        let more = wanted.saturating_sub(*section).min(left);
        if *section + more >= least {
            *section += more;
            left -= more;
        }
    };
    grow(&mut heights.replicas, 2 + replicas.min(4), 1);
    grow(&mut heights.hardware, 2, 2);
    grow(&mut heights.logs, 4, 4);
    grow(&mut heights.rates, 2, 2);
    if events > 0 {
        grow(&mut heights.events, 2, 2);
    }
    grow(&mut heights.replicas, 3 + replicas, 1);
    grow(&mut heights.hardware, 1 + hardware_rows, 2);
    if heights.rates > 0 {
        grow(&mut heights.rates, 3, 2);
    }
    if heights.events > 0 {
        grow(&mut heights.events, 1 + events, 2);
    }
    if heights.logs > 0 {
        grow(&mut heights.logs, u16::MAX, 4);
    } else {
        grow(&mut heights.replicas, u16::MAX, 1);
    }
    heights
}

fn place(heights: Heights, area: Rect) -> Areas {
    let mut y = area.y;
    let mut next = |height: u16| {
        let rect = Rect::new(area.x, y, area.width, height);
        y += height;
        rect
    };
    Areas {
        header: next(heights.header),
        replicas: next(heights.replicas),
        rates: next(heights.rates),
        hardware: next(heights.hardware),
        events: next(heights.events),
        logs: next(heights.logs),
        footer: next(heights.footer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tui::fixtures;

    fn heights(areas: &Areas) -> u16 {
        let Areas { header, replicas, rates, hardware, events, logs, footer } = areas;
        [header, replicas, rates, hardware, events, logs, footer].iter().map(|a| a.height).sum()
    }

    #[test]
    fn sections_fill_the_screen_exactly() {
        for state in [fixtures::state(None), fixtures::loaded_state(), fixtures::gpu_state()] {
            for height in MIN_HEIGHT..80 {
                for width in [40, 80, 120, 250] {
                    let areas = areas(&state, Rect::new(0, 0, width, height));
                    assert_eq!(heights(&areas), height, "{width}x{height}: {areas:?}");
                    assert!(areas.replicas.height > 0);
                }
            }
        }
    }

    #[test]
    fn the_log_is_reachable_even_where_the_main_view_has_no_room_for_it() {
        let mut state = fixtures::loaded_state();
        let area = Rect::new(0, 0, 40, 10);
        assert_eq!(areas(&state, area).logs.height, 0);
        state.focus = Focus::Logs;
        assert!(areas(&state, area).logs.height > 3);
    }
}
