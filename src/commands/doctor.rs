//! `mserve doctor`: what of this machine the runtime can use, and what to do about the rest.

use crate::exit;
use crate::hardware::{probe_gpus, probe_host};
use clap::Args;
use mserve_planner::hardware::GpuDevice;
use mserve_planner::units::{MIB, format_bytes};
use mserve_runtime::cuda;
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;
use std::process::ExitCode;

/// Connections take two descriptors each; fewer than these are soon used up.
const ENOUGH_OPEN_FILES: u64 = 4096;
/// What NCCL and PyTorch-like engines want as a minimum; Docker's own default is 64 MiB.
const ENOUGH_SHARED_MEMORY_BYTES: u64 = 1024 * MIB;

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// One JSON object instead of lines.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    /// Nothing stands in the way of serving on what this machine has.
    ok: bool,
    checks: Vec<Check>,
    gpus: Vec<GpuDevice>,
}

#[derive(Debug, Serialize)]
struct Check {
    name: String,
    verdict: Verdict,
    found: String,
    /// What mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    /// Serving works, with less.
    Note,
    Bad,
}

/// # Errors
/// When /proc cannot be read or the answer cannot be written as JSON.
pub fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let report = examine()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.checks.iter().for_each(|check| println!("{}", check.line()));
    }
    Ok(ExitCode::from(if report.ok { exit::OK } else { exit::FAILURE }))
}

fn examine() -> anyhow::Result<Report> {
    let host = probe_host()?;
    let memory = format!("{} of {} free", bytes(host.memory_available_bytes), bytes(host.memory_total_bytes));
    let mut checks = vec![check("cpu", Verdict::Ok, format!("{} cores, {memory}", host.cpus))];
    let probed = probe_gpus();
    let has_gpus = probed.is_ok();
    match &probed {
        Ok(gpus) => checks.extend(gpus.iter().map(card)),
        Err(why) => checks.push(check("gpu", Verdict::Note, format!("{why}; models run on the CPU"))),
    }
    checks.extend(cuda::report().into_iter().map(|line| library(line, has_gpus)));
    checks.push(shared_memory(has_gpus));
    checks.push(open_files(getrlimit(Resource::RLIMIT_NOFILE)?.1));
    let ok = checks.iter().all(|check| check.verdict != Verdict::Bad);
    Ok(Report { ok, checks, gpus: probed.unwrap_or_default() })
}

fn check(name: impl Into<String>, verdict: Verdict, found: impl Into<String>) -> Check {
    Check { name: name.into(), verdict, found: found.into(), remedy: None }
}

fn bytes(bytes: u64) -> String {
    format_bytes(bytes)
}

fn card(gpu: &GpuDevice) -> Check {
    let capability = gpu.compute_capability.map_or(String::new(), |(major, minor)| format!(", sm_{major}{minor}"));
    let free = format!("{} of {} free", bytes(gpu.memory_free_bytes), bytes(gpu.memory_total_bytes));
    let holders: Vec<String> = gpu
        .processes
        .iter()
        .map(|process| format!("; pid {} holds {}", process.pid, process.used_bytes.map_or("some".to_owned(), bytes)))
        .collect();
    let old = gpu.compute_capability.is_some_and(|capability| capability < (8, 0));
    let name = format!("gpu {}", gpu.index);
    let found = format!("{}{capability}, {free}, {}{}", gpu.name, gpu.uuid, holders.concat());
    let verdict = if old { Verdict::Note } else { Verdict::Ok };
    let remedy = old.then(|| "older than Ampere (sm_80): left alone, models run on the CPU".to_owned());
    Check { remedy, ..check(name, verdict, found) }
}

/// Only a machine with a card misses them.
fn library(line: cuda::LibraryReport, has_gpus: bool) -> Check {
    let name = format!("{:?}", line.library).to_lowercase();
    let version = line.version();
    match line.found {
        Ok(path) => {
            let speaks =
                Some(line.library).filter(|library| *library == cuda::Library::Driver).and(cuda::driver_speaks());
            let speaks = speaks.map(|version| format!("speaks CUDA {}.{}", version / 1000, version % 1000 / 10));
            let what: Vec<String> = version.into_iter().chain(speaks).collect();
            check(name, Verdict::Ok, format!("{}, {}", what.join(", "), path.display()))
        }
        Err(missing) => {
            let verdict = if has_gpus { Verdict::Bad } else { Verdict::Note };
            let broken = missing.broken.iter().map(|(path, why)| format!("; {}: {why}", path.display()));
            let found = format!("{} not found{}", line.library.names()[0], broken.collect::<String>());
            Check { remedy: Some(line.library.remedy().to_owned()), ..check(name, verdict, found) }
        }
    }
}

fn shared_memory(has_gpus: bool) -> Check {
    let Ok(stat) = nix::sys::statvfs::statvfs("/dev/shm") else {
        return check("/dev/shm", Verdict::Note, "is not there");
    };
    let size = stat.blocks() * stat.fragment_size();
    let small = has_gpus && size < ENOUGH_SHARED_MEMORY_BYTES;
    let verdict = if small { Verdict::Note } else { Verdict::Ok };
    let remedy = small.then(|| "docker run --shm-size=1g, where several GPUs work together".to_owned());
    Check { remedy, ..check("/dev/shm", verdict, bytes(size)) }
}

fn open_files(limit: u64) -> Check {
    let few = limit < ENOUGH_OPEN_FILES;
    let remedy = few.then(|| format!("ulimit -n {ENOUGH_OPEN_FILES}, or docker run --ulimit nofile=65536"));
    Check { remedy, ..check("open files", if few { Verdict::Bad } else { Verdict::Ok }, format!("at most {limit}")) }
}

impl Check {
    fn line(&self) -> String {
        let mark = match self.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Note => "note",
            Verdict::Bad => "BAD ",
        };
        let remedy = self.remedy.as_ref().map_or(String::new(), |remedy| format!(" -> {remedy}"));
        format!("{mark}  {:<10}  {}{remedy}", self.name, self.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mserve_runtime::cuda::{Library, LibraryReport, Missing};

    #[test]
    fn a_missing_library_is_bad_only_beside_a_card() {
        let missing = || LibraryReport {
            library: Library::Nvrtc,
            found: Err(Missing { library: Library::Nvrtc, looked_in: Vec::new(), broken: Vec::new() }),
        };
        assert_eq!(library(missing(), false).verdict, Verdict::Note);
        let bad = library(missing(), true);
        assert_eq!(bad.line(), "BAD   nvrtc       libnvrtc.so.13 not found -> pip install nvidia-cuda-nvrtc");
    }

    #[test]
    fn few_open_files_are_bad_and_say_what_to_do() {
        assert_eq!(open_files(ENOUGH_OPEN_FILES).verdict, Verdict::Ok);
        let few = open_files(256);
        assert!(few.verdict == Verdict::Bad && few.line().contains("ulimit -n 4096"));
    }
}
