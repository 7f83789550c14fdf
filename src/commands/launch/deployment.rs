//! A running deployment: supervisor and router wired to each other, and its state as data.

use crate::hardware::Sampler;
use crate::router::{Registry, Router};
use crate::status::{GpuStatus, HostStatus, ReplicaState, ReplicaStatus, SCHEMA, Status};
use crate::supervisor::{ReplicaSpec, ReplicaView, Supervisor};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Readers of the status share a reading of the hardware for this long.
const SAMPLE_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(super) struct Deployment {
    pub supervisor: Supervisor,
    pub router: Router,
    pub registry: Arc<Registry>,
    pub endpoint: String,
    pub started: Instant,
    sample: Mutex<Sample>,
}

#[derive(Debug)]
struct Sample {
    sampler: Sampler,
    taken: Option<Instant>,
    gpus: Vec<GpuStatus>,
    host: HostStatus,
}

impl Deployment {
    pub fn new(supervisor: Supervisor, router: Router, registry: Arc<Registry>, endpoint: String) -> Self {
        let (gpus, host) = (Vec::new(), HostStatus::default());
        let sample = Mutex::new(Sample { sampler: Sampler::new(), taken: None, gpus, host });
        Self { supervisor, router, registry, endpoint, started: Instant::now(), sample }
    }

    /// Tell the router of every replica that comes or goes. The receiver hears which replica has changed, for
    /// [`super::progress`]; a slow one misses some, not the last.
    pub fn connect(&self) -> mpsc::Receiver<String> {
        let (changed, changes) = mpsc::channel(256);
        for (spec, mut view) in self.supervisor.watch() {
            let (registry, changed) = (Arc::clone(&self.registry), changed.clone());
            tokio::spawn(async move {
                loop {
                    route(&registry, &spec.id, &view.borrow_and_update());
                    let _ = changed.try_send(spec.id.clone());
                    if view.changed().await.is_err() {
                        registry.set_down(&spec.id);
                        return;
                    }
                }
            });
        }
        changes
    }

    pub fn status(&self) -> Status {
        let (gpus, host) = self.hardware();
        Status {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            endpoint: self.endpoint.clone(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            replicas: self.supervisor.views().into_iter().map(|(spec, view)| self.replica(&spec, view)).collect(),
            router: self.router.status(),
            gpus,
            host,
            events: self.supervisor.log_book().events(),
        }
    }

    fn replica(&self, spec: &ReplicaSpec, view: ReplicaView) -> ReplicaStatus {
        let state_age_s = view.since.elapsed().as_secs_f64();
        let state = match view.state {
            // Told when the wait began.
            ReplicaState::Backoff { restart_in_s } => {
                ReplicaState::Backoff { restart_in_s: (restart_in_s - state_age_s).max(0.0) }
            }
            other => other,
        };
        ReplicaStatus {
            id: spec.id.clone(),
            model: spec.model.clone(),
            kind: spec.kind,
            devices: spec.devices.clone(),
            pid: view.pid,
            port: view.port,
            state,
            state_age_s,
            restarts: view.restarts,
            last_exit: view.last_exit,
            in_flight: self.registry.in_flight(&spec.id),
            load: view.load,
        }
    }

    fn hardware(&self) -> (Vec<GpuStatus>, HostStatus) {
        let mut sample = self.sample.lock().unwrap_or_else(PoisonError::into_inner);
        if sample.taken.is_none_or(|taken| taken.elapsed() >= SAMPLE_EVERY) {
            sample.gpus = sample.sampler.gpus();
            sample.host = sample.sampler.host();
            sample.taken = Some(Instant::now());
        }
        (sample.gpus.clone(), sample.host.clone())
    }
}

fn route(registry: &Registry, id: &str, view: &ReplicaView) {
    match (view.is_ready(), view.port) {
        (true, Some(port)) => {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            registry.set_ready(id, address, view.ready.as_ref().map(|info| info.max_model_len));
        }
        _ => registry.set_down(id),
    }
}
