//! `cargo xtask tidy`: what neither the compiler nor clippy checks.

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context, bail};
use seawall_lab::workspace;
use serde_json::Value;

use crate::tools::{cargo_output, git};

/// Which of our packages each package may stand on, from DESIGN.md, "Layout". The lab, the tests and
/// this program may use any but are used by none of the others.
const DIRECTIONS: &[(&str, &[&str])] = &[
    ("seawall-proto", &[]),
    ("seawall-region", &["seawall-proto"]),
    ("seawall-fanotify", &[]),
    ("seawall-engine", &["seawall-proto"]),
    ("seawall-engine-c", &["seawall-engine"]),
    ("seawall-client", &["seawall-proto"]),
    ("seawall-agent", &["seawall-fanotify", "seawall-region", "seawall-proto"]),
    ("seawall-daemon", &["seawall-region", "seawall-proto", "seawall-engine", "seawall-client"]),
    ("seawall-cli", &["seawall-client"]),
    ("seawall-unpack", &["seawall-engine"]),
    ("seawall-engine-yara", &["seawall-engine", "seawall-unpack"]),
    ("seawall-engine-clamav", &["seawall-engine"]),
    ("seawall-engine-hash", &["seawall-engine", "seawall-unpack"]),
    ("seawall-engine-fault", &["seawall-engine"]),
    ("seawall-opener", &[]),
    ("seawall-lab", &[]),
];

/// Documents whose mentions of files must be true.
const DOCUMENTS: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "SPECIFICATION.md",
    "THREAT-MODEL.md",
    "docs/engine-protocol.md",
    "docs/write-an-engine.md",
];

/// Longest source file, in lines.
const LONGEST_FILE: usize = 800;

/// Runs every check and shows all that is wrong.
pub fn run() -> anyhow::Result<ExitCode> {
    let files = tracked_files()?;
    let mut wrong = Vec::new();
    wrong.extend(check_directions()?);
    for document in DOCUMENTS {
        if let Ok(text) = fs::read_to_string(workspace().join(document)) {
            wrong.extend(check_mentions(document, &text, &files));
        }
    }
    for file in &files {
        let Ok(bytes) = fs::read(workspace().join(file)) else { continue };
        wrong.extend(check_content(file, &bytes));
    }
    if !wrong.is_empty() {
        bail!("not tidy:\n  {}", wrong.join("\n  "));
    }
    eprintln!("==> tidy: good, {} files", files.len());
    Ok(ExitCode::SUCCESS)
}

fn tracked_files() -> anyhow::Result<Vec<String>> {
    Ok(git(&["ls-files", "--cached", "--others", "--exclude-standard"])?
        .lines()
        .map(str::to_owned)
        .collect())
}

fn check_directions() -> anyhow::Result<Vec<String>> {
    let text = cargo_output(&["metadata", "--locked", "--no-deps", "--format-version", "1"])?;
    let metadata: Value = serde_json::from_str(&text)?;
    let mut wrong = Vec::new();
    let allowed: BTreeMap<_, _> = DIRECTIONS.iter().copied().collect();
    for package in metadata["packages"].as_array().context("cargo metadata has no packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        let ours = package["dependencies"].as_array().into_iter().flatten().filter(|dependency| {
            // Tests may reach further than the program does.
            dependency["path"].is_string() && dependency["kind"].as_str() != Some("dev")
        });
        let needed: Vec<&str> = ours.filter_map(|dependency| dependency["name"].as_str()).collect();
        if let Some(allowed) = allowed.get(name) {
            let not_allowed = needed.iter().filter(|needed| !allowed.contains(needed));
            wrong.extend(
                not_allowed.map(|needed| {
                    format!("{name} must not depend on {needed} (DESIGN.md, Layout)")
                }),
            );
        } else if !["seawall-tests", "seawall-perf", "seawall-xtask"].contains(&name) {
            wrong.push(format!(
                "{name} has no line in xtask/src/tidy.rs that says what it may depend on"
            ));
        }
    }
    Ok(wrong)
}

/// A word in backquotes or a link's target that looks like a path of this repository has to be one, from
/// its root or from the document's folder.
fn check_mentions(document: &str, text: &str, files: &[String]) -> Vec<String> {
    let folder = document.rsplit_once('/').map_or("", |(folder, _)| folder);
    let quoted = text.split('`').skip(1).step_by(2);
    let linked = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let mut wrong = Vec::new();
    for word in quoted.chain(linked) {
        let path = word.split('#').next().unwrap_or_default().trim_end_matches('/');
        let looks_like_ours = !path.contains(|c: char| c.is_whitespace() || "<>*{}$:=".contains(c))
            && [
                "crates/",
                "bin/",
                "lab/",
                "tests/",
                "perf/",
                "xtask/",
                "docs/",
                "fuzz/",
                "packaging/",
            ]
            .iter()
            .any(|folder| path.starts_with(folder))
            || [".md", ".rs"].iter().any(|ending| path.ends_with(ending))
                && !path.contains(|c: char| c.is_whitespace() || c == ':');
        let is_there = files.iter().any(|file| {
            file == path
                || file
                    .strip_prefix(folder)
                    .is_some_and(|rest| rest.strip_prefix('/') == Some(path))
                || file.starts_with(&format!("{path}/"))
                || !path.contains('/') && file.ends_with(&format!("/{path}"))
        });
        if looks_like_ours && !is_there {
            wrong.push(format!("{document} mentions `{word}`, which is not there"));
        }
    }
    wrong
}

fn check_content(file: &str, bytes: &[u8]) -> Vec<String> {
    let mut wrong = Vec::new();
    let holds = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    if holds(&seawall_lab::eicar()) {
        wrong.push(format!("{file} holds the complete EICAR string; join it at run time"));
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return wrong };
    // Joined here, so that this file does not find itself.
    let machine_paths =
        [["/wo", "rk/"], ["/ro", "ot/."], ["/home", "/runner"]].map(|halves| halves.concat());
    for path in machine_paths.iter().filter(|path| text.contains(path.as_str())) {
        wrong.push(format!("{file} names a path of one machine, {path}"));
    }
    let lines = text.lines().count();
    if file.ends_with(".rs") && lines > LONGEST_FILE {
        wrong
            .push(format!("{file} has {lines} lines; at {LONGEST_FILE} look for the missing noun"));
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mention_of_a_missing_file_is_found() {
        let files = ["lab/src/lib.rs".to_owned(), "docs/a.md".to_owned()];
        assert!(
            check_mentions(
                "X",
                "see `lab/src/lib.rs`, `lab/`, [a](docs/a.md#b) and `lib.rs`",
                &files
            )
            .is_empty()
        );
        assert_eq!(check_mentions("X", "see `lab/src/gone.rs`", &files).len(), 1);
        assert_eq!(check_mentions("X", "see [it](docs/gone.md)", &files).len(), 1);
        let files = ["docs/decisions/a.md".to_owned()];
        assert!(check_mentions("docs/X.md", "see [it](decisions/a.md)", &files).is_empty());
        assert_eq!(check_mentions("X.md", "see [it](decisions/a.md)", &files).len(), 1);
    }

    #[test]
    fn a_sample_in_a_file_is_found() {
        assert_eq!(check_content("x", &seawall_lab::eicar()).len(), 1);
        assert!(check_content("x", b"plain words").is_empty());
        assert_eq!(check_content("x", ["/wo", "rk/y"].concat().as_bytes()).len(), 1);
    }
}
