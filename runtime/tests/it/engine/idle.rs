//! What a device has put off is done while the engine has nothing else to do, a piece at a time.

use super::toy_backend::expected_greedy;
use super::*;
use futures::executor::block_on;
use mserve_runtime::engine::{Backend, BackendError, BackendInfo, RowOutput, StepBatch};
use mserve_runtime::worker::FailureKind;
use std::sync::Mutex;

/// What was called, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Step,
    Idle,
}

/// Has so many pieces to do, and more of them after each request's first step.
struct Busy {
    inner: ToyBackend,
    calls: Arc<Mutex<Vec<Call>>>,
    pieces: usize,
    /// The piece after which the device says this.
    fails: Option<(usize, BackendError)>,
}

impl Busy {
    fn start(pieces: usize, fails: Option<(usize, bool)>) -> (EngineHandle, Arc<Mutex<Vec<Call>>>) {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let error = |fatal| BackendError {
            device: "toy".to_owned(),
            what: "an idle hand slipped".to_owned(),
            fatal,
            kind: FailureKind::ContextLost,
        };
        let fails = fails.map(|(at, fatal)| (at, error(fatal)));
        let inner = ToyBackend::new(ToyKind::Generate, 64, BLOCK_SIZE);
        let backend = Self { inner, calls: Arc::clone(&calls), pieces, fails };
        (Engine::start(Box::new(backend), config()).unwrap(), calls)
    }
}

impl Backend for Busy {
    fn info(&self) -> &BackendInfo {
        self.inner.info()
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
        self.calls.lock().unwrap().push(Call::Step);
        self.inner.step(batch)
    }

    fn idle(&mut self) -> Result<bool, BackendError> {
        self.calls.lock().unwrap().push(Call::Idle);
        self.pieces = self.pieces.saturating_sub(1);
        if let Some((_, error)) = self.fails.take_if(|(at, _)| *at == self.pieces) {
            return Err(error);
        }
        Ok(self.pieces > 0)
    }
}

fn count(calls: &Mutex<Vec<Call>>, wanted: Call) -> usize {
    calls.lock().unwrap().iter().filter(|call| **call == wanted).count()
}

fn wait_for_pieces(calls: &Mutex<Vec<Call>>, pieces: usize) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while count(calls, Call::Idle) < pieces {
        assert!(Instant::now() < give_up, "{:?}", calls.lock().unwrap());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn all_of_it_is_done_once_and_no_step_waits_for_the_rest() {
    let (engine, calls) = Busy::start(3, None);
    wait_for_pieces(&calls, 3);
    let asked = prompt(1, 9);
    assert_eq!(collect(engine.generate(request(&asked, greedy(10))).unwrap()).0, expected_greedy(&asked, 10));
    // A step may have given it more: it is asked once again, when nothing is left to do.
    wait_for_pieces(&calls, 4);
    let calls = calls.lock().unwrap().clone();
    let first = calls.iter().position(|call| *call == Call::Step).unwrap();
    let last = calls.iter().rposition(|call| *call == Call::Step).unwrap();
    assert_eq!(first, 3);
    assert!(calls[first..=last].iter().all(|call| *call == Call::Step), "{calls:?}");
}

#[test]
fn a_piece_that_fails_ends_the_engine_only_when_the_device_is_lost() {
    let (engine, calls) = Busy::start(5, Some((3, false)));
    wait_for_pieces(&calls, 2);
    let asked = prompt(2, 5);
    assert_eq!(collect(engine.generate(request(&asked, greedy(4))).unwrap()).0, expected_greedy(&asked, 4));

    let (engine, calls) = Busy::start(5, Some((3, true)));
    let (kind, why) = block_on(engine.stopped());
    assert!(kind == FailureKind::ContextLost && why.contains("an idle hand slipped"), "{why}");
    assert_eq!(count(&calls, Call::Idle), 2);
}
