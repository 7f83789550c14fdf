//! The life of a worker: listen, load, serve, drain.

use super::load::load;
use super::{WorkerConfig, WorkerError, WorkerEvent};
use crate::engine::EngineHandle;
use crate::server::{self, ConnectionLimits, ServerConfig, ServerState, Telemetry};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// HTTP needs little, about 7 us a streamed token; the cores are the engine's. One of each so many, in these bounds.
const CORES_PER_ASYNC_THREAD: usize = 4;
const ASYNC_THREADS: RangeInclusive<usize> = 2..=8;
const LAST_WORDS: Duration = Duration::from_secs(1);
const STALL_LIMIT: Duration = Duration::from_secs(60);

/// Serve one model until asked to end (SIGTERM, SIGINT). Blocks. `events` is called from several threads.
///
/// # Errors
/// Why it could not start or had to end; also told as [`WorkerEvent::Failed`].
pub fn run(config: WorkerConfig, events: impl Fn(WorkerEvent) + Send + Sync + 'static) -> Result<(), WorkerError> {
    let events: Arc<dyn Fn(WorkerEvent) + Send + Sync> = Arc::new(events);
    let result = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(async_threads())
        .enable_all()
        .build()
        .map_err(|source| WorkerError::System { what: "starting the async threads", source })
        .and_then(|runtime| {
            let result = runtime.block_on(serve(config, Arc::clone(&events)));
            // Loading may still run when the worker was asked to end; it must not hold the process.
            runtime.shutdown_background();
            result
        });
    if let Err(error) = &result {
        events(WorkerEvent::Failed { kind: error.kind(), message: error.to_string() });
    }
    result
}

fn async_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / CORES_PER_ASYNC_THREAD).clamp(*ASYNC_THREADS.start(), *ASYNC_THREADS.end())
}

async fn serve(config: WorkerConfig, events: Arc<dyn Fn(WorkerEvent) + Send + Sync>) -> Result<(), WorkerError> {
    let mut ending = EndSignals::listen()?;
    let state = ServerState::new(server_config(&config)?);
    let address = SocketAddr::new(config.host, config.port);
    let bind = |source| WorkerError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(bind)?;
    let port = listener.local_addr().map_err(bind)?.port();
    events(WorkerEvent::Listening { port });
    let (stop_serving, stopped) = oneshot::channel::<()>();
    let router = server::router(Arc::clone(&state));
    let http = tokio::spawn(server::serve(listener, router, ConnectionLimits::default(), async move {
        drop(stopped.await);
    }));

    let shutdown_timeout = config.shutdown_timeout;
    let load_events = Arc::clone(&events);
    let loading = tokio::task::spawn_blocking(move || load(&config, &|event| load_events(event)));
    let (model, ready) = tokio::select! {
        loaded = loading => loaded.map_err(|_| WorkerError::LoadPanicked)??,
        () = ending.wait() => {
            tracing::info!("asked to end while loading");
            return Ok(());
        }
    };
    let engine = model.engine.clone();
    state.set_model(model);
    tracing::info!(port, device = %ready.device, load_ms = ready.load_ms, "ready");
    events(WorkerEvent::Ready(ready));

    tokio::select! {
        (kind, why) = engine.stopped() => {
            state.start_draining();
            last_words(&state).await;
            return Err(WorkerError::EngineStopped { kind, why });
        }
        () = ending.wait() => {}
    }
    drain(&state, &engine, shutdown_timeout, &mut ending).await;
    drop(stop_serving);
    drop(http.await);
    Ok(())
}

/// Refuse new requests, let running ones finish until the time is up or a second signal comes, then fail the rest.
async fn drain(state: &ServerState, engine: &EngineHandle, timeout: Duration, ending: &mut EndSignals) {
    let start = Instant::now();
    tracing::info!(timeout_s = timeout.as_secs(), "draining");
    state.start_draining();
    tokio::select! {
        () = state.wait_until_idle() => {}
        () = tokio::time::sleep(timeout) => tracing::warn!("the time for running requests is up"),
        () = ending.wait() => tracing::warn!("asked again: running requests are cut off"),
    }
    let outcome = engine.shutdown(Duration::ZERO).await;
    last_words(state).await;
    tracing::info!(?outcome, drained_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX), "ended");
}

/// Requests that failed still have to say so to their clients.
async fn last_words(state: &ServerState) {
    drop(tokio::time::timeout(LAST_WORDS, state.wait_until_idle()).await);
}

fn server_config(config: &WorkerConfig) -> Result<ServerConfig, WorkerError> {
    let names = config.names();
    let telemetry = match &config.identity {
        None => None,
        Some(identity) => {
            let telemetry = Telemetry::new(&identity.instance_id, &names[0], &identity.replica);
            Some(telemetry.ok_or_else(|| WorkerError::Option {
                option: "telemetry",
                value: format!("{}, {}, {}", identity.instance_id, names[0], identity.replica),
                expected: "instance id, model name and replica must have 1 to 128 of A-Z a-z 0-9 . _ : / -",
            })?)
        }
    };
    Ok(ServerConfig {
        served_model_names: names,
        token: config.token.clone(),
        telemetry,
        max_body_bytes: config.max_body_bytes,
        stall_limit: STALL_LIMIT,
    })
}

struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    fn listen() -> Result<Self, WorkerError> {
        let listen =
            |kind| signal(kind).map_err(|source| WorkerError::System { what: "listening for signals", source });
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
