//! Groups of layers over one pool of equal blocks, by vLLM's rules.
//!
//! Sources: `v1/core/kv_cache_planning.py` (groups, pages), `v1/kv_cache_interface.py` (blocks of a request),
//! `platforms/interface.py` (block size of hybrids).

use super::{CacheKind, KvFormat, LayerCache, layer_caches, served_dtype};
use crate::model::{CompressedAttentionSpec, DType, Family, Mixer, ModelSpec, StateSpec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a pool is laid out with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolOptions {
    pub tensor_parallel_size: u64,
    pub kv: KvFormat,
    /// Tokens of a block before a hybrid model enlarges it: 16 on CUDA, 64 for sparse MLA.
    pub block_size_tokens: u64,
    pub max_num_batched_tokens: u64,
    /// Steps in flight whose tokens a sliding layer must hold: 2 with async scheduling.
    pub concurrent_batches: u64,
    /// False with `--disable-hybrid-kv-cache-manager`, some connectors, and off CUDA: windows are kept whole.
    pub hybrid_manager: bool,
    pub mamba_blocks: MambaBlocks,
    /// Speculative tokens: states and convolutions keep room for them, and the draft layers join the full ones.
    pub speculative_tokens: u64,
    pub draft_layers: u64,
    /// Type of recurrent states, where it is not the checkpoint's (`--mamba-ssm-cache-dtype`).
    pub state_dtype: Option<DType>,
    /// Type of convolution states, where it is not the model's (`--mamba-cache-dtype`).
    pub conv_dtype: Option<DType>,
    /// Ranks that share one sequence's cache.
    pub decode_context_parallel_size: u64,
}

impl PoolOptions {
    pub fn new(tensor_parallel_size: u64, kv: impl Into<KvFormat>) -> Self {
        Self {
            tensor_parallel_size,
            kv: kv.into(),
            block_size_tokens: 16,
            max_num_batched_tokens: 8192,
            concurrent_batches: 1,
            hybrid_manager: true,
            mamba_blocks: MambaBlocks::Align,
            speculative_tokens: 0,
            draft_layers: 0,
            state_dtype: None,
            conv_dtype: None,
            decode_context_parallel_size: 1,
        }
    }
}

/// States kept for a sequence (`mamba_cache_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MambaBlocks {
    /// Without prefix caching: one.
    None,
    /// With it: the last checkpoint too.
    Align,
}

/// Layers that share a block table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub kind: CacheKind,
    /// Real layers in it; the last group of a kind may have fewer than fit.
    pub layers: u64,
    pub block_size_tokens: u64,
}

/// All groups of a model on one rank, and the block that they share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// Empty for models that keep no cache.
    pub groups: Vec<Group>,
    pub bytes_per_block: u64,
    pub options: PoolOptions,
}

/// Layers of one kind and size.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    cache: LayerCache,
    layers: u64,
}

/// Attention blocks of hybrids grow in steps of this; of latent attention in larger ones.
const HYBRID_ALIGNMENT_TOKENS: u64 = 16;
const LATENT_HYBRID_ALIGNMENT_TOKENS: u64 = 128;

impl Groups {
    pub fn new(spec: &ModelSpec, options: PoolOptions) -> Self {
        let mut buckets = buckets(spec, &options);
        if !options.hybrid_manager || buckets.iter().any(|b| matches!(b.cache.kind, CacheKind::Chunked { .. })) {
            keep_windows_whole(&mut buckets);
        }
        let block = options.block_size_tokens.max(1);
        let one_kind = buckets.iter().all(|b| matches!(b.cache.kind, CacheKind::Full | CacheKind::Indexer));
        let (groups, bytes_per_block) = match &buckets[..] {
            [] => (Vec::new(), 0),
            _ if compressed_layers(spec).next().is_some() => compressed_groups(spec),
            // All layers need the same tokens: one table, and pages side by side.
            all if one_kind || all.len() == 1 && !fixed(all[0].cache.kind) => {
                let bytes: u64 = all.iter().map(|b| b.layers * b.cache.bytes_per_entry).sum();
                let layers = all.iter().map(|b| b.layers).sum();
                (vec![Group { kind: all[0].cache.kind, layers, block_size_tokens: block }], bytes * block)
            }
            all => by_pages(all, block, latent(spec)),
        };
        Self { groups, bytes_per_block, options }
    }

