//! The kernels of one model, loaded.

use super::compile::compile_all;
use super::cubin_cache::DiskCache;
use super::device::Device;
use super::kernels::{self, ChainSizes, Decode, FILES, HEAD_DIMS, KernelFile, Prefill, Products, WIDE};
use super::linear::ProductKernels;
use super::module::{Arg, Kernel, Module};
use super::{CudaError, plan::HeadSizes};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Kernels that do not depend on the head dimension, and those that do, by it.
#[derive(Debug)]
pub struct KernelSet {
    pub embed: Kernel,
    pub rms_norm: Kernel,
    pub rms_norm_add: Kernel,
    pub silu_mul: Kernel,
    pub gelu_mul: Kernel,
    pub gelu_tanh_mul: Kernel,
    pub gather_rows: Kernel,
    pub sample_scan: Kernel,
    pub sample: Kernel,
    pub token_state_reset: Kernel,
    /// Small matrix products, in the order of [`Products::ALL`].
    pub products: Vec<Kernel>,
    /// Products of many rows, in the order of [`WIDE`]; none but on Hopper.
    pub wide: Vec<Kernel>,
    /// Products with what surrounds them, in the order of [`kernels::FUSED`].
    pub fused: Vec<Kernel>,
    /// All products between two attentions; `None` where the card cannot ([`super::fusion::Abilities`]).
    pub chain: Option<ChainKernel>,
    pub by_head_dim: BTreeMap<u32, AttentionKernels>,
}

#[derive(Debug)]
pub struct ChainKernel {
    kernel: Kernel,
    /// Clusters that the card holds at a time.
    resident: u32,
}

impl ChainKernel {
    /// # Errors
    /// [`CudaError::Launch`] where not even one cluster runs: its blocks would wait for ever.
    pub fn new(kernel: Kernel) -> Result<Self, CudaError> {
        match kernel.clusters_resident(&kernels::chain_block())? {
            0 => {
                let what = "the card has no room for a cluster of 8 blocks".to_owned();
                Err(CudaError::Launch { kernel: kernel.name().to_owned(), what })
            }
            resident => Ok(Self { kernel, resident }),
        }
    }

    /// # Safety
    /// As [`Kernel::launch`].
    pub unsafe fn launch(&self, sizes: &ChainSizes, args: &[Arg]) -> Result<(), CudaError> {
        // SAFETY: passed on from the caller.
        unsafe { self.kernel.launch(&sizes.geometry(self.resident), args) }
    }
}

#[derive(Debug)]
pub struct AttentionKernels {
    pub rope: Kernel,
    /// By warps a block: those that the card has shared memory for.
    pub decode: BTreeMap<u32, Kernel>,
    /// The same for few sequences, beside products that want L1.
    pub decode_few: BTreeMap<u32, Kernel>,
    pub decode_shape: Decode,
    pub prefill: Kernel,
    pub prefill_shape: Prefill,
}

