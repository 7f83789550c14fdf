//! Which replicas exist, which of them are ready, and what each has to do.

use super::breaker::Breaker;
use super::policy::{Candidate, choose};
use crate::status::ModelKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::watch;

/// Replicas of one model, under one or more names.
#[derive(Debug)]
pub struct Group {
    /// What requests may call it; the first is its own.
    pub names: Vec<String>,
    pub kind: ModelKind,
    pub replicas: Vec<Arc<Replica>>,
}

#[derive(Debug)]
pub struct Replica {
    pub id: String,
    /// Sent as `x-mserve-token`.
    pub token: String,
    in_flight: AtomicU64,
    outstanding_tokens: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    upstream: Option<Upstream>,
    /// Counts processes, so that a failure of an earlier one does not speak against the next.
    generation: u64,
    breaker: Breaker,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Upstream {
    address: SocketAddr,
    max_model_len: Option<u64>,
}

/// One process of one replica.
pub type Tried = (usize, u64);

#[derive(Debug)]
pub struct Registry {
    groups: Vec<Group>,
    /// Counts changes of readiness, for those who wait for one.
    changes: watch::Sender<u64>,
    pub(super) waiting: AtomicUsize,
}

impl Replica {
    pub fn new(id: impl Into<String>, token: impl Into<String>) -> Arc<Self> {
        Arc::new(Self {
            id: id.into(),
            token: token.into(),
            in_flight: AtomicU64::new(0),
            outstanding_tokens: AtomicU64::new(0),
            state: Mutex::default(),
        })
    }

    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub fn outstanding_tokens(&self) -> u64 {
        self.outstanding_tokens.load(Ordering::Relaxed)
    }

    pub fn is_ready(&self) -> bool {
        self.state().upstream.is_some()
    }

