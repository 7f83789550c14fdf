//! From `config.json` to [`ModelSpec`] to [`Program`]: the one place where a model is described.

mod builder;
pub mod checkpoint;
mod config;
mod dtype;
pub mod families;
mod ffn;
mod mixer;
mod operands;
mod program;
mod quantization;
mod spec;
mod tail;
pub mod work;

pub use builder::Builder;
pub use config::{ConfigError, known_architectures, parse_config};
pub use dtype::DType;
pub use ffn::{Activation, Ffn, MlpSpec, MoeSpec, Router};
pub use mixer::{
    AttentionSpec, CompressedAttentionSpec, IndexerSpec, KvOrigin, LatentAttentionSpec, Mask, Mixer, OutputGate,
    QkNorm, RopeScaling, RopeSpec, StateKind, StateSpec,
};
pub use program::{
    AttentionId, Buffer, BufferId, Feature, KvSource, LinearWeights, Op, PlannedOp, Pooling, Program, Rows, Shard,
    Weight, WeightId,
};
pub use quantization::{Element, Forms, Packed, Quantization, Role, Rules, Scales, Storage, StoredWeights};
pub use spec::{Extras, Family, LayerSpec, ModelSpec, Norm, NormKind, PerLayerInput, Positions, Task};
