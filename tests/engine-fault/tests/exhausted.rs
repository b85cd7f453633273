//! The service has no descriptor left: alone in its process, which it would disturb else.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::time::Duration;

use common::{LONG, config, order, start};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use seawall_engine::host::Outcome;

#[test]
fn a_scan_waits_until_a_descriptor_is_free_for_its_content() {
    let program = env!("CARGO_BIN_EXE_seawall-engine-fault");
    let engine = start(config(program, &["--by-descriptor"])).ready();
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), ..before }).unwrap();
    let all: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert!(!all.is_empty());
    let reply = engine.send(&order("sleep=1"), LONG);
    assert!(reply.recv_timeout(Duration::from_millis(500)).is_err(), "it was scanned without");
    let status = engine.handle.status();
    assert_eq!((status.queued, status.in_flight), (1, 0));
    drop(all);
    assert_eq!(reply.recv_timeout(LONG).unwrap().result, Ok(Outcome::Clean));
    assert_eq!(engine.handle.status().restarts, 0);
}
