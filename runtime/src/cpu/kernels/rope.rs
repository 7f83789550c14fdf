//! The rotation of heads, by the tables of [`Rope`](crate::backend::rope::Rope).

/// Rotates the leading dimensions of one head in place: dimension i with dimension i + half (the half-split
/// convention of Hugging Face checkpoints, not the interleaved one).
#[inline(always)]
pub fn rotate(head: &mut [f32], cos_sin: &[f32]) {
    let pairs = cos_sin.len() / 2;
    let (cos, sin) = cos_sin.split_at(pairs);
    let (first, second) = head[..2 * pairs].split_at_mut(pairs);
    for (((a, b), &c), &s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}
