//! `architectures[0]` to family and task.

use super::ConfigError;
use super::fields::{Fields, printable};
use super::json::Value;
use crate::model::{Family, Pooling, Task};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    LanguageModel,
    LanguageModelOfImages {
        any_family: bool,
    },
    /// The bare model: its hidden states become a vector.
    Vector(Pooling),
    /// `labels` where the class fixes them.
    Classifier {
        labels: Option<u64>,
    },
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Architecture {
    pub(super) name: &'static str,
    pub(super) family: Family,
    pub(super) head: Head,
}

impl Architecture {
    pub(super) fn image_text(&self) -> bool {
        matches!(self.head, Head::LanguageModelOfImages { .. })
    }
}

const LM: Head = Head::LanguageModel;
const LAST: Head = Head::Vector(Pooling::LastToken);
const MEAN: Head = Head::Vector(Pooling::Mean);
const SCORE: Head = Head::Classifier { labels: None };
const REWARD: Head = Head::Classifier { labels: Some(1) };
/// A language model beside an image tower; the text side is planned.
const IMAGE: Head = Head::LanguageModelOfImages { any_family: false };
/// The same around language models of many families: `text_config` says which.
const WRAPPER: Head = Head::LanguageModelOfImages { any_family: true };

const fn row(name: &'static str, family: Family, head: Head) -> Architecture {
    Architecture { name, family, head }
}

