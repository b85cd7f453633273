//! The benchmark runs to its end and reports every row. Nothing here says how fast anything is.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use seawall_lab::{Need, ensure_binaries};
use serde_json::Value;

/// Cases of each setup.
const BARE: [(&str, usize); 4] =
    [("unprotected", 4), ("listener", 8), ("marks_only", 4), ("clamonacc", 2)];
const OURS: [(&str, usize); 2] = [("ours", 17), ("unmarked", 7)];
/// Figures that have a goal.
const FIGURES: usize = 27;
/// Of all scenarios that are measured when nothing is named.
const PLOTS: usize = 5;

fn cases_by_setup(results: &Value) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for case in list(results, "cases") {
        *counts.entry(case["setup"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    counts
}

fn expected(setups: &[(&str, usize)]) -> BTreeMap<String, usize> {
    setups.iter().map(|(setup, count)| ((*setup).to_owned(), *count)).collect()
}

/// What a run says, its results, and their page.
type Run = (Output, Value, String);

/// All that is measured when nothing is named, once for all tests.
fn all() -> &'static Run {
    static ALL: OnceLock<Run> = OnceLock::new();
    let run = ALL.get_or_init(|| {
        ensure_binaries(Need::ALL).unwrap();
        quick(&[], None)
    });
    let said = String::from_utf8_lossy(&run.0.stdout);
    assert!(run.0.status.success(), "{said}\n{}", String::from_utf8_lossy(&run.0.stderr));
    run
}

/// Runs these scenarios of the benchmark quickly.
fn quick(scenarios: &[&str], binaries: Option<&Path>) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("results.json");
    let mut command = Command::new("timeout");
    command
        .arg("600")
        .arg(env!("CARGO_BIN_EXE_seawall-perf"))
        .args(scenarios)
        .args(["--quick", "--json"])
        .arg(&json)
        .arg("--html")
        .arg(folder.path().join("page.html"));
    if let Some(binaries) = binaries {
        command.env("SEAWALL_BIN_DIR", binaries);
    }
    let output = command.output().unwrap();
    let text = std::fs::read_to_string(&json).unwrap_or_default();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let results = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no results: {error}"));
    let page = std::fs::read_to_string(folder.path().join("page.html")).unwrap();
    (output, results, page)
}

fn list<'a>(results: &'a Value, name: &str) -> Vec<&'a Value> {
    results[name].as_array().unwrap().iter().collect()
}

#[test]
fn every_row_is_there_and_positive() {
    let (output, results, page) = all();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(cases_by_setup(results), expected(&[BARE.as_slice(), &OURS].concat()));
    let mut service_us = 0.0;
    for case in list(results, "cases") {
        for key in ["value", "p50", "p95", "p99"] {
            assert!(case[key].as_f64().unwrap() > 0.0, "{key} of {case}");
        }
        assert_eq!(case["rounds"].as_array().unwrap().len(), 2, "{case}");
        let ours = case["setup"] == "ours";
        let repeat = case["what"] == "repeat" || case["what"] == "read";
        assert_eq!(case["ratios"]["marks_only"].is_object(), repeat && ours, "{case}");
        if ours && !repeat {
            assert!(case["ratios"]["listener"]["median"].as_f64().unwrap() > 0.0, "{case}");
            assert!(case["cpu_us"]["driver"].as_f64().unwrap() > 0.0, "{case}");
            let us = case["cpu_us"]["service"].as_f64().unwrap();
            // The kernel counts what runs on without a pause at its ticks alone: few opens may fall between.
            let pauses = case["pace"] == "one_per_ms" || case["what"] == "new_content";
            assert!(us > 0.0 || !pauses, "{case}");
            service_us += us;
        }
    }
    assert!(service_us > 0.0, "{results:#}");
    let figures = rows_of("open");
    assert_eq!(figures.len(), FIGURES, "{figures:#?}");
    for figure in figures {
        let value = figure["value"].as_f64().unwrap();
        assert!(value > 0.0 && figure["spread"][1].as_f64().unwrap() >= value, "{figure}");
        assert!(figure["met"].is_boolean() && figure["goal"]["at_most"].is_number(), "{figure}");
    }
    for part in ["service_kib", "engine_kib"] {
        assert!(results["memory"][part].as_u64().unwrap() > 0, "{part}");
    }
    assert!(text.contains("new file, known content"), "{text}");
    assert_eq!(page.matches("<svg").count(), PLOTS, "{page}");
    assert!(page.contains("clamonacc, new content, scanned"), "{page}");
}

#[test]
fn what_cannot_run_is_said_and_the_rest_is_measured() {
    let nothing = tempfile::tempdir().unwrap();
    let (output, results, page) = quick(&["open"], Some(nothing.path()));
    assert!(page.contains("Not measured") && !page.contains("NaN"), "{page}");
    assert!(!output.status.success());
    assert_eq!(cases_by_setup(&results), expected(&BARE));
    let failed = list(&results, "failed");
    let names: Vec<_> = failed.iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["ours", "ours, unmarked"]);
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
            list(&results, "rows").into_iter().filter(|row| row["scenario"] == scenario).collect();
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
    let rows = list(&results, "rows");
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

