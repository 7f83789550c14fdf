use super::names::candidates;
use super::{HostTensor, StoredType, TensorLocation, TensorSource, WeightsError};
use mserve_planner::model::checkpoint::{LENGTH_PREFIX_BYTES, TensorInfo, header_bytes, parse_header, parse_index};
use mserve_planner::model::{Program, Weight};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Largest published index is a few MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// How many missing tensors an error lists.
const LISTED: usize = 4;

/// The safetensors files of a model directory, with their headers read and checked.
#[derive(Debug)]
pub struct Checkpoint {
    /// The file, or the index, that a missing tensor is missing from.
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: HashMap<String, Location>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    /// Where the data section begins.
    data_start: u64,
}

#[derive(Debug)]
struct Location {
    shard: usize,
    info: TensorInfo,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// When there is no such file, when a file is not a regular file, or when a header or the index lies.
    pub fn open(dir: &Path) -> Result<Self, WeightsError> {
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        if exists(&single)? {
            let mut checkpoint = Self { path: single.clone(), shards: Vec::new(), tensors: HashMap::new() };
            checkpoint.add_shard(&single)?;
            Ok(checkpoint)
        } else if exists(&index)? {
            Self::open_sharded(dir, index)
        } else {
            Err(match pickle_in(dir) {
                Some(file) => WeightsError::PickleOnly { dir: dir.to_owned(), file },
                None => WeightsError::NoWeights { dir: dir.to_owned() },
            })
        }
    }

    fn open_sharded(dir: &Path, index_path: PathBuf) -> Result<Self, WeightsError> {
        let index = parse_index(&read_index(&index_path)?)
            .map_err(|source| WeightsError::Index { path: index_path.clone(), source })?;
        let mut checkpoint = Self { path: index_path, shards: Vec::new(), tensors: HashMap::new() };
        for name in index.shards() {
            checkpoint.add_shard(&dir.join(name))?;
        }
        for (tensor, file) in &index.weight_map {
            let path = dir.join(file);
            let found = checkpoint.tensors.get(tensor).map(|at| &checkpoint.shards[at.shard].path);
            if found != Some(&path) {
                return Err(WeightsError::NotInShard { path, tensor: tensor.clone() });
            }
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, path: &Path) -> Result<(), WeightsError> {
        let io = |source| WeightsError::Io { path: path.to_owned(), source };
        let (file, file_bytes) = open_regular(path)?;
        let header = |source| WeightsError::Header { path: path.to_owned(), source };
        let mut prefix = [0; LENGTH_PREFIX_BYTES as usize];
        if file_bytes >= LENGTH_PREFIX_BYTES {
            file.read_exact_at(&mut prefix, 0).map_err(io)?;
        }
        let header_len = header_bytes(prefix, file_bytes).map_err(header)?;
        let data_start = LENGTH_PREFIX_BYTES + header_len;
        let mut json = vec![0; header_len as usize];
        file.read_exact_at(&mut json, LENGTH_PREFIX_BYTES).map_err(io)?;
        let shard = self.shards.len();
        self.shards.push(Shard { path: path.to_owned(), file, data_start });
        for info in parse_header(&json, file_bytes - data_start).map_err(header)? {
            let (name, location) = (info.name.clone(), Location { shard, info });
            if let Some(first) = self.tensors.insert(name.clone(), location) {
                let other = self.shards[first.shard].path.clone();
                return Err(WeightsError::InTwoShards { path: path.to_owned(), other, tensor: name });
            }
        }
        Ok(())
    }

    /// Tensors of all files, in no order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|at| &at.info)
    }

    fn find(&self, weight: &Weight, prefixes: &[String]) -> Option<&Location> {
        candidates(&weight.name, prefixes).iter().find_map(|name| self.tensors.get(name))
    }

    fn fitting(&self, weight: &Weight, prefixes: &[String]) -> Result<(&Location, StoredType), WeightsError> {
        let Some(at) = self.find(weight, prefixes) else {
            let (path, first) = (self.path.clone(), vec![weight.name.clone()]);
            return Err(WeightsError::Missing { path, missing_count: 1, first });
        };
        Ok((at, self.check_fit(weight, at)?))
    }