    pub fn breaker_open(&self) -> bool {
        self.state().breaker.is_open()
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.state().upstream.map(|upstream| upstream.address)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Group {
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// As told by a ready replica.
    pub fn max_model_len(&self) -> Option<u64> {
        self.replicas.iter().find_map(|replica| replica.state().upstream?.max_model_len)
    }

    /// Take a replica for a request of `tokens`. `tried` are left out; so are those whose breaker is open, unless all
    /// are: trying is better than failing everything.
    pub(super) fn pick(&self, tried: &[Tried], tokens: u64, rng: &mut fastrand::Rng) -> Option<Lease> {
        let now = Instant::now();
        let ready: Vec<_> = self.replicas.iter().enumerate().filter_map(|r| Self::candidate(r, tried, now)).collect();
        let allowed: Vec<_> = ready.iter().filter(|candidate| candidate.allowed).collect();
        let pool = if allowed.is_empty() { ready.iter().collect() } else { allowed };
        let burdens: Vec<Candidate> = pool.iter().map(|candidate| candidate.burden).collect();
        let chosen = pool[choose(&burdens, rng)?];
        Some(Lease::take(&self.replicas[chosen.index], chosen, tokens, now))
    }

    fn candidate((index, replica): (usize, &Arc<Replica>), tried: &[Tried], now: Instant) -> Option<Ready> {
        let state = replica.state();
        let address = state.upstream?.address;
        if tried.contains(&(index, state.generation)) {
            return None;
        }
        Some(Ready {
            index,
            generation: state.generation,
            address,
            allowed: state.breaker.allows(now),
            burden: Candidate { outstanding_tokens: replica.outstanding_tokens(), in_flight: replica.in_flight() },
        })
    }
}

#[derive(Debug, Clone, Copy)]
struct Ready {
    index: usize,
    generation: u64,
    address: SocketAddr,
    allowed: bool,
    burden: Candidate,
}

/// A request's place at a replica. Gives everything back when dropped, however the request ends.
#[derive(Debug)]
pub(super) struct Lease {
    pub replica: Arc<Replica>,
    pub address: SocketAddr,
    /// For [`Group::pick`] of a retry.
    pub tried: Tried,
    tokens: u64,
    probes: bool,
}

impl Lease {
    fn take(replica: &Arc<Replica>, chosen: &Ready, tokens: u64, now: Instant) -> Self {
        replica.in_flight.fetch_add(1, Ordering::Relaxed);
        replica.outstanding_tokens.fetch_add(tokens, Ordering::Relaxed);
        let probes = replica.state().breaker.on_send(now);
        let tried = (chosen.index, chosen.generation);
        Self { replica: Arc::clone(replica), address: chosen.address, tried, tokens, probes }
    }

    /// The replica has answered.
    pub fn succeeded(&mut self) {
        self.judge(Breaker::on_success);
    }

    /// The replica is to blame.
    pub fn failed(&mut self) {
        self.judge(|breaker| breaker.on_failure(Instant::now()));
    }

    fn judge(&mut self, verdict: impl FnOnce(&mut Breaker)) {
        self.probes = false;
        let mut state = self.replica.state();
        if state.generation == self.tried.1 {
            verdict(&mut state.breaker);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.replica.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.replica.outstanding_tokens.fetch_sub(self.tokens, Ordering::Relaxed);
        if self.probes {
            self.judge(|breaker| breaker.on_probe_abandoned(Instant::now()));
        }
    }
}

impl Registry {
    pub fn new(groups: Vec<Group>) -> Self {
        Self { groups, changes: watch::Sender::new(0), waiting: AtomicUsize::new(0) }
    }

    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    pub fn replicas(&self) -> impl Iterator<Item = &Arc<Replica>> {
        self.groups.iter().flat_map(|group| &group.replicas)
    }

    /// The replica takes requests at `address` from now on.
    pub fn set_ready(&self, id: &str, address: SocketAddr, max_model_len: Option<u64>) {
        self.set_upstream(id, Some(Upstream { address, max_model_len }));
    }

    /// No new requests for this replica; those it has go on.
    pub fn set_down(&self, id: &str) {
        self.set_upstream(id, None);
    }

    fn set_upstream(&self, id: &str, upstream: Option<Upstream>) {
        let Some(replica) = self.replicas().find(|replica| replica.id == id) else { return };
        {
            let mut state = replica.state();
            if state.upstream == upstream {
                return;
            }
            state.upstream = upstream;
            if upstream.is_some() {
                state.generation += 1;
                state.breaker = Breaker::default();
            }
        }
        self.changes.send_modify(|count| *count += 1);
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Requests that wait for a replica to become ready.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    pub fn in_flight(&self, id: &str) -> u64 {
        self.replicas().find(|replica| replica.id == id).map_or(0, |replica| replica.in_flight())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn registry() -> Registry {
        let replicas = ["m-0", "m-1"].map(|id| Replica::new(id, "t")).to_vec();
        Registry::new(vec![Group { names: vec!["m".into()], kind: ModelKind::Chat, replicas }])
    }

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn pick(registry: &Registry, tried: &[Tried]) -> Option<Lease> {
        registry.groups()[0].pick(tried, 10, &mut fastrand::Rng::with_seed(5))
    }

    #[test]
    fn only_ready_replicas_are_picked() {
        let registry = registry();
        assert!(pick(&registry, &[]).is_none());
        registry.set_ready("m-1", address(1), Some(64));
        assert_eq!(pick(&registry, &[]).unwrap().replica.id, "m-1");
        assert_eq!(registry.groups()[0].max_model_len(), Some(64));
        registry.set_down("m-1");
        assert!(pick(&registry, &[]).is_none());
    }

    #[test]
    fn a_lease_counts_until_dropped() {
        let registry = registry();
        registry.set_ready("m-0", address(1), None);
        let lease = pick(&registry, &[]).unwrap();
        let replica = Arc::clone(&lease.replica);
        assert_eq!((replica.in_flight(), replica.outstanding_tokens()), (1, 10));
        drop(lease);
        assert_eq!((replica.in_flight(), replica.outstanding_tokens()), (0, 0));
    }

    #[test]
    fn a_retry_goes_elsewhere_or_to_a_new_process() {
        let registry = registry();
        registry.set_ready("m-0", address(1), None);
        let tried = pick(&registry, &[]).unwrap().tried;
        assert!(pick(&registry, &[tried]).is_none());
        registry.set_ready("m-1", address(2), None);
        assert_eq!(pick(&registry, &[tried]).unwrap().replica.id, "m-1");
        registry.set_down("m-1");
        registry.set_ready("m-0", address(3), None);
        assert_eq!(pick(&registry, &[tried]).unwrap().address, address(3));
    }

    #[test]
    fn an_open_breaker_diverts_unless_all_are_open() {
        let registry = registry();
        registry.set_ready("m-0", address(1), None);
        (0..5).for_each(|_| pick(&registry, &[]).unwrap().failed());
        assert!(registry.groups()[0].replicas[0].breaker_open());
        assert_eq!(pick(&registry, &[]).unwrap().replica.id, "m-0", "the only one is better than none");
        registry.set_ready("m-1", address(2), None);
        assert!((0..50).all(|_| pick(&registry, &[]).unwrap().replica.id == "m-1"));
    }

    #[test]
    fn a_late_failure_does_not_speak_against_the_next_process() {
        let registry = registry();
        registry.set_ready("m-0", address(1), None);
        let mut old: Vec<_> = (0..9).map(|_| pick(&registry, &[]).unwrap()).collect();
        registry.set_ready("m-0", address(2), None);
        old.iter_mut().for_each(Lease::failed);
        assert!(!registry.groups()[0].replicas[0].breaker_open());
    }
}
