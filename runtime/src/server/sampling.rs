//! Sampling fields of a request, as OpenAI and vLLM name them, to [`SamplingParams`].

use super::error::ApiError;
use super::fields::Fields;
use crate::engine::SamplingParams;
use crate::tokenizer::GenerationDefaults;
use serde_json::Value;
use std::collections::HashMap;

const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 4096;
const MAX_STOP_TOKENS: usize = 1024;
const MAX_TOP_K: i64 = 1 << 24;

/// What the model sets for its requests.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub vocab_size: usize,
    pub defaults: GenerationDefaults,
}

/// Everything but `max_tokens` and `logprobs`, whose fields differ between routes.
///
/// # Errors
/// 400 naming the first field of a wrong type or out of its range, or one that is not supported.
pub fn parse(fields: &Fields, limits: &Limits) -> Result<SamplingParams, ApiError> {
    refuse_unsupported(fields)?;
    let standard = SamplingParams::default();
    let defaults = &limits.defaults;
    let number = |name: &str, low: f64, high: f64, default: f32| {
        fields.number(name, low..=high).map(|value| value.unwrap_or(default))
    };
    let top_k = fields.integer("top_k", -1..=MAX_TOP_K)?.map(|k| u32::try_from(k).unwrap_or(0));
    Ok(SamplingParams {
        temperature: number("temperature", 0.0, 2.0, defaults.temperature.unwrap_or(standard.temperature))?,
        top_k: top_k.or(defaults.top_k).unwrap_or(standard.top_k),
        top_p: number("top_p", 0.0, 1.0, defaults.top_p.unwrap_or(standard.top_p))?,
        min_p: number("min_p", 0.0, 1.0, defaults.min_p.unwrap_or(standard.min_p))?,
        repetition_penalty: number(
            "repetition_penalty",
            0.01,
            100.0,
            defaults.repetition_penalty.unwrap_or(standard.repetition_penalty),
        )?,
        presence_penalty: number("presence_penalty", -2.0, 2.0, standard.presence_penalty)?,
        frequency_penalty: number("frequency_penalty", -2.0, 2.0, standard.frequency_penalty)?,
        logit_bias: logit_bias(fields, limits.vocab_size)?,
        // Two's complement keeps negative seeds apart from positive ones.
        seed: fields.get::<i64>("seed", "an integer")?.map(|seed| seed as u64),
        min_tokens: fields.count("min_tokens", 0..=i64::MAX)?.unwrap_or(0),
        stop: stop(fields)?,
        stop_token_ids: stop_token_ids(fields, limits.vocab_size)?,
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        ..standard
    })
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let stops = match fields.raw("stop") {
        Some(text) if text.starts_with('"') => fields.text("stop")?.into_iter().collect(),
        _ => fields.get::<Vec<String>>("stop", "a string or a list of strings")?.unwrap_or_default(),
    };
    if stops.len() > MAX_STOPS {
        return Err(ApiError::field("stop", format!("stop has {} strings, and the limit is {MAX_STOPS}", stops.len())));
    }
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        Some(_) => Err(ApiError::field("stop", format!("a stop string must have 1 to {MAX_STOP_BYTES} bytes"))),
        None => Ok(stops),
    }
}

fn stop_token_ids(fields: &Fields, vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    let name = "stop_token_ids";
    let ids: Vec<u32> = fields.get(name, "a list of token ids")?.unwrap_or_default();
    if ids.len() > MAX_STOP_TOKENS {
        return Err(ApiError::field(name, format!("{name} has {} ids, and the limit is {MAX_STOP_TOKENS}", ids.len())));
    }
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(ApiError::field(name, format!("token id {id} is outside the vocabulary of {vocab_size}"))),
        None => Ok(ids),
    }
}

