//! Rows without an output end behind the last op in which tokens see one another.
#![allow(clippy::unwrap_used)]

use crate::fixtures;
use mserve_planner::memory::activation_bytes;
use mserve_planner::model::{BufferId, Feature, Op, Program, Rows, families, parse_config};
use mserve_planner::perf::Engine;
use std::hash::{DefaultHasher, Hash, Hasher};

const PARALLEL: &str = "microsoft__phi-2";

/// The kind of an op, in a word.
fn kind(op: &Op) -> String {
    match op {
        Op::Planned(op) => op.feature.name().to_owned(),
        op => format!("{op:?}").split([' ', '(']).next().unwrap().to_owned(),
    }
}

fn kinds(ops: &[Op]) -> Vec<String> {
    ops.iter().map(kind).collect()
}

fn is_gather(op: &Op) -> bool {
    matches!(op, Op::GatherLast { .. })
}

/// The ops from the first gather on.
fn tail(program: &Program) -> &[Op] {
    let begin = program.ops.iter().position(is_gather).unwrap();
    &program.ops[begin..]
}

/// What wrote the buffers that are gathered.
fn gathered(program: &Program) -> Vec<String> {
    let writer = |id: BufferId| program.ops.iter().rfind(|op| op.writes().any(|w| w == id)).map(kind).unwrap();
    tail(program).iter().filter(|op| is_gather(op)).flat_map(Op::reads).map(writer).collect()
}

fn program(config: &str) -> Program {
    families::program(&fixtures::spec(config))
}

#[test]
fn a_llama_gathers_attention_and_residual_before_the_output_projection() {
    let program = program("meta-llama__Meta-Llama-3.1-8B");
    let tail = tail(&program);
    let expected = ["GatherLast", "GatherLast", "Linear", "Norm", "Linear", "GatedAct", "Linear", "Norm", "LmHead"];
    assert_eq!(kinds(tail), expected);
    assert_eq!(gathered(&program), ["Attention", "Linear"]);
    let [Op::GatherLast { out: o, .. }, Op::GatherLast { out: residual, .. }, Op::Linear { x, add, .. }, ..] = tail
    else {
        panic!("{tail:?}")
    };
    assert_eq!((x, add), (o, &Some(*residual)));
    assert!(program.buffer(*o).sharded && !program.buffer(*residual).sharded);
}

#[test]
fn with_norms_behind_the_blocks_the_residual_is_added_to_gathered_rows() {
    let program = program("google__gemma-2-2b");
    let expected = ["Linear", "Norm", "Norm", "Linear", "GatedAct", "Linear", "Norm", "Norm", "LmHead", "SoftCap"];
    assert_eq!(kinds(&tail(&program)[2..]), expected);
    assert_eq!(gathered(&program), ["Attention", "Norm"]);
    let [_, Op::GatherLast { out: residual, .. }, _, Op::Norm { add, .. }, ..] = tail(&program) else { panic!() };
    assert_eq!(*add, Some(*residual));
}

#[test]
fn blocks_side_by_side_gather_the_norm_that_both_read() {
    let program = program(PARALLEL);
    assert_eq!(kinds(tail(&program)), ["GatherLast", "GatherLast", "Mlp", "Norm", "LmHead"]);
    assert_eq!(gathered(&program), ["Norm", "Attention"]);
}

#[test]
fn what_may_look_at_other_tokens_stays_on_all_of_them() {
    let state = program("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4");
    assert!(tail(&state).iter().all(|op| !matches!(op, Op::Planned(op) if op.feature != Feature::Experts)));
    let streams = program("deepseek-ai__DeepSeek-V4-Flash");
    assert_eq!(kinds(tail(&streams)), ["GatherLast", "Norm", "LmHead"]);
    assert_eq!(gathered(&streams), ["HyperConnections"]);
}

#[test]
fn texts_that_are_pooled_keep_their_rows() {
    for config in ["intfloat__e5-mistral-7b-instruct", "BAAI__bge-large-en-v1.5", "BAAI__bge-reranker-v2-m3"] {
        let spec = fixtures::spec(config);
        let program = families::program(&spec);
        assert!(program.ops.iter().any(|op| matches!(op, Op::Pool { .. })), "{config}");
        assert_eq!(program, families::whole_layers(&spec), "{config}");
    }
}

#[test]
fn other_engines_take_every_token_through_the_last_norm() {
    let spec = fixtures::spec("meta-llama__Meta-Llama-3.1-8B");
    for engine in [Engine::Vllm, Engine::Sglang] {
        assert_eq!(kinds(tail(&engine.program(&spec))), ["GatherLast", "LmHead"]);
    }
    assert_eq!(Engine::Mserve.program(&spec), families::program(&spec));
}

/// A number for what the last row of each sequence holds in the output: gathers change it not, every other op does.
fn last_row(program: &Program) -> u64 {
    let mut values = vec![0_u64; program.buffers.len()];
    for op in &program.ops {
        let mut hash = DefaultHasher::new();
        format!("{:?}", op.renamed(|_| BufferId(0))).hash(&mut hash);
        op.reads().for_each(|id| values[id.0].hash(&mut hash));
        let value = match op {
            Op::GatherLast { x, .. } => values[x.0],
            _ => hash.finish(),
        };
        op.writes().for_each(|id| values[id.0] = value);
    }
    values[program.output.0]
}

#[test]
fn every_model_computes_what_it_computed_on_whole_layers() {
    for config in fixtures::names() {
        let spec = parse_config(&fixtures::json(&config)).unwrap();
        let (early, whole) = (families::program(&spec), families::whole_layers(&spec));
        assert_eq!(last_row(&early), last_row(&whole), "{config}");
        assert_eq!((&early.weights, &early.attentions), (&whole.weights, &whole.attentions), "{config}");
        for op in early.ops.iter().filter(|op| !is_gather(op) && !matches!(op, Op::Pool { .. })) {
            let rows: Vec<Rows> = op.buffers().map(|id| early.buffer(id).rows).collect();
            assert!(rows.iter().all(|r| *r == rows[0]), "{config}: {op:?}");
            let mixes = matches!(op, Op::Embed { .. } | Op::QkNormRopeKvWrite { .. } | Op::Attention { .. });
            assert!(!mixes || rows[0] == Rows::Tokens, "{config}: {op:?}");
        }
        let used = |id: usize| early.ops.iter().flat_map(Op::buffers).any(|b| b.0 == id);
        assert!((0..early.buffers.len()).all(used), "{config}");
        for tp in [1, 4] {
            let bytes = |program| activation_bytes(program, &spec, tp, 8192, 256);
            assert!(bytes(&early) <= bytes(&whole), "{config} at TP {tp}");
        }
    }
}
