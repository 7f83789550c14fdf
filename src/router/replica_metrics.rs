//! The replicas' own metrics on the router's page, each sample with a `replica` label: one target to scrape.

use super::Shared;
use super::registry::Replica;
use futures::StreamExt;
use futures::future::join_all;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

const SCRAPE_TIMEOUT: Duration = Duration::from_secs(2);
/// A replica's page has some tens of kilobytes.
const MAX_PAGE_BYTES: usize = 1 << 20;

/// Of all replicas that are ready and answer in time.
pub(super) async fn gather(shared: &Shared) -> String {
    let pages = shared.registry.replicas().map(|replica| async move {
        let page = tokio::time::timeout(SCRAPE_TIMEOUT, scrape(&shared.http, replica)).await.ok()??;
        Some((replica.id.clone(), page))
    });
    let pages: Vec<(String, String)> = join_all(pages).await.into_iter().flatten().collect();
    merge(&pages)
}

async fn scrape(http: &reqwest::Client, replica: &Arc<Replica>) -> Option<String> {
    let url = format!("http://{}/metrics", replica.address()?);
    let response = http.get(url).header("x-mserve-token", &replica.token).send().await.ok()?;
    let mut page = Vec::new();
    let mut chunks = response.error_for_status().ok()?.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        page.extend_from_slice(&chunk.ok()?);
        if page.len() > MAX_PAGE_BYTES {
            return None;
        }
    }
    String::from_utf8(page).ok()
}

/// Pages of several replicas as one: a metric's HELP and TYPE once, then everyone's samples of it.
fn merge(pages: &[(String, String)]) -> String {
    let mut families: BTreeMap<&str, Family<'_>> = BTreeMap::new();
    for (replica, page) in pages {
        let mut current = "";
        for line in page.lines() {
            let mut words = line.splitn(4, ' ');
            match (words.next(), words.next(), words.next()) {
                (Some("#"), Some("HELP"), Some(name)) => families.entry(name).or_default().help = Some(line),
                (Some("#"), Some("TYPE"), Some(name)) => {
                    current = name;
                    families.entry(name).or_default().kind = Some(line);
                }
                (Some("#" | ""), ..) | (None, ..) => {}
                _ => families.entry(current).or_default().samples.extend(labelled(line, replica)),
            }
        }
    }
    let mut text = String::new();
    for family in families.values() {
        for line in family.help.iter().chain(&family.kind).copied().chain(family.samples.iter().map(String::as_str)) {
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

#[derive(Default)]
struct Family<'a> {
    help: Option<&'a str>,
    kind: Option<&'a str>,
    samples: Vec<String>,
}

/// `name 1` and `name{a="b"} 1` with one label more; `None` for what is no sample.
fn labelled(line: &str, replica: &str) -> Option<String> {
    let name_end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(name_end);
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    if name.is_empty() || !name.chars().all(plain) {
        return None;
    }
    Some(match rest.strip_prefix('{') {
        Some(labels) if labels.starts_with('}') => format!("{name}{{replica=\"{replica}\"{labels}"),
        Some(labels) => format!("{name}{{replica=\"{replica}\",{labels}"),
        None => format!("{name}{{replica=\"{replica}\"}}{rest}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_become_one_with_a_label_more() {
        let page = "# HELP vllm:running Now.\n# TYPE vllm:running gauge\nvllm:running{model_name=\"m\"} 3\n\
                    # TYPE t histogram\nt_bucket{le=\"+Inf\"} 1\nt_count 1\n\nfree{} 1\n!! not a metric\n";
        let pages = [("m-0".to_owned(), page.to_owned()), ("m-1".to_owned(), page.to_owned())];
        insta::assert_snapshot!(merge(&pages), @r#"
        # TYPE t histogram
        t_bucket{replica="m-0",le="+Inf"} 1
        t_count{replica="m-0"} 1
        free{replica="m-0"} 1
        t_bucket{replica="m-1",le="+Inf"} 1
        t_count{replica="m-1"} 1
        free{replica="m-1"} 1
        # HELP vllm:running Now.
        # TYPE vllm:running gauge
        vllm:running{replica="m-0",model_name="m"} 3
        vllm:running{replica="m-1",model_name="m"} 3
        "#);
    }

    #[test]
    fn nothing_from_nobody() {
        assert_eq!(merge(&[]), "");
    }
}
