//! Which modules a checkpoint stores otherwise than by default.
//!
//! Files name up to tens of thousands of modules, or a few with `*`. Whole names are found in a map, names with `*` that
//! belong to one layer under it, and what fits the others is worked out once for all layers.

use super::Storage;
use std::collections::{BTreeMap, HashMap};

/// Exceptions from the default, by module. Names may leave off prefixes such as `model.`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// Whole names, of a module or of one that it is part of.
    exact: HashMap<String, Storage>,
    /// Names with `*` that speak of one number (`layers.3.mlp*`, `*.3.mlp*`), by it: files repeat them for each layer.
    of_number: BTreeMap<u64, Vec<Glob>>,
    /// Names with `*` that fit all layers alike or none.
    alike: Vec<Glob>,
    /// Names with `*` that cut through a number (`*1.mlp`).
    odd: Vec<Glob>,
    /// Names with `*` so far.
    globs: usize,
    /// Whole names so far that no module is looked up by.
    unasked: usize,
}

/// Of several that fit a module the first in the file counts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Glob {
    place: usize,
    pattern: String,
    storage: Storage,
}

/// Three times what the largest file has (22,000 in MiniMax-M3-NVFP4).
const MAX_NAMES: usize = 65_536;
/// Names with `*` that speak of one number: in all, and of the same.
const MAX_OF_NUMBERS: usize = 8192;
const MAX_OF_ONE_NUMBER: usize = 64;
/// The others.
const MAX_ALIKE: usize = 64;
const MAX_ODD: usize = 4;

/// Parts of a name that checkpoints put before or leave off.
const WRAPPERS: [&str; 6] = ["model", "language_model", "backbone", "transformer", "text_model", "llm"];

impl Rules {
    /// False when there are more rules than any real file has.
    #[must_use]
    pub fn add(&mut self, pattern: &str, storage: Storage) -> bool {
        if !pattern.contains('*') {
            return self.add_exact(pattern, storage);
        }
        let pattern = stem(pattern).to_owned();
        let number = numbers(&pattern).next();
        let cuts = cuts_numbers(&pattern);
        let glob = Glob { place: self.globs, pattern, storage };
        self.globs += 1;
        let (list, most) = match number {
            Some(number) => (self.of_number.entry(number).or_default(), MAX_OF_ONE_NUMBER),
            None if cuts => (&mut self.odd, MAX_ODD),
            None => (&mut self.alike, MAX_ALIKE),
        };
        list.push(glob);
        list.len() <= most && self.globs <= MAX_OF_NUMBERS
    }

    fn add_exact(&mut self, name: &str, storage: Storage) -> bool {
        if is_of_later_expert(name) {
            self.unasked += 1;
        } else {
            self.exact.entry(stem(name).to_owned()).or_insert(storage);
        }
        self.exact.len() + self.unasked <= MAX_NAMES
    }

    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.globs == 0
    }
}

/// Rules at work on the modules of one model.
#[derive(Debug)]
pub(super) struct Matcher<'a> {
    rules: &'a Rules,
    /// The first of `alike` that fits a name, by the name with its numbers struck out.
    alike: BTreeMap<String, Option<&'a Glob>>,
}

impl<'a> Matcher<'a> {
    pub(super) fn new(rules: &'a Rules) -> Self {
        Self { rules, alike: BTreeMap::new() }
    }

    pub(super) fn find(&mut self, module: &str) -> Option<Storage> {
        if self.rules.is_empty() {
            return None;
        }
        // The first expert stands for all.
        let first = module.replace(".*", ".0");
        let module = stem(&first);
        let exact = &self.rules.exact;
        if let Some(storage) = ancestors(module).find_map(|name| exact.get(name)) {
            return Some(*storage);
        }
        // A short name without a path (`gate`, `lm_head`) means every module that ends in it (vLLM, `is_layer_skipped`).
        let last = module.rsplit('.').next().unwrap_or(module);
        if let Some(storage) = exact.get(last) {
            return Some(*storage);
        }
        self.first_glob(module).map(|glob| glob.storage)
    }

