//! The router's own counters, for Prometheus and for [`RouterStatus`].

use super::registry::Registry as Replicas;
use crate::status::RouterStatus;
use prometheus::core::Collector;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::sync::atomic::Ordering;

/// Seconds; vLLM's buckets for the time to first token, with longer ones for whole answers.
const BUCKETS_S: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];

#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    /// `model`, `route` and `code` of finished requests. Only served models and known routes appear as labels.
    pub requests: IntCounterVec,
    pub requests_total: IntCounter,
    pub errors_total: IntCounter,
    pub retries: IntCounter,
    pub in_flight: IntGauge,
    /// By `replica` and `reason`: connect, reset, status, timeout, stream.
    pub replica_failures: IntCounterVec,
    pub duration: HistogramVec,
    pub first_byte: HistogramVec,
    replica_in_flight: IntGaugeVec,
    replica_outstanding_tokens: IntGaugeVec,
    replica_ready: IntGaugeVec,
    replica_breaker_open: IntGaugeVec,
    waiting: IntGauge,
}

impl Metrics {
    pub fn new() -> anyhow::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let replica: &[&str] = &["replica"];
        Ok(Self {
            requests: add(
                r,
                IntCounterVec::new(opts("requests_total", "Finished requests."), &["model", "route", "code"])?,
            )?,
            requests_total: IntCounter::new("requests", "All requests, for the status.")?,
            errors_total: IntCounter::new("errors", "Answers 5xx and broken streams, for the status.")?,
            retries: add(
                r,
                IntCounter::with_opts(opts("retries_total", "Requests sent again to another replica or process."))?,
            )?,
            in_flight: add(r, IntGauge::with_opts(opts("in_flight_requests", "Requests that are not finished."))?)?,
            replica_failures: add(
                r,
                IntCounterVec::new(
                    opts("replica_failures_total", "Failed attempts, by replica and reason."),
                    &["replica", "reason"],
                )?,
            )?,
            duration: add(r, histogram("request_duration_seconds", "From request to the end of its answer.")?)?,
            first_byte: add(r, histogram("first_byte_seconds", "From request to the first byte of its answer.")?)?,
            replica_in_flight: add(
                r,
                IntGaugeVec::new(opts("replica_in_flight_requests", "Requests at a replica."), replica)?,
            )?,
            replica_outstanding_tokens: add(
                r,
                IntGaugeVec::new(
                    opts("replica_outstanding_tokens", "Estimated tokens of the requests at a replica."),
                    replica,
                )?,
            )?,
            replica_ready: add(r, IntGaugeVec::new(opts("replica_ready", "1 when it takes requests."), replica)?)?,
            replica_breaker_open: add(
                r,
                IntGaugeVec::new(opts("replica_breaker_open", "1 while requests are kept from it."), replica)?,
            )?,
            waiting: add(
                r,
                IntGauge::with_opts(opts("waiting_requests", "Requests that wait for a replica to become ready."))?,
            )?,
            registry,
        })
    }

    /// Prometheus text format.
    pub fn text(&self, replicas: &Replicas) -> String {
        for replica in replicas.replicas() {
            let labels = &[replica.id.as_str()];
            self.replica_in_flight.with_label_values(labels).set(signed(replica.in_flight()));
            self.replica_outstanding_tokens.with_label_values(labels).set(signed(replica.outstanding_tokens()));
            self.replica_ready.with_label_values(labels).set(replica.is_ready().into());
            self.replica_breaker_open.with_label_values(labels).set(replica.breaker_open().into());
        }
        self.waiting.set(signed(replicas.waiting.load(Ordering::Relaxed) as u64));
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    pub fn status(&self) -> RouterStatus {
        RouterStatus {
            requests_total: self.requests_total.get(),
            errors_total: self.errors_total.get(),
            retries_total: self.retries.get(),
            in_flight: self.in_flight.get().try_into().unwrap_or(0),
        }
    }

    pub fn duration_of(&self, model: &str) -> Histogram {
        self.duration.with_label_values(&[model])
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("mserve_router_{name}"), help)
}

fn histogram(name: &str, help: &str) -> prometheus::Result<HistogramVec> {
    let opts = HistogramOpts::from(opts(name, help)).buckets(BUCKETS_S.to_vec());
    HistogramVec::new(opts, &["model"])
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