const ARCHITECTURES: &[Architecture] = &[
    row("LlamaForCausalLM", Family::Llama, LM),
    row("LLaMAForCausalLM", Family::Llama, LM),
    row("LlamaModel", Family::Llama, LAST),
    row("LlamaForSequenceClassification", Family::Llama, SCORE),
    row("YiForCausalLM", Family::Llama, LM),
    row("XverseForCausalLM", Family::Llama, LM),
    row("AquilaForCausalLM", Family::Llama, LM),
    row("AquilaModel", Family::Llama, LM),
    row("MistralForCausalLM", Family::Mistral, LM),
    row("MistralModel", Family::Mistral, LAST),
    row("MistralForSequenceClassification", Family::Mistral, SCORE),
    row("Qwen2ForCausalLM", Family::Qwen2, LM),
    row("Qwen2Model", Family::Qwen2, LAST),
    row("Qwen2ForSequenceClassification", Family::Qwen2, SCORE),
    row("Qwen2ForRewardModel", Family::Qwen2, REWARD),
    row("Qwen2VLForConditionalGeneration", Family::Qwen2, IMAGE),
    row("Qwen2_5OmniForConditionalGeneration", Family::Qwen2, IMAGE),
    row("Qwen2_5OmniModel", Family::Qwen2, IMAGE),
    row("Qwen2_5_VLForConditionalGeneration", Family::Qwen2, IMAGE),
    row("Qwen3ForCausalLM", Family::Qwen3, LM),
    row("Qwen3Model", Family::Qwen3, LAST),
    row("Qwen3ForSequenceClassification", Family::Qwen3, SCORE),
    row("Qwen3VLForConditionalGeneration", Family::Qwen3, IMAGE),
    row("Phi3ForCausalLM", Family::Phi3, LM),
    row("Phi3VForCausalLM", Family::Phi3, LM),
    row("Phi4MMForCausalLM", Family::Phi3, IMAGE),
    row("Gemma2ForCausalLM", Family::Gemma2, LM),
    row("Gemma3ForCausalLM", Family::Gemma3, LM),
    row("Gemma3ForConditionalGeneration", Family::Gemma3, LM),
    row("BertModel", Family::Bert, MEAN),
    row("BertForMaskedLM", Family::Bert, MEAN),
    row("BertForSequenceClassification", Family::Bert, SCORE),
    row("RobertaModel", Family::XlmRoberta, MEAN),
    row("RobertaForMaskedLM", Family::XlmRoberta, MEAN),
    row("RobertaForSequenceClassification", Family::XlmRoberta, SCORE),
    row("XLMRobertaModel", Family::XlmRoberta, MEAN),
    row("XLMRobertaForMaskedLM", Family::XlmRoberta, MEAN),
    row("XLMRobertaForSequenceClassification", Family::XlmRoberta, SCORE),
    row("AfmoeForCausalLM", Family::Afmoe, LM),
    row("CamembertModel", Family::XlmRoberta, MEAN),
    row("CamembertForSequenceClassification", Family::XlmRoberta, SCORE),
    row("MPNetModel", Family::BertLike, MEAN),
    row("MPNetForMaskedLM", Family::BertLike, MEAN),
    row("DebertaV2Model", Family::BertLike, MEAN),
    row("DebertaV2ForMaskedLM", Family::BertLike, MEAN),
    row("DebertaV2ForSequenceClassification", Family::BertLike, SCORE),
    row("ElectraModel", Family::BertLike, MEAN),
    row("ElectraForPreTraining", Family::BertLike, MEAN),
    row("ElectraForSequenceClassification", Family::BertLike, SCORE),
    row("NewModel", Family::BertLike, MEAN),
    row("NewForSequenceClassification", Family::BertLike, SCORE),
    row("JinaBertModel", Family::BertLike, MEAN),
    row("JinaBertForMaskedLM", Family::BertLike, MEAN),
    row("Grok1ForCausalLM", Family::Grok, LM),
    row("Grok1ModelForCausalLM", Family::Grok, LM),
    row("MiniCPMO", Family::Qwen2, IMAGE),
    row("MultiModalityCausalLM", Family::Llama, WRAPPER),
    row("InternS1ForConditionalGeneration", Family::Qwen3Moe, WRAPPER),
    row("Qwen2_5OmniThinkerForConditionalGeneration", Family::Qwen2, IMAGE),
    row("Qwen3OmniMoeThinkerForConditionalGeneration", Family::Qwen3Moe, IMAGE),
    row("Phi4MultimodalForCausalLM", Family::Phi3, IMAGE),
    row("LlavaLlamaForCausalLM", Family::Llama, IMAGE),
    row("LlavaMistralForCausalLM", Family::Mistral, IMAGE),
    row("LlavaQwenForCausalLM", Family::Qwen2, IMAGE),
    row("ApertusForCausalLM", Family::Apertus, LM),
    row("ArceeForCausalLM", Family::Arcee, LM),
    row("BambaForCausalLM", Family::Bamba, LM),
    row("CwmForCausalLM", Family::Cwm, LM),
    row("Cohere2MoeForCausalLM", Family::Cohere, LM),
    row("Cohere2VisionForConditionalGeneration", Family::Cohere, IMAGE),
    row("DeepseekOCRForCausalLM", Family::DeepseekV2, IMAGE),
    row("ExaoneMoeForCausalLM", Family::ExaoneMoe, LM),
    row("Exaone4_5_ForConditionalGeneration", Family::Exaone4, IMAGE),
    row("FlexOlmoForCausalLM", Family::OlmoE, LM),
    row("HeliumForCausalLM", Family::Biased, LM),
    row("HYV3ForCausalLM", Family::Hunyuan, LM),
    row("Lfm2VlForConditionalGeneration", Family::Lfm2, IMAGE),
    row("LongcatFlashForCausalLM", Family::LongCat, LM),
    row("LongcatCausalLM", Family::LongCat, LM),
    row("Mistral4ForCausalLM", Family::DeepseekV2, LM),
    row("SolarOpenForCausalLM", Family::SolarOpen, LM),
    row("YoutuForCausalLM", Family::DeepseekV3, LM),
    row("OrionForCausalLM", Family::StableLm, LM),
    row("Glm46VForConditionalGeneration", Family::Glm4, WRAPPER),
    row("AyaVisionForConditionalGeneration", Family::Cohere, WRAPPER),
    row("Idefics2ForConditionalGeneration", Family::Mistral, WRAPPER),
    row("LlavaNextVideoForConditionalGeneration", Family::Llama, WRAPPER),
    row("LlavaOnevisionForConditionalGeneration", Family::Qwen2, WRAPPER),
    row("PaliGemmaForConditionalGeneration", Family::Gemma, WRAPPER),
    row("Qwen2AudioForConditionalGeneration", Family::Qwen2, WRAPPER),
    row("SmolVLMForConditionalGeneration", Family::Llama, WRAPPER),
    row("VoxtralForConditionalGeneration", Family::Llama, WRAPPER),
    row("BaichuanForCausalLM", Family::Baichuan, LM),
    row("BaiChuanForCausalLM", Family::Baichuan, LM),
    row("BloomForCausalLM", Family::Bloom, LM),
    row("BloomModel", Family::Bloom, LM),
    row("ChatGLMModel", Family::ChatGlm, LM),
    row("ChatGLMForConditionalGeneration", Family::ChatGlm, LM),
    row("CohereForCausalLM", Family::Cohere, LM),
    row("Cohere2ForCausalLM", Family::Cohere, LM),
    row("DbrxForCausalLM", Family::Dbrx, LM),
    row("DeciLMForCausalLM", Family::DeciLm, LM),
    row("DeepseekV2ForCausalLM", Family::DeepseekV2, LM),
    row("DeepseekVLV2ForCausalLM", Family::DeepseekV2, IMAGE),
    row("DeepseekForCausalLM", Family::DeepseekV2, LM),
    row("DeepseekV3ForCausalLM", Family::DeepseekV3, LM),
    row("DeepseekV32ForCausalLM", Family::DeepseekV3, LM),
    row("KimiK25ForConditionalGeneration", Family::DeepseekV3, IMAGE),
    row("Glm4MoeLiteForCausalLM", Family::DeepseekV3, LM),
    row("KimiVLForConditionalGeneration", Family::DeepseekV3, IMAGE),
    row("DeepseekV4ForCausalLM", Family::DeepseekV4, LM),
    row("DistilBertModel", Family::DistilBert, MEAN),
    row("DistilBertForSequenceClassification", Family::DistilBert, SCORE),
    row("Ernie4_5ForCausalLM", Family::Ernie4_5, LM),
    row("Ernie4_5_ForCausalLM", Family::Ernie4_5, LM),
    row("Ernie4_5_MoeForCausalLM", Family::Ernie4_5, LM),
    row("ExaoneForCausalLM", Family::Exaone, LM),
    row("Exaone4ForCausalLM", Family::Exaone4, LM),
    row("FalconForCausalLM", Family::Falcon, LM),
    row("RWForCausalLM", Family::Falcon, LM),
    row("FalconH1ForCausalLM", Family::FalconH1, LM),
    row("GemmaForCausalLM", Family::Gemma, LM),
    row("Gemma3nForConditionalGeneration", Family::Gemma3n, IMAGE),
    row("Gemma3nForCausalLM", Family::Gemma3n, LM),
    row("Gemma4ForConditionalGeneration", Family::Gemma4, IMAGE),
    row("Gemma4ForCausalLM", Family::Gemma4, LM),
    row("GlmForCausalLM", Family::Glm4, LM),
    row("Glm4ForCausalLM", Family::Glm4, LM),
    row("Glm4vForConditionalGeneration", Family::Glm4, IMAGE),
    row("Glm4MoeForCausalLM", Family::Glm4Moe, LM),
    row("BailingMoeForCausalLM", Family::Glm4Moe, LM),
    row("BailingMoeV2ForCausalLM", Family::Glm4Moe, LM),
    row("Glm4vMoeForConditionalGeneration", Family::Glm4Moe, IMAGE),
    row("Dots1ForCausalLM", Family::Glm4Moe, LM),
    row("GlmMoeDsaForCausalLM", Family::GlmMoeDsa, LM),
    row("GPT2LMHeadModel", Family::Gpt2, LM),
    row("GPTBigCodeForCausalLM", Family::GptBigCode, LM),
    row("GPTJForCausalLM", Family::GptJ, LM),
    row("GPTNeoXForCausalLM", Family::GptNeoX, LM),
    row("GptOssForCausalLM", Family::GptOss, LM),
    row("GraniteForCausalLM", Family::Granite, LM),
    row("GraniteMoeForCausalLM", Family::GraniteMoe, LM),
    row("GraniteMoeSharedForCausalLM", Family::GraniteMoe, LM),
    row("GraniteMoeHybridForCausalLM", Family::GraniteMoeHybrid, LM),
    row("HunYuanDenseV1ForCausalLM", Family::Hunyuan, LM),
    row("HunYuanMoEV1ForCausalLM", Family::Hunyuan, LM),
    row("InternLMForCausalLM", Family::Biased, LM),
    row("InternLM3ForCausalLM", Family::Biased, LM),
    row("SeedOssForCausalLM", Family::Biased, LM),
    row("MiMoForCausalLM", Family::Biased, LM),
    row("InternLM2ForCausalLM", Family::InternLm2, LM),
    row("InternLM2ForRewardModel", Family::InternLm2, REWARD),
    row("JambaForCausalLM", Family::Jamba, LM),
    row("KimiLinearForCausalLM", Family::KimiLinear, LM),
    row("KimiK3ForConditionalGeneration", Family::KimiLinear, IMAGE),
    row("Lfm2ForCausalLM", Family::Lfm2, LM),
    row("Lfm2MoeForCausalLM", Family::Lfm2, LM),
    row("Llama4ForConditionalGeneration", Family::Llama4, IMAGE),
    row("Llama4ForCausalLM", Family::Llama4, LM),
    row("MambaForCausalLM", Family::Mamba, LM),
    row("FalconMambaForCausalLM", Family::Mamba, LM),
    row("Mamba2ForCausalLM", Family::Mamba2, LM),
    row("MiMoV2FlashForCausalLM", Family::MiMoV2, LM),
    row("MiMoV2ForCausalLM", Family::MiMoV2, LM),
    row("MiniCPMForCausalLM", Family::MiniCpm, LM),
    row("MiniCPM3ForCausalLM", Family::MiniCpm3, LM),
    row("MiniMaxText01ForCausalLM", Family::MiniMax, LM),
    row("MiniMaxM1ForCausalLM", Family::MiniMax, LM),
    row("MiniMaxForCausalLM", Family::MiniMax, LM),
    row("MiniMaxM2ForCausalLM", Family::MiniMaxM2, LM),
    row("MiniMaxM3ForCausalLM", Family::MiniMaxM3, LM),
    row("MiniMaxM3SparseForCausalLM", Family::MiniMaxM3, LM),
    row("MiniMaxM3SparseForConditionalGeneration", Family::MiniMaxM3, IMAGE),
    row("MixtralForCausalLM", Family::Mixtral, LM),
    row("MllamaForConditionalGeneration", Family::Mllama, IMAGE),
    row("ModernBertModel", Family::ModernBert, MEAN),
    row("ModernBertForMaskedLM", Family::ModernBert, MEAN),
    row("ModernBertForSequenceClassification", Family::ModernBert, SCORE),
    row("MPTForCausalLM", Family::Mpt, LM),
    row("MptForCausalLM", Family::Mpt, LM),
    row("NemotronForCausalLM", Family::Nemotron, LM),
    row("NemotronHForCausalLM", Family::NemotronH, LM),
    row("NemotronH_Nano_VL_V2", Family::NemotronH, IMAGE),
    row("NomicBertModel", Family::NomicBert, MEAN),
    row("OlmoForCausalLM", Family::Olmo, LM),
    row("OLMoForCausalLM", Family::Olmo, LM),
    row("Olmo2ForCausalLM", Family::Olmo2, LM),
    row("Olmo3ForCausalLM", Family::Olmo2, LM),
    row("OlmoeForCausalLM", Family::OlmoE, LM),
    row("OPTForCausalLM", Family::Opt, LM),
    row("PhiForCausalLM", Family::Phi, LM),
    row("Phi3SmallForCausalLM", Family::Phi3Small, LM),
    row("PhiMoEForCausalLM", Family::PhiMoe, LM),
    row("PhimoeForCausalLM", Family::PhiMoe, LM),
    row("QWenLMHeadModel", Family::Qwen, LM),
    row("Qwen2MoeForCausalLM", Family::Qwen2Moe, LM),
    row("Qwen3MoeForCausalLM", Family::Qwen3Moe, LM),
    row("Qwen3VLMoeForConditionalGeneration", Family::Qwen3Moe, IMAGE),
    row("Qwen3OmniMoeForConditionalGeneration", Family::Qwen3Moe, IMAGE),
    row("Qwen3NextForCausalLM", Family::Qwen3Next, LM),
    row("Qwen3_5ForConditionalGeneration", Family::Qwen3Next, IMAGE),
    row("Qwen3_5MoeForConditionalGeneration", Family::Qwen3Next, IMAGE),
    row("Qwen3_5ForCausalLM", Family::Qwen3Next, LM),
    row("Qwen3_5MoeForCausalLM", Family::Qwen3Next, LM),
    row("SmolLM3ForCausalLM", Family::SmolLm3, LM),
    row("StableLmForCausalLM", Family::StableLm, LM),
    row("StableLMEpochForCausalLM", Family::StableLm, LM),
    row("Starcoder2ForCausalLM", Family::StarCoder2, LM),
    row("Step3p5ForCausalLM", Family::Step3p5, LM),
    row("Step3p7FlashForCausalLM", Family::Step3p5, LM),
    row("LlavaForConditionalGeneration", Family::Llama, WRAPPER),
    row("LlavaNextForConditionalGeneration", Family::Llama, WRAPPER),
    row("InternVLForConditionalGeneration", Family::Llama, WRAPPER),
    row("InternVLChatModel", Family::Llama, WRAPPER),
    row("Idefics3ForConditionalGeneration", Family::Llama, WRAPPER),
    // Scales queries by their position, which no op here does.
    row("Ministral3ForCausalLM", Family::Mistral, IMAGE),
    row("Mistral3ForConditionalGeneration", Family::Mistral, WRAPPER),
    row("PixtralForConditionalGeneration", Family::Mistral, WRAPPER),
];

