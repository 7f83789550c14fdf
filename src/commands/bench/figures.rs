//! What a run of requests comes to: throughput and percentiles, under the names of `vllm bench serve`.

use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// One request that was answered in full. Times count from the moment it was sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// From the begin of the run.
    pub sent_at: Duration,
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    /// When text or tokens came, at least once. Several tokens may come at one time.
    pub arrivals: Vec<Duration>,
}

impl Answered {
    fn first(&self) -> Duration {
        self.arrivals.first().copied().unwrap_or_default()
    }

    fn last(&self) -> Duration {
        self.arrivals.last().copied().unwrap_or_default()
    }
}

/// A run. JSON names are those of vLLM's result files.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Seconds from the first request to the last token.
    pub duration: f64,
    pub completed: usize,
    pub failed: usize,
    pub total_input_tokens: usize,
    pub total_output_tokens: usize,
    pub request_throughput: f64,
    pub output_throughput: f64,
    pub total_token_throughput: f64,
    /// From sending to the first token.
    pub ttft_ms: Percentiles,
    /// Mean time of a token after the first, a value a request.
    pub tpot_ms: Percentiles,
    /// Between two arrivals of a request, a value an arrival.
    pub itl_ms: Percentiles,
    /// From sending to the last token.
    pub e2el_ms: Percentiles,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Percentiles {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Percentiles {
    /// Of values in any order; zeros of none. Between two ranks the value is interpolated, as numpy does.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let Some(&max) = values.last() else { return Self::default() };
        let at = |share: f64| {
            let rank = share * (values.len() - 1) as f64;
            let (low, high) = (values[rank.floor() as usize], values[rank.ceil() as usize]);
            low + (high - low) * rank.fract()
        };
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Self { mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), max }
    }
}

impl Figures {
    pub fn new(answered: &[Answered], failed: usize) -> Self {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let begin = answered.iter().map(|a| a.sent_at).min().unwrap_or_default();
        let end = answered.iter().map(|a| a.sent_at + a.last()).max().unwrap_or_default();
        let duration = (end - begin).as_secs_f64();
        let per_second = |count: usize| if duration > 0.0 { count as f64 / duration } else { 0.0 };
        let total_input_tokens = answered.iter().map(|a| a.prompt_tokens).sum();
        let total_output_tokens = answered.iter().map(|a| a.output_tokens).sum();
        let several = answered.iter().filter(|a| a.output_tokens > 1);
        let gaps = answered.iter().flat_map(|a| a.arrivals.windows(2).map(move |pair| ms(pair[1] - pair[0])));
        Self {
            duration,
            completed: answered.len(),
            failed,
            total_input_tokens,
            total_output_tokens,
            request_throughput: per_second(answered.len()),
            output_throughput: per_second(total_output_tokens),
            total_token_throughput: per_second(total_input_tokens + total_output_tokens),
            ttft_ms: Percentiles::of(answered.iter().map(|a| ms(a.first())).collect()),
            tpot_ms: Percentiles::of(
                several.map(|a| ms(a.last() - a.first()) / (a.output_tokens - 1) as f64).collect(),
            ),
            itl_ms: Percentiles::of(gaps.collect()),
            e2el_ms: Percentiles::of(answered.iter().map(|a| ms(a.last())).collect()),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Successful requests:              {:>12}", self.completed)?;
        writeln!(f, "Failed requests:                  {:>12}", self.failed)?;
        writeln!(f, "Benchmark duration (s):           {:>12.2}", self.duration)?;
        writeln!(f, "Total input tokens:               {:>12}", self.total_input_tokens)?;
        writeln!(f, "Total generated tokens:           {:>12}", self.total_output_tokens)?;
        writeln!(f, "Request throughput (req/s):       {:>12.2}", self.request_throughput)?;
        writeln!(f, "Output token throughput (tok/s):  {:>12.1}", self.output_throughput)?;
        writeln!(f, "Total token throughput (tok/s):   {:>12.1}", self.total_token_throughput)?;
        writeln!(f, "ms           mean       p50       p90       p99       max")?;
        for (name, p) in [("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms), ("ITL", self.itl_ms), ("E2EL", self.e2el_ms)]
        {
            writeln!(f, "{name:<7} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2}", p.mean, p.p50, p.p90, p.p99, p.max)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(sent_at: u64, output_tokens: usize, arrivals: &[u64]) -> Answered {
        let arrivals = arrivals.iter().copied().map(Duration::from_millis).collect();
        Answered { sent_at: Duration::from_millis(sent_at), prompt_tokens: 10, output_tokens, arrivals }
    }

    #[test]
    fn percentiles_lie_between_ranks() {
        let found = Percentiles::of((1..=101).rev().map(f64::from).collect());
        assert_eq!(found, Percentiles { mean: 51.0, p50: 51.0, p90: 91.0, p99: 100.0, max: 101.0 });
        assert_eq!(Percentiles::of(vec![1.0, 2.0]).p50, 1.5);
        assert_eq!(Percentiles::of(Vec::new()), Percentiles::default());
    }

    #[test]
    fn a_run_lasts_from_the_first_request_to_the_last_token() {
        // Three tokens in two arrivals; then one that was sent later and ends last.
        let run = Figures::new(&[answered(100, 3, &[50, 70]), answered(600, 2, &[400, 500])], 1);
        assert_eq!((run.duration, run.completed, run.failed), (1.0, 2, 1));
        assert_eq!((run.output_throughput, run.total_token_throughput, run.request_throughput), (5.0, 25.0, 2.0));
        assert_eq!((run.ttft_ms.max, run.ttft_ms.mean), (400.0, 225.0));
        // 20 ms over two tokens, 100 ms over one.
        assert_eq!((run.tpot_ms.mean, run.itl_ms.mean, run.e2el_ms.max), (55.0, 60.0, 500.0));
    }

    #[test]
    fn a_run_in_which_all_failed_has_no_rate() {
        let run = Figures::new(&[], 4);
        assert_eq!((run.failed, run.output_throughput, run.ttft_ms.p50), (4, 0.0, 0.0));
    }
}
