//! Texts put through a backend by hand, with the logits that came out.

use super::any_device::steps::{Piece, Places, batch, greedy, sampling, tokens};
use super::any_device::{Failure, Inspect};
use mserve_runtime::engine::{SampledToken, SamplingParams};

/// `[text][(position, logits after it)]`
pub type Forced = Vec<Vec<(usize, Vec<f32>)>>;

/// Logits after some positions of each text, all texts going through the backend side by side: first half of it in one
/// piece, then a few tokens at a time, then one by one.
pub fn teacher_forced<B: Inspect>(backend: &mut B, texts: &[Vec<u32>], places: Places) -> Result<Forced, Failure> {
    let mut computed = vec![0; texts.len()];
    let mut found: Forced = vec![Vec::new(); texts.len()];
    while computed.iter().zip(texts).any(|(done, text)| *done < text.len()) {
        let mut pieces: Vec<Piece<'_>> = Vec::new();
        for (sequence, text) in texts.iter().enumerate().filter(|(i, text)| computed[*i] < text.len()) {
            let start = computed[sequence];
            let len = next_piece(start, text.len());
            pieces.push(Piece { sequence, tokens: text, start, end: start + len, sampling: Some(greedy()) });
        }
        pieces.sort_by_key(|piece| piece.end - piece.start > 1);
        let (_, logits) = backend.step_and_logits(&batch(&pieces, places))?;
        for (piece, logits) in pieces.iter().zip(logits) {
            computed[piece.sequence] = piece.end;
            found[piece.sequence].push((piece.end - 1, logits));
        }
    }
    Ok(found)
}

fn next_piece(done: usize, len: usize) -> usize {
    match (done, len - done) {
        (0, left) => left.div_ceil(2),
        (_, left) if left > 24 => 7,
        _ => 1,
    }
}

/// Greedy continuation with what stood second at each place: `count` tokens, each with its two likeliest.
pub fn greedy_text<B: Inspect>(backend: &mut B, prompt: &[u32], count: usize) -> Result<Vec<SampledToken>, Failure> {
    let places = Places { sequences: 1 };
    let params = SamplingParams { temperature: 0.0, logprobs: Some(2), ..SamplingParams::default() };
    let row = sampling(params, 0);
    let (mut text, mut start, mut chosen) = (prompt.to_vec(), 0, Vec::new());
    while chosen.len() < count {
        let end = text.len();
        let piece = Piece { sequence: 0, tokens: &text, start, end, sampling: Some(row.clone()) };
        let token = tokens(backend.step(&batch(&[piece], places))?)?.remove(0);
        start = end;
        text.push(token.token_id);
        chosen.push(token);
    }
    Ok(chosen)
}