/// Every architecture name that [`super::parse_config`] accepts.
pub fn known_architectures() -> Vec<&'static str> {
    ARCHITECTURES.iter().map(|a| a.name).collect()
}

pub(super) fn find(root: &Fields<'_>) -> Result<Architecture, ConfigError> {
    const FIELD: &str = "architectures";
    let missing = || ConfigError::Missing {
        field: FIELD.to_owned(),
        expected: "a list with the model's class, such as LlamaForCausalLM".to_owned(),
    };
    let first = match root.list(FIELD)? {
        None => of_model_type(root)?.ok_or_else(missing)?,
        Some([]) => return Err(missing()),
        Some([Value::String(name), ..]) => name,
        Some([other, ..]) => return Err(root.wrong_type("architectures[0]", other, "a string")),
    };
    let found = ARCHITECTURES.iter().find(|a| a.name == first).copied();
    let found = found.ok_or_else(|| ConfigError::UnknownArchitecture {
        architecture: printable(first),
        known: known_architectures(),
    })?;
    match found.head {
        Head::LanguageModelOfImages { any_family: true } => with_text_family(found, root),
        _ => Ok(found),
    }
}

/// The class that transformers makes of a file without `architectures`, for types of models that are shared so.
fn of_model_type(root: &Fields<'_>) -> Result<Option<&'static str>, ConfigError> {
    Ok(match root.string(&["model_type"])? {
        Some((_, "llama")) => Some("LlamaForCausalLM"),
        Some((_, "mistral")) => Some("MistralForCausalLM"),
        Some((_, "mixtral")) => Some("MixtralForCausalLM"),
        Some((_, "qwen2")) => Some("Qwen2ForCausalLM"),
        Some((_, "qwen3")) => Some("Qwen3ForCausalLM"),
        Some((_, "qwen3_moe")) => Some("Qwen3MoeForCausalLM"),
        Some((_, "gemma2")) => Some("Gemma2ForCausalLM"),
        Some((_, "gemma3_text")) => Some("Gemma3ForCausalLM"),
        Some((_, "phi3")) => Some("Phi3ForCausalLM"),
        Some((_, "gpt2")) => Some("GPT2LMHeadModel"),
        Some((_, "gpt_neox")) => Some("GPTNeoXForCausalLM"),
        Some((_, "bloom")) => Some("BloomForCausalLM"),
        Some((_, "deepseek_v3")) => Some("DeepseekV3ForCausalLM"),
        Some((_, "deepseek_vl_v2")) => Some("DeepseekVLV2ForCausalLM"),
        Some((_, "multi_modality")) => Some("MultiModalityCausalLM"),
        Some((_, "bert")) => Some("BertModel"),
        Some((_, "xlm-roberta")) => Some("XLMRobertaModel"),
        _ => None,
    })
}

/// The family that `text_config.model_type` names.
fn with_text_family(found: Architecture, root: &Fields<'_>) -> Result<Architecture, ConfigError> {
    let text = super::base::text_of(root)?;
    let family = match text.string(&["model_type"])? {
        None => return Ok(found),
        Some((_, "llama")) => Family::Llama,
        Some((_, "mistral" | "ministral3")) => Family::Mistral,
        Some((_, "mixtral")) => Family::Mixtral,
        Some((_, "qwen2")) => Family::Qwen2,
        Some((_, "qwen3")) => Family::Qwen3,
        Some((_, "qwen3_moe")) => Family::Qwen3Moe,
        Some((_, "phi3")) => Family::Phi3,
        Some((_, "internlm2")) => Family::InternLm2,
        Some((_, "gpt_oss")) => Family::GptOss,
        Some((_, "gemma")) => Family::Gemma,
        Some((_, "gemma2")) => Family::Gemma2,
        Some((_, "cohere" | "cohere2")) => Family::Cohere,
        Some((_, "glm4v_text" | "glm46v_text")) => Family::Glm4,
        Some((_, "glm4v_moe_text")) => Family::Glm4Moe,
        Some((_, "granite")) => Family::Granite,
        Some((_, "deepseek_v3" | "kimi_k2")) => Family::DeepseekV3,
        Some((name, other)) => {
            let supported = "supported: llama, mistral, ministral3, mixtral, qwen2, qwen3, qwen3_moe, phi3, internlm2, \
                             gpt_oss, gemma, gemma2, cohere, cohere2, glm4v_text, glm4v_moe_text, granite, deepseek_v3";
            return Err(text.unsupported(name, other, supported));
        }
    };
    Ok(Architecture { family, ..found })
}

/// What the model is served as.
pub(super) fn task(architecture: &Architecture, root: &Fields<'_>) -> Result<Task, ConfigError> {
    Ok(match architecture.head {
        Head::LanguageModel | Head::LanguageModelOfImages { .. } => Task::Generate,
        Head::Vector(pooling) => Task::Embed { pooling },
        Head::Classifier { labels: Some(labels) } => Task::Classify { labels },
        Head::Classifier { labels: None } => Task::Classify { labels: labels(root)? },
    })
}

/// `id2label` lists them; transformers assumes two when nothing is said.
fn labels(root: &Fields<'_>) -> Result<u64, ConfigError> {
    let range = super::limits::LABELS;
    if let Some(labels) = root.object("id2label")? {
        let count = labels.keys() as u64;
        let expected = format!("an object with {} to {} labels", range.start(), range.end());
        return if range.contains(&count) {
            Ok(count)
        } else {
            Err(root.out_of_range("id2label", &format!("an object with {count} labels"), expected))
        };
    }
    Ok(root.uint(&["num_labels"], range)?.unwrap_or(2))
}