    /// The tensor's element type, if its shape and type are those of a weight of the model.
    fn check_fit(&self, weight: &Weight, at: &Location) -> Result<StoredType, WeightsError> {
        let path = || self.shards[at.shard].path.clone();
        let tensor = at.info.name.clone();
        if at.info.shape != weight.shape {
            let (expected, found) = (weight.shape.clone(), at.info.shape.clone());
            return Err(WeightsError::Shape { path: path(), tensor, expected, found });
        }
        StoredType::from_dtype(at.info.dtype).ok_or_else(|| WeightsError::DType {
            path: path(),
            tensor,
            dtype: at.info.dtype,
        })
    }
}

impl TensorSource for Checkpoint {
    fn check(&self, program: &Program) -> Result<u64, WeightsError> {
        let mut missing = Vec::new();
        let mut bytes: u64 = 0;
        for weight in &program.weights {
            match self.find(weight, &program.name_prefixes) {
                Some(at) => {
                    self.check_fit(weight, at)?;
                    bytes = bytes.saturating_add(at.info.bytes());
                }
                None => missing.push(weight.name.clone()),
            }
        }
        if missing.is_empty() {
            return Ok(bytes);
        }
        let missing_count = missing.len();
        missing.truncate(LISTED);
        Err(WeightsError::Missing { path: self.path.clone(), missing_count, first: missing })
    }

    fn locate(&self, weight: &Weight, prefixes: &[String]) -> Result<Option<TensorLocation<'_>>, WeightsError> {
        let (at, stored) = self.fitting(weight, prefixes)?;
        let shard = &self.shards[at.shard];
        let offset = shard.data_start + at.info.begin;
        Ok(Some(TensorLocation { file: &shard.file, path: &shard.path, offset, bytes: at.info.bytes(), stored }))
    }

    fn read(&self, weight: &Weight, prefixes: &[String]) -> Result<HostTensor, WeightsError> {
        let (at, stored) = self.fitting(weight, prefixes)?;
        let shard = &self.shards[at.shard];
        let too_large = || WeightsError::TooLarge {
            path: shard.path.clone(),
            tensor: at.info.name.clone(),
            bytes: at.info.bytes(),
        };
        let shape: Option<Vec<usize>> = at.info.shape.iter().map(|&n| usize::try_from(n).ok()).collect();
        let len = usize::try_from(at.info.bytes()).map_err(|_| too_large())?;
        let mut bytes = vec![0; len];
        shard
            .file
            .read_exact_at(&mut bytes, shard.data_start + at.info.begin)
            .map_err(|source| WeightsError::Io { path: shard.path.clone(), source })?;
        Ok(HostTensor { stored, shape: shape.ok_or_else(too_large)?, bytes })
    }
}

fn exists(path: &Path) -> Result<bool, WeightsError> {
    path.try_exists().map_err(|source| WeightsError::Io { path: path.to_owned(), source })
}

/// Opens a file that is one: no pipe to hang on, no device to read for ever. Links are followed, since download
/// caches keep the real files elsewhere.
fn open_regular(path: &Path) -> Result<(File, u64), WeightsError> {
    let io = |source| WeightsError::Io { path: path.to_owned(), source };
    // Asked before opening, because opening a pipe blocks.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(WeightsError::NotAFile { path: path.to_owned() });
    }
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    Ok((file, metadata.len()))
}

fn read_index(path: &Path) -> Result<Vec<u8>, WeightsError> {
    let (file, bytes) = open_regular(path)?;
    if bytes > MAX_INDEX_BYTES {
        return Err(WeightsError::IndexTooLong { path: path.to_owned(), limit_bytes: MAX_INDEX_BYTES });
    }
    let mut json = Vec::new();
    file.take(MAX_INDEX_BYTES)
        .read_to_end(&mut json)
        .map_err(|source| WeightsError::Io { path: path.to_owned(), source })?;
    Ok(json)
}

/// A file of pickled weights in `dir`, if there is one.
fn pickle_in(dir: &Path) -> Option<String> {
    let names = std::fs::read_dir(dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut pickles: Vec<String> =
        names.filter(|name| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end))).collect();
    pickles.sort();
    pickles.into_iter().next()
}
