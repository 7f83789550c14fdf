//! Shapes of well-known models: their `config.json`, without what does not change the arithmetic.

use clap::ValueEnum;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    #[value(name = "qwen2.5-0.5b")]
    Qwen25Half,
}

impl Shape {
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen25Half => "qwen2.5-0.5b",
        }
    }

    pub fn config_json(self) -> &'static str {
        match self {
            Self::Qwen25Half => include_str!("shapes/qwen2.5-0.5b.json"),
        }
    }
}