fn logit_bias(fields: &Fields, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let name = "logit_bias";
    let expected = "a map of token ids to numbers from -100 to 100";
    let map: HashMap<String, f64> = fields.get(name, expected)?.unwrap_or_default();
    if map.len() > vocab_size {
        return Err(ApiError::field(name, format!("{name} has {} entries, more than the vocabulary", map.len())));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (token, bias) in map {
        let id = token.parse().ok().filter(|&id: &u32| (id as usize) < vocab_size);
        match id {
            Some(id) if (-100.0..=100.0).contains(&bias) => biases.push((id, bias as f32)),
            _ => {
                let token: String = token.chars().take(40).collect();
                let message = format!("{name} has {token:?}: {bias}; it must be {expected}, ids below {vocab_size}");
                return Err(ApiError::field(name, message));
            }
        }
    }
    biases.sort_unstable_by_key(|&(id, _)| id);
    Ok(biases)
}

fn refuse_unsupported(fields: &Fields) -> Result<(), ApiError> {
    for name in [
        "tools",
        "functions",
        "audio",
        "suffix",
        "prompt_logprobs",
        "use_beam_search",
        "truncate_prompt_tokens",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "prompt_embeds",
        "continue_final_message",
    ] {
        fields.refuse(name, "")?;
    }
    fields.refuse("chat_template", ": templates come from the model or the operator, never from a request")?;
    if let Some(format) = fields.get::<Value>("response_format", "an object")?
        && format.get("type").and_then(Value::as_str) != Some("text")
    {
        let message = "response_format: only {\"type\": \"text\"} is supported";
        return Err(ApiError::field("response_format", message).code("unsupported_parameter"));
    }
    let n = fields.integer("n", 1..=128)?.unwrap_or(1);
    if fields.integer("best_of", 1..=i64::MAX)?.is_some_and(|best_of| best_of != n) {
        return Err(ApiError::field("best_of", "best_of must equal n").code("unsupported_parameter"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse_with(body: &str, defaults: GenerationDefaults) -> Result<SamplingParams, ApiError> {
        parse(&Fields::parse(body.as_bytes()).unwrap(), &Limits { vocab_size: 10, defaults })
    }

    fn param_of(body: &str) -> Option<String> {
        parse_with(body, GenerationDefaults::default()).unwrap_err().param
    }

    #[test]
    fn request_goes_before_the_models_defaults() {
        let defaults = GenerationDefaults { temperature: Some(0.6), top_k: Some(20), ..Default::default() };
        let params = parse_with(r#"{"temperature": 0, "top_p": 0.5}"#, defaults).unwrap();
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.0, 0.5, 20));
        let all = parse_with(r#"{"top_k": -1}"#, defaults).unwrap();
        assert_eq!((all.temperature, all.top_k), (0.6, 0));
    }

    #[test]
    fn everything_arrives() {
        let params = parse_with(
            r#"{"logit_bias": {"3": -100, "1": 5}, "seed": -1, "stop": "x", "stop_token_ids": [9], "min_tokens": 2,
                "ignore_eos": true, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1,
                "min_p": 0.1, "tools": [], "response_format": {"type": "text"}, "user": "u"}"#,
            GenerationDefaults::default(),
        )
        .unwrap();
        let expected = SamplingParams {
            logit_bias: vec![(1, 5.0), (3, -100.0)],
            seed: Some(u64::MAX),
            stop: vec!["x".to_owned()],
            stop_token_ids: vec![9],
            min_tokens: 2,
            ignore_eos: true,
            presence_penalty: 0.5,
            frequency_penalty: -0.5,
            repetition_penalty: 1.1,
            min_p: 0.1,
            ..SamplingParams::default()
        };
        assert_eq!(params, expected);
    }

    #[test]
    fn each_limit_names_its_field() {
        for (body, param) in [
            (r#"{"temperature": 2.1}"#, "temperature"),
            (r#"{"temperature": "0"}"#, "temperature"),
            (r#"{"top_p": -0.1}"#, "top_p"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"presence_penalty": 3}"#, "presence_penalty"),
            (r#"{"stop": ["a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a"]}"#, "stop"),
            (r#"{"stop": [""]}"#, "stop"),
            (r#"{"stop": {"a": 1}}"#, "stop"),
            (r#"{"stop_token_ids": [10]}"#, "stop_token_ids"),
            (r#"{"stop_token_ids": [-1]}"#, "stop_token_ids"),
            (r#"{"logit_bias": {"10": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"a": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"1": 101}}"#, "logit_bias"),
            (r#"{"seed": 1.5}"#, "seed"),
            (r#"{"min_tokens": -1}"#, "min_tokens"),
            (r#"{"ignore_eos": 1}"#, "ignore_eos"),
            (r#"{"n": 129}"#, "n"),
            (r#"{"best_of": 2}"#, "best_of"),
            (r#"{"tools": [{"type": "function"}]}"#, "tools"),
            (r#"{"chat_template": "{{ 1 }}"}"#, "chat_template"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
        ] {
            assert_eq!(param_of(body).as_deref(), Some(param), "{body}");
        }
    }
}
