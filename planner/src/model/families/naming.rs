//! How families name their tensors: Llama's names, and what each family has instead.
//!
//! Where one checkpoint tensor holds several projections (`fused_qkv`), ranks cut it as the separate ones.

use crate::model::Family;

#[derive(Debug, Clone, Copy)]
pub(super) struct Naming {
    pub embed: &'static str,
    /// Learned positions.
    pub positions: &'static str,
    pub layers: &'static str,
    pub final_norm: &'static str,
    pub head: &'static str,
    /// Norms of a layer as wide as the model: before the mixer, before the FFN, then any others.
    pub norms: &'static [&'static str],
    /// Prefix of the mixer within a layer.
    pub mixer: &'static str,
    /// q, k, v: or one name for all three.
    pub qkv: &'static [&'static str],
    pub output: &'static str,
    pub mlp: &'static str,
    /// gate, up, down; gate and up may be one.
    pub mlp_parts: [&'static str; 3],
    pub router: &'static str,
    pub experts: &'static str,
    pub expert_parts: [&'static str; 3],
    pub shared: &'static str,
}

const LLAMA: Naming = Naming {
    embed: "model.embed_tokens",
    positions: "model.embed_positions",
    layers: "model.layers",
    final_norm: "model.norm",
    head: "lm_head",
    norms: &["input_layernorm", "post_attention_layernorm"],
    mixer: "self_attn",
    qkv: &["q_proj", "k_proj", "v_proj"],
    output: "o_proj",
    mlp: "mlp",
    mlp_parts: ["gate_proj", "up_proj", "down_proj"],
    router: "mlp.gate",
    experts: "mlp.experts.*",
    expert_parts: ["gate_proj", "up_proj", "down_proj"],
    shared: "mlp.shared_experts",
};

const SANDWICH: &[&str] =
    &["input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"];
const GPT2: Naming = Naming {
    embed: "transformer.wte",
    positions: "transformer.wpe",
    layers: "transformer.h",
    final_norm: "transformer.ln_f",
    norms: &["ln_1", "ln_2"],
    mixer: "attn",
    qkv: &["c_attn"],
    output: "c_proj",
    mlp_parts: ["", "c_fc", "c_proj"],
    ..LLAMA
};
const FALCON: Naming = Naming {
    embed: "transformer.word_embeddings",
    layers: "transformer.h",
    final_norm: "transformer.ln_f",
    mixer: "self_attention",
    qkv: &["query_key_value"],
    output: "dense",
    mlp_parts: ["", "dense_h_to_4h", "dense_4h_to_h"],
    ..LLAMA
};

pub(super) fn naming(family: Family) -> Naming {
    match family {
        Family::Afmoe => Naming {
            norms: &["input_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "post_mlp_layernorm"],
            router: "mlp.router.gate",
            ..LLAMA
        },
        Family::Gemma3n | Family::Gemma4 | Family::Gemma2 | Family::Gemma3 => {
            Naming { norms: SANDWICH, router: "router.proj", experts: "experts.*", ..LLAMA }
        }
        Family::Glm4 => Naming {
            norms: &["input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"],
            ..LLAMA
        },
        Family::Qwen => Naming { mlp_parts: ["w2", "w1", "c_proj"], ..GPT2 },
        Family::Gpt2 | Family::GptBigCode => GPT2,
        Family::GptJ => Naming { norms: &["ln_1"], qkv: &["q_proj", "k_proj", "v_proj"], ..GPT2 },
        Family::GptNeoX => Naming {
            embed: "gpt_neox.embed_in",
            layers: "gpt_neox.layers",
            final_norm: "gpt_neox.final_layer_norm",
            head: "embed_out",
            mixer: "attention",
            ..FALCON
        },
        Family::Falcon | Family::Bloom => FALCON,
        Family::Mpt => Naming {
            embed: "transformer.wte",
            positions: "transformer.wpe",
            layers: "transformer.blocks",
            final_norm: "transformer.norm_f",
            norms: &["norm_1", "norm_2"],
            mixer: "attn",
            qkv: &["Wqkv"],
            output: "out_proj",
            mlp: "ffn",
            mlp_parts: ["", "up_proj", "down_proj"],
            ..LLAMA
        },
        Family::Dbrx => Naming {
            embed: "transformer.wte",
            layers: "transformer.blocks",
            final_norm: "transformer.norm_f",
            norms: &["norm_attn_norm.norm_1", "norm_attn_norm.norm_2"],
            mixer: "norm_attn_norm.attn",
            qkv: &["Wqkv"],
            output: "out_proj",
            router: "ffn.router.layer",
            experts: "ffn.experts.mlp.*",
            expert_parts: ["w1", "v1", "w2"],
            ..LLAMA
        },
        Family::Opt => Naming {
            embed: "model.decoder.embed_tokens",
            positions: "model.decoder.embed_positions",
            layers: "model.decoder.layers",
            final_norm: "model.decoder.final_layer_norm",
            norms: &["self_attn_layer_norm", "final_layer_norm"],
            output: "out_proj",
            mlp: "",
            mlp_parts: ["", "fc1", "fc2"],
            ..LLAMA
        },
        Family::Phi => Naming { norms: &["input_layernorm"], output: "dense", mlp_parts: ["", "fc1", "fc2"], ..LLAMA },
        Family::StarCoder2 => Naming { mlp_parts: ["", "c_fc", "c_proj"], ..LLAMA },
        Family::Baichuan => Naming { qkv: &["W_pack"], ..LLAMA },
        Family::Phi3 => Naming { qkv: &["qkv_proj"], mlp_parts: ["gate_up_proj", "", "down_proj"], ..LLAMA },
        Family::Phi3Small => {
            Naming { qkv: &["query_key_value"], output: "dense", mlp_parts: ["up_proj", "", "down_proj"], ..LLAMA }
        }
        Family::ChatGlm => Naming {
            embed: "transformer.embedding.word_embeddings",
            layers: "transformer.encoder.layers",
            final_norm: "transformer.encoder.final_layernorm",
            head: "transformer.output_layer",
            mixer: "self_attention",
            qkv: &["query_key_value"],
            output: "dense",
            mlp_parts: ["dense_h_to_4h", "", "dense_4h_to_h"],
            ..LLAMA
        },
        Family::InternLm2 => Naming {
            embed: "model.tok_embeddings",
            head: "output",
            norms: &["attention_norm", "ffn_norm"],
            mixer: "attention",
            qkv: &["wqkv"],
            output: "wo",
            mlp: "feed_forward",
            mlp_parts: ["w1", "w3", "w2"],
            ..LLAMA
        },
        Family::Exaone => Naming {
            embed: "transformer.wte",
            layers: "transformer.h",
            final_norm: "transformer.ln_f",
            norms: &["ln_1", "ln_2"],
            mixer: "attn.attention",
            output: "out_proj",
            mlp_parts: ["c_fc_0", "c_fc_1", "c_proj"],
            ..LLAMA
        },
        Family::Cohere => Naming { norms: &["input_layernorm"], ..LLAMA },
        Family::Olmo => Naming { norms: &[], ..LLAMA },
        Family::Olmo2 | Family::Exaone4 => {
            Naming { norms: &["post_attention_layernorm", "post_feedforward_layernorm"], ..LLAMA }
        }
        Family::Nemotron | Family::Arcee => Naming { mlp_parts: ["", "up_proj", "down_proj"], ..LLAMA },
        Family::NemotronH => Naming {
            embed: "backbone.embeddings",
            layers: "backbone.layers",
            final_norm: "backbone.norm_f",
            norms: &["norm"],
            mixer: "mixer",
            mlp: "mixer",
            mlp_parts: ["", "up_proj", "down_proj"],
            router: "mixer.gate",
            experts: "mixer.experts.*",
            expert_parts: ["", "up_proj", "down_proj"],
            shared: "mixer.shared_experts",
            ..LLAMA
        },
        Family::Mamba | Family::Mamba2 => Naming {
            embed: "backbone.embeddings",
            layers: "backbone.layers",
            final_norm: "backbone.norm_f",
            norms: &["norm"],
            mixer: "mixer",
            ..LLAMA
        },
        Family::Jamba => Naming {
            norms: &["input_layernorm", "pre_ff_layernorm"],
            mlp: "feed_forward",
            router: "feed_forward.router",
            experts: "feed_forward.experts.*",
            final_norm: "model.final_layernorm",
            ..LLAMA
        },
        Family::Bamba => Naming {
            norms: &["input_layernorm", "pre_ff_layernorm"],
            mlp: "feed_forward",
            final_norm: "model.final_layernorm",
            ..LLAMA
        },
        Family::FalconH1 => Naming { norms: &["input_layernorm", "pre_ff_layernorm"], mlp: "feed_forward", ..LLAMA },
        Family::Mixtral | Family::PhiMoe | Family::MiniMax | Family::MiniMaxM2 => Naming {
            router: "block_sparse_moe.gate",
            experts: "block_sparse_moe.experts.*",
            expert_parts: ["w1", "w3", "w2"],
            ..LLAMA
        },
        Family::MiniMaxM3 => Naming {
            router: "block_sparse_moe.gate",
            experts: "block_sparse_moe.experts.*",
            expert_parts: ["w1", "w3", "w2"],
            shared: "block_sparse_moe.shared_experts",
            ..LLAMA
        },
        Family::KimiLinear => Naming {
            router: "block_sparse_moe.gate",
            experts: "block_sparse_moe.experts.*",
            expert_parts: ["w1", "w3", "w2"],
            shared: "block_sparse_moe.shared_experts",
            ..LLAMA
        },
        Family::GraniteMoe | Family::GraniteMoeHybrid => Naming {
            router: "block_sparse_moe.router.layer",
            experts: "block_sparse_moe.*",
            expert_parts: ["input_linear", "", "output_linear"],
            shared: "shared_mlp",
            ..LLAMA
        },
        Family::Qwen2Moe | Family::Qwen3Next => Naming { shared: "mlp.shared_expert", ..LLAMA },
        Family::Llama4 => Naming {
            mlp: "feed_forward",
            router: "feed_forward.router",
            experts: "feed_forward.experts.*",
            shared: "feed_forward.shared_expert",
            ..LLAMA
        },
        Family::GptOss => Naming { router: "mlp.router", expert_parts: ["gate_up_proj", "", "down_proj"], ..LLAMA },
        Family::Hunyuan => Naming { router: "mlp.gate.wg", shared: "mlp.shared_mlp", ..LLAMA },
        Family::Step3p5 => Naming { router: "moe.gate", experts: "moe.*", shared: "share_expert", ..LLAMA },
        Family::DeepseekV4 => Naming {
            embed: "embed",
            layers: "layers",
            final_norm: "norm",
            head: "head",
            norms: &["attn_norm", "ffn_norm"],
            mixer: "attn",
            router: "ffn.gate",
            experts: "ffn.experts.*",
            expert_parts: ["w1", "w3", "w2"],
            shared: "ffn.shared_experts",
            ..LLAMA
        },
        Family::Lfm2 => Naming {
            norms: &["operator_norm", "ffn_norm"],
            output: "out_proj",
            mlp: "feed_forward",
            mlp_parts: ["w1", "w3", "w2"],
            router: "feed_forward.gate",
            experts: "feed_forward.experts.*",
            expert_parts: ["w1", "w3", "w2"],
            ..LLAMA
        },
        Family::Grok => Naming {
            norms: &["pre_attn_norm", "pre_moe_norm", "post_attn_norm", "post_moe_norm"],
            router: "block_sparse_moe.gate",
            experts: "block_sparse_moe.experts.*",
            expert_parts: ["w1", "w3", "w2"],
            ..LLAMA
        },
        Family::BertLike => Naming {
            embed: "embeddings.word_embeddings",
            positions: "embeddings.position_embeddings",
            layers: "encoder.layer",
            final_norm: "embeddings.LayerNorm",
            norms: &["attention.output.LayerNorm", "output.LayerNorm"],
            mixer: "attention",
            qkv: &["self.query", "self.key", "self.value"],
            output: "output.dense",
            mlp: "",
            mlp_parts: ["gate.dense", "intermediate.dense", "output.dense"],
            ..LLAMA
        },
        Family::ModernBert => Naming {
            embed: "embeddings.tok_embeddings",
            layers: "layers",
            final_norm: "final_norm",
            norms: &["attn_norm", "mlp_norm"],
            mixer: "attn",
            qkv: &["Wqkv"],
            output: "Wo",
            mlp_parts: ["Wi", "", "Wo"],
            ..LLAMA
        },
        Family::NomicBert => Naming {
            embed: "embeddings.word_embeddings",
            layers: "encoder.layers",
            final_norm: "emb_ln",
            norms: &["norm1", "norm2"],
            mixer: "attn",
            qkv: &["Wqkv"],
            output: "out_proj",
            mlp_parts: ["fc12", "fc11", "fc2"],
            ..LLAMA
        },
        Family::DistilBert => Naming {
            embed: "embeddings.word_embeddings",
            positions: "embeddings.position_embeddings",
            layers: "transformer.layer",
            final_norm: "embeddings.LayerNorm",
            norms: &["sa_layer_norm", "output_layer_norm"],
            mixer: "attention",
            qkv: &["q_lin", "k_lin", "v_lin"],
            output: "out_lin",
            mlp: "ffn",
            mlp_parts: ["", "lin1", "lin2"],
            ..LLAMA
        },
        _ => LLAMA,
    }
}
