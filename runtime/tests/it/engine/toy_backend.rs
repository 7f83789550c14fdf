//! A device whose next token depends on every token of the context, read back through block tables: a wrong slot, a
//! wrong block or a lost token gives another text.

use mserve_runtime::engine::{
    Backend, BackendError, BackendInfo, RowOutput, RowSampling, SampledToken, StepBatch, StepSequence, sample,
};
use mserve_runtime::worker::FailureKind;
use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

pub const VOCAB: u32 = 100;
/// Tokens that break the step they are in.
pub const FAILS_STEP: u32 = VOCAB - 1;
pub const LOSES_DEVICE: u32 = VOCAB - 2;
pub const PANICS: u32 = VOCAB - 3;
/// Tokens below this do no harm.
pub const HARMLESS: u32 = VOCAB - 3;

thread_local! {
    static STEPS_IN_FLIGHT: Cell<usize> = const { Cell::new(1) };
}

/// Run a test with devices that take one step at a time, then with such that take one ahead.
pub fn one_by_one_and_pipelined(test: impl Fn()) {
    for steps in [1, 2] {
        println!("{steps} steps in flight");
        STEPS_IN_FLIGHT.set(steps);
        test();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToyKind {
    Generate,
    /// Keeps no cache.
    Encode,
    /// A generating model used for vectors: it has a cache.
    EncodeWithCache,
}

/// What the device saw, for tests to look at.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// Steps begun, before they wait for a word.
    pub begun: usize,
    pub steps: usize,
    pub tokens: usize,
    pub most_tokens: usize,
    pub most_sequences: usize,
    pub prompt_chunks: usize,
    /// Steps that came while another was under way.
    pub ahead: usize,
}

pub struct ToyBackend {
    info: BackendInfo,
    kind: ToyKind,
    /// `[slots]`: token and position last written.
    cache: Vec<Option<(u32, u32)>>,
    pub seen: Arc<Mutex<Seen>>,
    /// When set, every step waits for a word from the test; after the test has hung up, none does.
    gate: Option<Receiver<()>>,
    steps_in_flight: usize,
    /// Steps that were submitted. They run when they are collected: as late as a device may.
    submitted: VecDeque<StepBatch>,
    /// What the output rows of the step before got.
    previous: Vec<u32>,
    /// Of the step submitted last.
    last_outputs: usize,
    /// Refuse steps with [`FAILS_STEP`] at once.
    refuses_early: bool,
    /// Tokens chosen so far of sequences with penalties, by the address of their prompt: it counts them itself.
    counts: Option<HashMap<usize, Vec<u32>>>,
}

impl ToyBackend {
    pub fn new(kind: ToyKind, num_blocks: usize, block_size: usize) -> Self {
        let num_blocks = if kind == ToyKind::Encode { 0 } else { num_blocks };
        let info = BackendInfo {
            output_width: VOCAB as usize,
            vocab_size: VOCAB as usize,
            block_size,
            num_blocks,
            kv_cache_bytes: (num_blocks * block_size * 8) as u64,
            max_model_len: 4096,
            device: "toy".to_owned(),
        };
        let cache = vec![None; num_blocks * block_size];
        Self {
            info,
            kind,
            cache,
            seen: Arc::default(),
            gate: None,
            steps_in_flight: STEPS_IN_FLIGHT.get(),
            submitted: VecDeque::new(),
            previous: Vec::new(),
            last_outputs: 0,
            refuses_early: false,
            counts: None,
        }
    }

    pub fn taking(mut self, steps_in_flight: usize) -> Self {
        self.steps_in_flight = steps_in_flight;
        self
    }

    pub fn counting(mut self) -> Self {
        self.counts = Some(HashMap::new());
        self
    }

    pub fn refusing_early(mut self) -> Self {
        self.refuses_early = true;
        self
    }

    pub fn gated(mut self, gate: Receiver<()>) -> Self {
        self.gate = Some(gate);
        self
    }

    fn write(&mut self, batch: &StepBatch) {
        for (at, slot) in batch.slot_mapping.iter().enumerate() {
            self.cache[*slot as usize] = Some((batch.token_ids[at], batch.positions[at]));
        }
    }

    /// The context as the cache holds it, or as the step brings it for a model without one.
    fn context(&self, batch: &StepBatch, sequence: &StepSequence) -> Vec<Option<(u32, u32)>> {
        if self.info.num_blocks == 0 {
            let rows = sequence.query_start..sequence.query_start + sequence.query_len;
            return rows.map(|at| Some((batch.token_ids[at], batch.positions[at]))).collect();
        }
        let table = &batch.block_tables[sequence.block_table.clone()];
        let size = self.info.block_size;
        (0..sequence.context_len).map(|at| self.cache[table[at / size] as usize * size + at % size]).collect()
    }

    /// Slots that the step reads or writes.
    fn slots(&self, batch: &StepBatch) -> Vec<u32> {
        let size = self.info.block_size;
        let of = |sequence: &StepSequence| {
            let table = batch.block_tables[sequence.block_table.clone()].to_vec();
            (0..sequence.context_len).map(move |at| table[at / size] * size as u32 + (at % size) as u32)
        };
        if self.info.num_blocks == 0 { Vec::new() } else { batch.sequences.iter().flat_map(of).collect() }
    }

    fn check_ahead(&self, batch: &StepBatch) {
        assert!(self.submitted.len() < self.steps_in_flight, "too many steps");
        for earlier in &self.submitted {
            let used = self.slots(earlier);
            assert!(!batch.slot_mapping.iter().any(|slot| used.contains(slot)), "a slot that a step under way uses");
        }
        for &token_id in batch.token_ids.iter().filter(|id| **id >= VOCAB) {
            assert!(!self.submitted.is_empty(), "a token that is known by now");
            assert!((!token_id as usize) < self.last_outputs, "a row that the step before does not have");
        }
        let needs_all = |sequence: &StepSequence| {
            let sampling = sequence.sampling.as_ref().filter(|_| sequence.wants_output);
            sampling.is_some_and(|s| s.params.presence_penalty != 0.0 && s.output_token_ids.len() as u64 != s.step)
        };
        assert!(
            self.counts.is_some() || !batch.sequences.iter().any(needs_all),
            "a penalty without the tokens that it is for"
        );
    }

    fn note(&self, batch: &StepBatch) {
        let mut seen = self.seen.lock().unwrap();
        seen.steps += 1;
        seen.tokens += batch.token_ids.len();
        seen.most_tokens = seen.most_tokens.max(batch.token_ids.len());
        seen.most_sequences = seen.most_sequences.max(batch.sequences.len());
        seen.prompt_chunks += batch.sequences.iter().filter(|sequence| sequence.query_len > 1).count();
    }

    fn error(&self, what: &str, fatal: bool) -> BackendError {
        BackendError { device: self.info.device.clone(), what: what.to_owned(), fatal, kind: FailureKind::Device }
    }
}

impl Backend for ToyBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn max_steps_in_flight(&self) -> usize {
        self.steps_in_flight
    }

    fn counts_tokens(&self) -> bool {
        self.counts.is_some()
    }

    fn submit(&mut self, batch: &StepBatch) -> Result<(), BackendError> {
        self.check_ahead(batch);
        if self.refuses_early && batch.token_ids.contains(&FAILS_STEP) {
            return Err(self.error("this step went wrong", false));
        }
        self.seen.lock().unwrap().ahead += usize::from(!self.submitted.is_empty());
        self.last_outputs = batch.sequences.iter().filter(|sequence| sequence.wants_output).count();
        self.submitted.push_back(batch.clone());
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<RowOutput>, BackendError> {
        let mut batch = self.submitted.pop_front().unwrap();
        for token_id in batch.token_ids.iter_mut().filter(|id| **id >= VOCAB) {
            // A step that failed has chosen nothing; what follows from it is for nobody.
            *token_id = self.previous.get(!*token_id as usize).copied().unwrap_or(0);
        }
        let outputs = self.step(&batch);
        let ids = |output: &RowOutput| if let RowOutput::Token(token) = output { token.token_id } else { 0 };
        self.previous = outputs.as_ref().map_or(Vec::new(), |outputs| outputs.iter().map(ids).collect());
        outputs
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
        self.seen.lock().unwrap().begun += 1;
        if let Some(gate) = &self.gate {
            let _ = gate.recv();
        }
        check_layout(batch, self.info.num_blocks > 0);
        self.note(batch);
        self.write(batch);
        if batch.token_ids.contains(&FAILS_STEP) {
            return Err(self.error("this step went wrong", false));
        }
        if batch.token_ids.contains(&LOSES_DEVICE) {
            return Err(self.error("fell off the bus", true));
        }
        assert!(!batch.token_ids.contains(&PANICS), "unheard-of token");
        let wanted = batch.sequences.iter().filter(|sequence| sequence.wants_output);
        let rows: Vec<_> = wanted.map(|sequence| (logits(&self.context(batch, sequence)), sequence)).collect();
        Ok(rows
            .into_iter()
            .map(|(mut row, sequence)| match (self.kind, &sequence.sampling) {
                (ToyKind::Generate, Some(sampling)) => RowOutput::Token(choose(&mut row, sampling, &mut self.counts)),
                _ => RowOutput::Vector(row),
            })
            .collect())
    }
}

fn check_layout(batch: &StepBatch, has_cache: bool) {
    let tokens = batch.token_ids.len();
    assert!(tokens > 0, "an empty step");
    assert_eq!(batch.positions.len(), tokens);
    assert_eq!(batch.slot_mapping.len(), if has_cache { tokens } else { 0 });
    let mut next = 0;
    for sequence in &batch.sequences {
        assert_eq!(sequence.query_start, next);
        next += sequence.query_len;
        assert_eq!(sequence.context_len, batch.positions[next - 1] as usize + 1);
    }
    assert_eq!(next, tokens);
    let singles = batch.sequences.iter().take_while(|sequence| sequence.query_len == 1).count();
    assert!(batch.sequences[singles..].iter().all(|sequence| sequence.query_len > 1), "decodes come first");
    let mut slots = batch.slot_mapping.clone();
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), batch.slot_mapping.len(), "two tokens in one slot");
}

