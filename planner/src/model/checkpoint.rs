//! What a safetensors file says of itself: the header as a list of tensors, and the index of a sharded checkpoint.
//!
//! A file is eight bytes of header length, a JSON header, then the data. Everything a header claims is checked here
//! before anyone allocates or reads by it, so a caller may trust the ranges that come out.
//! Format: <https://github.com/huggingface/safetensors>.

use super::DType;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Longest header the format allows.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// More tensors than any single published file holds.
pub const MAX_TENSORS: usize = 100_000;
/// More dimensions than any weight has.
const MAX_RANK: usize = 8;
/// Bytes before the header: its length, little endian.
pub const LENGTH_PREFIX_BYTES: u64 = 8;

/// One tensor of a file. `begin..end` are bytes from the start of the data section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub begin: u64,
    pub end: u64,
}

impl TensorInfo {
    pub fn bytes(&self) -> u64 {
        self.end - self.begin
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("the file has {file_bytes} bytes, too few for the header of {needed_bytes} bytes it announces")]
    FileTooShort { file_bytes: u64, needed_bytes: u64 },
    #[error("the header claims {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")]
    HeaderTooLong { header_bytes: u64 },
    #[error("the header is not valid JSON: {0}")]
    Json(String),
    #[error("the header lists more than {MAX_TENSORS} tensors")]
    TooManyTensors,
    #[error("tensor {tensor} is listed twice")]
    Duplicate { tensor: String },
    #[error("tensor {tensor}: field {field} is missing or not {expected}")]
    Field { tensor: String, field: &'static str, expected: &'static str },
    #[error("tensor {tensor} has the element type {dtype}, which is not supported")]
    UnknownDType { tensor: String, dtype: String },
    #[error("tensor {tensor} has {rank} dimensions; at most {MAX_RANK} are allowed")]
    TooManyDimensions { tensor: String, rank: usize },
    #[error("tensor {tensor}: shape {shape:?} overflows 64 bits")]
    ShapeOverflow { tensor: String, shape: Vec<u64> },
    #[error(
        "tensor {tensor}: shape {shape:?} of {dtype:?} takes {expected_bytes} bytes, its offsets span {found_bytes}"
    )]
    LengthMismatch { tensor: String, shape: Vec<u64>, dtype: DType, expected_bytes: u64, found_bytes: u64 },
    #[error("tensor {tensor} ends before it begins ({begin}..{end})")]
    NegativeLength { tensor: String, begin: u64, end: u64 },
    #[error("tensor {tensor} ends at byte {end} of {data_bytes} bytes of data")]
    OutOfFile { tensor: String, end: u64, data_bytes: u64 },
    #[error("tensor {tensor} begins at byte {begin}, where byte {expected} was due: tensors overlap or leave a gap")]
    NotContiguous { tensor: String, begin: u64, expected: u64 },
    #[error("{trailing_bytes} bytes of data belong to no tensor")]
    TrailingData { trailing_bytes: u64 },
}

/// Length of the JSON header out of the first eight bytes, checked against the size of the file.
///
/// # Errors
/// [`HeaderError::HeaderTooLong`] and [`HeaderError::FileTooShort`].
pub fn header_bytes(prefix: [u8; 8], file_bytes: u64) -> Result<u64, HeaderError> {
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(HeaderError::HeaderTooLong { header_bytes });
    }
    let needed_bytes = LENGTH_PREFIX_BYTES + header_bytes;
    if needed_bytes > file_bytes {
        return Err(HeaderError::FileTooShort { file_bytes, needed_bytes });
    }
    Ok(header_bytes)
}

/// The tensors of one file, in the order of their data. `data_bytes` is what follows the header in the file.
///
/// # Errors
/// The first lie found, with the tensor's name.
pub fn parse_header(header_json: &[u8], data_bytes: u64) -> Result<Vec<TensorInfo>, HeaderError> {
    let mut tensors = Vec::new();
    for (name, entry) in unique_entries(header_json)? {
        if name != "__metadata__" {
            tensors.push(tensor_info(name, &entry)?);
        }
    }
    tensors.sort_by_key(|t| (t.begin, t.end));
    check_layout(&tensors, data_bytes)?;
    Ok(tensors)
}

/// Tensors must follow one another from byte 0 to the end of the file, so that no byte is read twice or hidden.
fn check_layout(tensors: &[TensorInfo], data_bytes: u64) -> Result<(), HeaderError> {
    let mut expected = 0;
    for t in tensors {
        if t.end > data_bytes {
            return Err(HeaderError::OutOfFile { tensor: t.name.clone(), end: t.end, data_bytes });
        }
        if t.begin != expected {
            return Err(HeaderError::NotContiguous { tensor: t.name.clone(), begin: t.begin, expected });
        }
        expected = t.end;
    }
    match data_bytes - expected {
        0 => Ok(()),
        trailing_bytes => Err(HeaderError::TrailingData { trailing_bytes }),
    }
}

