//! Which cards serve the LLM and which the small models around it (embedding, reranker, classifier), for document and
//! knowledge-base questions: a request to the LLM comes with several to small models, and the side that runs short
//! limits both.

mod options;
mod small;

pub use options::{Idle, Side, Split, SplitError, SplitOption, changes, split};
pub use small::{DEFAULT_SLM_TOKENS, NotSmall, SlmCard, SlmKind, SlmReplica, SmallModel, slm_card};

use serde::{Deserialize, Serialize};

/// Requests to small models for each request to the LLM.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Documents given along: split, embed, rerank a few.
    DocQa,
    /// A knowledge base: many candidates for each question.
    KbQa,
    Balanced,
    Ratio(f64),
}

impl Workload {
    pub const NAMED: [Self; 3] = [Self::DocQa, Self::KbQa, Self::Balanced];

    pub fn name(self) -> String {
        match self {
            Self::DocQa => "doc-qa".to_owned(),
            Self::KbQa => "kb-qa".to_owned(),
            Self::Balanced => "balanced".to_owned(),
            Self::Ratio(ratio) => format!("ratio {ratio}"),
        }
    }

    /// The usual range.
    pub fn range(self) -> (f64, f64) {
        match self {
            Self::DocQa => (5.0, 10.0),
            Self::KbQa => (10.0, 30.0),
            Self::Balanced => (3.0, 5.0),
            Self::Ratio(ratio) => (ratio, ratio),
        }
    }

    /// What options are compared at: the middle of the range.
    pub fn ratio(self) -> f64 {
        let (low, high) = self.range();
        (low + high) / 2.0
    }
}

/// Cards for small models beside an LLM side of `llm_requests_per_s`, for the low and the high end of the workload's
/// range; at most `cards`.
pub fn slm_gpus(
    llm_requests_per_s: f64,
    workload: Workload,
    slm_requests_per_s_per_gpu: f64,
    cards: u64,
) -> (u64, u64) {
    let gpus = |ratio: f64| {
        let needed = (llm_requests_per_s * ratio / slm_requests_per_s_per_gpu.max(1e-9)).ceil();
        (needed.max(1.0) as u64).min(cards)
    };
    let (low, high) = workload.range();
    (gpus(low), gpus(high))
}
