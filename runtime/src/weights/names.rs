//! Checkpoints of one architecture name the same tensor in a few ways.

/// Names under which a checkpoint may hold the tensor that the program calls `name`, the likeliest first:
/// as it is, with a family prefix added (`bert.`) or left off (`model.`), and with the names that TensorFlow's
/// LayerNorm gave its parameters (`gamma`, `beta`), which the first BERT checkpoints kept.
pub fn candidates(name: &str, prefixes: &[String]) -> Vec<String> {
    let mut names = vec![name.to_owned()];
    for prefix in prefixes {
        names.push(match name.strip_prefix(prefix.as_str()) {
            Some(rest) => rest.to_owned(),
            None => format!("{prefix}{name}"),
        });
    }
    let old: Vec<String> = names.iter().filter_map(|n| layer_norm_name(n)).collect();
    names.extend(old);
    names
}

fn layer_norm_name(name: &str) -> Option<String> {
    let stem = |suffix| name.strip_suffix(suffix).filter(|stem| stem.ends_with("LayerNorm"));
    stem(".weight").map(|s| format!("{s}.gamma")).or_else(|| stem(".bias").map(|s| format!("{s}.beta")))
}

#[cfg(test)]
mod tests {
    use super::candidates;

    #[test]
    fn prefixes_are_added_or_left_off() {
        let prefixes = ["model.".to_owned()];
        assert_eq!(candidates("model.norm.weight", &prefixes), ["model.norm.weight", "norm.weight"]);
        assert_eq!(candidates("lm_head.weight", &prefixes), ["lm_head.weight", "model.lm_head.weight"]);
    }

    #[test]
    fn the_first_bert_checkpoints_say_gamma_and_beta() {
        let prefixes = ["bert.".to_owned()];
        let names = candidates("embeddings.LayerNorm.weight", &prefixes);
        assert_eq!(names[2..], ["embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.gamma"]);
        assert_eq!(candidates("embeddings.LayerNorm.bias", &[])[1], "embeddings.LayerNorm.beta");
    }
}
