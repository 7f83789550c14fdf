#![allow(clippy::unwrap_used)]
use super::values::Devices;
use super::*;
use crate::exit::{Failure, USAGE};
use std::path::Path;

fn resolved(file: &str, flags: Flags) -> anyhow::Result<LaunchSettings> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("mserve.toml"), file).unwrap();
    resolve(flags, directory.path())
}

fn error(file: &str, flags: Flags) -> String {
    let error = resolved(file, flags).unwrap_err();
    let failure = error.downcast_ref::<Failure>().unwrap_or_else(|| panic!("no exit code: {error:#}"));
    assert_eq!(failure.code, USAGE);
    format!("{} | {}", failure.message, failure.hint.as_deref().unwrap_or(""))
}

const TWO: &str = "[server]\nport = 9000\nhost = \"127.0.0.2\"\n\
    [[model]]\nname = \"a\"\npath = \"models/a\"\nreplicas = 2\nmax_model_len = \"4k\"\n\
    [[model]]\npath = \"/models/b\"\nkind = \"embedding\"\ndevices = \"cpu\"\n";

#[test]
fn flags_come_before_the_file_and_the_file_before_defaults() {
    let plain = resolved(TWO, Flags::default()).unwrap();
    assert_eq!((plain.server.port, plain.server.host.to_string()), (9000, "127.0.0.2".to_owned()));
    assert_eq!(plain.server.shutdown_timeout, Duration::from_secs(30));
    let [a, b] = plain.models.as_slice() else { panic!("{:?}", plain.models) };
    assert_eq!((a.replicas, b.replicas, a.max_model_len, b.max_model_len), (2, 1, Some(4096), None));
    assert_eq!((b.name.as_str(), b.kind, b.devices), ("b", Some(ModelKind::Embedding), Devices::Cpu));
    assert!(a.path.ends_with("models/a") && a.path.is_absolute(), "relative to the file: {}", a.path.display());
    assert_eq!(b.path, Path::new("/models/b"));

    let overrides = ModelOverrides { replicas: Some(3), max_num_seqs: Some(4), ..ModelOverrides::default() };
    let flags = Flags { port: Some(0), host: Some("::1".into()), overrides, ..Flags::default() };
    let flagged = resolved(TWO, flags).unwrap();
    assert_eq!((flagged.server.port, flagged.server.host.to_string()), (0, "::1".to_owned()));
    assert!(flagged.models.iter().all(|model| model.replicas == 3 && model.max_num_seqs == Some(4)));
}

#[test]
fn one_model_on_the_command_line() {
    let directory = tempfile::tempdir().unwrap();
    let overrides = ModelOverrides { served_model_names: vec!["x".into(), "y".into()], ..ModelOverrides::default() };
    let flags = Flags { model: Some("models/tiny".into()), overrides, ..Flags::default() };
    let settings = resolve(flags, directory.path()).unwrap();
    assert_eq!((settings.models[0].name.as_str(), settings.models[0].aliases.as_slice()), ("x", &["y".to_owned()][..]));
    assert_eq!((settings.server.port, settings.server.host.to_string()), (8000, "127.0.0.1".to_owned()));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let model = |lines: &str| format!("[[model]]\nname = \"a\"\npath = \"m\"\n{lines}");
    let named = |name: &str| Flags {
        overrides: ModelOverrides { served_model_names: vec![name.into()], ..ModelOverrides::default() },
        ..Flags::default()
    };
    for (file, flags, expected) in [
        ("", Flags::default(), "names no model | add a table"),
        (&format!("{}{}", model(""), model("")), Flags::default(), "two models are called a"),
        (&model("served_model_names = [\"a\"]"), Flags::default(), "two models are called a"),
        (&model(""), named("white space"), "must be 1 to 128 of"),
        (TWO, named("x"), "--served-model-name is for one model, and 2 are launched"),
        (&model("replicas = 2\nreplicas_per_device = 3"), Flags::default(), "contradicts replicas_per_device = 3"),
        ("[server]\nhost = \"example.org\"", Flags::default(), "host `example.org` is not an IP address | 127.0.0.1"),
        ("[server]\napi_key_env = \"A\"\napi_key_file = \"b\"", Flags::default(), "give one of them"),
        ("[server]\napi_key_env = \"MSERVE_NO_SUCH_KEY\"", Flags::default(), "MSERVE_NO_SUCH_KEY, which is not set"),
        ("[server]\napi_key_file = \"nowhere\"", Flags::default(), "cannot read api_key_file"),
        (TWO, Flags { api_key: Some("a b".into()), ..Flags::default() }, "visible ASCII"),
        (TWO, Flags { config: Some("a".into()), model: Some("b".into()), ..Flags::default() }, "not both"),
        (TWO, Flags { config: Some("nowhere.toml".into()), ..Flags::default() }, "cannot read"),
        (
            TWO,
            Flags { config: Some(".".into()), ..Flags::default() },
            "it is not a file | to serve one model: mserve launch --model",
        ),
        (
            TWO,
            Flags {
                overrides: ModelOverrides { replicas: Some(1024), ..ModelOverrides::default() },
                ..Flags::default()
            },
            "2048 replicas in all; at most 1024",
        ),
    ] {
        let error = error(file, flags);
        assert!(error.contains(expected), "{file:?}:\n  {error}\n  {expected}");
    }
}

#[test]
fn a_key_is_never_shown() {
    let flags = Flags { api_key: Some("hunter2".into()), ..Flags::default() };
    let settings = resolved(TWO, flags).unwrap();
    assert_eq!(settings.server.api_key.as_ref().unwrap().text(), "hunter2");
    assert!(!format!("{settings:?}").contains("hunter2"));
}

#[test]
fn templates_are_names_or_files() {
    for (written, absolute) in [("vicuna", false), ("templates/own.jinja", true), ("own.jinja", true)] {
        let settings =
            resolved(&format!("[[model]]\npath = \"m\"\nchat_template = \"{written}\""), Flags::default()).unwrap();
        let template = settings.models[0].chat_template.clone().unwrap();
        assert_eq!(template.is_absolute(), absolute, "{written} became {}", template.display());
    }
}