/// Machine code of every kernel file a model needs, by file name and head dimension.
#[derive(Debug)]
pub struct Cubins(HashMap<(&'static str, Option<u32>), Vec<u8>>);

impl Cubins {
    /// Compiles for `device`, or finds what an earlier start compiled.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] for a head dimension without kernels, or what the compiler says.
    pub fn build(device: &Device, layers: &[HeadSizes], cache: Option<&DiskCache>) -> Result<Self, CudaError> {
        let mut head_dims: Vec<u32> = layers.iter().map(|l| l.head_dim).collect();
        head_dims.sort_unstable();
        head_dims.dedup();
        if let Some(other) = head_dims.iter().find(|d| !HEAD_DIMS.contains(d)) {
            return Err(CudaError::Unsupported { op: "Attention", what: format!("head_dim {other}") });
        }
        let variants = |file: &'static KernelFile| -> Vec<(&'static KernelFile, Option<u32>)> {
            file.variants_for(&head_dims, device.compute_capability).into_iter().map(|d| (file, d)).collect()
        };
        let wanted: Vec<(&KernelFile, Option<u32>)> = FILES.iter().flat_map(variants).collect();
        let sources: Vec<_> = wanted.iter().map(|(f, d)| f.source(*d, device.compute_capability)).collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let cubins = compile_all(&sources, &device.arch(), cache, threads)?;
        Ok(Self(wanted.iter().map(|(f, d)| (f.name, *d)).zip(cubins).collect()))
    }
}

impl KernelSet {
    /// Those that compute products.
    pub fn of_products(&self) -> ProductKernels {
        ProductKernels {
            few_rows: self.products.clone(),
            many_rows: self.wide.clone(),
            silu_mul: self.silu_mul.clone(),
            ropes: self.by_head_dim.iter().map(|(&head_dim, of)| (head_dim, of.rope.clone())).collect(),
        }
    }

    pub fn load(device: &Arc<Device>, cubins: &Cubins) -> Result<Self, CudaError> {
        let mut modules = HashMap::new();
        for (key, cubin) in &cubins.0 {
            modules.insert(*key, Module::load(device, cubin)?);
        }
        let get = |file: &'static str, head_dim: Option<u32>, entry: &str, shared_bytes: u32| match modules
            .get(&(file, head_dim))
        {
            Some(module) => module.kernel(entry, shared_bytes),
            None => Err(CudaError::Unsupported { op: "kernel", what: format!("{file} for head_dim {head_dim:?}") }),
        };
        let mut by_head_dim = BTreeMap::new();
        for head_dim in modules.keys().filter_map(|(_, d)| *d) {
            let d = Some(head_dim);
            let shape = Prefill::new(head_dim, device.compute_capability, device.multiprocessors);
            let (prefill, shared_bytes) = (shape.entry(), shape.geometry(1, 1, head_dim).shared_bytes);
            if shared_bytes > device.shared_memory_per_block_bytes {
                let what = format!("prefill of head_dim {head_dim}: {shared_bytes} bytes of shared memory a block");
                return Err(CudaError::Unsupported { op: "Attention", what });
            }
            let decode_shape = device.decode_attention(head_dim);
            let decode_warps = Decode::WARPS.into_iter().filter(|&warps| decode_shape.takes(warps));
            let decode_kernel = |warps| {
                let kernel = get("attn_decode", d, Decode::entry(warps), decode_shape.shared_bytes(warps))?;
                Ok::<_, CudaError>((warps, kernel))
            };
            // How memory is divided belongs to a loaded function: this one is loaded twice.
            let few = cubins.0.get(&("attn_decode", d)).map(|cubin| Module::load(device, cubin)).transpose()?;
            let decode_few = |warps| {
                let Some(module) = &few else { return decode_kernel(warps) };
                let kernel = module.kernel(Decode::entry(warps), decode_shape.shared_bytes(warps))?;
                Ok((warps, kernel.beside_l1()?))
            };
            by_head_dim.insert(
                head_dim,
                AttentionKernels {
                    rope: get("qk_norm_rope_kv_write", d, "qk_norm_rope_kv_write", 0)?,
                    decode: decode_warps.clone().map(decode_kernel).collect::<Result<_, _>>()?,
                    decode_few: decode_warps.map(decode_few).collect::<Result<_, _>>()?,
                    decode_shape,
                    prefill: get(prefill, d, prefill, shared_bytes)?,
                    prefill_shape: shape,
                },
            );
        }
        Ok(Self {
            embed: get("embed", None, "embed", 0)?,
            rms_norm: get("rms_norm", None, "rms_norm", 0)?,
            rms_norm_add: get("rms_norm", None, "rms_norm_add", 0)?,
            silu_mul: get("gated_act", None, "silu_mul", 0)?,
            gelu_mul: get("gated_act", None, "gelu_mul", 0)?,
            gelu_tanh_mul: get("gated_act", None, "gelu_tanh_mul", 0)?,
            gather_rows: get("gather", None, "gather_rows", 0)?,
            sample_scan: get("sample_scan", None, "sample_scan", 0)?,
            sample: get("sample", None, "sample", 0)?,
            token_state_reset: get("token_state", None, "token_state_reset", 0)?,
            products: Products::ALL
                .iter()
                .map(|p| get("gemv", None, p.entry, 0)?.beside_l1())
                .collect::<Result<_, _>>()?,
            wide: match modules.contains_key(&("wide_linear", None)) {
                true => {
                    WIDE.iter().map(|w| get(w.file(), None, w.entry, w.shared_bytes())).collect::<Result<_, _>>()?
                }
                false => Vec::new(),
            },
            fused: kernels::FUSED
                .iter()
                .map(|f| {
                    let kernel = get(f.file(), None, f.entry, f.shared_bytes())?;
                    if f.reads_through_l1() { kernel.beside_l1() } else { Ok(kernel) }
                })
                .collect::<Result<_, _>>()?,
            chain: match device.abilities().chains {
                true => {
                    let shared_bytes = kernels::chain_block().shared_bytes;
                    Some(ChainKernel::new(get("chain_linear", None, "chain_linear", shared_bytes)?)?)
                }
                false => None,
            },
            by_head_dim,
        })
    }
}
