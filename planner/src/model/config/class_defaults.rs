//! What transformers leaves out of a nested object: fields that equal the defaults of the language model's class. A file
//! of its own states them all. From the configuration classes of transformers 5.24.

type Defaults = &'static [(&'static str, u64)];

const LLAMA: Defaults = &[
    ("hidden_size", 4096),
    ("intermediate_size", 11_008),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("max_position_embeddings", 2048),
    ("vocab_size", 32_000),
];
const MISTRAL: Defaults = &[
    ("hidden_size", 4096),
    ("intermediate_size", 14_336),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 8),
    ("max_position_embeddings", 131_072),
    ("vocab_size", 32_000),
];
const MINISTRAL3: Defaults = &[
    ("hidden_size", 4096),
    ("intermediate_size", 14_336),
    ("num_hidden_layers", 34),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 8),
    ("head_dim", 128),
    ("max_position_embeddings", 262_144),
    ("vocab_size", 131_072),
];
const MIXTRAL: Defaults = &[
    ("hidden_size", 4096),
    ("intermediate_size", 14_336),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 8),
    ("num_local_experts", 8),
    ("num_experts_per_tok", 2),
    ("max_position_embeddings", 131_072),
    ("vocab_size", 32_000),
];
const QWEN2: Defaults = &[
    ("hidden_size", 4096),
    ("intermediate_size", 22_016),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 32),
    ("max_position_embeddings", 32_768),
    ("vocab_size", 151_936),
];
const QWEN3: Defaults = &[
    ("hidden_size", 4096),
    ("intermediate_size", 22_016),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 32),
    ("head_dim", 128),
    ("max_position_embeddings", 32_768),
    ("vocab_size", 151_936),
];
const GEMMA: Defaults = &[
    ("hidden_size", 3072),
    ("intermediate_size", 24_576),
    ("num_hidden_layers", 28),
    ("num_attention_heads", 16),
    ("num_key_value_heads", 16),
    ("head_dim", 256),
    ("max_position_embeddings", 8192),
    ("vocab_size", 256_000),
];
const GEMMA2: Defaults = &[
    ("hidden_size", 2304),
    ("intermediate_size", 9216),
    ("num_hidden_layers", 26),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("head_dim", 256),
    ("max_position_embeddings", 8192),
    ("vocab_size", 256_000),
];
const GEMMA4: Defaults = &[
    ("hidden_size", 2304),
    ("intermediate_size", 9216),
    ("num_hidden_layers", 30),
    ("num_attention_heads", 8),
    ("num_key_value_heads", 4),
    ("head_dim", 256),
    ("max_position_embeddings", 131_072),
    ("sliding_window", 512),
    ("vocab_size", 262_144),
];
const PHI3: Defaults = &[
    ("hidden_size", 3072),
    ("intermediate_size", 8192),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("max_position_embeddings", 4096),
    ("vocab_size", 32_064),
];
const COHERE2: Defaults = &[
    ("hidden_size", 8192),
    ("intermediate_size", 22_528),
    ("num_hidden_layers", 40),
    ("num_attention_heads", 64),
    ("max_position_embeddings", 8192),
    ("sliding_window", 4096),
    ("vocab_size", 256_000),
];
const LFM2: Defaults = &[
    ("hidden_size", 2560),
    ("intermediate_size", 12_288),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 8),
    ("conv_L_cache", 3),
    ("max_position_embeddings", 128_000),
    ("vocab_size", 65_536),
];
const EXAONE4: Defaults = &[
    ("hidden_size", 4096),
    ("intermediate_size", 16_384),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 32),
    ("max_position_embeddings", 2048),
    ("sliding_window", 4096),
    ("vocab_size", 102_400),
];

/// For the `model_type` of a nested object; nothing for classes that are not nested in published files.
pub(super) fn of(model_type: &str) -> Defaults {
    match model_type {
        "llama" => LLAMA,
        "mistral" => MISTRAL,
        "ministral3" => MINISTRAL3,
        "mixtral" => MIXTRAL,
        "qwen2" => QWEN2,
        "qwen3" => QWEN3,
        "gemma" => GEMMA,
        "gemma2" => GEMMA2,
        "gemma4_text" => GEMMA4,
        "phi3" => PHI3,
        "cohere2" => COHERE2,
        "lfm2" => LFM2,
        "exaone4" => EXAONE4,
        _ => &[],
    }
}
