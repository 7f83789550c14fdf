//! How far logits are from what they should be.

/// Errors gathered over rows of logits.
#[derive(Debug, Default, Clone, Copy)]
pub struct Closeness {
    error: f64,
    signal: f64,
    /// Largest difference of a logprob among the [`LIKELIEST`] tokens.
    pub worst_logprob: f64,
    /// Rows, and those among them whose likeliest token is the same.
    pub rows: usize,
    pub same_best: usize,
}

const LIKELIEST: usize = 20;

impl Closeness {
    pub fn add(&mut self, ours: &[f32], exact: &[f32]) {
        assert_eq!(ours.len(), exact.len(), "rows of one vocabulary");
        let mean = exact.iter().map(|&x| f64::from(x)).sum::<f64>() / exact.len() as f64;
        for (&a, &b) in ours.iter().zip(exact) {
            self.error += square(f64::from(a) - f64::from(b));
            self.signal += square(f64::from(b) - mean);
        }
        let (normal_ours, normal_exact) = (log_sum_exp(ours), log_sum_exp(exact));
        for id in likeliest(exact) {
            let apart = (f64::from(ours[id]) - normal_ours) - (f64::from(exact[id]) - normal_exact);
            // NaN must not pass.
            let apart = if apart.is_nan() { f64::INFINITY } else { apart.abs() };
            self.worst_logprob = self.worst_logprob.max(apart);
        }
        self.rows += 1;
        self.same_best += usize::from(likeliest(ours).first() == likeliest(exact).first());
    }

    /// Mean square error over the variance of what should be.
    pub fn nmse(&self) -> f64 {
        let nmse = self.error / self.signal;
        if nmse.is_nan() { f64::INFINITY } else { nmse }
    }
}

impl std::fmt::Display for Closeness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (nmse, worst) = (self.nmse(), self.worst_logprob);
        write!(f, "NMSE {nmse:.2e}, logprobs within {worst:.4}, likeliest equal {}/{}", self.same_best, self.rows)
    }
}

fn square(x: f64) -> f64 {
    x * x
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let most = row.iter().copied().fold(f32::MIN, f32::max);
    f64::from(most) + row.iter().map(|&x| f64::from(x - most).exp()).sum::<f64>().ln()
}

fn likeliest(row: &[f32]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..row.len()).collect();
    let count = LIKELIEST.min(ids.len());
    let order = |a: &usize, b: &usize| row[*b].total_cmp(&row[*a]).then(a.cmp(b));
    ids.select_nth_unstable_by(count - 1, order);
    ids.truncate(count);
    ids.sort_unstable_by(order);
    ids
}
