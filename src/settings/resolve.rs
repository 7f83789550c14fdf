use super::file::{ConfigFile, ModelTable, ServerTable};
use super::values::{Devices, PoolingChoice, Written};
use super::{ApiKey, Flags, LaunchSettings, ModelOverrides, ModelSettings, ServerSettings};
use crate::demo;
use crate::exit::Failure;
use crate::status::ModelKind;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Used when the command line names neither a file nor a model.
const DEFAULT_FILE: &str = "mserve.toml";
const DEFAULT_PORT: u16 = 8000;
const DEFAULT_MAX_CONCURRENT_REQUESTS: u32 = 1024;
const DEFAULT_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_MODELS: usize = 64;
const MAX_REPLICAS: u32 = 1024;

/// The settings of a launch from `directory` (where relative flags begin and `mserve.toml` is looked for).
///
/// # Errors
/// [`Failure`] with exit code 2, before anything has been started.
pub fn resolve(flags: Flags, directory: &Path) -> anyhow::Result<LaunchSettings> {
    let default_file = directory.join(DEFAULT_FILE);
    let file = match (&flags.config, &flags.model) {
        (Some(_), Some(_)) => {
            return Err(Failure::usage("give a configuration file or --model, not both").into());
        }
        (Some(path), None) => Some(directory.join(path)),
        (None, None) if default_file.exists() => Some(default_file),
        (None, _) => None,
    };
    let (tables, server, base, origin) = match &file {
        Some(path) => {
            let parsed = ConfigFile::read(path)?;
            let base = path.parent().unwrap_or(directory).to_owned();
            (Some(parsed.models), parsed.server, base, path.display().to_string())
        }
        None => (None, ServerTable::default(), directory.to_owned(), "--model".to_owned()),
    };
    let server = server_settings(&flags, &server, &base)?;
    let (models, origin) = match (tables, flags.model) {
        (Some(tables), _) => (from_tables(tables, &base, &origin)?, origin),
        (None, Some(model)) => (vec![bare_model(directory.join(model))?], origin),
        (None, None) => (demo_models(flags.overrides.devices)?, "the embedded demo model".to_owned()),
    };
    let models = override_all(models, &flags.overrides, directory)?;
    check_names(&models, &origin)?;
    let replicas: u32 = models.iter().map(|model| model.replicas).sum();
    if replicas > MAX_REPLICAS {
        return Err(Failure::usage(format!("{origin}: {replicas} replicas in all; at most {MAX_REPLICAS}")).into());
    }
    Ok(LaunchSettings { server, models, origin })
}

fn server_settings(flags: &Flags, table: &ServerTable, base: &Path) -> Result<ServerSettings, Failure> {
    let host = match flags.host.as_deref().or(table.host.as_deref()) {
        None => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Some(text) => text.parse().map_err(|_| {
            let failure = Failure::usage(format!("host `{text}` is not an IP address"));
            failure.hint("127.0.0.1 serves this machine only, 0.0.0.0 the whole network")
        })?,
    };
    let api_key = match (&flags.api_key, &table.api_key_env, &table.api_key_file) {
        (_, Some(_), Some(_)) => {
            return Err(Failure::usage("[server] has api_key_env and api_key_file; give one of them"));
        }
        (Some(key), ..) => Some(ApiKey::new(key, "MSERVE_API_KEY")?),
        (None, Some(name), None) => Some(ApiKey::from_env(name)?),
        (None, None, Some(path)) => Some(ApiKey::from_file(&base.join(path))?),
        (None, None, None) => None,
    };
    let shutdown_timeout_s = flags.shutdown_timeout_s.or(table.shutdown_timeout);
    Ok(ServerSettings {
        host,
        port: flags.port.or(table.port).unwrap_or(DEFAULT_PORT),
        api_key,
        max_concurrent_requests: flags
            .max_concurrent_requests
            .or(table.max_concurrent_requests.map(|Written(count)| count.0))
            .unwrap_or(DEFAULT_MAX_CONCURRENT_REQUESTS),
        shutdown_timeout: shutdown_timeout_s.map_or(DEFAULT_SHUTDOWN_TIMEOUT, |s| Duration::from_secs(s.into())),
    })
}