    fn first_glob(&mut self, module: &str) -> Option<&'a Glob> {
        let rules = self.rules;
        let of_numbers = numbers(module).filter_map(|number| rules.of_number.get(&number));
        let globs = of_numbers.chain([&rules.odd]).filter_map(|globs| first_fitting(globs, module));
        let alike = self.first_alike(module);
        globs.chain(alike).min_by_key(|glob| glob.place)
    }

    fn first_alike(&mut self, module: &str) -> Option<&'a Glob> {
        let rules = self.rules;
        if rules.alike.is_empty() {
            return None;
        }
        let key = without_numbers(module);
        if let Some(known) = self.alike.get(&key) {
            return *known;
        }
        let found = first_fitting(&rules.alike, module);
        self.alike.insert(key, found);
        found
    }
}

fn first_fitting<'a>(globs: &'a [Glob], module: &str) -> Option<&'a Glob> {
    globs.iter().find(|glob| {
        // What may end in anything and fits a part of the name fits the whole.
        let open = glob.pattern.ends_with('*');
        ancestors(module).take(if open { 1 } else { usize::MAX }).any(|name| glob_fits(&glob.pattern, name))
    })
}

/// The module and what it is part of, innermost first.
fn ancestors(module: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(module), |name| name.rfind('.').map(|dot| &name[..dot]))
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.len() < 10 && part.bytes().all(|b| b.is_ascii_digit())
}

/// Numbers that stand between dots. Of a pattern also the one before a `*`: `layers.0*` is about layer 0.
fn numbers(name: &str) -> impl Iterator<Item = u64> {
    let parts = name.split('.').skip(1).map(|part| part.strip_suffix('*').unwrap_or(part));
    parts.filter(|part| is_number(part)).filter_map(|part| part.parse().ok())
}

/// Whether a fixed part of a pattern may begin or end within a number of a name.
fn cuts_numbers(pattern: &str) -> bool {
    let digit = |b: u8| b.is_ascii_digit();
    pattern.split('*').any(|part| {
        part.bytes().next().is_some_and(digit)
            || part.as_bytes().windows(2).any(|pair| pair[0] == b'.' && digit(pair[1]))
    })
}

/// `layers.3.mlp.up_proj` to `layers.0.mlp.up_proj`.
fn without_numbers(module: &str) -> String {
    let mut out = String::with_capacity(module.len());
    for (i, part) in module.split('.').enumerate() {
        if i > 0 {
            out.push('.');
        }
        out.push_str(if i > 0 && is_number(part) { "0" } else { part });
    }
    out
}

fn stem(name: &str) -> &str {
    let unwrapped = |name| WRAPPERS.iter().find_map(|&wrapper| str::strip_prefix(name, wrapper)?.strip_prefix('.'));
    std::iter::successors(Some(name), |&name| unwrapped(name)).last().unwrap_or(name)
}

/// Whether it is a part of an expert other than the first. Experts are one tensor here and many in a file, where they
/// are nearly all of the names: of `layers.3.mlp.experts.7.up_proj` only number 0 is asked for.
fn is_of_later_expert(name: &str) -> bool {
    let is = |(before, _part)| {
        let (before, number) = split_last(before)?;
        (is_number(number) && number != "0" && before.ends_with(".experts")).then_some(())
    };
    split_last(name).and_then(is).is_some()
}

fn split_last(name: &str) -> Option<(&str, &str)> {
    // Parts are short: nothing is gained by looking for the dot a word at a time.
    let dot = name.bytes().rposition(|b| b == b'.')?;
    Some((&name[..dot], &name[dot + 1..]))
}

