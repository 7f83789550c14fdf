//! What a number in `config.json` may be. Far above any published model, far below what would overflow or
//! exhaust memory while planning: the product of the largest layers, heads and head size times four bytes times
//! the longest context still fits 64 bits.

use std::ops::RangeInclusive;

pub(super) const LAYERS: RangeInclusive<u64> = 1..=1024;
pub(super) const HIDDEN: RangeInclusive<u64> = 1..=131_072;
pub(super) const HEADS: RangeInclusive<u64> = 1..=1024;
pub(super) const HEAD_DIM: RangeInclusive<u64> = 1..=1024;
pub(super) const INTERMEDIATE: RangeInclusive<u64> = 1..=1_048_576;
pub(super) const VOCAB: RangeInclusive<u64> = 1..=16_777_216;
/// 2^27 tokens.
pub(super) const POSITIONS: RangeInclusive<u64> = 1..=134_217_728;
pub(super) const LABELS: RangeInclusive<u64> = 1..=65_536;
pub(super) const TOKEN_TYPES: RangeInclusive<u64> = 1..=1024;
pub(super) const EPS: RangeInclusive<f64> = 1e-30..=0.1;
pub(super) const ROPE_THETA: RangeInclusive<f64> = 1.0..=1e15;
/// Stretching a context; below 1 it would shrink.
pub(super) const ROPE_FACTOR: RangeInclusive<f64> = 1.0..=1e6;
/// Any other positive factor.
pub(super) const POSITIVE: RangeInclusive<f64> = 1e-6..=1e6;
pub(super) const SOFTCAP: RangeInclusive<f64> = 1e-3..=1e6;
/// Experts of one layer.
pub(super) const EXPERTS: RangeInclusive<u64> = 1..=4096;
/// Ranks of low-rank projections.
pub(super) const RANK: RangeInclusive<u64> = 1..=65_536;
/// Heads, groups and sizes of recurrent states.
pub(super) const STATE: RangeInclusive<u64> = 1..=65_536;
pub(super) const CONV_KERNEL: RangeInclusive<u64> = 1..=64;
