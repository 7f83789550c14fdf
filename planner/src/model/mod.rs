//! From `config.json` to [`ModelSpec`] to [`Program`]: the one place where a model is described.

pub mod checkpoint;
mod config;
mod dtype;
pub mod families;
mod program;
mod spec;

pub use config::{ConfigError, known_architectures, parse_config};
pub use dtype::DType;
pub use program::{
    AttentionId, Buffer, BufferId, Builder, KvSource, LinearWeights, Op, Pooling, Program, Rows, Shard, Weight,
    WeightId,
};
pub use spec::{
    Activation, AttentionSpec, Family, LayerSpec, Mask, MlpSpec, ModelSpec, Norm, NormKind, Positions, Quantization,
    RopeScaling, RopeSpec, Task,
};
