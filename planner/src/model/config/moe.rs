//! Experts: how many, how large, which layers have them.

use super::base::Base;
use super::{ConfigError, limits};
use crate::model::{Ffn, MlpSpec, MoeSpec, Router};

/// Names for the number of routed experts.
pub(super) const NUMBER: [&str; 5] =
    ["n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_moe_experts"];

impl Base<'_> {
    /// Routed experts alone, under any of the names for their number, choice and width.
    pub(super) fn experts(&self) -> Result<MoeSpec, ConfigError> {
        const TOP_K: [&str; 6] =
            ["num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "experts_per_token"];
        const SIZE: [&str; 3] = ["moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size"];
        let num_experts = self.text.required_uint(&NUMBER, limits::EXPERTS)?;
        let top_k = match self.same(&TOP_K, 1..=num_experts)? {
            Some(top_k) => top_k,
            None => self.text.required_uint(&TOP_K, 1..=num_experts)?,
        };
        let size = self.same(&SIZE, limits::INTERMEDIATE)?;
        let expert = match size {
            Some(size) => self.mlp_of(size)?,
            None => self.mlp()?,
        };
        Ok(MoeSpec {
            num_experts,
            top_k,
            expert: MlpSpec { bias: false, ..expert },
            shared: None,
            shared_gate: false,
            dense: None,
            latent_size: None,
            router: Router::Plain,
        })
    }

    /// Shared experts of the routed ones' width (`n_shared_experts` of them), as DeepSeek and GLM have it.
    pub(super) fn with_shared(&self, moe: MoeSpec) -> Result<MoeSpec, ConfigError> {
        let count = self.get(&["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 0..=64)?;
        let width = count.unwrap_or(0) * moe.expert.intermediate_size;
        let shared = (width > 0).then_some(MlpSpec { intermediate_size: width, ..moe.expert });
        Ok(MoeSpec { shared, ..moe })
    }

    /// The MLP of layers without experts. Files of models without such layers do not state its width.
    pub(super) fn mlp_or(&self, moe: &MoeSpec) -> Result<MlpSpec, ConfigError> {
        let stated = self.text.value("intermediate_size").is_some();
        if stated { self.mlp() } else { Ok(MlpSpec { bias: false, ..moe.expert }) }
    }

    /// `mlp_layer_types` (transformers 5), a word for each layer: true where it has experts.
    fn listed_experts(&self) -> Result<Option<Vec<bool>>, ConfigError> {
        const FIELD: &str = "mlp_layer_types";
        let Some(words) = self.words(FIELD)? else { return Ok(None) };
        let experts = |word: &str| match word {
            "dense" => Ok(false),
            // The first layers of DeepSeek-V4 pick experts by a hash of the token.
            "sparse" | "moe" | "hash_moe" => Ok(true),
            other => Err(self.text.unsupported(FIELD, other, "supported: dense, sparse, moe, hash_moe")),
        };
        words.into_iter().map(experts).collect::<Result<_, _>>().map(Some)
    }

    /// Dense in the first layers, then experts in every `moe_layer_freq`-th, or where a list says so.
    pub(super) fn dense_then_experts(&self, dense: MlpSpec, moe: MoeSpec) -> Result<Vec<Ffn>, ConfigError> {
        const FREQUENCY: &str = "moe_layer_freq";
        let listed = match self.text.value(FREQUENCY) {
            Some(value) if value.is_array() => self.flags(&self.text, FREQUENCY)?,
            _ => self.listed_experts()?,
        };
        let names = ["first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"];
        let first = self.get(&names, 0..=self.layers)?.unwrap_or(0);
        let every = match &listed {
            Some(_) => 1,
            None => self.get(&[FREQUENCY, "moe_layer_interval"], limits::LAYERS)?.unwrap_or(1),
        };
        let has_experts = |i: u64| match &listed {
            Some(listed) => listed[i as usize],
            None => i >= first && i.is_multiple_of(every),
        };
        Ok((0..self.layers).map(|i| if has_experts(i) { Ffn::Experts(moe) } else { Ffn::Dense(dense) }).collect())
    }
}