fn tensor_info(tensor: String, entry: &Value) -> Result<TensorInfo, HeaderError> {
    let field = |field, expected| HeaderError::Field { tensor: tensor.clone(), field, expected };
    let dtype = entry.get("dtype").and_then(Value::as_str).ok_or_else(|| field("dtype", "a string"))?;
    let dtype: DType = DType::deserialize(dtype.into_deserializer()).map_err(|_: serde::de::value::Error| {
        HeaderError::UnknownDType { tensor: tensor.clone(), dtype: dtype.to_owned() }
    })?;
    let shape = integers(entry.get("shape")).ok_or_else(|| field("shape", "a list of non-negative integers"))?;
    let offsets = integers(entry.get("data_offsets"));
    let Some(&[begin, end]) = offsets.as_deref() else {
        return Err(field("data_offsets", "a pair of non-negative integers"));
    };
    if shape.len() > MAX_RANK {
        return Err(HeaderError::TooManyDimensions { tensor, rank: shape.len() });
    }
    let Some(found_bytes) = end.checked_sub(begin) else {
        return Err(HeaderError::NegativeLength { tensor, begin, end });
    };
    let expected_bytes = shape.iter().try_fold(dtype.bytes(), |product, &n| product.checked_mul(n));
    let Some(expected_bytes) = expected_bytes else {
        return Err(HeaderError::ShapeOverflow { tensor, shape });
    };
    if expected_bytes != found_bytes {
        return Err(HeaderError::LengthMismatch { tensor, shape, dtype, expected_bytes, found_bytes });
    }
    Ok(TensorInfo { name: tensor, dtype, shape, begin, end })
}

fn integers(value: Option<&Value>) -> Option<Vec<u64>> {
    value?.as_array()?.iter().map(Value::as_u64).collect()
}

/// Entries of a JSON object in file order. serde_json's own maps keep the last of two equal keys in silence.
fn unique_entries(json: &[u8]) -> Result<Vec<(String, Value)>, HeaderError> {
    let mut fault = None;
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let parsed = UniqueEntries { fault: &mut fault }.deserialize(&mut deserializer);
    match (fault, parsed.and_then(|entries| deserializer.end().map(|()| entries))) {
        (Some(fault), _) => Err(fault),
        (None, Err(error)) => Err(HeaderError::Json(error.to_string())),
        (None, Ok(entries)) => match repeated(&entries) {
            Some(name) => Err(HeaderError::Duplicate { tensor: name.to_owned() }),
            None => Ok(entries),
        },
    }
}

fn repeated(entries: &[(String, Value)]) -> Option<&str> {
    let mut names: Vec<&str> = entries.iter().map(|(name, _)| &name[..]).collect();
    names.sort_unstable();
    names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

struct UniqueEntries<'a> {
    /// Why the walk stopped, when that was not the JSON's fault.
    fault: &'a mut Option<HeaderError>,
}

impl<'de> DeserializeSeed<'de> for UniqueEntries<'_> {
    type Value = Vec<(String, Value)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for UniqueEntries<'_> {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some((name, entry)) = map.next_entry::<String, Value>()? {
            if entries.len() >= MAX_TENSORS {
                *self.fault = Some(HeaderError::TooManyTensors);
                return Err(serde::de::Error::custom("refused"));
            }
            entries.push((name, entry));
        }
        Ok(entries)
    }
}

/// `model.safetensors.index.json`: which shard holds which tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardIndex {
    /// Tensor name -> file name.
    pub weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// File names, each once, in order.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    #[error("not valid JSON: {0}")]
    Json(String),
    #[error("field weight_map is missing or not an object of file names")]
    NoWeightMap,
    #[error("field weight_map is empty")]
    Empty,
    #[error("weight_map has more than {MAX_TENSORS} entries")]
    TooManyTensors,
    #[error("tensor {tensor} is in {file:?}, which is not the plain name of a .safetensors file in the same directory")]
    BadFileName { tensor: String, file: String },
}

/// Reads an index. File names that would leave the model's directory are refused.
///
/// # Errors
/// See [`IndexError`].
pub fn parse_index(json: &[u8]) -> Result<ShardIndex, IndexError> {
    let value: Value = serde_json::from_slice(json).map_err(|e| IndexError::Json(e.to_string()))?;
    let Value::Object(mut index) = value else { return Err(IndexError::NoWeightMap) };
    let Some(Value::Object(map)) = index.remove("weight_map") else { return Err(IndexError::NoWeightMap) };
    if map.is_empty() {
        return Err(IndexError::Empty);
    }
    if map.len() > MAX_TENSORS {
        return Err(IndexError::TooManyTensors);
    }
    let mut weight_map = BTreeMap::new();
    for (tensor, file) in map {
        let Value::String(file) = file else { return Err(IndexError::NoWeightMap) };
        if !is_plain_file_name(&file) {
            return Err(IndexError::BadFileName { tensor, file });
        }
        weight_map.insert(tensor, file);
    }
    Ok(ShardIndex { weight_map })
}

