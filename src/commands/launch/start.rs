//! From planned groups to an exit code: bind, start, wait, stop.

use super::control_server::Control;
use super::deployment::Deployment;
use super::gpus;
use super::group::GroupPlan;
use super::progress::{follow, say};
use super::shutdown::{Stop, failure_code, listen, wind_down};
use super::worker_args::Launch;
use crate::commands::top::Live;
use crate::control::{Client, Deployment as DeploymentFile, runtime_dir};
use crate::exit::Failure;
use crate::router::{self, Access, Registry, Router, RouterLimits};
use crate::settings::ServerSettings;
use crate::status::ModelKind;
use crate::supervisor::{LogBook, ReplicaView, Supervisor, SupervisorLimits};
use crate::tui::{self, Outcome, TuiOptions};
use mserve_planner::units::{format_bytes, format_count};
use mserve_runtime::worker::ReadyInfo;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

/// For answers that are being written when everything else has ended.
const CONNECTION_GRACE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy)]
pub(super) struct Options {
    pub telemetry: bool,
    /// Show the dashboard.
    pub screen: Option<TuiOptions>,
}

/// Runs until stopped. What cannot work is found out before the first process is started.
pub(super) async fn launch(
    server: ServerSettings,
    groups: Vec<GroupPlan>,
    options: Options,
) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let (stops, mut stopped) = mpsc::channel(8);
    listen(&stops)?;
    let listener = bind(&server).await?;
    let address = listener.local_addr()?;
    let endpoint = format!("http://{}", reachable(address));
    let mut control = Control::open(&endpoint, address.port())?;
    warn_if_open(&server);

    let launch = Launch {
        instance_id: uuid::Uuid::new_v4().to_string(),
        token: uuid::Uuid::new_v4().simple().to_string(),
        telemetry: options.telemetry,
        shutdown_timeout: server.shutdown_timeout,
    };
    let registry = Arc::new(Registry::new(groups.iter().map(|plan| launch.group(plan)).collect()));
    let limits = RouterLimits {
        max_concurrent_requests: usize::try_from(server.max_concurrent_requests)?,
        ..RouterLimits::default()
    };
    let router = Router::new(Arc::clone(&registry), limits, access(&server))?;
    gpus::check_still_free(&groups)?;
    let specs = groups.iter().flat_map(|plan| launch.replicas(plan)).collect();
    let limits = SupervisorLimits { drain: server.shutdown_timeout, ..SupervisorLimits::default() };
    let supervisor = Supervisor::start(specs, &limits, Arc::new(LogBook::default()))?;
    let app = router.app();
    let deployment = Arc::new(Deployment::new(supervisor, router, registry, endpoint));
    let mut changes = deployment.connect();
    control.serve(Arc::clone(&deployment), stops.clone());
    let (close, closed) = oneshot::channel::<()>();
    let served = tokio::spawn(router::serve(listener, app, async { drop(closed.await) }, CONNECTION_GRACE));

    let run = Run { deployment: &deployment, groups: &groups, server: &server, started };
    let end = match options.screen {
        Some(screen) => run.with_dashboard(screen, &control, &mut changes, &mut stopped).await,
        None => run.in_plain_text(&mut changes, &mut stopped).await,
    };
    let grace = match &end {
        Stop::Asked { timeout: Some(timeout) } => *timeout,
        Stop::AllFailed { .. } => Duration::ZERO,
        _ => server.shutdown_timeout,
    };
    let some_failed = run.views().iter().any(ReplicaView::is_given_up);
    wind_down(&deployment, grace, &mut stopped).await;
    drop(close);
    let _ = served.await;
    if let Stop::AllFailed { code, why } = end {
        return Err(Failure { code, message: why, hint: None }.into());
    }
    say("stopped");
    Ok(ExitCode::from(end.exit_code(some_failed)))
}

/// Bound before anything is started, so that a port in use costs nothing.
async fn bind(server: &ServerSettings) -> Result<TcpListener, Failure> {
    let address = SocketAddr::new(server.host, server.port);
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            let other = format!("another port: --port {}; any free one: --port 0", server.port.saturating_add(1));
            match holder(server.port) {
                Some(pid) => Failure::usage(format!("port {} is in use by mserve (pid {pid})", server.port))
                    .hint(format!("mserve stop --port {} ends that one; {other}", server.port)),
                None => Failure::usage(format!("port {} is in use", server.port)).hint(other),
            }
        }
        std::io::ErrorKind::PermissionDenied => {
            Failure::usage(format!("port {} needs privileges", server.port)).hint("use one from 1024 up")
        }
        _ => Failure::usage(format!("cannot listen on {address}: {error}")),
    })
}

/// Our own deployment on that port, when it is one.
fn holder(port: u16) -> Option<u32> {
    let running = DeploymentFile::list(&runtime_dir().ok()?);
    running.into_iter().find(|deployment| deployment.port == port).map(|deployment| deployment.pid)
}

/// 0.0.0.0 is no address to connect to.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.into(), address.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), address.port()),
        _ => address,
    }
}

fn access(server: &ServerSettings) -> Access {
    match &server.api_key {
        Some(key) => Access::Key(key.text().to_owned()),
        None if server.host.is_loopback() => Access::Local,
        None => Access::Open,
    }
}

fn warn_if_open(server: &ServerSettings) {
    if server.api_key.is_none() && !server.host.is_loopback() {
        eprintln!("warning: {} is open to everyone who can reach it; set MSERVE_API_KEY to ask for a key", server.host);
    }
}

/// A deployment that has been started.
struct Run<'a> {
    deployment: &'a Arc<Deployment>,
    groups: &'a [GroupPlan],
    server: &'a ServerSettings,
    started: Instant,
}

