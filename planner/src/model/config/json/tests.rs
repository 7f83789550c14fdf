#![allow(clippy::unwrap_used)]
use super::*;

fn object(json: &str) -> Rc<Object<'_>> {
    match parse(json.as_bytes()).unwrap() {
        Value::Object(object) => object,
        other => panic!("{other:?}"),
    }
}

#[test]
fn values_are_those_of_serde_json() {
    let json = r#" {"b": [1, -2, 3.5, true, null, "xé\n"], "a": {"b": {}}, "ké": 18446744073709551615} "#;
    let theirs: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(to_serde(&parse(json.as_bytes()).unwrap()), theirs);
    for broken in ["", "{", "[1,]", "{\"a\":}", "1 2", "{} x", "\u{1}"] {
        assert!(matches!(parse(broken.as_bytes()), Err(ParseError::Json(_))), "{broken}");
    }
}

fn to_serde(value: &Value<'_>) -> serde_json::Value {
    match value {
        Value::Null => serde_json::Value::Null,
        Value::Bool(b) => (*b).into(),
        Value::Number(n) => n.clone().into(),
        Value::String(s) => s.as_ref().into(),
        Value::Array(list) => list.iter().map(to_serde).collect(),
        Value::Object(map) => map.entries().map(|(name, value)| (name.to_owned(), to_serde(value))).collect(),
    }
}

/// With every kind of value, spaces of every kind, and texts longer than a word with an end at every place in one.
const SAMPLE: &str = r#"{ "a" : [ 0 , -0, 12, -3, 4.5e-1, 1E+2,true,false , null , [ ] , { } ],
    "same":{"x":"y","n":16},	"same too": {"x":"y","n":16}, "not quite": {"x":"y","n":17}, "":"","a":1,
    "escapes\n":"12345678\"\u00e9\\", "é in eight": "ééééééé", "12345678":"123456789 123456789", "/":{}}"#;

#[test]
fn the_quick_reader_agrees_with_serde_json_on_whatever_it_reads() {
    let quickly = |text: &str| quick::read(text).as_ref().map(to_serde);
    assert_eq!(quickly(SAMPLE), serde_json::from_str(SAMPLE).ok());
    assert!(quickly(SAMPLE).is_some());
    for at in 0..SAMPLE.len() {
        assert_eq!(SAMPLE.get(..at).and_then(quickly), None, "cut at {at}");
        for byte in *b"\"\\{}[]:,-+.e0 1tfnu\n\r\t\x01\x7fx" {
            let mut damaged = SAMPLE.as_bytes().to_owned();
            damaged[at] = byte;
            let Ok(text) = std::str::from_utf8(&damaged) else { continue };
            assert_eq!(quickly(text), serde_json::from_str(text).ok(), "{} at {at}", byte.escape_ascii());
        }
    }
}

#[test]
fn fields_are_found_and_the_last_of_two_counts() {
    let few = r#"{"z":1,"a":2,"m":3,"a":4,"aa":5}"#.to_owned();
    let others: String = (0..FEW_ENTRIES).map(|i| format!(r#","{i}":0"#)).collect();
    let many = few.replace('}', &(others + "}"));
    for json in [few, many] {
        let map = object(&json);
        assert_eq!(map.get("a").and_then(Value::as_u64), Some(4));
        assert_eq!(map.get("aa").and_then(Value::as_u64), Some(5));
        assert_eq!(map.get("z").and_then(Value::as_u64), Some(1));
        assert!(["", "b", "zz"].iter().all(|name| map.get(name).is_none()));
    }
}

#[test]
fn a_file_has_only_so_many_values() {
    let list = |n: u32| format!("[{}0]", "0,".repeat(n as usize - 1));
    assert!(parse(list(MAX_VALUES - 2).as_bytes()).is_ok());
    assert!(matches!(parse(list(MAX_VALUES).as_bytes()), Err(ParseError::TooManyValues)));
    // Objects written alike count each.
    let alike = |n: u32| format!(r#"{{"":[]{}}}"#, r#","a":{"b":0}"#.repeat(n as usize));
    assert!(parse(alike(MAX_VALUES / 2 - 2).as_bytes()).is_ok());
    assert!(matches!(parse(alike(MAX_VALUES / 2).as_bytes()), Err(ParseError::TooManyValues)));
    // Deeper than any file: refused by the parser's own limit, not by the stack.
    assert!(parse("[".repeat(100_000).as_bytes()).is_err());
    let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
    assert!(parse(deep(127).as_bytes()).is_ok());
    assert!(parse(deep(128).as_bytes()).is_err());
}
