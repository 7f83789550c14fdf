//! A group's plan as processes to start and as routes to them.

use super::group::GroupPlan;
use crate::router::{Group, Replica};
use crate::status::ModelKind;
use crate::supervisor::{ReplicaSpec, WorkerCommand};
use mserve_planner::hardware::GpuDevice;
use std::ffi::OsString;
use std::time::Duration;

/// This binary, also when its file has been replaced since.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// What workers need not know.
const SECRETS: [&str; 1] = ["MSERVE_API_KEY"];

/// What all workers of one launch share.
#[derive(Debug)]
pub(super) struct Launch {
    /// `x-mserve-instance-id` of this launch.
    pub instance_id: String,
    /// Wanted by the workers from everyone who talks to them: other users of this machine must not go round the router.
    pub token: String,
    pub telemetry: bool,
    pub shutdown_timeout: Duration,
}

impl Launch {
    pub fn replicas(&self, plan: &GroupPlan) -> Vec<ReplicaSpec> {
        (0..plan.settings.replicas).map(|index| self.replica(plan, index)).collect()
    }

    pub fn group(&self, plan: &GroupPlan) -> Group {
        let names = std::iter::once(&plan.settings.name).chain(&plan.settings.aliases).cloned().collect();
        let replicas =
            (0..plan.settings.replicas).map(|index| Replica::new(replica_id(plan, index), &self.token)).collect();
        Group { names, kind: plan.kind, replicas }
    }

    fn replica(&self, plan: &GroupPlan, index: u32) -> ReplicaSpec {
        let id = replica_id(plan, index);
        let card = plan.gpu.as_ref().and_then(|share| share.cards.get(index as usize));
        ReplicaSpec {
            command: WorkerCommand {
                program: THIS_PROGRAM.into(),
                args: self.args(plan, &id),
                env: self.env(card),
                env_remove: SECRETS.map(Into::into).to_vec(),
            },
            id,
            model: plan.settings.name.clone(),
            kind: plan.kind,
            devices: vec![card.map_or_else(|| "cpu".into(), |card| card.uuid.clone())],
            max_stall: plan.max_stall(),
            token: self.token.clone(),
        }
    }

    /// A replica sees its own card only, as device 0.
    fn env(&self, card: Option<&GpuDevice>) -> Vec<(String, String)> {
        let mut env = vec![("MSERVE_WORKER_TOKEN".into(), self.token.clone())];
        if let Some(card) = card {
            env.push(("CUDA_VISIBLE_DEVICES".into(), card.uuid.clone()));
            env.push(("CUDA_DEVICE_ORDER".into(), "PCI_BUS_ID".into()));
        }
        env
    }

    fn args(&self, plan: &GroupPlan, id: &str) -> Vec<OsString> {
        let settings = &plan.settings;
        let mut args: Vec<OsString> = vec!["worker".into(), "--die-with-parent".into()];
        let mut flag = |name: &str, value: OsString| args.extend([name.into(), value]);
        flag("--model", plan.directory.clone().into());
        for name in std::iter::once(&settings.name).chain(&settings.aliases) {
            flag("--served-model-name", name.into());
        }
        let kind = match plan.kind {
            ModelKind::Chat => "chat",
            ModelKind::Embedding => "embedding",
        };
        flag("--kind", kind.into());
        flag("--host", "127.0.0.1".into());
        flag("--port", "0".into());
        flag("--device", if plan.gpu.is_some() { "cuda" } else { "cpu" }.into());
        if let Some(share) = &plan.gpu {
            flag("--gpu-memory-utilization", share.plan.gpu_memory_utilization.to_string().into());
        }
        let mut number = |name: &str, value: Option<u64>| {
            if let Some(value) = value {
                flag(name, value.to_string().into());
            }
        };
        number("--max-num-seqs", Some(plan.max_num_seqs.into()));
        number("--block-size", Some(plan.block_size.into()));
        number("--threads", Some(plan.threads.into()));
        number("--shutdown-timeout", Some(self.shutdown_timeout.as_secs()));
        number("--max-num-batched-tokens", settings.max_num_batched_tokens);
        // With a cache the plan has settled it; without, the worker knows the length that the model was made for. Where
        // the plan had to lower it, a card's replica finds the exact length: one that is given is kept or refused.
        let lowered = plan.gpu.as_ref().is_some_and(|share| share.plan.lowered_from.is_some());
        let planned_len = (plan.num_blocks > 0 && !lowered).then_some(plan.max_model_len);
        number("--max-model-len", planned_len.or(settings.max_model_len));
        // A card's replica measures what its share leaves.
        let planned_cache = (plan.num_blocks > 0 && plan.gpu.is_none()).then(|| plan.kv_cache_bytes());
        number("--kv-cache-bytes", planned_cache.or(plan.gpu.as_ref().and(settings.kv_cache_memory_bytes)));
        if let Some(template) = &settings.chat_template {
            flag("--chat-template", template.clone().into());
        }
        if let (Some(pooling), ModelKind::Embedding) = (settings.pooling, plan.kind) {
            flag("--pooling", pooling.name().into());
        }
        if self.telemetry {
            flag("--instance-id", self.instance_id.clone().into());
            flag("--replica", id.into());
            args.push("--telemetry".into());
        }
        args
    }
}

fn replica_id(plan: &GroupPlan, index: u32) -> String {
    format!("{}-{index}", plan.settings.name)
}
