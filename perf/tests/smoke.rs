//! The benchmark runs to its end and reports every row. Nothing here says how fast anything is.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

use std::path::Path;
use std::process::{Command, Output};

use seawall_lab::{Need, ensure_binaries};
use serde_json::Value;

const SIZES: [&str; 3] = ["4 KiB", "64 KiB", "1 MiB"];
const WATCHED_BY_NOBODY_OR_BARE: [(&str, &str); 4] = [
    ("unprotected, repeat open", "back to back"),
    ("listener, repeat open", "back to back"),
    ("listener, repeat open", "one per ms"),
    ("marks only, repeat open", "back to back"),
];
const OURS: [(&str, &str); 4] = [
    ("ours, repeat open", "back to back"),
    ("ours, new file, known content", "back to back"),
    ("ours, new file, known content", "one per ms"),
    ("ours, new file, new content", "back to back"),
];

fn names(kinds: &[(&str, &str)]) -> Vec<String> {
    let name = |(what, pace): &(&str, &str)| SIZES.map(|size| format!("{what}, {size}, {pace}"));
    kinds.iter().flat_map(name).collect()
}

/// Runs the benchmark quickly; what it says, and its results.
fn quick(binaries: Option<&Path>) -> (Output, Value) {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("results.json");
    let mut command = Command::new("timeout");
    command
        .arg("180")
        .arg(env!("CARGO_BIN_EXE_seawall-perf"))
        .args(["--quick", "--json"])
        .arg(&json);
    if let Some(binaries) = binaries {
        command.env("SEAWALL_BIN_DIR", binaries);
    }
    let output = command.output().unwrap();
    let text = std::fs::read_to_string(&json).unwrap_or_default();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let results = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no results: {error}"));
    (output, results)
}

fn rows(results: &Value) -> Vec<&Value> {
    results["rows"].as_array().unwrap().iter().collect()
}

#[test]
fn every_row_is_there_and_positive() {
    ensure_binaries(Need::ALL).unwrap();
    let (output, results) = quick(None);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let found: Vec<&str> = rows(&results).iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(found, [names(&WATCHED_BY_NOBODY_OR_BARE), names(&OURS)].concat());
    for row in rows(&results) {
        for key in ["value", "p50", "p95", "p99"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key} of {row}");
        }
        assert_eq!(row["rounds"].as_array().unwrap().len(), 2, "{row}");
        let ours = row["setup"] == "ours";
        assert_eq!(row["ratios"]["listener"]["median"].as_f64().is_some_and(|x| x > 0.0), {
            ours || row["pace"] == "back_to_back" && row["setup"] != "listener"
        });
        let repeat = row["what"] == "repeat";
        assert_eq!(row["ratios"]["marks_only"].is_object(), repeat && ours, "{row}");
        if ours && !repeat {
            assert!(row["cpu_us"]["driver"].as_f64().unwrap() > 0.0, "{row}");
            assert!(row["cpu_us"]["service"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    for part in ["driver_kib", "service_kib", "engine_kib"] {
        assert!(results["memory"][part].as_u64().unwrap() > 0, "{part}");
    }
    assert!(text.contains("new file, known content"), "{text}");
}

#[test]
fn what_cannot_run_is_said_and_the_rest_is_measured() {
    let nothing = tempfile::tempdir().unwrap();
    let (output, results) = quick(Some(nothing.path()));
    assert!(!output.status.success());
    let found: Vec<&str> = rows(&results).iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(found, names(&WATCHED_BY_NOBODY_OR_BARE));
    let failed = results["failed"].as_array().unwrap();
    assert_eq!((failed.len(), failed[0]["name"].as_str()), (1, Some("ours")));
    assert!(failed[0]["reason"].as_str().unwrap().contains("is not there"), "{failed:?}");
}

const SCENARIOS: [&str; 6] = [
    "engines-yara",
    "engines-clamav",
    "engines-cost",
    "engines-rules",
    "engines-signatures",
    "engines-hash",
];

#[test]
fn every_scenario_of_the_engines_runs_in_its_smallest_form() {
    // Here and not in the run: building may take longer than a run may.
    ensure_binaries(Need::ALL).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("results.json");
    let mut command = Command::new("timeout");
    command.arg("300").arg(env!("CARGO_BIN_EXE_seawall-perf")).args(SCENARIOS);
    let output = command.args(["--quick", "--json"]).arg(&json).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let results = std::fs::read_to_string(&json).unwrap_or_else(|_| panic!("{text}\n{error}"));
    let results: Value = serde_json::from_str(&results).unwrap();
    for scenario in SCENARIOS {
        let own: Vec<&Value> =
            rows(&results).into_iter().filter(|row| row["scenario"] == scenario).collect();
        assert!(own.len() >= 2, "{scenario}: {text}\n{error}");
        for row in own {
            assert!(row["value"].as_f64().unwrap() > 0.0, "{row}");
        }
        assert!(text.contains(scenario), "{text}");
    }
    // Programs to compare with that only a longer run fetches. All else has to be there.
    let failed = results["failed"].as_array().unwrap();
    let is_peer = |one: &Value| {
        ["yr: ", "clamdscan: "].iter().any(|peer| {
            let reason = one["reason"].as_str().unwrap();
            reason.starts_with(peer) && reason.contains("is not there; a run without --quick")
        })
    };
    assert!(failed.iter().all(is_peer), "{failed:?}");
    assert_eq!(output.status.success(), failed.is_empty());
}

#[test]
fn a_storm_is_measured() {
    ensure_binaries(Need::ALL).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("results.json");
    let output = Command::new("timeout")
        .arg("180")
        .arg(env!("CARGO_BIN_EXE_seawall-perf"))
        .args(["storm", "--quick", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    let results: Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let rows = rows(&results);
    let value = |name: &str| {
        let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name}"));
        row["value"].as_f64().unwrap()
    };
    for name in [
        "ours, 2 guests: memory",
        "clamd and clamdscan, one guest: memory",
        "clone over original",
        "CPU, 2 guests, over as many clamd",
        "memory, 2 guests, over as many clamd",
    ] {
        assert!(value(name) > 0.0, "{name}");
    }
}