    /// Blocks of a pool. 0 without a cache.
    pub fn num_blocks(&self, available_bytes: u64) -> u64 {
        available_bytes.checked_div(self.bytes_per_block).unwrap_or(0)
    }

    /// Blocks that a request of `tokens` may hold at once, over all groups.
    pub fn blocks_per_request(&self, tokens: u64) -> u64 {
        self.blocks_in_steps_of(tokens, self.options.max_num_batched_tokens)
    }

    /// The same with another size of steps.
    pub fn blocks_in_steps_of(&self, tokens: u64, max_num_batched_tokens: u64) -> u64 {
        let options = PoolOptions { max_num_batched_tokens, ..self.options };
        self.groups.iter().fold(0, |sum: u64, group| sum.saturating_add(blocks_of(group, &options, tokens)))
    }

    /// Bytes that one request of `tokens` needs.
    pub fn needed_bytes(&self, tokens: u64) -> u64 {
        self.blocks_per_request(tokens).saturating_mul(self.bytes_per_block)
    }

    /// The longest request that `available_bytes` hold, up to `limit`; 0 when not one token fits.
    pub fn longest(&self, available_bytes: u64, limit: u64) -> u64 {
        let fits = |tokens: u64| self.needed_bytes(tokens) <= available_bytes;
        if !fits(1) {
            return 0;
        }
        let (mut fitting, mut too_long) = (1, limit.saturating_add(1));
        while too_long - fitting > 1 {
            let middle = fitting + (too_long - fitting) / 2;
            if fits(middle) { fitting = middle } else { too_long = middle }
        }
        fitting
    }
}

fn blocks_of(group: &Group, options: &PoolOptions, tokens: u64) -> u64 {
    let blocks = |tokens: u64| tokens.div_ceil(group.block_size_tokens.max(1));
    match group.kind {
        CacheKind::Sliding { window_tokens } => {
            let in_flight = options.max_num_batched_tokens.saturating_mul(options.concurrent_batches);
            // A window rarely begins on a block's border.
            blocks((window_tokens - 1).saturating_add(in_flight).min(tokens)) + 1
        }
        CacheKind::State => {
            let states = match options.mamba_blocks {
                MambaBlocks::None => 1,
                MambaBlocks::Align => 2,
            };
            states + options.speculative_tokens
        }
        CacheKind::Compressed { tokens_per_entry } => blocks(tokens.div_ceil(tokens_per_entry.max(1))),
        CacheKind::Full | CacheKind::Chunked { .. } | CacheKind::Indexer => {
            blocks(tokens.div_ceil(options.decode_context_parallel_size.max(1)))
        }
    }
}

fn latent(spec: &ModelSpec) -> bool {
    spec.layers.iter().any(|layer| matches!(layer.mixer, Mixer::Latent(_)))
}

fn buckets(spec: &ModelSpec, options: &PoolOptions) -> Vec<Bucket> {
    let caches = layer_caches(spec, options.tensor_parallel_size, options.kv);
    let mut buckets: Vec<Bucket> = Vec::new();
    for (layer, caches) in spec.layers.iter().zip(caches) {
        for mut cache in caches {
            if let (CacheKind::State, Some(state)) = (cache.kind, layer.state()) {
                cache.bytes_per_entry = state_bytes(cache, state, spec, options);
            }
            add(&mut buckets, whole_heads(cache, spec, layer, options));
        }
    }
    // Draft layers of multi-token prediction attend in full.
    if let Some(full) = buckets.iter_mut().find(|b| b.cache.kind == CacheKind::Full) {
        full.layers += options.draft_layers;
    }
    buckets
}

