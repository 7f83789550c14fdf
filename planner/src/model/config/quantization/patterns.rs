//! Names of modules as quantisers write them: whole, with `*`, or as a regular expression behind `re:`.
//!
//! Of regular expressions the forms that files use are read (`.*`, `\.`, `(a|b)`, `\d+`, `[0-9]+`, `^`, `$`) and turned
//! into names with `*`; any other is refused by name.

use super::super::{ConfigError, fields::Fields};
use crate::model::{Rules, Storage};

/// Names one expression may stand for.
const MAX_ALTERNATIVES: usize = 64;

pub(super) fn add(
    q: &Fields<'_>,
    field: &str,
    rules: &mut Rules,
    pattern: &str,
    storage: Storage,
) -> Result<(), ConfigError> {
    let added = match pattern.strip_prefix("re:") {
        None => rules.add(pattern, storage),
        Some(expression) => {
            let globs = globs(expression).ok_or_else(|| {
                let supported = "supported: names, `*`, and expressions of `.*`, `\\.`, `(a|b)` and digits";
                q.unsupported(field, pattern, supported)
            })?;
            globs.iter().all(|glob| rules.add(glob, storage))
        }
    };
    if added {
        return Ok(());
    }
    Err(q.out_of_range(field, "a list with more patterns", "a shorter list of modules"))
}

/// The names that an expression stands for; it must fit from a name's start and may end before it.
fn globs(expression: &str) -> Option<Vec<String>> {
    let expression = expression.strip_prefix('^').unwrap_or(expression);
    let (expression, open) = match expression.strip_suffix('$') {
        Some(whole) => (whole, false),
        None => (expression, true),
    };
    let mut names = vec![String::new()];
    let mut rest = expression;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        let piece = match c {
            '(' => {
                let (inside, after) = rest.split_once(')')?;
                rest = after;
                let inside = inside.strip_prefix("?:").unwrap_or(inside);
                let parts: Vec<String> = inside.split('|').map(literal).collect::<Option<_>>()?;
                names = names.iter().flat_map(|name| parts.iter().map(move |part| format!("{name}{part}"))).collect();
                if names.len() > MAX_ALTERNATIVES {
                    return None;
                }
                continue;
            }
            '.' if rest.starts_with('*') || rest.starts_with('+') => {
                rest = &rest[1..];
                "*".to_owned()
            }
            '[' => {
                let (_, after) = rest.strip_prefix("0-9]").map(|after| ("", after))?;
                rest = after.strip_prefix('+').unwrap_or(after);
                "*".to_owned()
            }
            '\\' => {
                let escaped = rest.chars().next()?;
                rest = &rest[escaped.len_utf8()..];
                match escaped {
                    'd' => {
                        rest = rest.strip_prefix('+').unwrap_or(rest);
                        "*".to_owned()
                    }
                    c if c.is_ascii_punctuation() => c.to_string(),
                    _ => return None,
                }
            }
            c if "]{}?+*|^$)".contains(c) => return None,
            c => c.to_string(),
        };
        names.iter_mut().for_each(|name| name.push_str(&piece));
    }
    if open {
        names.iter_mut().filter(|name| !name.ends_with('*')).for_each(|name| name.push('*'));
    }
    Some(names)
}

/// A part of an alternative: plain text, `.*` or an escaped dot.
fn literal(text: &str) -> Option<String> {
    let text = text.replace(".*", "*").replace("\\.", ".").replace("\\d+", "*").replace("[0-9]+", "*");
    (!text.contains(['\\', '(', '[', '{', '?', '+', '|'])).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::globs;

    #[test]
    fn expressions_become_names() {
        let table: [(&str, &[&str]); 5] = [
            (".*self_attn.*", &["*self_attn*"]),
            (r".*mlp\.(gate|up)_proj.*", &["*mlp.gate_proj*", "*mlp.up_proj*"]),
            (r"model\.layers\.\d+\.mlp\.gate$", &["model.layers.*.mlp.gate"]),
            ("vision_tower.*", &["vision_tower*"]),
            ("lm_head", &["lm_head*"]),
        ];
        for (expression, expected) in table {
            assert_eq!(globs(expression).as_deref(), Some(&expected.map_to_owned()[..]), "{expression}");
        }
        for refused in ["a{3}", "(?!x)y", "[a-z]+", "(a|b", "a?"] {
            assert_eq!(globs(refused), None, "{refused}");
        }
    }

    trait MapToOwned {
        fn map_to_owned(&self) -> Vec<String>;
    }

    impl MapToOwned for &[&str] {
        fn map_to_owned(&self) -> Vec<String> {
            self.iter().map(|&s| s.to_owned()).collect()
        }
    }
}