/// Replays.
fn replayed(options: &[&str]) -> BTreeMap<String, f64> {
    ensure_binaries(Need::ALL).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("results.json");
    let mut command = Command::new("timeout");
    command.arg("180").arg(env!("CARGO_BIN_EXE_seawall-perf"));
    command.args(["replay", "--quick", "--json"]).arg(&json).args(options);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    let results: Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    values(list(&results, "rows"))
}

/// The value of each row by its name.
fn values(rows: Vec<&Value>) -> BTreeMap<String, f64> {
    let name = |row: &Value| row["name"].as_str().unwrap().to_owned();
    rows.into_iter().map(|row| (name(row), row["value"].as_f64().unwrap())).collect()
}

#[test]
fn a_busy_host_is_replayed_under_each_setup() {
    let rows = values(rows_of("replay"));
    for setup in ["unprotected", "listener", "ours", "clamonacc"] {
        for what in ["opened again", "opened first", "opened beside a writer", "opened and written"]
        {
            assert!(rows[&format!("{setup}: {what}, p50")] > 0.0, "{setup}: {rows:?}");
        }
        assert!(rows[&format!("{setup}: done in time, of all")] > 0.0, "{rows:?}");
    }
    assert!(rows["ours: CPU of who watches in guests"] > 0.0, "{rows:?}");
    assert!(rows["ours over unprotected: opened again, p99"] > 0.0, "{rows:?}");
}

#[test]
fn a_recorded_trace_is_replayed_in_several_guests() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut text = String::from("{\"seawall_trace\":1,\"began\":1}\n");
    for n in 0..200 {
        let (act, file) = if n % 9 == 0 { ("write", n % 5) } else { ("open", n % 20) };
        text += &format!("[{},\"{act}\",{file},5000,{}]\n", 7_000_000 + n * 1000, n % 3);
    }
    std::fs::write(&trace, text).unwrap();
    let rows = replayed(&["--guests", "2", "--trace", trace.to_str().unwrap()]);
    for setup in ["unprotected", "listener", "ours", "clamonacc"] {
        assert!(rows[&format!("{setup}: opened first, p99")] > 0.0, "{setup}: {rows:?}");
    }
    // Nobody holds a file open in it.
    assert!(!rows.keys().any(|name| name.contains("beside a writer")), "{rows:?}");
}

/// The rows of one scenario among those of all.
fn rows_of(scenario: &str) -> Vec<&'static Value> {
    let rows = list(&all().1, "rows").into_iter();
    rows.filter(|row| row["scenario"] == scenario).collect()
}

fn with_goal(rows: &[&Value]) -> usize {
    rows.iter().filter(|row| row["met"].is_boolean()).count()
}

#[test]
fn single_files_are_measured() {
    let rows = rows_of("files");
    assert_eq!((rows.len(), with_goal(&rows)), (16, 5), "{rows:#?}");
    let mut measured =
        rows.iter().filter(|row| !row["name"].as_str().unwrap().contains("scans in"));
    assert!(measured.all(|row| row["value"].as_f64().unwrap() > 0.0), "{rows:#?}");
}

#[test]
fn what_further_guests_cost_is_measured() {
    let rows = rows_of("guests");
    let value = |name: &str| {
        let row = rows.iter().find(|row| row["name"].as_str().unwrap().contains(name));
        row.unwrap_or_else(|| panic!("{name}: {rows:#?}"))["value"].as_f64().unwrap()
    };
    assert_eq!(value("ClamAV, 3 guests: scans"), 50.0);
    assert_eq!(value("golden image, 2 clones: scans"), 0.0);
    assert_eq!(value("bytes sent by the second"), 0.0);
    for name in ["throughput of 4 guests", "p99 beside a greedy guest"] {
        assert!(value(name) > 0.0, "{name}");
    }
}

#[test]
fn memory_is_measured() {
    let rows = rows_of("memory");
    assert_eq!((rows.len(), with_goal(&rows)), (9, 2), "{rows:#?}");
    assert!(rows.iter().all(|row| row["value"].as_f64().unwrap() > 0.0), "{rows:#?}");
}

#[test]
fn what_one_run_has_started_ends_with_it() {
    ensure_binaries(Need::ALL).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_seawall-perf"));
    let command = command.args(["files", "replay", "--quick"]).stdout(Stdio::null());
    let mut run = command.spawn().unwrap();
    // This program for one scenario, and that in a namespace of its own.
    let children = |pid: u32| {
        let path = format!("/proc/{pid}/task/{pid}/children");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<u32>>()
    };
    let until = Instant::now() + Duration::from_secs(60);
    let [one, inside] = loop {
        let one = children(run.id());
        let inside: Vec<u32> = one.iter().flat_map(|pid| children(*pid)).collect();
        if let ([one], [inside]) = (one.as_slice(), inside.as_slice()) {
            break [*one, *inside];
        }
        assert!(Instant::now() < until, "{one:?} {inside:?}");
        std::thread::sleep(Duration::from_millis(10));
    };
    run.kill().unwrap();
    run.wait().unwrap();
    let runs = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Nobody may have waited for it.
        stat.contains("(seawall-perf)") && !stat.contains("(seawall-perf) Z")
    };
    while runs(one) || runs(inside) {
        assert!(Instant::now() < until, "{one} or {inside} goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn options_of_one_scenario_are_refused_for_several() {
    for options in [["--only", "known"], ["--guests", "2"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_seawall-perf"));
        let output = command.args(["files", "replay", "--quick"]).args(options).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("for one scenario"), "{said}");
    }
}
