//! Checkpoints on disk, good and bad. Headers that lie have their table beside the parser.
#![allow(clippy::unwrap_used)]

use mserve_planner::model::{DType, Program, Shard, Storage, Weight};
use mserve_runtime::weights::{Checkpoint, TensorSource, WeightsError};
use std::path::Path;
use tempfile::TempDir;

/// A safetensors file with F32 tensors of the given shapes, filled with 0, 1, 2, ...
fn file(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, shape) in tensors {
        let begin = data.len();
        for i in 0..shape.iter().product::<usize>() {
            data.extend((i as f32).to_le_bytes());
        }
        entries
            .push(format!(r#""{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{}]}}"#, data.len()));
    }
    raw(&format!("{{{}}}", entries.join(",")), &data)
}

fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn dir(files: &[(&str, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn weight(name: &str, shape: &[u64]) -> Weight {
    let (shape, storage) = (shape.to_vec(), Storage::Plain);
    Weight { name: name.to_owned(), shape, dtype: DType::F32, shard: Shard::Replicated, storage }
}

/// A program that is only its weights.
fn program(weights: Vec<Weight>) -> Program {
    Program {
        ops: Vec::new(),
        buffers: Vec::new(),
        weights,
        attentions: Vec::new(),
        output: mserve_planner::model::BufferId(0),
        name_prefixes: vec!["model.".to_owned()],
    }
}

fn open_error(path: &Path) -> String {
    Checkpoint::open(path).unwrap_err().to_string()
}

#[test]
fn one_file_and_shards_give_the_same_tensors() {
    let index = r#"{"weight_map":{"model.a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    let single = dir(&[("model.safetensors", file(&[("model.a", &[2, 3]), ("b", &[4]), ("unused", &[1])]))]);
    let sharded = dir(&[
        ("model.safetensors.index.json", index.into()),
        ("model-1.safetensors", file(&[("model.a", &[2, 3]), ("unused", &[1])])),
        ("model-2.safetensors", file(&[("b", &[4])])),
    ]);
    let program = program(vec![weight("a", &[2, 3]), weight("model.b", &[4])]);
    for dir in [single, sharded] {
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.check(&program).unwrap(), 40);
        let a = checkpoint.read(&program.weights[0], &program.name_prefixes).unwrap();
        assert_eq!((a.shape.as_slice(), a.to_f32()), (&[2, 3][..], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
        assert_eq!(checkpoint.read(&program.weights[1], &program.name_prefixes).unwrap().len(), 4);
    }
}

#[test]
fn what_is_missing_is_listed() {
    let dir = dir(&[("model.safetensors", file(&[("a", &[1])]))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let weights = (0..9).map(|i| weight(&format!("w{i}"), &[1])).collect();
    let error = checkpoint.check(&program(weights)).unwrap_err().to_string();
    assert!(error.contains("9 tensors") && error.contains("w0, w1, w2, w3, ..."), "{error}");
}

#[test]
fn shape_and_type_must_be_the_models() {
    let header = r#"{"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[8,32]}}"#;
    let dir = dir(&[("model.safetensors", raw(header, &[0; 32]))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let error = checkpoint.check(&program(vec![weight("a", &[3, 2])])).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: tensor a has shape [2, 3], config.json asks for [3, 2]"), "{error}");
    let error = checkpoint.check(&program(vec![weight("i", &[1])])).unwrap_err().to_string();
    assert!(error.contains("tensor i is stored as I64"), "{error}");
}

#[test]
fn broken_files_are_named() {
    let good = file(&[("a", &[4])]);
    let truncated = good[..good.len() - 4].to_vec();
    // (bytes of model.safetensors, what the error must say)
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "too few"),
        (vec![1, 0, 0], "too few"),
        (u64::MAX.to_le_bytes().to_vec(), "at most 100000000"),
        (1000_u64.to_le_bytes().to_vec(), "too few"),
        (raw("{", &[]), "not valid JSON"),
        (truncated, "ends at byte 16 of 12"),
        ([good, vec![0; 3]].concat(), "3 bytes of data belong to no tensor"),
    ];
    for (bytes, expected) in cases {
        let dir = dir(&[("model.safetensors", bytes)]);
        let error = open_error(dir.path());
        assert!(error.contains("model.safetensors") && error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_file_cut_while_open_is_an_error() {
    let dir = dir(&[("model.safetensors", file(&[("a", &[4])]))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(70).unwrap();
    let error = checkpoint.read(&weight("a", &[4]), &[]).unwrap_err();
    assert!(matches!(error, WeightsError::Io { .. }), "{error}");
}

#[test]
fn directories_without_usable_weights() {
    assert!(open_error(dir(&[]).path()).contains("neither model.safetensors nor"));
    let pickle = dir(&[("pytorch_model.bin", vec![0])]);
    let error = open_error(pickle.path());
    assert!(error.contains("pytorch_model.bin") && error.contains("safetensors"), "{error}");
    let folder = dir(&[]);
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert!(matches!(Checkpoint::open(folder.path()), Err(WeightsError::NotAFile { .. })));
}

#[test]
fn an_index_that_lies() {
    let shard = || ("model-1.safetensors", file(&[("a", &[1])]));
    let index = |json: &str| ("model.safetensors.index.json", json.as_bytes().to_vec());
    let cases = [
        (vec![index("{"), shard()], "not valid JSON"),
        (vec![index(r#"{"weight_map":{"a":"../model-1.safetensors"}}"#), shard()], "not the plain name"),
        (vec![index(r#"{"weight_map":{"a":"model-2.safetensors"}}"#), shard()], "model-2.safetensors: No such file"),
        (vec![index(r#"{"weight_map":{"b":"model-1.safetensors"}}"#), shard()], "puts tensor b here"),
        (
            vec![
                index(r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#),
                shard(),
                ("model-2.safetensors", file(&[("a", &[1]), ("b", &[1])])),
            ],
            "tensor a is also in",
        ),
    ];
    for (files, expected) in cases {
        let error = open_error(dir(&files).path());
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
