//! Prometheus metrics under vLLM's names, so that its dashboards, scalers and scrapers work unchanged.

use super::{BackendInfo, EngineConfig, EngineLoad};
use prometheus::{Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, TextEncoder};

/// Bounds of vLLM's `v1/metrics/loggers.py`.
const TIME_TO_FIRST_TOKEN_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const INTER_TOKEN_LATENCY_S: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST_LATENCY_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const ITERATION_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    num_requests_running: Gauge,
    num_requests_waiting: Gauge,
    kv_cache_usage_perc: Gauge,
    pub prompt_tokens: IntCounter,
    pub generation_tokens: IntCounter,
    pub prefix_cache_queries: IntCounter,
    pub prefix_cache_hits: IntCounter,
    pub num_preemptions: IntCounter,
    /// By `finished_reason`.
    pub request_success: IntCounterVec,
    pub time_to_first_token: Histogram,
    pub inter_token_latency: Histogram,
    pub e2e_request_latency: Histogram,
    pub request_queue_time: Histogram,
    pub request_prefill_time: Histogram,
    pub request_decode_time: Histogram,
    pub request_inference_time: Histogram,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    pub iteration_tokens: Histogram,
}

impl Metrics {
    /// # Errors
    /// A label or name that Prometheus does not take; none of ours is.
    pub fn new(config: &EngineConfig, info: &BackendInfo) -> Result<Self, prometheus::Error> {
        let family = Family { registry: Registry::new(), model_name: config.model_name.clone() };
        let per_request_tokens = one_two_five(config.max_model_len);
        family.cache_config_info(config, info)?;
        Ok(Self {
            num_requests_running: family.gauge("num_requests_running", "Requests in the running batch.")?,
            num_requests_waiting: family.gauge("num_requests_waiting", "Requests waiting to be scheduled.")?,
            kv_cache_usage_perc: family.gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")?,
            prompt_tokens: family.counter("prompt_tokens_total", "Prompt tokens processed.")?,
            generation_tokens: family.counter("generation_tokens_total", "Tokens generated.")?,
            prefix_cache_queries: family
                .counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.")?,
            prefix_cache_hits: family.counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")?,
            num_preemptions: family
                .counter("num_preemptions_total", "Sequences that lost their KV blocks to another.")?,
            request_success: family.request_success()?,
            time_to_first_token: family.histogram(
                "time_to_first_token_seconds",
                "From arrival to the first token.",
                TIME_TO_FIRST_TOKEN_S,
            )?,
            inter_token_latency: family.histogram(
                "inter_token_latency_seconds",
                "Between two tokens of a request.",
                INTER_TOKEN_LATENCY_S,
            )?,
            e2e_request_latency: family.histogram(
                "e2e_request_latency_seconds",
                "From arrival to the end of a request.",
                REQUEST_LATENCY_S,
            )?,
            request_queue_time: family.histogram(
                "request_queue_time_seconds",
                "From arrival to the first step.",
                REQUEST_LATENCY_S,
            )?,
            request_prefill_time: family.histogram(
                "request_prefill_time_seconds",
                "From the first step to the first token.",
                REQUEST_LATENCY_S,
            )?,
            request_decode_time: family.histogram(
                "request_decode_time_seconds",
                "From the first token to the last.",
                REQUEST_LATENCY_S,
            )?,
            request_inference_time: family.histogram(
                "request_inference_time_seconds",
                "From the first step to the last token.",
                REQUEST_LATENCY_S,
            )?,
            request_prompt_tokens: family.histogram(
                "request_prompt_tokens",
                "Prompt tokens of a request.",
                &per_request_tokens,
            )?,
            request_generation_tokens: family.histogram(
                "request_generation_tokens",
                "Tokens generated for a request.",
                &per_request_tokens,
            )?,
            iteration_tokens: family.histogram("iteration_tokens_total", "Tokens of a step.", ITERATION_TOKENS)?,
            registry: family.registry,
        })
    }

    /// Prometheus text; the gauges are as in `load`.
    pub fn render(&self, load: &EngineLoad) -> String {
        self.num_requests_running.set(load.running as f64);
        self.num_requests_waiting.set(load.waiting as f64);
        self.kv_cache_usage_perc.set(load.kv_cache_usage);
        let mut text = Vec::new();
        // Writing to memory fails only for a metric without values, and there is none.
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::warn!("metrics could not be written: {error}");
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// Makes metrics that carry the labels all of them have.
struct Family {
    registry: Registry,
    model_name: String,
}

impl Family {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(format!("vllm:{name}"), help).const_label("model_name", &self.model_name).const_label("engine", "0")
    }

    fn gauge(&self, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
        let gauge = Gauge::with_opts(self.opts(name, help))?;
        self.registry.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        let counter = IntCounter::with_opts(self.opts(name, help))?;
        self.registry.register(Box::new(counter.clone()))?;
        Ok(counter)
    }

    fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Result<Histogram, prometheus::Error> {
        let opts = HistogramOpts::from(self.opts(name, help)).buckets(bounds.to_vec());
        let histogram = Histogram::with_opts(opts)?;
        self.registry.register(Box::new(histogram.clone()))?;
        Ok(histogram)
    }

    fn request_success(&self) -> Result<IntCounterVec, prometheus::Error> {
        let opts = self.opts("request_success_total", "Requests that ended, by reason.");
        let counter = IntCounterVec::new(opts, &["finished_reason"])?;
        for reason in ["stop", "length", "abort", "error"] {
            // So that a rate over them starts from 0.
            counter.with_label_values(&[reason]);
        }
        self.registry.register(Box::new(counter.clone()))?;
        Ok(counter)
    }

    fn cache_config_info(&self, config: &EngineConfig, info: &BackendInfo) -> Result<(), prometheus::Error> {
        let opts = self
            .opts("cache_config_info", "Facts about the KV cache, as labels.")
            .const_label("block_size", info.block_size.to_string())
            .const_label("num_gpu_blocks", info.num_blocks.to_string())
            .const_label("enable_prefix_caching", if config.enable_prefix_caching { "True" } else { "False" });
        let gauge = Gauge::with_opts(opts)?;
        gauge.set(1.0);
        self.registry.register(Box::new(gauge))
    }
}

/// 1, 2, 5, 10, 20, 50 ... up to `most`.
fn one_two_five(most: usize) -> Vec<f64> {
    let decades = (0..).map(|exponent| 10_f64.powi(exponent));
    let bounds = decades.flat_map(|decade| [decade, 2.0 * decade, 5.0 * decade]);
    bounds.take_while(|&bound| bound <= most.max(1) as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_bounds_end_at_the_context() {
        assert_eq!(one_two_five(60), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(one_two_five(0), [1.0]);
    }
}
