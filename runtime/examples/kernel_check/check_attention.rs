//! Paged attention on the card against the plain sum.

use super::card::{Caches, Card, Failure, Outcome, int, pointer, prefill_launch};
use super::numbers::{BF16_BOUND, Random, close, nmse};
use half::bf16;
use mserve_runtime::cuda::kernels::{Decode, DecodeLaunch, Prefill, Shares};
use mserve_runtime::cuda::memory::DeviceMemory;
use mserve_runtime::cuda::module::Arg;

struct Case {
    head_dim: usize,
    kv_heads: usize,
    group: usize,
    window: usize,
    softcap: f32,
}

/// K and V of several sequences in scattered blocks; NaN where no token stands.
struct Cache {
    head_dim: usize,
    kv_heads: usize,
    max_blocks: usize,
    table: Vec<i32>,
    keys: Vec<bf16>,
    values: Vec<bf16>,
}

impl Cache {
    fn new(random: &mut Random, case: &Case, lengths: &[usize]) -> Self {
        let max_blocks = lengths.iter().max().map_or(1, |n| n / 16 + 1);
        let mut table: Vec<i32> = (0..(lengths.len() * max_blocks) as i32).collect();
        random.shuffle(&mut table);
        let size = table.len() * case.kv_heads * 16 * case.head_dim;
        let nothing = vec![bf16::NAN; size];
        let (head_dim, kv_heads) = (case.head_dim, case.kv_heads);
        let mut cache = Self { head_dim, kv_heads, max_blocks, table, keys: nothing.clone(), values: nothing };
        for (s, &length) in lengths.iter().enumerate() {
            for at in (0..length).flat_map(|t| (0..kv_heads).map(move |h| (t, h))) {
                let at = cache.at(s, at.0, at.1);
                cache.keys[at..at + head_dim].copy_from_slice(&random.bf16s(head_dim, 1.0));
                cache.values[at..at + head_dim].copy_from_slice(&random.bf16s(head_dim, 1.0));
            }
        }
        cache
    }

    fn at(&self, sequence: usize, token: usize, kv_head: usize) -> usize {
        let block = self.table[sequence * self.max_blocks + token / 16] as usize;
        ((block * self.kv_heads + kv_head) * 16 + token % 16) * self.head_dim
    }

    fn attend(&self, case: &Case, sequence: usize, position: usize, kv_head: usize, q: &[bf16]) -> Vec<f64> {
        let first = if case.window > 0 { (position + 1).saturating_sub(case.window) } else { 0 };
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let score = |t: usize| -> f64 {
            let key = &self.keys[self.at(sequence, t, kv_head)..];
            let dot: f64 = q.iter().zip(key).map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>() * scale;
            let cap = f64::from(case.softcap);
            if cap > 0.0 { cap * (dot / cap).tanh() } else { dot }
        };
        let scores: Vec<f64> = (first..=position).map(score).collect();
        let most = scores.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
        let mut out = vec![0.0; self.head_dim];
        for (t, s) in (first..=position).zip(&scores) {
            let value = &self.values[self.at(sequence, t, kv_head)..];
            for (o, v) in out.iter_mut().zip(value) {
                *o += (s - most).exp() / total * v.to_f64();
            }
        }
        out
    }
}

struct OnCard {
    keys: DeviceMemory,
    values: DeviceMemory,
    table: DeviceMemory,
    context: DeviceMemory,
}

fn upload(card: &Card, cache: &Cache, context: &[i32]) -> Result<OnCard, Failure> {
    let (keys, values) = (card.upload(&cache.keys)?, card.upload(&cache.values)?);
    Ok(OnCard { keys, values, table: card.upload(&cache.table)?, context: card.upload(context)? })
}

