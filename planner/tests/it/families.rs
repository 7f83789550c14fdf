//! Families beyond the corpus: their files in short, against published parameters and caches worked out by hand.
#![allow(clippy::unwrap_used)]

use mserve_planner::memory::{KvLayout, SlidingLayers};
use mserve_planner::model::{DType, families, parse_config, work};

/// Name, config.json in short, parameters (published), bytes of a token at TP 1 in two bytes, of a sequence's states.
struct Case {
    name: &'static str,
    config: &'static str,
    parameters: f64,
    active: Option<f64>,
    bytes_per_token: u64,
    bytes_per_sequence: u64,
}

const fn case(name: &'static str, config: &'static str, parameters: f64, bytes_per_token: u64) -> Case {
    Case { name, config, parameters, active: None, bytes_per_token, bytes_per_sequence: 0 }
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    case("Falcon-7B", r#"{"architectures":["FalconForCausalLM"],"hidden_size":4544,"num_hidden_layers":32,"num_attention_heads":71,"multi_query":true,"parallel_attn":true,"bias":false,"vocab_size":65024,"max_position_embeddings":2048,"new_decoder_architecture":false,"torch_dtype":"bfloat16"}"#, 6_921_720_704.0, 32 * 2 * 64 * 2),
    case("Falcon-40B", r#"{"architectures":["FalconForCausalLM"],"hidden_size":8192,"num_hidden_layers":60,"num_attention_heads":128,"num_kv_heads":8,"new_decoder_architecture":true,"bias":false,"vocab_size":65024,"max_position_embeddings":2048,"torch_dtype":"bfloat16"}"#, 41_303_293_952.0, 60 * 2 * 8 * 64 * 2),
    case("MPT-7B", r#"{"architectures":["MPTForCausalLM"],"d_model":4096,"n_heads":32,"n_layers":32,"expansion_ratio":4,"no_bias":true,"vocab_size":50432,"max_seq_len":2048,"attn_config":{"alibi":true},"torch_dtype":"bfloat16"}"#, 6_649_286_656.0, 32 * 2 * 4096 * 2),
    case("BLOOM-7B1", r#"{"architectures":["BloomForCausalLM"],"hidden_size":4096,"n_head":32,"n_layer":30,"seq_length":2048,"vocab_size":250880,"torch_dtype":"float16"}"#, 7_069_016_064.0, 30 * 2 * 4096 * 2),
    case("BLOOM-176B", r#"{"architectures":["BloomForCausalLM"],"n_embed":14336,"num_attention_heads":112,"n_layer":70,"seq_length":2048,"vocab_size":250880,"torch_dtype":"bfloat16"}"#, 176_247_271_424.0, 70 * 2 * 14336 * 2),
    case("OPT-6.7B", r#"{"architectures":["OPTForCausalLM"],"hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":32,"ffn_dim":16384,"word_embed_proj_dim":4096,"max_position_embeddings":2048,"vocab_size":50272,"torch_dtype":"float16","activation_function":"relu"}"#, 6_658_473_984.0, 32 * 2 * 4096 * 2),
    case("GPT-2", r#"{"architectures":["GPT2LMHeadModel"],"n_embd":768,"n_head":12,"n_layer":12,"n_positions":1024,"vocab_size":50257}"#, 124_439_808.0, 12 * 2 * 768 * 2),
    case("GPT-J-6B", r#"{"architectures":["GPTJForCausalLM"],"n_embd":4096,"n_head":16,"n_layer":28,"n_positions":2048,"rotary_dim":64,"vocab_size":50400,"tie_word_embeddings":false}"#, 6_050_882_784.0, 28 * 2 * 4096 * 2),
    case("GPT-NeoX-20B", r#"{"architectures":["GPTNeoXForCausalLM"],"hidden_size":6144,"num_hidden_layers":44,"num_attention_heads":64,"intermediate_size":24576,"rotary_pct":0.25,"max_position_embeddings":2048,"vocab_size":50432,"torch_dtype":"float16","tie_word_embeddings":false}"#, 20_554_567_680.0, 44 * 2 * 6144 * 2),
    case("StarCoder", r#"{"architectures":["GPTBigCodeForCausalLM"],"n_embd":6144,"n_head":48,"n_layer":40,"n_inner":24576,"n_positions":8192,"multi_query":true,"vocab_size":49152}"#, 15_517_456_384.0, 40 * 2 * 128 * 2),
    case("StarCoder2-15B", r#"{"architectures":["Starcoder2ForCausalLM"],"hidden_size":6144,"num_hidden_layers":40,"num_attention_heads":48,"num_key_value_heads":4,"intermediate_size":24576,"hidden_act":"gelu_pytorch_tanh","max_position_embeddings":16384,"use_bias":true,"vocab_size":49152,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#, 15_957_889_024.0, 40 * 2 * 4 * 128 * 2),
    case("Command-R", r#"{"architectures":["CohereForCausalLM"],"hidden_size":8192,"num_hidden_layers":40,"num_attention_heads":64,"num_key_value_heads":64,"intermediate_size":22528,"max_position_embeddings":8192,"model_max_length":131072,"use_qk_norm":false,"vocab_size":256000,"torch_dtype":"float16"}"#, 34_980_831_232.0, 40 * 2 * 8192 * 2),
    case("Command-R7B", r#"{"architectures":["Cohere2ForCausalLM"],"hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"head_dim":128,"intermediate_size":14336,"max_position_embeddings":8192,"sliding_window":4096,"sliding_window_pattern":4,"use_qk_norm":false,"vocab_size":256000,"torch_dtype":"bfloat16"}"#, 8_028_033_024.0, 32 * 2 * 8 * 128 * 2),
    case("Granite-3.1-8B", r#"{"architectures":["GraniteForCausalLM"],"hidden_size":4096,"num_hidden_layers":40,"num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":12800,"max_position_embeddings":131072,"vocab_size":49155,"tie_word_embeddings":true,"torch_dtype":"bfloat16"}"#, 8_170_848_256.0, 40 * 2 * 8 * 128 * 2),
    Case { name: "Granite-4.0-H-Small", config: r#"{"architectures":["GraniteMoeHybridForCausalLM"],"hidden_size":4096,"num_hidden_layers":40,"num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":768,"shared_intermediate_size":1536,"num_local_experts":72,"num_experts_per_tok":10,"mamba_n_heads":128,"mamba_d_head":64,"mamba_n_groups":1,"mamba_d_state":128,"mamba_d_conv":4,"mamba_expand":2,"mamba_conv_bias":true,"mamba_proj_bias":false,"max_position_embeddings":131072,"vocab_size":100352,"tie_word_embeddings":true,"torch_dtype":"bfloat16","layer_types":["mamba","mamba","mamba","mamba","mamba","attention","mamba","mamba","mamba","mamba","mamba","mamba","mamba","mamba","mamba","attention","mamba","mamba","mamba","mamba","mamba","mamba","mamba","mamba","mamba","attention","mamba","mamba","mamba","mamba","mamba","mamba","mamba","mamba","mamba","attention","mamba","mamba","mamba","mamba"]}"#,
        parameters: 32_207_339_520.0, active: Some(8.8e9), bytes_per_token: 4 * 2 * 8 * 128 * 2, bytes_per_sequence: 36 * (128 * 64 * 128 * 2 + (8192 + 256) * 3 * 2) },
    Case { name: "Jamba-v0.1", config: r#"{"architectures":["JambaForCausalLM"],"hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":14336,"attn_layer_period":8,"attn_layer_offset":4,"expert_layer_period":2,"expert_layer_offset":1,"num_experts":16,"num_experts_per_tok":2,"mamba_d_state":16,"mamba_d_conv":4,"mamba_expand":2,"mamba_dt_rank":256,"mamba_conv_bias":true,"mamba_proj_bias":false,"max_position_embeddings":262144,"vocab_size":65536,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 51_570_323_328.0, active: Some(12.1e9), bytes_per_token: 4 * 2 * 8 * 128 * 2, bytes_per_sequence: 28 * (8192 * 16 * 2 + 8192 * 3 * 2) },
    Case { name: "Mamba-2.8B", config: r#"{"architectures":["MambaForCausalLM"],"hidden_size":2560,"num_hidden_layers":64,"intermediate_size":5120,"state_size":16,"conv_kernel":4,"time_step_rank":160,"use_bias":false,"use_conv_bias":true,"vocab_size":50280,"max_position_embeddings":1048576,"torch_dtype":"float32"}"#,
        parameters: 2_768_345_600.0, active: None, bytes_per_token: 0, bytes_per_sequence: 64 * (5120 * 16 * 2 + 5120 * 3 * 2) },
    Case { name: "Mamba2-Codestral-7B", config: r#"{"architectures":["Mamba2ForCausalLM"],"hidden_size":4096,"num_hidden_layers":64,"num_heads":128,"head_dim":64,"n_groups":8,"state_size":128,"conv_kernel":4,"expand":2,"use_bias":false,"use_conv_bias":true,"vocab_size":32768,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 7_285_403_648.0, active: None, bytes_per_token: 0, bytes_per_sequence: 64 * (128 * 64 * 128 * 2 + (8192 + 2048) * 3 * 2) },
    Case { name: "Qwen1.5-MoE-A2.7B", config: r#"{"architectures":["Qwen2MoeForCausalLM"],"hidden_size":2048,"num_hidden_layers":24,"num_attention_heads":16,"num_key_value_heads":16,"intermediate_size":5632,"moe_intermediate_size":1408,"shared_expert_intermediate_size":5632,"num_experts":60,"num_experts_per_tok":4,"decoder_sparse_step":1,"max_position_embeddings":8192,"vocab_size":151936,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 14_315_784_192.0, active: Some(2.7e9), bytes_per_token: 24 * 2 * 16 * 128 * 2, bytes_per_sequence: 0 },
    Case { name: "Mixtral-8x22B", config: r#"{"architectures":["MixtralForCausalLM"],"hidden_size":6144,"num_hidden_layers":56,"num_attention_heads":48,"num_key_value_heads":8,"intermediate_size":16384,"num_local_experts":8,"num_experts_per_tok":2,"max_position_embeddings":65536,"vocab_size":32000,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 140_620_634_112.0, active: Some(39.1e9), bytes_per_token: 56 * 2 * 8 * 128 * 2, bytes_per_sequence: 0 },
    Case { name: "DeepSeek-V2", config: r#"{"architectures":["DeepseekV2ForCausalLM"],"hidden_size":5120,"num_hidden_layers":60,"num_attention_heads":128,"num_key_value_heads":128,"q_lora_rank":1536,"kv_lora_rank":512,"qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,"intermediate_size":12288,"moe_intermediate_size":1536,"n_routed_experts":160,"n_shared_experts":2,"num_experts_per_tok":6,"first_k_dense_replace":1,"moe_layer_freq":1,"max_position_embeddings":163840,"vocab_size":102400,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 235_741_434_880.0, active: Some(21.4e9), bytes_per_token: 60 * 576 * 2, bytes_per_sequence: 0 },
    Case { name: "gpt-oss-20b", config: r#"{"architectures":["GptOssForCausalLM"],"hidden_size":2880,"num_hidden_layers":24,"num_attention_heads":64,"num_key_value_heads":8,"head_dim":64,"intermediate_size":2880,"num_local_experts":32,"num_experts_per_tok":4,"sliding_window":128,"max_position_embeddings":131072,"vocab_size":201088,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 20_914_757_184.0, active: None, bytes_per_token: 24 * 2 * 8 * 64 * 2, bytes_per_sequence: 0 },
    case("GLM-4-9B-0414", r#"{"architectures":["Glm4ForCausalLM"],"hidden_size":4096,"num_hidden_layers":40,"num_attention_heads":32,"num_key_value_heads":2,"head_dim":128,"intermediate_size":13696,"attention_bias":true,"max_position_embeddings":32768,"vocab_size":151552,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#, 9_400_279_040.0, 40 * 2 * 2 * 128 * 2),
    case("OLMo-2-7B", r#"{"architectures":["Olmo2ForCausalLM"],"hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":32,"intermediate_size":11008,"max_position_embeddings":4096,"vocab_size":100352,"tie_word_embeddings":false,"torch_dtype":"float32"}"#, 7_298_617_344.0, 32 * 2 * 4096 * 2),
    Case { name: "OLMoE-1B-7B", config: r#"{"architectures":["OlmoeForCausalLM"],"hidden_size":2048,"num_hidden_layers":16,"num_attention_heads":16,"num_key_value_heads":16,"intermediate_size":1024,"num_experts":64,"num_experts_per_tok":8,"max_position_embeddings":4096,"vocab_size":50304,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 6_919_161_856.0, active: Some(1.28e9), bytes_per_token: 16 * 2 * 2048 * 2, bytes_per_sequence: 0 },
    case("Nemotron-4-15B-like Minitron-8B", r#"{"architectures":["NemotronForCausalLM"],"hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":48,"num_key_value_heads":8,"head_dim":128,"intermediate_size":16384,"hidden_act":"relu2","partial_rotary_factor":0.5,"max_position_embeddings":4096,"vocab_size":256000,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#, 8_272_617_472.0, 32 * 2 * 8 * 128 * 2),
    Case { name: "DBRX", config: r#"{"architectures":["DbrxForCausalLM"],"d_model":6144,"n_heads":48,"n_layers":40,"max_seq_len":32768,"vocab_size":100352,"tie_word_embeddings":false,"torch_dtype":"bfloat16","attn_config":{"kv_n_heads":8},"ffn_config":{"ffn_hidden_size":10752,"moe_num_experts":16,"moe_top_k":4}}"#,
        parameters: 131_596_523_520.0, active: Some(36.5e9), bytes_per_token: 40 * 2 * 8 * 128 * 2, bytes_per_sequence: 0 },
    Case { name: "MiniMax-Text-01", config: r#"{"architectures":["MiniMaxText01ForCausalLM"],"hidden_size":6144,"num_hidden_layers":80,"num_attention_heads":64,"num_key_value_heads":8,"head_dim":128,"intermediate_size":9216,"num_local_experts":32,"num_experts_per_tok":2,"attn_type_list":[0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,1],"max_position_embeddings":10240000,"vocab_size":200064,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 456.09e9, active: Some(45.9e9), bytes_per_token: 10 * 2 * 8 * 128 * 2, bytes_per_sequence: 70 * 64 * 128 * 128 * 4 },
    Case { name: "Falcon-H1-7B", config: r#"{"architectures":["FalconH1ForCausalLM"],"hidden_size":3072,"num_hidden_layers":44,"num_attention_heads":12,"num_key_value_heads":2,"head_dim":128,"intermediate_size":12288,"mamba_n_heads":24,"mamba_d_head":128,"mamba_d_ssm":3072,"mamba_d_state":256,"mamba_n_groups":1,"mamba_d_conv":4,"mamba_expand":2,"mamba_conv_bias":true,"mamba_proj_bias":false,"max_position_embeddings":262144,"vocab_size":130048,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 7.59e9, active: None, bytes_per_token: 44 * 2 * 2 * 128 * 2, bytes_per_sequence: 44 * (3072 * 256 * 2 + (3072 + 512) * 3 * 2) },
    case("StableLM-2-1.6B", r#"{"architectures":["StableLmForCausalLM"],"hidden_size":2048,"num_hidden_layers":24,"num_attention_heads":32,"num_key_value_heads":32,"intermediate_size":5632,"use_qkv_bias":true,"partial_rotary_factor":0.25,"max_position_embeddings":4096,"vocab_size":100352,"tie_word_embeddings":false,"torch_dtype":"float16"}"#, 1_644_515_328.0, 24 * 2 * 2048 * 2),
    case("SmolLM3-3B", r#"{"architectures":["SmolLM3ForCausalLM"],"hidden_size":2048,"num_hidden_layers":36,"num_attention_heads":16,"num_key_value_heads":4,"intermediate_size":11008,"max_position_embeddings":65536,"vocab_size":128256,"torch_dtype":"bfloat16"}"#, 3_075_098_624.0, 36 * 2 * 4 * 128 * 2),
    case("ModernBERT-base", r#"{"architectures":["ModernBertForMaskedLM"],"hidden_size":768,"num_hidden_layers":22,"num_attention_heads":12,"intermediate_size":1152,"local_attention":128,"global_attn_every_n_layers":3,"max_position_embeddings":8192,"vocab_size":50368,"torch_dtype":"float32"}"#, 149.0e6, 0),
    case("DistilBERT-base", r#"{"architectures":["DistilBertModel"],"dim":768,"n_layers":6,"n_heads":12,"hidden_dim":3072,"max_position_embeddings":512,"vocab_size":30522,"torch_dtype":"float32"}"#, 66_362_880.0, 0),
    case("nomic-embed-text-v1.5", r#"{"architectures":["NomicBertModel"],"n_embd":768,"n_layer":12,"n_head":12,"n_inner":3072,"n_positions":8192,"activation_function":"swiglu","qkv_proj_bias":false,"mlp_fc1_bias":false,"vocab_size":30528,"torch_dtype":"float32"}"#, 136_731_648.0, 0),
    case("Phi-4", r#"{"architectures":["Phi3ForCausalLM"],"hidden_size":5120,"num_hidden_layers":40,"num_attention_heads":40,"num_key_value_heads":10,"intermediate_size":17920,"max_position_embeddings":16384,"original_max_position_embeddings":16384,"sliding_window":null,"vocab_size":100352,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#, 14_659_507_200.0, 40 * 2 * 10 * 128 * 2),
    Case { name: "Phi-3.5-MoE", config: r#"{"architectures":["PhiMoEForCausalLM"],"hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":6400,"num_local_experts":16,"num_experts_per_tok":2,"attention_bias":true,"lm_head_bias":true,"max_position_embeddings":131072,"vocab_size":32064,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 41_873_153_344.0, active: Some(6.6e9), bytes_per_token: 32 * 2 * 8 * 128 * 2, bytes_per_sequence: 0 },
    case("EXAONE-3.5-7.8B", r#"{"architectures":["ExaoneForCausalLM"],"hidden_size":4096,"num_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":14336,"activation_function":"silu","max_position_embeddings":32768,"vocab_size":102400,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#, 7_818_448_896.0, 32 * 2 * 8 * 128 * 2),
    case("Yi-6B", r#"{"architectures":["LlamaForCausalLM"],"hidden_size":4096,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":4,"intermediate_size":11008,"max_position_embeddings":4096,"vocab_size":64000,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#, 6_061_035_520.0, 32 * 2 * 4 * 128 * 2),
    case("Baichuan2-13B", r#"{"architectures":["BaichuanForCausalLM"],"hidden_size":5120,"num_hidden_layers":40,"num_attention_heads":40,"intermediate_size":13696,"model_max_length":4096,"vocab_size":125696,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#, 13_896_668_160.0, 40 * 2 * 5120 * 2),
    Case { name: "LFM2-1.2B", config: r#"{"architectures":["Lfm2ForCausalLM"],"hidden_size":2048,"num_hidden_layers":16,"num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":12288,"block_ff_dim":12288,"block_auto_adjust_ff_dim":true,"block_multiple_of":256,"conv_L_cache":3,"conv_bias":false,"full_attn_idxs":[2,5,8,10,12,14],"max_position_embeddings":128000,"vocab_size":65536,"torch_dtype":"bfloat16"}"#,
        parameters: 1_170_340_608.0, active: None, bytes_per_token: 6 * 2 * 8 * 64 * 2, bytes_per_sequence: 10 * 2048 * 2 * 2 },
    Case { name: "Ling-mini-2.0", config: r#"{"architectures":["BailingMoeV2ForCausalLM"],"hidden_size":2048,"num_hidden_layers":20,"num_attention_heads":16,"num_key_value_heads":4,"head_dim":128,"intermediate_size":5120,"moe_intermediate_size":512,"num_experts":256,"num_experts_per_tok":8,"num_shared_experts":1,"first_k_dense_replace":1,"use_qk_norm":true,"use_qkv_bias":false,"partial_rotary_factor":0.5,"max_position_embeddings":32768,"vocab_size":157184,"tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#,
        parameters: 16.26e9, active: Some(1.43e9), bytes_per_token: 20 * 2 * 4 * 128 * 2, bytes_per_sequence: 0 },
    // The language model, 6.87 B, less k and v of the 15 layers that read others' caches (31.5 M, not loaded).
    case("Gemma-3n-E4B", r#"{"architectures":["Gemma3nForConditionalGeneration"],"text_config":{"hidden_size":2048,"num_hidden_layers":35,"num_attention_heads":8,"num_key_value_heads":2,"head_dim":256,"intermediate_size":16384,"sliding_window":512,"layer_types":["sliding_attention","sliding_attention","sliding_attention","sliding_attention","full_attention","sliding_attention","sliding_attention","sliding_attention","sliding_attention","full_attention","sliding_attention","sliding_attention","sliding_attention","sliding_attention","full_attention","sliding_attention","sliding_attention","sliding_attention","sliding_attention","full_attention","sliding_attention","sliding_attention","sliding_attention","sliding_attention","full_attention","sliding_attention","sliding_attention","sliding_attention","sliding_attention","full_attention","sliding_attention","sliding_attention","sliding_attention","sliding_attention","full_attention"],"num_kv_shared_layers":15,"hidden_size_per_layer_input":256,"vocab_size_per_layer_input":262144,"laurel_rank":64,"altup_num_inputs":4,"max_position_embeddings":32768,"vocab_size":262400,"torch_dtype":"bfloat16"}}"#, 6.838e9, 20 * 2 * 2 * 256 * 2),
];

#[test]
fn families_beyond_the_corpus_have_their_parameters_and_caches() {
    let mut off = Vec::new();
    for case in CASES {
        let spec = parse_config(case.config.as_bytes()).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let program = families::program(&spec);
        let parameters = program.parameters();
        if (parameters as f64 / case.parameters - 1.0).abs() > 0.005 {
            off.push(format!("{}: {parameters} parameters, published {}", case.name, case.parameters));
        }
        let active = work::active_parameters(&program, &spec);
        // Some publishers count embedding and head, some do not.
        let bare = active - 2 * spec.vocab_size * spec.hidden_size;
        let near = |ours: u64, published: f64| (ours as f64 / published - 1.0).abs() < 0.02;
        if let Some(published) = case.active.filter(|&p| !near(active, p) && !near(bare, p)) {
            off.push(format!("{}: {active} active, published {published}", case.name));
        }
        let layout = KvLayout::new(&spec, 1, DType::BF16, 16, SlidingLayers::KeepWindow);
        let ours = (layout.bytes_per_token(), layout.bytes_per_sequence());
        if ours != (case.bytes_per_token, case.bytes_per_sequence) {
            off.push(format!("{}: {ours:?}, by hand {:?}", case.name, (case.bytes_per_token, case.bytes_per_sequence)));
        }
    }
    assert!(off.is_empty(), "{}", off.join("\n"));
}
