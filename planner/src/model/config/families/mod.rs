//! One file for each kind of model that is read through [`super::base::Base`].

pub(super) mod deepseek;
pub(super) mod deepseek_v4;
pub(super) mod encoders;
pub(super) mod experts;
pub(super) mod gemma;
pub(super) mod glm;
pub(super) mod gpt;
pub(super) mod kimi;
pub(super) mod llama_like;
pub(super) mod pruned;
pub(super) mod qwen;
pub(super) mod state;
pub(super) mod windows;

use super::architecture::Architecture;
use super::{ConfigError, fields::Fields};
use crate::model::{Family, ModelSpec};

type Reader = fn(&Architecture, &Fields<'_>) -> Result<ModelSpec, ConfigError>;

/// The reader of a family; `None` for those with readers of their own.
pub(super) fn reader(arch: &Architecture) -> Option<Reader> {
    Some(match arch.family {
        Family::Llama | Family::Mistral | Family::Phi3 if arch.image_text() => llama_like::plain,
        Family::Qwen2 | Family::Qwen3 if arch.image_text() => qwen::vision_language,
        Family::Gemma2 if arch.image_text() => gemma::second,
        Family::Llama
        | Family::Mistral
        | Family::Qwen2
        | Family::Qwen3
        | Family::Phi3
        | Family::Gemma2
        | Family::Gemma3
        | Family::Bert
        | Family::XlmRoberta => return None,
        Family::Afmoe => windows::afmoe,
        Family::Apertus => llama_like::apertus,
        Family::Arcee => windows::arcee,
        Family::Bamba => state::bamba,
        Family::Baichuan => llama_like::baichuan,
        Family::BertLike => encoders::bert_like,
        Family::Biased => llama_like::biased,
        Family::Bloom => gpt::bloom,
        Family::ChatGlm => glm::chat_glm,
        Family::Cohere if arch.name == "Cohere2MoeForCausalLM" => windows::cohere2_moe,
        Family::Cohere => llama_like::cohere,
        Family::Cwm => windows::cwm,
        Family::Dbrx => experts::dbrx,
        Family::DeciLm => pruned::deci_lm,
        Family::DeepseekV2 | Family::DeepseekV3 | Family::GlmMoeDsa => deepseek::spec,
        Family::DeepseekV4 => deepseek_v4::spec,
        Family::DistilBert => encoders::distil_bert,
        Family::Ernie4_5 if arch.name.contains("Moe") => glm::moe,
        Family::Ernie4_5 => llama_like::ernie,
        Family::Exaone => llama_like::exaone,
        Family::ExaoneMoe => windows::exaone_moe,
        Family::Exaone4 | Family::Olmo2 => llama_like::post_norm,
        Family::Falcon => gpt::falcon,
        Family::FalconH1 => state::falcon_h1,
        Family::Gemma => gemma::first,
        Family::Gemma3n | Family::Gemma4 => gemma::later,
        Family::Glm4 => glm::glm4,
        Family::Glm4Moe => glm::moe,
        Family::Gpt2 | Family::GptBigCode => gpt::gpt2,
        Family::GptJ => gpt::gpt_j,
        Family::GptNeoX => gpt::gpt_neox,
        Family::GptOss => experts::gpt_oss,
        Family::Granite | Family::SmolLm3 => llama_like::tied,
        Family::GraniteMoe => experts::granite_moe,
        Family::GraniteMoeHybrid => state::granite_hybrid,
        Family::Grok => experts::grok,
        Family::Hunyuan if arch.name == "HYV3ForCausalLM" => windows::hunyuan3,
        Family::Hunyuan if arch.name.contains("MoE") => experts::hunyuan,
        Family::Hunyuan => llama_like::hunyuan,
        Family::InternLm2 => llama_like::intern_lm2,
        Family::Jamba => state::jamba,
        Family::KimiLinear => kimi::spec,
        Family::Lfm2 => state::lfm2,
        Family::Llama4 => experts::llama4,
        Family::LongCat => windows::longcat,
        Family::Mamba | Family::Mamba2 => state::mamba,
        Family::MiMoV2 => experts::mimo_v2,
        Family::MiniCpm => llama_like::mini_cpm,
        Family::MiniCpm3 => deepseek::mini_cpm3,
        Family::MiniMax => experts::mini_max_01,
        Family::MiniMaxM2 => experts::mini_max_m2,
        Family::MiniMaxM3 => experts::mini_max_m3,
        Family::Mixtral => experts::mixtral,
        Family::Mllama => pruned::mllama,
        Family::ModernBert => encoders::modern_bert,
        Family::Mpt => gpt::mpt,
        Family::Nemotron => llama_like::nemotron,
        Family::NemotronH => state::nemotron_h,
        Family::NomicBert => encoders::nomic_bert,
        Family::Olmo => llama_like::olmo,
        Family::OlmoE => llama_like::olmoe,
        Family::Opt => gpt::opt,
        Family::Phi => gpt::phi,
        Family::Phi3Small => gpt::phi3_small,
        Family::PhiMoe => experts::phi_moe,
        Family::Qwen => qwen::first,
        Family::Qwen2Moe | Family::Qwen3Moe => qwen::moe,
        Family::Qwen3Next => qwen::next,
        Family::SolarOpen => windows::solar_open,
        Family::StableLm => llama_like::stable_lm,
        Family::StarCoder2 => llama_like::star_coder2,
        Family::Step3p5 => experts::step,
    })
}