/// `*` stands for any text. Linear in the pattern times the name.
fn glob_fits(glob: &str, text: &str) -> bool {
    let mut parts = glob.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::super::{Packed, Scales};
    use super::*;

    const FP8: Storage = Storage::Packed(Packed::fp8(Scales::Tensor));
    const FP4: Storage = Storage::Packed(Packed::NVFP4);

    #[test]
    fn globs_fit_whole_names() {
        for (glob, text, fits) in [
            ("layers.0.mlp*", "layers.0.mlp.gate", true),
            ("layers.0.mlp*", "layers.10.mlp.gate", false),
            ("*.attn.*", "layers.3.attn.wq_a", true),
            ("*.attn.*", "layers.3.attn", false),
            ("*self_attn*", "layers.3.self_attn.q_proj", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b", "ab", true),
            ("a*b", "a", false),
        ] {
            assert_eq!(glob_fits(glob, text), fits, "{glob} {text}");
        }
    }

    fn rules(patterns: &[(&str, Storage)]) -> Rules {
        let mut rules = Rules::default();
        for (pattern, storage) in patterns {
            assert!(rules.add(pattern, *storage), "{pattern}");
        }
        rules
    }

    #[test]
    fn rules_know_wrappers_parents_and_short_names() {
        let rules = rules(&[
            ("model.language_model.layers.0.self_attn", Storage::Plain),
            ("gate", Storage::Plain),
            ("layers.1.ffn.experts", FP8),
            ("language_model.model.layers.2.mlp*", FP8),
            ("model.layers.*.linear_attn", FP8),
        ]);
        let mut matcher = Matcher::new(&rules);
        for (module, storage) in [
            ("model.layers.2.mlp.up_proj", Some(FP8)),
            ("model.layers.20.mlp.up_proj", None),
            ("model.layers.9.linear_attn.in_proj_z", Some(FP8)),
            ("model.layers.10.linear_attn.in_proj_z", Some(FP8)),
            ("model.layers.0.self_attn.q_proj", Some(Storage::Plain)),
            ("model.layers.1.self_attn.q_proj", None),
            ("model.layers.7.mlp.gate", Some(Storage::Plain)),
            ("layers.1.ffn.experts.*.w1", Some(FP8)),
        ] {
            assert_eq!(matcher.find(module), storage, "{module}");
        }
    }

    #[test]
    fn of_experts_the_first_counts() {
        let names = |expert: u64| format!("model.layers.1.mlp.experts.{expert}.up_proj");
        let mut rules = Rules::default();
        for expert in 0..300 {
            assert!(rules.add(&names(expert), if expert == 0 { FP8 } else { FP4 }));
        }
        assert!(rules.add("model.layers.2.mlp.shared_experts.1.up_proj", FP4));
        assert!(rules.add("model.layers.3.mlp.experts", FP4));
        assert_eq!((rules.exact.len(), rules.unasked), (3, 299));
        let mut matcher = Matcher::new(&rules);
        assert_eq!(matcher.find("model.layers.1.mlp.experts.*.up_proj"), Some(FP8));
        assert_eq!(matcher.find("model.layers.3.mlp.experts.*.up_proj"), Some(FP4));
        assert_eq!(matcher.find("model.layers.1.mlp.experts.*.down_proj"), None);
    }

    #[test]
    fn what_is_remembered_is_what_each_pattern_says() {
        // Of every kind: whole numbers, none, and numbers that are cut.
        let patterns = [
            ("*.mlp.w1*", FP8),
            ("*.3.mlp.up*", FP4),
            ("layers.4*", FP4),
            ("*1.mlp.down", FP4),
            ("*.attn.*", Storage::Plain),
            ("layers.*.mlp.down", FP8),
            ("*s.2*", FP8),
        ];
        let rules = rules(&patterns);
        assert_eq!((rules.alike.len(), rules.odd.len(), rules.of_number.len()), (3, 1, 3));
        let mut matcher = Matcher::new(&rules);
        let modules = ["mlp.up", "mlp.down", "mlp.w1", "attn.q", "attn"];
        for module in (0..30).flat_map(|layer| modules.map(|part| format!("layers.{layer}.{part}"))) {
            let fits = |glob: &str| ancestors(&module).any(|name| glob_fits(glob, name));
            // `layers.4*` and `*s.2*` are about layers 4 and 2, not 40 or 20.
            let of_layer = |glob: &str| numbers(glob).next().is_none_or(|n| numbers(&module).any(|m| m == n));
            let expected = patterns.iter().find(|(glob, _)| of_layer(glob) && fits(glob)).map(|(_, storage)| *storage);
            assert_eq!(matcher.find(&module), expected, "{module}");
        }
    }

    #[test]
    fn there_is_an_end_to_rules() {
        let until = |pattern: &dyn Fn(usize) -> String| {
            let mut rules = Rules::default();
            (0..200_000).take_while(|&i| rules.add(&pattern(i), FP8)).count()
        };
        assert_eq!(until(&|i| format!("*a{i}x*")), MAX_ALIKE);
        assert_eq!(until(&|i| format!("*{i}.x*")), MAX_ODD);
        assert_eq!(until(&|i| format!("layers.3.x{i}*")), MAX_OF_ONE_NUMBER);
        assert_eq!(until(&|i| format!("layers.{i}.x*")), MAX_OF_NUMBERS);
        assert_eq!(until(&|i| format!("layers.{i}.x")), MAX_NAMES);
        assert_eq!(until(&|i| format!("layers.0.experts.{i}.x")), MAX_NAMES);
    }
}
