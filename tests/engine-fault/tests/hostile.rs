//! What an engine may say to the service, and what it costs: that engine alone.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Engine, LONG, config, start};
use seawall_engine::host::{EngineConfig, EngineState, Outcome, ScanError};

fn hostile(mode: &str) -> EngineConfig {
    config(env!("CARGO_BIN_EXE_seawall-engine-hostile"), &[mode])
}

/// Sends one scan to a hostile engine beside a good one; the good one notices nothing.
fn beside_a_good_one(mode: &str) -> (Engine, Result<Outcome, ScanError>) {
    let good = start(config(env!("CARGO_BIN_EXE_seawall-engine-fault"), &[])).ready();
    let engine = start(hostile(mode)).ready();
    let result = engine.scan(b"harmless").result;
    assert_eq!(good.scan(b"harmless").result, Ok(Outcome::Clean));
    assert_eq!(good.handle.status().restarts, 0);
    (engine, result)
}

#[test]
fn a_message_that_breaks_the_protocol_ends_the_engine() {
    for mode in [
        "garbage",
        "empty",
        "oversized",
        "started-twice",
        "other-scan",
        "unasked-pong",
        "descriptor",
        "closes",
    ] {
        let (engine, result) = beside_a_good_one(mode);
        assert_eq!(result, Err(ScanError::KilledTwice), "{mode}");
        assert_eq!(engine.handle.status().restarts, 2, "{mode}");
    }
}

/// The first answer stands; the second costs the process.
#[test]
fn an_engine_that_answers_twice_or_goes_on_with_what_it_has_not_is_replaced() {
    for mode in ["twice", "next-is-other"] {
        let (engine, result) = beside_a_good_one(mode);
        assert_eq!(result, Ok(Outcome::Clean), "{mode}");
        engine.wait_state(|_| engine.handle.status().restarts == 1);
        let engine = engine.ready();
        assert_eq!(engine.scan(b"harmless").result, Ok(Outcome::Clean), "{mode}");
    }
}

#[test]
fn a_report_before_ready_is_no_start() {
    let engine = start(hostile("early-report"));
    let state = engine.wait_state(|state| matches!(state, EngineState::Failed { .. }));
    assert!(format!("{state:?}").contains("out of turn"), "{state:?}");
}

#[test]
fn an_engine_that_refuses_dies_or_never_gets_ready_has_failed() {
    for (mode, patience, word) in [
        ("refuses", LONG, "not today"),
        ("dies-loading", LONG, "exited with status 3"),
        ("never-ready", Duration::from_millis(300), "not ready within"),
    ] {
        let config = EngineConfig { ready_timeout: patience, ..hostile(mode) };
        let engine = start(config);
        let state = engine.wait_state(|state| matches!(state, EngineState::Failed { .. }));
        assert!(format!("{state:?}").contains(word), "{mode}: {state:?}");
    }
}

#[test]
fn half_a_set_is_refused_by_a_strict_start_even_when_the_engine_would_take_it() {
    let engine = start(EngineConfig { strict: true, ..hostile("half-a-set") });
    assert!(engine.handle.wait_loaded(LONG));
    let EngineState::Failed { diagnostics } = engine.handle.state() else { panic!("not refused") };
    assert_eq!(diagnostics[0].reason, "half a set");
}

#[test]
fn ten_megabytes_of_noise_on_standard_error_hurt_nobody() {
    let (engine, result) = beside_a_good_one("noise");
    assert_eq!(result, Ok(Outcome::Clean));
    assert_eq!(engine.handle.status().restarts, 0);
}

/// It never takes a scan: killed as hung, and in the end the scan is given back.
#[test]
fn an_engine_that_takes_no_scans_is_replaced() {
    let engine = start(hostile("deaf")).ready();
    let _waiting = engine.send(b"harmless", LONG);
    let state = engine.wait_state(|state| !matches!(state, EngineState::Ready { .. }));
    assert!(format!("{state:?}").contains("takes no scans"), "{state:?}");
}