fn add(buckets: &mut Vec<Bucket>, cache: LayerCache) {
    match buckets.iter_mut().find(|b| b.cache == cache) {
        Some(bucket) => bucket.layers += 1,
        None => buckets.push(Bucket { cache, layers: 1 }),
    }
}

/// vLLM runs MiniCPM3 without latent attention: whole heads are cached, values padded to the keys' width.
fn whole_heads(
    cache: LayerCache,
    spec: &ModelSpec,
    layer: &crate::model::LayerSpec,
    options: &PoolOptions,
) -> LayerCache {
    match &layer.mixer {
        Mixer::Latent(a) if spec.family == Family::MiniCpm3 => {
            let heads = (a.num_heads / options.tensor_parallel_size.max(1)).max(1);
            let width = a.qk_nope_head_dim + a.qk_rope_head_dim;
            LayerCache { bytes_per_entry: 2 * heads * width * options.kv.dtype.bytes(), ..cache }
        }
        _ => cache,
    }
}

/// With other types than the checkpoint's, and with room in the convolution for speculative tokens.
fn state_bytes(cache: LayerCache, state: &StateSpec, spec: &ModelSpec, options: &PoolOptions) -> u64 {
    let served = served_dtype(spec);
    let old = state.state_dtype.unwrap_or(served).bytes();
    let recurrent = state.state_elements().div_ceil(options.tensor_parallel_size.max(1));
    let convolution = cache.bytes_per_entry.saturating_sub(recurrent * old);
    let taps = state.conv_kernel.saturating_sub(1).max(1);
    let conv_dtype = options.conv_dtype.unwrap_or(served);
    let of_tap = convolution / taps / served.bytes() * conv_dtype.bytes();
    let conv_taps = if state.conv_kernel > 1 { taps + options.speculative_tokens } else { 0 };
    recurrent * options.state_dtype.map_or(old, DType::bytes) + of_tap * conv_taps
}

fn compressed_layers(spec: &ModelSpec) -> impl Iterator<Item = &CompressedAttentionSpec> {
    spec.layers.iter().filter_map(|layer| match &layer.mixer {
        Mixer::Compressed(attention) => Some(attention),
        _ => None,
    })
}

/// DeepSeek-V4 (`models/deepseek_v4/{attention,compressor}.py`, `mla/sparse_swa.py`): compressed states of 256 tokens
/// share a block with the indexer's keys; windows have blocks of 64 tokens and compressor states blocks of 4 or 8, so
/// that their pages are equal. Pages are whole rows of 576 bytes; the widest group sets the block.
fn compressed_groups(spec: &ModelSpec) -> (Vec<Group>, u64) {
    const BLOCK: u64 = 256;
    const ROW_BYTES: u64 = 576;
    let page = |entries: u64, bytes: u64| (entries * bytes).next_multiple_of(ROW_BYTES);
    let caches = layer_caches(spec, 1, DType::BF16.into());
    let (mut shared_bytes, mut shared_layers, mut windows, mut window) = (0_u64, 0, 0_u64, 1);
    // By tokens in a state: compressor states, and bytes of all of them in one block.
    let mut compressors: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let mut window_page = 0;
    for (attention, caches) in compressed_layers(spec).zip(caches) {
        let tokens = attention.tokens_per_state;
        (windows, window) = (windows + 1, attention.window);
        for cache in caches {
            match cache.kind {
                CacheKind::Sliding { .. } => window_page = page(64, cache.bytes_per_entry),
                CacheKind::Compressed { .. } => {
                    shared_layers += 1;
                    shared_bytes += page(BLOCK.div_ceil(tokens.max(1)), cache.bytes_per_entry);
                }
                _ => {
                    let (span, held) = compressor_block(tokens);
                    let (count, bytes) = compressors.entry(tokens).or_default();
                    (*count, *bytes) = (*count + 1, *bytes + page(held, cache.bytes_per_entry / span.max(1)));
                }
            }
        }
    }
    let mut groups = vec![Group { kind: CacheKind::Full, layers: shared_layers, block_size_tokens: BLOCK }];
    let mut widest = shared_bytes;
    for (&tokens, &(layers, bytes)) in &compressors {
        let (span, block_size_tokens) = compressor_block(tokens);
        groups.push(Group { kind: CacheKind::Sliding { window_tokens: span }, layers, block_size_tokens });
        widest = widest.max(bytes);
    }
    // Windows are dealt over as many groups as keep them narrower than the rest.
    let count = (windows * window_page).div_ceil(widest.max(window_page).max(1)).max(1);
    for i in 0..count {
        let layers = (windows - i.min(windows)).div_ceil(count);
        groups.push(Group { kind: CacheKind::Sliding { window_tokens: window }, layers, block_size_tokens: 64 });
        widest = widest.max(layers * window_page);
    }
    (groups, widest)
}

