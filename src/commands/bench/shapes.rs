//! Shapes of well-known models: their `config.json`, without what does not change the arithmetic.

use clap::ValueEnum;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    #[value(name = "qwen2.5-0.5b")]
    Qwen25Half,
    #[value(name = "llama-3.1-8b")]
    Llama31Eight,
}

impl Shape {
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen25Half => "qwen2.5-0.5b",
            Self::Llama31Eight => "llama-3.1-8b",
        }
    }

    pub fn config_json(self) -> &'static str {
        match self {
            Self::Qwen25Half => include_str!("shapes/qwen2.5-0.5b.json"),
            Self::Llama31Eight => include_str!("shapes/llama-3.1-8b.json"),
        }
    }
}
