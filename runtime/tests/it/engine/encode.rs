//! Vectors of whole prompts.

use super::toy_backend::{FAILS_STEP, ToyBackend, ToyKind, expected_vector};
use super::*;
use futures::executor::block_on;
use futures::future::join_all;
use mserve_runtime::engine::{AdmissionError, RequestError};

fn encoder(kind: ToyKind) -> EngineHandle {
    Engine::start(Box::new(ToyBackend::new(kind, 32, BLOCK_SIZE)), config()).unwrap()
}

#[test]
fn vectors_are_those_of_each_prompt_alone() {
    one_by_one_and_pipelined(|| {
        for kind in [ToyKind::Encode, ToyKind::EncodeWithCache] {
            let engine = encoder(kind);
            // Some share a start, which must not come from a cache.
            let prompts: Vec<_> = (0..40).map(|seed| prompt(seed % 13, 1 + seed as usize * 7 % 60)).collect();
            let vectors = prompts.iter().map(|prompt| engine.encode(prompt.clone()).unwrap());
            let vectors = block_on(join_all(vectors.collect::<Vec<_>>()));
            for (vector, prompt) in vectors.into_iter().zip(&prompts) {
                assert_eq!(vector.unwrap(), expected_vector(prompt));
            }
            wait_until_empty(&engine);
            let total: usize = prompts.iter().map(Vec::len).sum();
            assert_eq!(engine.load().prompt_tokens_total, total as u64);
        }
    });
}

#[test]
fn many_prompts_share_a_step() {
    let backend = ToyBackend::new(ToyKind::Encode, 0, 0);
    let seen = Arc::clone(&backend.seen);
    let (gate, receiver) = channel();
    let engine = Engine::start(Box::new(backend.gated(receiver)), config()).unwrap();
    // The first step waits with some of them; at least 16 are queued by its end.
    let vectors: Vec<_> = (0..24).map(|seed| engine.encode(prompt(seed, 8)).unwrap()).collect();
    drop(gate);
    block_on(join_all(vectors)).into_iter().for_each(|vector| drop(vector.unwrap()));
    let seen = seen.lock().unwrap().clone();
    assert_eq!((seen.most_sequences, seen.most_tokens), (8, 64));
}

#[test]
fn a_prompt_must_fit_one_step() {
    one_by_one_and_pipelined(|| {
        let engine = encoder(ToyKind::Encode);
        assert!(block_on(engine.encode(vec![1; 64]).unwrap()).is_ok());
        let refused = engine.encode(vec![1; 65]).err();
        assert_eq!(refused, Some(AdmissionError::PromptTooLong { prompt_tokens: 65, max_model_len: 64 }));
        // A model without a cache generates nothing.
        let refused = engine.generate(request(&[1], greedy(1))).unwrap_err();
        assert!(matches!(refused, AdmissionError::PoolTooSmall { total_blocks: 0, .. }), "{refused}");
    });
}

#[test]
fn a_failed_step_and_a_dropped_future_leave_nothing_behind() {
    one_by_one_and_pipelined(|| {
        let engine = encoder(ToyKind::EncodeWithCache);
        let failed = block_on(engine.encode(vec![1, FAILS_STEP]).unwrap());
        assert_eq!(failed, Err(RequestError::Device("this step went wrong".to_owned())));
        for seed in 0..50 {
            drop(engine.encode(prompt(seed, 20)).unwrap());
        }
        wait_until_empty(&engine);
    });
}

#[test]
fn a_vector_where_a_token_is_wanted_fails_the_request() {
    one_by_one_and_pipelined(|| {
        let engine = encoder(ToyKind::EncodeWithCache);
        let mut stream = engine.generate(request(&[1, 2], greedy(3))).unwrap();
        assert!(matches!(stream.blocking_next(), Some(TokenEvent::Failed(RequestError::Device(_)))));
        assert_eq!(stream.blocking_next(), None);
        wait_until_empty(&engine);
    });
}