fn from_tables(tables: Vec<ModelTable>, base: &Path, origin: &str) -> Result<Vec<ModelSettings>, Failure> {
    if tables.is_empty() {
        let failure = Failure::usage(format!("{origin} names no model"));
        return Err(failure.hint("add a table: [[model]] with path = \"DIRECTORY\""));
    }
    if tables.len() > MAX_MODELS {
        return Err(Failure::usage(format!("{origin} names {} models; at most {MAX_MODELS}", tables.len())));
    }
    tables.into_iter().map(|table| from_table(table, base, origin)).collect()
}

fn from_table(table: ModelTable, base: &Path, origin: &str) -> Result<ModelSettings, Failure> {
    let path = base.join(&table.path);
    let name = table.name.map_or_else(|| name_of(&path), Ok)?;
    // The CPU counts as one device.
    let per_device = table.replicas_per_device.map(|Written(count)| count.0);
    let replicas = table.replicas.map(|Written(count)| count.0);
    if let (Some(replicas), Some(per_device)) = (replicas, per_device)
        && replicas != per_device
    {
        let message = format!(
            "{origin}: model {name}: replicas = {replicas} contradicts replicas_per_device = {per_device} on one device"
        );
        return Err(Failure::usage(message).hint("leave one of them out"));
    }
    Ok(ModelSettings {
        name,
        aliases: table.served_model_names,
        path,
        kind: table.kind.map(|Written(kind)| kind),
        replicas: replicas.or(per_device).unwrap_or(1),
        devices: table.devices.map_or(Devices::Auto, |Written(devices)| devices),
        max_model_len: table.max_model_len.map(|Written(tokens)| tokens.0),
        max_num_seqs: table.max_num_seqs.map(|Written(count)| count.0),
        max_num_batched_tokens: table.max_num_batched_tokens.map(|Written(tokens)| tokens.0),
        block_size: table.block_size.map(|Written(count)| count.0),
        threads: table.threads.map(|Written(count)| count.0),
        kv_cache_memory_bytes: table.kv_cache_memory.map(|Written(bytes)| bytes.0),
        gpu_memory_utilization: table.gpu_memory_utilization.map(|Written(share)| share),
        chat_template: table.chat_template.map(|template| relative_template(base, template)),
        pooling: table.pooling.map(|Written(pooling)| pooling),
    })
}

/// A bare word is the name of a built-in template; anything with a dot or a slash is a file.
fn relative_template(base: &Path, template: PathBuf) -> PathBuf {
    let is_name = template.to_str().is_some_and(|text| !text.contains(['/', '.']));
    if is_name { template } else { base.join(template) }
}

fn bare_model(path: PathBuf) -> Result<ModelSettings, Failure> {
    Ok(ModelSettings {
        name: name_of(&path)?,
        aliases: Vec::new(),
        path,
        kind: None,
        replicas: 1,
        devices: Devices::Auto,
        max_model_len: None,
        max_num_seqs: None,
        max_num_batched_tokens: None,
        block_size: None,
        threads: None,
        kv_cache_memory_bytes: None,
        gpu_memory_utilization: None,
        chat_template: None,
        pooling: None,
    })
}

/// Two chat replicas and one that embeds, all of the same weights. So small that cards are left to others; a card that is
/// asked for serves one replica.
fn demo_models(devices: Option<Devices>) -> anyhow::Result<Vec<ModelSettings>> {
    let path = demo::unpack()?;
    let chat_replicas = if devices == Some(Devices::Gpu) { 1 } else { 2 };
    let model = |name: &str, kind, replicas, pooling| {
        let bare = bare_model(path.clone())?;
        Ok::<_, Failure>(ModelSettings {
            name: name.to_owned(),
            kind: Some(kind),
            replicas,
            pooling,
            devices: Devices::Cpu,
            ..bare
        })
    };
    Ok(vec![
        model("demo", ModelKind::Chat, chat_replicas, None)?,
        model("demo-embed", ModelKind::Embedding, 1, Some(PoolingChoice::Mean))?,
    ])
}

