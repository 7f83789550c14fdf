#![allow(clippy::unwrap_used)]
use super::*;
use crate::settings::{Flags, ModelOverrides, resolve};
use mserve_planner::units::GIB;

fn machine(memory_bytes: u64, gpus: Result<Vec<GpuDevice>, NoGpus>) -> ThisMachine {
    let host = Host { cpus: 8, memory_total_bytes: memory_bytes, memory_available_bytes: memory_bytes };
    ThisMachine { host, gpus, gpu_libraries: Err("libnvrtc is missing".to_owned()) }
}

fn settings(model: &Path, overrides: ModelOverrides) -> Vec<ModelSettings> {
    let flags = Flags { model: Some(model.to_owned()), overrides, ..Flags::default() };
    resolve(flags, Path::new("/")).unwrap().models
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo-model")
}

fn plan(overrides: ModelOverrides, memory_bytes: u64) -> Result<GroupPlan, Failure> {
    let plans = plan_all(&settings(&demo(), overrides), &machine(memory_bytes, Err(NoGpus::NoLibrary)));
    plans.map(|mut plans| plans.remove(0)).map_err(|error| error.downcast().unwrap())
}

#[test]
fn cores_and_memory_are_shared_out() {
    let overrides = ModelOverrides { replicas: Some(3), ..ModelOverrides::default() };
    let plan = plan(overrides, 4 * GIB).unwrap();
    assert_eq!(
        (plan.threads, plan.kind, plan.max_model_len, plan.kv_bytes_per_token),
        (2, ModelKind::Chat, 2048, 6144)
    );
    assert!((60..120).contains(&plan.max_stall().as_secs()), "{:?}", plan.max_stall());
    let caches = 3 * plan.kv_cache_bytes();
    assert!(caches <= GIB && caches > GIB / 2, "a quarter of what is left: {caches}");
    insta::assert_snapshot!(plan.line(), @"demo-model (LlamaForCausalLM, chat): 3 replicas on cpu with 2 threads each, 10.45 MiB of weights; KV 6 KiB a token, 3,442 blocks of 16 tokens = 322.69 MiB; a replica holds 26.9 requests of 2,048 tokens");
}

#[test]
fn a_small_machine_lowers_the_context_unless_it_was_asked_for() {
    let memory = 112 * MIB;
    let lowered = plan(ModelOverrides::default(), memory).unwrap();
    assert!(lowered.max_model_len < 2048 && lowered.max_model_len >= 1024, "{}", lowered.max_model_len);
    let asked = plan(ModelOverrides { max_model_len: Some(2048), ..ModelOverrides::default() }, memory).unwrap_err();
    assert_eq!(asked.code, crate::exit::DOES_NOT_FIT);
    let fits = format!("max_model_len = {} would fit", lowered.max_model_len);
    assert!(asked.message.contains("2,048 tokens needs 12 MiB") && asked.hint.unwrap().contains(&fits));
}

#[test]
fn too_little_memory_is_exit_3() {
    let weights = plan(ModelOverrides::default(), 64 * MIB).unwrap_err();
    assert!(weights.code == crate::exit::DOES_NOT_FIT && weights.message.starts_with("the weights do not fit"));
    let asked = ModelOverrides { kv_cache_memory_bytes: Some(8 * GIB), ..ModelOverrides::default() };
    let caches = plan(asked, 4 * GIB).unwrap_err();
    assert!(caches.code == crate::exit::DOES_NOT_FIT && caches.message.starts_with("the KV caches need 8.00 GiB"));
    let tiny = ModelOverrides { kv_cache_memory_bytes: Some(1000), ..ModelOverrides::default() };
    assert_eq!(plan(tiny, 4 * GIB).unwrap_err().code, crate::exit::DOES_NOT_FIT);
}

#[test]
fn gpus_that_cannot_be_used_are_told_of() {
    let gpu = GpuDevice {
        index: 0,
        uuid: "GPU-1".into(),
        name: "NVIDIA H200".into(),
        memory_total_bytes: GIB,
        memory_free_bytes: GIB,
        compute_capability: Some((9, 0)),
        processes: Vec::new(),
    };
    let with_gpu = machine(GIB, Ok(vec![gpu]));
    assert!(with_gpu.line().ends_with("; GPU 0 NVIDIA H200 1.00 GiB free"), "{}", with_gpu.line());
    let auto = plan_all(&settings(&demo(), ModelOverrides::default()), &with_gpu).unwrap().remove(0);
    assert!(auto.gpu.is_none() && auto.line().ends_with("(not on a GPU: libnvrtc is missing)"), "{}", auto.line());
    for machine in [with_gpu, machine(GIB, Err(NoGpus::NoLibrary))] {
        let wanted = ModelOverrides { devices: Some(Devices::Gpu), ..ModelOverrides::default() };
        let error = plan_all(&settings(&demo(), wanted), &machine).unwrap_err();
        assert_eq!(error.downcast_ref::<Failure>().unwrap().code, crate::exit::USAGE);
    }
}

#[test]
fn of_several_models_those_without_kernels_stay_on_the_cpu_when_gpus_are_asked_for() {
    let overrides = ModelOverrides { devices: Some(Devices::Gpu), ..ModelOverrides::default() };
    let all = resolve(Flags { overrides, ..Flags::default() }, Path::new("/")).unwrap().models;
    let devices: Vec<_> = all.iter().map(|model| (model.replicas, model.devices)).collect();
    assert_eq!(devices, [(1, Devices::GpuWhereSupported); 2], "a card for the one replica that chats");
    let embedding = all.iter().find(|model| model.kind == Some(ModelKind::Embedding)).cloned();
    let plan = plan_all(&[embedding.unwrap()], &machine(GIB, Err(NoGpus::NoLibrary))).unwrap().remove(0);
    assert!(
        plan.gpu.is_none() && plan.line().contains("(not on a GPU: the CUDA runtime cannot run"),
        "{}",
        plan.line()
    );
    let refused = plan_all(&all, &machine(GIB, Err(NoGpus::NoLibrary))).unwrap_err();
    assert!(refused.to_string().contains("devices = \"gpu\", but there is no NVIDIA driver"), "{refused}");
}

#[test]
fn a_broken_model_directory_is_exit_2_and_names_what_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let error = |overrides: ModelOverrides| {
        let models = settings(directory.path(), overrides);
        let error = plan_all(&models, &machine(GIB, Err(NoGpus::NoLibrary))).unwrap_err();
        let failure = error.downcast::<Failure>().unwrap();
        assert_eq!(failure.code, crate::exit::USAGE);
        failure.message
    };
    let named = || ModelOverrides { served_model_names: vec!["m".into()], ..ModelOverrides::default() };
    assert!(error(named()).contains("no config.json"));
    std::fs::write(directory.path().join("config.json"), "{\"architectures\":[\"LlamaForCausalLM\"]}").unwrap();
    assert!(error(named()).contains("config.json: field `"));
    std::fs::copy(demo().join("config.json"), directory.path().join("config.json")).unwrap();
    assert!(error(named()).contains("no safetensors weights"));
    std::fs::copy(demo().join("model.safetensors"), directory.path().join("model.safetensors")).unwrap();
    assert!(error(named()).contains("no tokenizer.json"));
    std::fs::copy(demo().join("tokenizer.json"), directory.path().join("tokenizer.json")).unwrap();
    assert!(error(ModelOverrides { max_model_len: Some(4096), ..named() }).contains("the model has 2048 positions"));
    let template = Some(directory.path().join("none.jinja"));
    assert!(error(ModelOverrides { chat_template: template, ..named() }).contains("none.jinja: no such file"));
}