/// Tokens that a compressor looks back on (states over few tokens overlap), and tokens in one of its blocks.
fn compressor_block(tokens_per_state: u64) -> (u64, u64) {
    if tokens_per_state <= 4 { (2 * tokens_per_state, 4) } else { (tokens_per_state, 8) }
}

/// Takes the same blocks whatever the length.
fn fixed(kind: CacheKind) -> bool {
    matches!(kind, CacheKind::State | CacheKind::Compressed { .. })
}

fn keep_windows_whole(buckets: &mut Vec<Bucket>) {
    let mut whole: Vec<Bucket> = Vec::new();
    for bucket in buckets.drain(..) {
        let kind = match bucket.cache.kind {
            CacheKind::Sliding { .. } | CacheKind::Chunked { .. } => CacheKind::Full,
            kind => kind,
        };
        let cache = LayerCache { kind, ..bucket.cache };
        match whole.iter_mut().find(|b| b.cache == cache) {
            Some(same) => same.layers += bucket.layers,
            None => whole.push(Bucket { cache, ..bucket }),
        }
    }
    *buckets = whole;
}

/// Kinds with needs of their own: pages of one size, groups of one number of layers.
fn by_pages(buckets: &[Bucket], block: u64, latent: bool) -> (Vec<Group>, u64) {
    let state = buckets.iter().filter(|b| b.cache.kind == CacheKind::State).map(|b| b.cache.bytes_per_entry).max();
    let entry = buckets.iter().filter(|b| b.cache.kind != CacheKind::State).map(|b| b.cache.bytes_per_entry).max();
    // Blocks of attention grow until a state fits the page of one layer.
    let block = match (state, entry) {
        (Some(state), Some(entry)) => {
            let step = if latent { LATENT_HYBRID_ALIGNMENT_TOKENS } else { HYBRID_ALIGNMENT_TOKENS };
            let step = step.max(block);
            (step * state.div_ceil(step * entry.max(1))).max(block)
        }
        _ => block,
    };
    let page = state.unwrap_or(0).max(block * entry.unwrap_or(0));
    let (fewest, most) = buckets.iter().fold((u64::MAX, 0), |(few, many), b| (b.layers.min(few), b.layers.max(many)));
    let per_group = if 2 * most < 3 * fewest { most } else { fewest }.max(1);
    let mut groups = Vec::new();
    for bucket in buckets {
        // A smaller layer has more tokens in its block, where that fits evenly; else its page is padded.
        let own = block * bucket.cache.bytes_per_entry;
        let ratio = if own > 0 && page.is_multiple_of(own) { page / own } else { 1 };
        let block_size_tokens = if bucket.cache.kind == CacheKind::State { block } else { block * ratio };
        let count = bucket.layers.div_ceil(per_group);
        for i in 0..count {
            // Layers are dealt round, so that pipeline stages have their share of each group.
            let layers = (bucket.layers - i).div_ceil(count);
            groups.push(Group { kind: bucket.cache.kind, layers, block_size_tokens });
        }
    }
    (groups, per_group * page)
}
