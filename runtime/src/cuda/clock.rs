//! Where the time of a start goes.

use std::time::Instant;

/// Milliseconds of one phase after the other.
#[derive(Debug)]
pub struct Clock {
    last: Instant,
    pub laps: Vec<(&'static str, f64)>,
}

impl Clock {
    pub fn start() -> Self {
        Self { last: Instant::now(), laps: Vec::new() }
    }

    /// The phase that ends now.
    pub fn lap(&mut self, name: &'static str) {
        self.laps.push((name, self.last.elapsed().as_secs_f64() * 1e3));
        self.last = Instant::now();
    }
}