fn is_plain_file_name(file: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    file.len() <= 255 && file.ends_with(".safetensors") && !file.starts_with('.') && file.chars().all(plain)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn one(dtype: &str, shape: &str, offsets: &str) -> String {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    }

    #[test]
    fn a_truthful_header_is_read_in_data_order() {
        let json = br#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]},
            "a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},
            "scalar":{"dtype":"I64","shape":[],"data_offsets":[28,36]},
            "none":{"dtype":"U8","shape":[0,7],"data_offsets":[28,28]}}"#;
        let tensors = parse_header(json, 36).unwrap();
        let names: Vec<_> = tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "none", "scalar"]);
        assert_eq!(tensors[1].shape, [2, 3]);
        assert_eq!(tensors[1].bytes(), 24);
    }

    #[test]
    fn lies_are_named() {
        let huge = format!("[{},{}]", u64::MAX, 2);
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"w":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"v":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
            )
        };
        // (header, data bytes, what the error must say)
        let cases: Vec<(String, u64, &str)> = vec![
            ("nonsense".into(), 0, "not valid JSON"),
            ("[]".into(), 0, "not valid JSON"),
            (r#"{"w":{}} tail"#.into(), 0, "not valid JSON"),
            (r#"{"w":3}"#.into(), 0, "field dtype"),
            (one("F8_E8M0", "[4]", "[0,4]"), 4, "F8_E8M0"),
            (one("f32", "[1]", "[0,4]"), 4, "f32"),
            (one("F32", "[-1]", "[0,4]"), 4, "field shape"),
            (one("F32", "[1.0]", "[0,4]"), 4, "field shape"),
            (one("F32", "[1]", "[0.0,4]"), 4, "field data_offsets"),
            (one("F32", "[1]", "[-4,0]"), 4, "field data_offsets"),
            (one("F32", "[1]", "[0,4,8]"), 4, "field data_offsets"),
            (one("F32", "[1]", "[4,0]"), 4, "ends before it begins"),
            (one("F32", &huge, "[0,4]"), 4, "overflows"),
            (one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "9 dimensions"),
            (one("F32", "[2]", "[0,4]"), 4, "takes 8 bytes"),
            (one("F32", "[2]", "[0,8]"), 4, "ends at byte 8 of 4"),
            (one("F32", "[1]", "[4,8]"), 8, "begins at byte 4"),
            (one("F32", "[1]", "[0,4]"), 6, "2 bytes of data belong to no tensor"),
            (two("[0,4]", "[2,6]"), 6, "begins at byte 2"),
            (two("[0,4]", "[6,10]"), 10, "begins at byte 6"),
            (two("[0,4]", "[0,4]"), 4, "begins at byte 0"),
            (
                r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#
                    .into(),
                1,
                "listed twice",
            ),
        ];
        for (json, data_bytes, expected) in cases {
            let error = parse_header(json.as_bytes(), data_bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{json}: {error}");
        }
    }

    #[test]
    fn too_many_tensors_are_refused() {
        let entries: Vec<String> =
            (0..=MAX_TENSORS).map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)).collect();
        let json = format!("{{{}}}", entries.join(","));
        assert_eq!(parse_header(json.as_bytes(), 0), Err(HeaderError::TooManyTensors));
    }

    #[test]
    fn the_length_prefix_is_checked_before_anything_is_allocated() {
        assert_eq!(header_bytes(16u64.to_le_bytes(), 24), Ok(16));
        assert!(matches!(header_bytes((1u64 << 63).to_le_bytes(), 24), Err(HeaderError::HeaderTooLong { .. })));
        assert!(matches!(header_bytes(17u64.to_le_bytes(), 24), Err(HeaderError::FileTooShort { .. })));
    }

    #[test]
    fn an_index_names_files_of_its_own_directory_only() {
        let good = br#"{"metadata":{"total_size":1},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors","c":"model-00002-of-00002.safetensors"}}"#;
        assert_eq!(parse_index(good).unwrap().shards().len(), 2);
        for file in [
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "..",
            "",
            "x.bin",
            ".safetensors",
            "a\\b.safetensors",
        ] {
            let json = serde_json::json!({"weight_map": {"w": file}}).to_string();
            assert!(matches!(parse_index(json.as_bytes()), Err(IndexError::BadFileName { .. })), "{file}");
        }
        assert_eq!(parse_index(b"{}"), Err(IndexError::NoWeightMap));
        assert_eq!(parse_index(br#"{"weight_map":{}}"#), Err(IndexError::Empty));
        assert_eq!(parse_index(br#"{"weight_map":{"w":3}}"#), Err(IndexError::NoWeightMap));
        assert!(matches!(parse_index(b"["), Err(IndexError::Json(_))));
    }
}