pub fn all(card: &Card) -> Outcome {
    let case = |head_dim, kv_heads, group, window, softcap| Case { head_dim, kv_heads, group, window, softcap };
    let cases = [
        case(128, 8, 4, 0, 0.0),
        case(64, 2, 7, 0, 0.0),
        case(128, 2, 8, 100, 0.0),
        case(96, 4, 1, 0, 0.0),
        case(80, 4, 1, 50, 30.0),
        case(128, 1, 12, 0, 0.0),
        case(64, 4, 1, 1100, 0.0),
        case(64, 1, 16, 0, 30.0),
        case(32, 4, 2, 0, 0.0),
        case(16, 2, 2, 0, 0.0),
    ];
    for c in &cases {
        decode(card, c)?;
        prefill(card, c)?;
    }
    Ok(())
}

/// One decode launch's inputs, and what it must give.
struct Sequences<'a> {
    card: &'a Card,
    case: &'a Case,
    lengths: [usize; 7],
    cache: Cache,
    on: OnCard,
    q: DeviceMemory,
    want: Vec<f64>,
}

impl<'a> Sequences<'a> {
    fn new(card: &'a Card, case: &'a Case) -> Result<Self, Failure> {
        let mut random = Random::new(7);
        let lengths = [1, 0, 33, 700, 2049, 16, 1024];
        let cache = Cache::new(&mut random, case, &lengths);
        let on = upload(card, &cache, &lengths.map(|n| n as i32))?;
        let heads = case.kv_heads * case.group;
        let stride = (heads + 2 * case.kv_heads) * case.head_dim;
        let q = random.bf16s(lengths.len() * stride, 2.0);
        let mut want = vec![];
        for (s, &length) in lengths.iter().enumerate() {
            for head in 0..heads {
                let query = &q[s * stride + head * case.head_dim..][..case.head_dim];
                want.extend(match length {
                    0 => vec![0.0; case.head_dim],
                    n => cache.attend(case, s, n - 1, head / case.group, query),
                });
            }
        }
        Ok(Self { card, case, lengths, cache, on, q: card.upload(&q)?, want })
    }

    const fn sizes(&self) -> [u32; 3] {
        let kv_heads = self.case.kv_heads as u32;
        [kv_heads * self.case.group as u32, kv_heads, self.case.head_dim as u32]
    }

    /// Error of a launch, twice: the second finds what the first left.
    fn error(&self, decode: &Decode, launch: DecodeLaunch) -> Result<f64, Failure> {
        let [heads, kv_heads, head_dim] = self.sizes().map(|n| n as usize);
        let entry = Decode::entry(launch.warps);
        let geometry = decode.geometry(self.lengths.len() as u32, heads as u32, kv_heads as u32, launch);
        let rows = self.lengths.len() * heads;
        let splits = launch.shares.clusters as usize;
        let out = self.card.poisoned(rows * head_dim * 2)?;
        let partial = self.card.poisoned(rows * splits * head_dim * 4)?;
        let statistic = self.card.poisoned(rows * splits * 8)?;
        let args = [
            pointer(&self.q),
            int((heads + 2 * kv_heads) * head_dim),
            pointer(&self.on.keys),
            pointer(&self.on.values),
            pointer(&self.on.table),
            pointer(&self.on.context),
            pointer(&out),
            pointer(&partial),
            pointer(&statistic),
            int(self.cache.max_blocks),
            int(heads),
            int(kv_heads),
            Arg::Float(1.0 / (head_dim as f32).sqrt()),
            Arg::Float(self.case.softcap),
            int(self.case.window),
        ];
        let mut worst = 0.0_f64;
        for _ in 0..2 {
            out.fill(0xff)?;
            self.card.run(entry, head_dim as u32, geometry, &args)?;
            let error = nmse(&self.card.bf16s(&out, self.want.len())?, &self.want);
            if error.is_nan() || error > BF16_BOUND {
                return Err(format!("{entry}, {geometry:?}: NMSE {error:e}").into());
            }
            worst = worst.max(error);
        }
        Ok(worst)
    }
}