impl Run<'_> {
    async fn in_plain_text(&self, changes: &mut mpsc::Receiver<String>, stopped: &mut mpsc::Receiver<Stop>) -> Stop {
        tokio::select! {
            () = follow(self.deployment, changes, false) => {}
            Some(stop) = stopped.recv() => return stop,
        }
        if let Some(stop) = self.start_failure() {
            return stop;
        }
        self.announce();
        self.wait(changes, stopped).await
    }

    /// The dashboard's end is not the deployment's: it goes on in plain text.
    async fn with_dashboard(
        &self,
        screen: TuiOptions,
        control: &Control,
        changes: &mut mpsc::Receiver<String>,
        stopped: &mut mpsc::Receiver<Stop>,
    ) -> Stop {
        let dashboard = async {
            match Client::new(control.deployment.clone()) {
                Ok(client) => tui::run(Live::new(client), screen).await,
                Err(error) => Err(error),
            }
        };
        let waiting = async {
            follow(self.deployment, changes, true).await;
            match self.start_failure() {
                Some(stop) => stop,
                None => self.wait(changes, stopped).await,
            }
        };
        let left = tokio::select! {
            left = dashboard => left,
            stop = waiting => return stop,
        };
        match left {
            Ok(Outcome::Signalled(2)) => Stop::Interrupted,
            Ok(Outcome::Signalled(_)) => Stop::Terminated,
            Ok(Outcome::Quit | Outcome::Stopped) => {
                say("the dashboard is closed; the deployment goes on (Ctrl-C stops it)");
                self.in_plain_text(changes, stopped).await
            }
            Err(error) => {
                eprintln!("warning: no dashboard: {error:#}");
                self.in_plain_text(changes, stopped).await
            }
        }
    }

    fn views(&self) -> Vec<ReplicaView> {
        self.deployment.supervisor.views().into_iter().map(|(_, view)| view).collect()
    }

    /// A replica that can never work, found out while starting, ends the launch: nothing half-started is left.
    fn start_failure(&self) -> Option<Stop> {
        let views = self.deployment.supervisor.views();
        let hopeless = views.iter().find(|(_, view)| view.permanent.is_some());
        if let Some((spec, view)) = hopeless {
            let why = view.last_exit.clone().unwrap_or_default();
            return Some(Stop::AllFailed { code: failure_code(view.permanent), why: format!("{}: {why}", spec.id) });
        }
        Stop::when_all_failed(&self.views())
    }

    async fn wait(&self, changes: &mut mpsc::Receiver<String>, stopped: &mut mpsc::Receiver<Stop>) -> Stop {
        loop {
            tokio::select! {
                stop = stopped.recv() => return stop.unwrap_or(Stop::Terminated),
                Some(_) = changes.recv() => {
                    if let Some(stop) = Stop::when_all_failed(&self.views()) {
                        return stop;
                    }
                }
            }
        }
    }

    fn announce(&self) {
        let views = self.deployment.supervisor.views();
        let ready = views.iter().filter(|(_, view)| view.is_ready()).count();
        // When the last of them became ready: this may be said later, once the dashboard is closed.
        let last = views.iter().map(|(_, view)| view.since.saturating_duration_since(self.started)).max();
        let seconds = last.unwrap_or_default().as_secs_f64();
        if ready == views.len() {
            say(&format!("ready in {seconds:.1} s: {ready} replicas"));
        } else {
            say(&format!("partly ready after {seconds:.1} s: {ready} of {} replicas", views.len()));
        }
        for (spec, view) in &views {
            let group = self.groups.iter().find(|group| group.settings.name == spec.model);
            if let (Some(group), Some(info)) = (group.filter(|group| group.num_blocks > 0), &view.ready) {
                say(&format!("  {}  {}", spec.id, planned_and_actual(group, info)));
            }
        }
        let endpoint = &self.deployment.endpoint;
        let names: Vec<_> = self.groups.iter().map(|group| group.settings.name.as_str()).collect();
        say(&format!("  endpoint  {endpoint}/v1"));
        say(&format!("  models    {}", names.join(", ")));
        let key = if self.server.api_key.is_some() { " -H \"Authorization: Bearer $MSERVE_API_KEY\"" } else { "" };
        if let Some(example) = self.example() {
            say(&format!(
                "  try       curl {endpoint}{}{key} -H 'Content-Type: application/json' -d '{}'",
                example.0, example.1
            ));
        }
        say("  then      mserve top | ps | logs | chat | stop");
    }

    fn example(&self) -> Option<(&'static str, String)> {
        let chat = self.groups.iter().find(|group| group.kind == ModelKind::Chat);
        let group = chat.or(self.groups.first())?;
        let name = &group.settings.name;
        Some(match group.kind {
            ModelKind::Chat => (
                "/v1/chat/completions",
                format!(
                    "{{\"model\":\"{name}\",\"max_tokens\":64,\"messages\":[{{\"role\":\"user\",\"content\":\"In the beginning\"}}]}}"
                ),
            ),
            ModelKind::Embedding => {
                ("/v1/embeddings", format!("{{\"model\":\"{name}\",\"input\":\"In the beginning\"}}"))
            }
        })
    }
}

/// The pool that was planned beside the one that the replica has made.
fn planned_and_actual(plan: &GroupPlan, info: &ReadyInfo) -> String {
    let (planned, actual) = (plan.kv_cache_bytes(), info.kv_cache_bytes);
    let tokens = info.num_blocks * info.block_size;
    format!(
        "KV cache planned {}, actual {} ({:.1} %) = {} tokens, {:.1} requests of {}",
        format_bytes(planned),
        format_bytes(actual),
        100.0 * actual as f64 / planned.max(1) as f64,
        format_count(tokens),
        tokens as f64 / info.max_model_len.max(1) as f64,
        format_count(info.max_model_len)
    )
}