/// The last part of the path, as vLLM users know it from `--served-model-name`'s default.
fn name_of(path: &Path) -> Result<String, Failure> {
    let resolved = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    // A config.json given as the model stands for its directory.
    let resolved = if resolved.is_file() { resolved.parent().unwrap_or(&resolved) } else { &resolved };
    let name = resolved.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    name.ok_or_else(|| {
        let failure = Failure::usage(format!("cannot take a model name from {}", path.display()));
        failure.hint("give one: --served-model-name NAME")
    })
}

fn override_all(
    models: Vec<ModelSettings>,
    flags: &ModelOverrides,
    directory: &Path,
) -> Result<Vec<ModelSettings>, Failure> {
    let one_model = models.len() == 1;
    let only_for_one = [
        ("--served-model-name", !flags.served_model_names.is_empty()),
        ("--kind", flags.kind.is_some()),
        ("--chat-template", flags.chat_template.is_some()),
        ("--pooling", flags.pooling.is_some()),
    ];
    if let Some((flag, _)) = only_for_one.iter().find(|(_, given)| *given && !one_model) {
        let message = format!("{flag} is for one model, and {} are launched", models.len());
        return Err(Failure::usage(message).hint("set it in mserve.toml, per [[model]]"));
    }
    let devices = match flags.devices {
        Some(Devices::Gpu) if !one_model => Some(Devices::GpuWhereSupported),
        other => other,
    };
    let flags = ModelOverrides { devices, ..flags.clone() };
    Ok(models.into_iter().map(|model| override_one(model, &flags, directory)).collect())
}

fn override_one(mut model: ModelSettings, flags: &ModelOverrides, directory: &Path) -> ModelSettings {
    if let Some((first, others)) = flags.served_model_names.split_first() {
        model.name = first.clone();
        model.aliases = others.to_vec();
    }
    model.kind = flags.kind.or(model.kind);
    model.replicas = flags.replicas.unwrap_or(model.replicas);
    model.devices = flags.devices.unwrap_or(model.devices);
    model.max_model_len = flags.max_model_len.or(model.max_model_len);
    model.max_num_seqs = flags.max_num_seqs.or(model.max_num_seqs);
    model.max_num_batched_tokens = flags.max_num_batched_tokens.or(model.max_num_batched_tokens);
    model.threads = flags.threads.or(model.threads);
    model.kv_cache_memory_bytes = flags.kv_cache_memory_bytes.or(model.kv_cache_memory_bytes);
    model.gpu_memory_utilization = flags.gpu_memory_utilization.or(model.gpu_memory_utilization);
    let template = flags.chat_template.clone().map(|template| relative_template(directory, template));
    model.chat_template = template.or(model.chat_template);
    model.pooling = flags.pooling.or(model.pooling);
    model
}

/// Names are labels of metrics, parts of headers and of replica ids: plain, and each once.
fn check_names(models: &[ModelSettings], origin: &str) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    for model in models {
        for name in std::iter::once(&model.name).chain(&model.aliases) {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._:/-".contains(&byte);
            if name.is_empty() || name.len() > 128 || !name.bytes().all(plain) {
                let message = format!("{origin}: model name {name:?} must be 1 to 128 of A-Z a-z 0-9 . _ : / -");
                return Err(Failure::usage(message));
            }
            if !seen.insert(name) {
                let failure = Failure::usage(format!("{origin}: two models are called {name}"));
                return Err(failure.hint("give each [[model]] a name of its own"));
            }
        }
    }
    Ok(())
}