fn decode(card: &Card, case: &Case) -> Outcome {
    let sequences = Sequences::new(card, case)?;
    let [_, _, head_dim] = sequences.sizes();
    let decode = card.device.decode_attention(head_dim);
    let largest = if decode.compute_capability.0 >= 9 { 8 } else { 1 };
    let mut errors = vec![];
    for warps in Decode::WARPS.into_iter().filter(|&w| decode.takes(w)) {
        let shares = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (1, 20), (2, 2), (4, 3), (8, 2)]
            .map(|(blocks, clusters)| Shares { blocks, clusters });
        for shares in shares.into_iter().filter(|s| s.blocks <= largest) {
            errors.push(sequences.error(&decode, DecodeLaunch { warps, shares, beside_l1: false })?);
        }
    }
    let worst = errors.iter().copied().fold(0.0, f64::max);
    let (launches, Case { group, window, softcap, .. }) = (errors.len(), case);
    println!(
        "decode head_dim {head_dim} group {group} window {window} cap {softcap}: NMSE {worst:.1e} at worst of {launches}"
    );
    Ok(())
}

fn prefill(card: &Card, case: &Case) -> Outcome {
    let mut random = Random::new(8);
    // One decode row first, then chunks with and without earlier tokens.
    let (rows, before) = ([1, 1, 300, 128, 77], [9, 0, 0, 200, 1000]);
    let lengths: Vec<usize> = rows.iter().zip(&before).map(|(a, b)| a + b).collect();
    let cache = Cache::new(&mut random, case, &lengths);
    let context: Vec<i32> = lengths.iter().map(|&n| n as i32).collect();
    let on = upload(card, &cache, &context)?;
    let mut start = vec![0];
    for n in rows {
        start.push(start[start.len() - 1] + n as i32);
    }
    let heads = case.kv_heads * case.group;
    let (total, stride) = (rows.iter().sum::<usize>(), (heads + 2 * case.kv_heads) * case.head_dim);
    let q = random.bf16s(total * stride, 2.0);
    let (q_on, start_on) = (card.upload(&q)?, card.upload(&start)?);
    let out = card.poisoned(total * heads * case.head_dim * 2)?;
    let lens: Vec<u32> = rows[1..].iter().map(|&n| n as u32).collect();
    let args = |tiles: u32| {
        [
            pointer(&q_on),
            int(stride),
            pointer(&on.keys),
            pointer(&on.values),
            pointer(&start_on),
            pointer(&on.context),
            pointer(&on.table),
            pointer(&out),
            int(cache.max_blocks),
            int(1),
            int(rows.len()),
            int(case.kv_heads),
            Arg::Float(1.0 / (case.head_dim as f32).sqrt()),
            Arg::Float(case.softcap),
            int(case.window),
            int(heads),
            int(tiles as usize),
        ]
    };
    let mut want = vec![];
    for s in 1..rows.len() {
        for row in start[s] as usize..start[s + 1] as usize {
            let position = lengths[s] - (start[s + 1] as usize - row);
            for head in 0..heads {
                let query = &q[row * stride + head * case.head_dim..][..case.head_dim];
                want.extend(cache.attend(case, s, position, head / case.group, query));
            }
        }
    }
    let head_dim = case.head_dim as u32;
    let compute_capability = card.device.compute_capability;
    let fastest = Prefill::new(head_dim, compute_capability, card.device.multiprocessors);
    // A grid of few blocks gives each many items.
    let few = Prefill::new(head_dim, compute_capability, 5);
    for prefill in [Prefill::WarpProducts { compute_capability }, fastest, few] {
        let (tiles, geometry) = prefill_launch(prefill, &lens, 2, heads as u32, head_dim);
        let entry = prefill.entry();
        out.fill(0xff)?;
        let at = [on.keys.pointer(), on.values.pointer()];
        let caches = Caches::new(card, at, cache.keys.len() * 2, case.head_dim, prefill)?;
        card.run(entry, head_dim, geometry, &caches.within(args(tiles).to_vec()))?;
        let got = card.bf16s(&out, total * heads * case.head_dim)?;
        if !got[..heads * case.head_dim].iter().all(|v| v.is_nan()) {
            return Err("prefill wrote the row of a decode sequence".into());
        }
        let what = format!("{entry} head_dim {} group {} window {}", case.head_dim, case.group, case.window);
        close(&what, &got[heads * case.head_dim..], &want, BF16_BOUND)?;
    }
    Ok(())
}
