//! The model as files: config.json, and the headers of the safetensors files beside it. No weight is read.

use crate::exit::Failure;
use anyhow::Context;
use mserve_planner::memory::{WeightSource, checkpoint_bytes};
use mserve_planner::model::checkpoint::{self, TensorInfo};
use mserve_planner::model::{ConfigError, ModelSpec, Quantization, parse_config};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// More than any config or index; what is longer is not one.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Threads that read headers, and the files that are worth one.
const MAX_READERS: usize = 8;
const FILES_PER_READER: usize = 16;

#[derive(Debug)]
pub(in crate::commands) struct Model {
    pub(super) name: String,
    pub(in crate::commands) spec: ModelSpec,
    pub(super) weights: WeightSource,
    pub(super) notes: Vec<String>,
}

/// Read a model directory, or a config.json (then its directory, when the file has that name).
pub(in crate::commands) fn load(path: &Path) -> anyhow::Result<Model> {
    let (config, directory) = locate(path)?;
    let spec = parse_config(&read(&config)?).map_err(|error| config_failure(&config, &error))?;
    let spec = match &directory {
        Some(directory) => with_quantization_file(spec, directory)?,
        None => spec,
    };
    let (weights, note) = match &directory {
        Some(directory) => weights(directory, &spec)?,
        None => (WeightSource::Program, None),
    };
    Ok(Model { name: name(&config, directory.as_deref()), spec, weights, notes: note.into_iter().collect() })
}

/// The config file, and the model's directory where there is one.
fn locate(path: &Path) -> anyhow::Result<(PathBuf, Option<PathBuf>)> {
    if path.is_dir() {
        let config = path.join("config.json");
        if !config.is_file() {
            let message = format!("{}: no config.json in this directory", path.display());
            return Err(Failure::usage(message).hint("give a model directory in Hugging Face's layout").into());
        }
        return Ok((config, Some(path.to_owned())));
    }
    if !path.exists() {
        let failure = Failure::usage(format!("{}: no such file or directory", path.display()));
        return Err(failure.hint("give a model directory or its config.json; nothing is downloaded").into());
    }
    let named_config = path.file_name().is_some_and(|name| name == "config.json");
    let directory = named_config.then(|| path.parent().unwrap_or(Path::new("")).to_owned());
    Ok((path.to_owned(), directory))
}

fn config_failure(path: &Path, error: &ConfigError) -> Failure {
    Failure::usage(format!("{}: {error}", path.display()))
}

/// For people: the directory's name, or the file's.
fn name(config: &Path, directory: Option<&Path>) -> String {
    let shown = match directory {
        Some(directory) => fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned()),
        None => config.with_extension(""),
    };
    let name = shown.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Older ModelOpt wrote this file alone; where config.json says it too, engines read that.
fn with_quantization_file(spec: ModelSpec, directory: &Path) -> anyhow::Result<ModelSpec> {
    let path = directory.join("hf_quant_config.json");
    if matches!(spec.quantization, Quantization::Stored(_)) || !path.is_file() {
        return Ok(spec);
    }
    Ok(spec.with_hf_quant_config(&read(&path)?).map_err(|error| config_failure(&path, &error))?)
}

/// Device bytes of the checkpoint where all its files are there, else the Program's.
fn weights(directory: &Path, spec: &ModelSpec) -> anyhow::Result<(WeightSource, Option<String>)> {
    let files = shard_files(directory)?;
    let missing = files.iter().filter(|file| !file.is_file()).count();
    if files.is_empty() || missing == files.len() {
        return Ok((WeightSource::Program, None));
    }
    if missing > 0 {
        let note = format!(
            "{missing} of {} safetensors files are missing: weights are computed from config.json.",
            files.len()
        );
        return Ok((WeightSource::Program, Some(note)));
    }
    Ok((WeightSource::Checkpoint { bytes: stored_bytes(&files, spec)? }, None))
}

/// Device bytes of all files. A large checkpoint has hundreds of headers: each thread reads a run of them.
fn stored_bytes(files: &[PathBuf], spec: &ModelSpec) -> anyhow::Result<u64> {
    let of_run = |run: &[PathBuf]| -> anyhow::Result<u64> {
        run.iter().map(|file| Ok(checkpoint_bytes(&header(file)?, spec))).sum()
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_READERS);
    std::thread::scope(|scope| {
        let runs = files.chunks(files.len().div_ceil(threads).max(FILES_PER_READER));
        let readers: Vec<_> = runs.map(|run| scope.spawn(move || of_run(run))).collect();
        // In the order of the files, so that of several faults the first is told.
        readers.into_iter().map(|reader| reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
    })
}

/// What the index names, or the single file of a small model.
fn shard_files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let index = directory.join("model.safetensors.index.json");
    if index.is_file() {
        let index_json = read(&index)?;
        let index = checkpoint::parse_index(&index_json)
            .map_err(|error| Failure::usage(format!("{}: {error}", index.display())))?;
        return Ok(index.shards().into_iter().map(|file| directory.join(file)).collect());
    }
    let single = directory.join("model.safetensors");
    Ok(if single.is_file() { vec![single] } else { Vec::new() })
}

fn header(path: &Path) -> anyhow::Result<Vec<TensorInfo>> {
    let shown = || path.display().to_string();
    let refuse = |error: checkpoint::HeaderError| Failure::usage(format!("{}: {error}", path.display()));
    let mut file = File::open(path).with_context(shown)?;
    let file_bytes = file.metadata().with_context(shown)?.len();
    let mut prefix = [0; 8];
    match file.read_exact(&mut prefix) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            let message = format!("{}: {file_bytes} bytes are too few for a safetensors file", path.display());
            return Err(Failure::usage(message).into());
        }
        other => other.with_context(shown)?,
    }
    let header_bytes = checkpoint::header_bytes(prefix, file_bytes).map_err(refuse)?;
    let mut json = vec![0; usize::try_from(header_bytes)?];
    file.read_exact(&mut json).with_context(shown)?;
    let data_bytes = file_bytes - checkpoint::LENGTH_PREFIX_BYTES - header_bytes;
    Ok(checkpoint::parse_header(&json, data_bytes).map_err(refuse)?)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let refuse = |error: std::io::Error| Failure::usage(format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(refuse)?;
    // Said by the file system, not by the file; a hint only.
    let length = file.metadata().map_or(0, |metadata| metadata.len()).min(MAX_JSON_BYTES) + 1;
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(refuse)?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        let message = format!("{}: longer than {MAX_JSON_BYTES} bytes, which no such file is", path.display());
        return Err(Failure::usage(message).into());
    }
    Ok(bytes)
}
