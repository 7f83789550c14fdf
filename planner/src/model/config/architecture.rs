//! `architectures[0]` to family and task.

use super::{ConfigError, fields::Fields};
use crate::model::{Family, Pooling, Task};
use serde_json::Value;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    LanguageModel,
    /// The bare model: its hidden states become a vector.
    Vector(Pooling),
    Classifier,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Architecture {
    pub(super) name: &'static str,
    pub(super) family: Family,
    pub(super) head: Head,
}

const LM: Head = Head::LanguageModel;
const LAST: Head = Head::Vector(Pooling::LastToken);
const MEAN: Head = Head::Vector(Pooling::Mean);
const SCORE: Head = Head::Classifier;

const fn row(name: &'static str, family: Family, head: Head) -> Architecture {
    Architecture { name, family, head }
}

const ARCHITECTURES: &[Architecture] = &[
    row("LlamaForCausalLM", Family::Llama, LM),
    // The spelling of the first converted LLaMA checkpoints.
    row("LLaMAForCausalLM", Family::Llama, LM),
    row("LlamaModel", Family::Llama, LAST),
    row("LlamaForSequenceClassification", Family::Llama, SCORE),
    row("MistralForCausalLM", Family::Mistral, LM),
    row("MistralModel", Family::Mistral, LAST),
    row("MistralForSequenceClassification", Family::Mistral, SCORE),
    row("Qwen2ForCausalLM", Family::Qwen2, LM),
    row("Qwen2Model", Family::Qwen2, LAST),
    row("Qwen2ForSequenceClassification", Family::Qwen2, SCORE),
    row("Qwen3ForCausalLM", Family::Qwen3, LM),
    row("Qwen3Model", Family::Qwen3, LAST),
    row("Qwen3ForSequenceClassification", Family::Qwen3, SCORE),
    row("Phi3ForCausalLM", Family::Phi3, LM),
    row("Gemma2ForCausalLM", Family::Gemma2, LM),
    row("Gemma3ForCausalLM", Family::Gemma3, LM),
    row("Gemma3ForConditionalGeneration", Family::Gemma3, LM),
    row("BertModel", Family::Bert, MEAN),
    row("BertForSequenceClassification", Family::Bert, SCORE),
    row("RobertaModel", Family::XlmRoberta, MEAN),
    row("RobertaForSequenceClassification", Family::XlmRoberta, SCORE),
    row("XLMRobertaModel", Family::XlmRoberta, MEAN),
    row("XLMRobertaForSequenceClassification", Family::XlmRoberta, SCORE),
];

/// Every architecture name that [`super::parse_config`] accepts.
pub fn known_architectures() -> Vec<&'static str> {
    ARCHITECTURES.iter().map(|a| a.name).collect()
}

pub(super) fn find(root: &Fields<'_>) -> Result<Architecture, ConfigError> {
    const FIELD: &str = "architectures";
    let first = match root.list(FIELD)? {
        None | Some([]) => {
            let expected = format!("a list with one of {}", known_architectures().join(", "));
            return Err(ConfigError::Missing { field: FIELD.to_owned(), expected });
        }
        Some([Value::String(name), ..]) => name,
        Some([other, ..]) => return Err(root.wrong_type("architectures[0]", other, "a string")),
    };
    ARCHITECTURES.iter().find(|a| a.name == first).copied().ok_or_else(|| ConfigError::UnknownArchitecture {
        architecture: first.chars().take(120).collect(),
        known: known_architectures(),
    })
}

/// What the model is served as.
pub(super) fn task(architecture: &Architecture, root: &Fields<'_>) -> Result<Task, ConfigError> {
    Ok(match architecture.head {
        Head::LanguageModel => Task::Generate,
        Head::Vector(pooling) => Task::Embed { pooling },
        Head::Classifier => Task::Classify { labels: labels(root)? },
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
