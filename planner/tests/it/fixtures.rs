//! Real configs: facts and figures of published models.
#![allow(clippy::unwrap_used)]

use mserve_planner::model::{ModelSpec, parse_config};
use std::fs;

const DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/configs");

/// Names of all configs, in order.
pub fn names() -> Vec<String> {
    let files = fs::read_dir(DIR).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = files
        .filter_map(|file| file.strip_suffix(".json").map(str::to_owned))
        .filter(|name| !name.ends_with(".hf_quant_config"))
        .collect();
    names.sort();
    names
}

pub fn json(name: &str) -> Vec<u8> {
    fs::read(format!("{DIR}/{name}.json")).unwrap()
}

/// Parsed as `mserve plan` does it: with the quantisation file beside the config, where there is one.
pub fn spec(name: &str) -> ModelSpec {
    let spec = parse_config(&json(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    match fs::read(format!("{DIR}/{name}.hf_quant_config.json")) {
        Ok(json) => spec.with_hf_quant_config(&json).unwrap(),
        Err(_) => spec,
    }
}

/// Fields of a line of comma-separated values; quotes keep commas together.
pub fn csv_fields(line: &str) -> Vec<String> {
    let (mut fields, mut quoted) = (vec![String::new()], false);
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => fields.last_mut().unwrap().push(c),
        }
    }
    fields
}
