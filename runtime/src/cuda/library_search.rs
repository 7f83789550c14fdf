//! Where CUDA libraries may lie on a machine: toolkits, conda, and what pip puts under `nvidia/*/lib`.

use std::path::{Path, PathBuf};

/// What the search depends on, as data, so that it can be tested over an invented tree.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// `/`, or the top of an invented tree.
    pub root: PathBuf,
    pub path: Vec<PathBuf>,
    pub ld_library_path: Vec<PathBuf>,
    pub home: Option<PathBuf>,
    pub conda_prefix: Option<PathBuf>,
    pub virtual_env: Option<PathBuf>,
    pub cuda_home: Option<PathBuf>,
}

impl Surroundings {
    pub fn of_this_process() -> Self {
        let paths = |name| std::env::var_os(name).map(|v| std::env::split_paths(&v).collect()).unwrap_or_default();
        let path = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        Self {
            root: PathBuf::from("/"),
            path: paths("PATH"),
            ld_library_path: paths("LD_LIBRARY_PATH"),
            home: path("HOME"),
            conda_prefix: path("CONDA_PREFIX"),
            virtual_env: path("VIRTUAL_ENV"),
            cuda_home: path("CUDA_HOME").or_else(|| path("CUDA_PATH")),
        }
    }

    /// Directories in the order in which they are tried. Only those that exist.
    pub fn library_directories(&self) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = self.ld_library_path.clone();
        found.push(self.at("usr/local/nvidia/lib64"));
        found.extend(self.site_packages().iter().flat_map(|site| pip_libraries(site)));
        if let Some(conda) = &self.conda_prefix {
            found.extend([conda.join("lib"), conda.join("targets/x86_64-linux/lib")]);
        }
        let mut toolkits: Vec<PathBuf> = self.cuda_home.iter().cloned().collect();
        toolkits.extend(matching(&self.at("usr/local"), |name| name.starts_with("cuda")).into_iter().rev());
        found.extend(toolkits.iter().flat_map(|t| [t.join("lib64"), t.join("targets/x86_64-linux/lib")]));
        found.extend(["usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib/wsl/lib"].map(|d| self.at(d)));
        let mut seen = std::collections::HashSet::new();
        // A directory that is there under two names counts once.
        found.retain(|directory| directory.canonicalize().is_ok_and(|real| real.is_dir() && seen.insert(real)));
        found
    }

    fn at(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// Python's package folders: of the active environment, of the `python3` on the PATH, and of the usual places.
    fn site_packages(&self) -> Vec<PathBuf> {
        let mut prefixes: Vec<PathBuf> = self.virtual_env.iter().chain(&self.conda_prefix).cloned().collect();
        for bin in &self.path {
            let python = bin.join("python3");
            if python.exists() {
                // A virtual environment's python3 is a link: its own packages first, then those it was made from.
                prefixes.extend(bin.parent().map(Path::to_owned));
                let target = std::fs::canonicalize(&python).ok();
                prefixes.extend(target.and_then(|t| Some(t.parent()?.parent()?.to_owned())));
            }
        }
        prefixes.extend(self.home.iter().map(|home| home.join(".local")));
        let opt = matching(&self.at("opt"), |_| true);
        prefixes.extend(opt.iter().flat_map(|o| [o.join(".venv"), o.clone()]));
        prefixes.extend([self.at("usr/local"), self.at("usr")]);
        let mut found = Vec::new();
        for prefix in prefixes {
            for lib in ["lib", "lib64"] {
                for python in matching(&prefix.join(lib), |name| name.starts_with("python3")) {
                    found.extend([python.join("site-packages"), python.join("dist-packages")]);
                }
            }
        }
        found
    }
}

/// `nvidia/<package>/lib` of a package folder, the newest CUDA last in name first in order.
fn pip_libraries(site: &Path) -> Vec<PathBuf> {
    let packages = matching(&site.join("nvidia"), |_| true);
    packages.into_iter().rev().map(|package| package.join("lib")).collect()
}

/// Entries of a directory whose names pass, sorted. None when it cannot be read.
fn matching(directory: &Path, pass: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_str().is_some_and(&pass))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// The first file in `directories` that has one of `names`; an earlier directory wins over an earlier name.
pub fn find(directories: &[PathBuf], names: &[&str]) -> Option<PathBuf> {
    directories.iter().flat_map(|d| names.iter().map(move |n| d.join(n))).find(|file| file.is_file())
}

/// Files of a directory that begin with `prefix`.
pub fn beside(file: &Path, prefix: &str) -> Vec<PathBuf> {
    file.parent().map(|directory| matching(directory, |name| name.starts_with(prefix))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, b"").unwrap();
        }
        root
    }

    fn found(root: &tempfile::TempDir, surroundings: &Surroundings, names: &[&str]) -> Option<String> {
        let file = find(&surroundings.library_directories(), names)?;
        Some(file.strip_prefix(root.path()).unwrap().display().to_string())
    }

    #[test]
    fn pip_in_the_environment_of_the_python_on_the_path() {
        let root = tree(&[
            "home/me/env/bin/python3",
            "home/me/env/lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13",
            "usr/local/cuda-12.4/lib64/libcublasLt.so.12",
        ]);
        let here = Surroundings {
            root: root.path().to_owned(),
            path: vec![root.path().join("home/me/env/bin")],
            ..Surroundings::default()
        };
        let names = ["libcublasLt.so.13", "libcublasLt.so.12"];
        let pip = "home/me/env/lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13";
        assert_eq!(found(&root, &here, &names).as_deref(), Some(pip));
        let elsewhere = Surroundings { root: root.path().to_owned(), ..Surroundings::default() };
        assert_eq!(found(&root, &elsewhere, &names).as_deref(), Some("usr/local/cuda-12.4/lib64/libcublasLt.so.12"));
    }

    #[test]
    fn the_newest_toolkit_the_venv_under_opt_and_the_loader_path_first() {
        let root = tree(&[
            "usr/local/cuda-12.1/lib64/libnvrtc.so.12",
            "usr/local/cuda-13.0/lib64/libnvrtc.so.13",
            "opt/ml/.venv/lib/python3.11/site-packages/nvidia/cublas/lib/libcublasLt.so.12",
            "own/libnvrtc.so.12",
        ]);
        let mut here = Surroundings { root: root.path().to_owned(), ..Surroundings::default() };
        let nvrtc = ["libnvrtc.so.13", "libnvrtc.so.12"];
        assert_eq!(found(&root, &here, &nvrtc).as_deref(), Some("usr/local/cuda-13.0/lib64/libnvrtc.so.13"));
        let blas = "opt/ml/.venv/lib/python3.11/site-packages/nvidia/cublas/lib/libcublasLt.so.12";
        assert_eq!(found(&root, &here, &["libcublasLt.so.12"]).as_deref(), Some(blas));
        here.ld_library_path = vec![root.path().join("own")];
        assert_eq!(found(&root, &here, &nvrtc).as_deref(), Some("own/libnvrtc.so.12"));
        assert_eq!(found(&root, &here, &["libnccl.so.2"]), None);
    }
}
