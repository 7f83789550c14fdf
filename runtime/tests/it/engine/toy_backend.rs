//! A device whose next token depends on every token of the context, read back through block tables: a wrong slot, a
//! wrong block or a lost token gives another text.

use mserve_runtime::engine::{Backend, BackendError, BackendInfo, RowOutput, StepBatch, StepSequence, sample};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

pub const VOCAB: u32 = 100;
/// Tokens that break the step they are in.
pub const FAILS_STEP: u32 = VOCAB - 1;
pub const LOSES_DEVICE: u32 = VOCAB - 2;
pub const PANICS: u32 = VOCAB - 3;
/// Tokens below this do no harm.
pub const HARMLESS: u32 = VOCAB - 3;

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
    pub steps: usize,
    pub tokens: usize,
    pub most_tokens: usize,
    pub most_sequences: usize,
    pub prompt_chunks: usize,
}

pub struct ToyBackend {
    info: BackendInfo,
    kind: ToyKind,
    /// `[slots]`: token and position last written.
    cache: Vec<Option<(u32, u32)>>,
    pub seen: Arc<Mutex<Seen>>,
    /// When set, every step waits for a word from the test; after the test has hung up, none does.
    gate: Option<Receiver<()>>,
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
        Self { info, kind, cache, seen: Arc::default(), gate: None }
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

    fn note(&self, batch: &StepBatch) {
        let mut seen = self.seen.lock().unwrap();
        seen.steps += 1;
        seen.tokens += batch.token_ids.len();
        seen.most_tokens = seen.most_tokens.max(batch.token_ids.len());
        seen.most_sequences = seen.most_sequences.max(batch.sequences.len());
        seen.prompt_chunks += batch.sequences.iter().filter(|sequence| sequence.query_len > 1).count();
    }

    fn error(&self, what: &str, fatal: bool) -> BackendError {
        BackendError { device: self.info.device.clone(), what: what.to_owned(), fatal }
    }
}

impl Backend for ToyBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn step(&mut self, batch: &StepBatch) -> Result<Vec<RowOutput>, BackendError> {
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
        Ok(wanted
            .map(|sequence| {
                let mut row = logits(&self.context(batch, sequence));
                match (self.kind, &sequence.sampling) {
                    (ToyKind::Generate, Some(sampling)) => RowOutput::Token(sample(&mut row, sampling)),
                    _ => RowOutput::Vector(row),
                }
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
    let decodes = batch.sequences.iter().take_while(|sequence| sequence.query_len == 1).count();
    let started = |sequence: &StepSequence| sequence.sampling.as_ref().is_some_and(|sampling| sampling.step > 0);
    assert!(
        batch.sequences[decodes..].iter().all(|sequence| sequence.query_len > 1 || !started(sequence) || has_cache),
        "decodes come first"
    );
    let mut slots = batch.slot_mapping.clone();
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), batch.slot_mapping.len(), "two tokens in one slot");
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