/// With the tokens so far as the device counted them, where it does.
fn choose(row: &mut [f32], sampling: &RowSampling, counts: &mut Option<HashMap<usize, Vec<u32>>>) -> SampledToken {
    let Some(counts) = counts else { return sample(row, sampling) };
    let counted = counts.entry(sampling.prompt_token_ids.as_ptr().addr()).or_default();
    if sampling.output_token_ids.len() as u64 == sampling.step {
        counted.clone_from(&sampling.output_token_ids);
    }
    assert_eq!(counted.len() as u64, sampling.step, "tokens that the device was not told of");
    let token = sample(row, &RowSampling { output_token_ids: counted.clone(), ..sampling.clone() });
    counted.push(token.token_id);
    token
}

/// One logit per token, all decided by the whole context.
fn logits(context: &[Option<(u32, u32)>]) -> Vec<f32> {
    let mut state = 0x51_7c_c1_b7_27_22_0a_95_u64;
    for entry in context {
        let (token_id, position) = entry.unwrap_or((u32::MAX, u32::MAX));
        state = mix(state ^ (u64::from(token_id) << 32 | u64::from(position)));
    }
    let harm = |id: u32| if id < HARMLESS { 0.0 } else { f32::NEG_INFINITY };
    (0..VOCAB).map(|id| (mix(state ^ u64::from(id)) % 8000) as f32 / 1000.0 - 4.0 + harm(id)).collect()
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

/// What the device must say of a prompt, without any engine.
pub fn expected_vector(prompt: &[u32]) -> Vec<f32> {
    let context: Vec<_> = prompt.iter().zip(0..).map(|(&token_id, position)| Some((token_id, position))).collect();
    logits(&context)
}

/// The greedy text that must follow a prompt, without any engine.
pub fn expected_greedy(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let logits = expected_vector(&tokens);
        let best = (0..VOCAB).rev().max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize]));
        tokens.extend(best);
    }
    tokens.split_off(prompt.len())
}
