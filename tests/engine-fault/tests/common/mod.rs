//! An engine handle with what the stories need around it.
#![allow(dead_code, clippy::unwrap_used)]

use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use seawall_engine::host::{
    EngineConfig, EngineHandle, EngineState, Lane, Metadata, Operation, ScanId, ScanReport,
    SharedContent,
};

/// Far longer than anything here takes; a test that needs it has failed.
pub const LONG: Duration = Duration::from_secs(60);

pub struct Engine {
    pub handle: EngineHandle,
    pub states: Receiver<EngineState>,
}

pub fn config(program: &str, arguments: &[&str]) -> EngineConfig {
    let command = [program].iter().chain(arguments).map(|&one| one.to_owned()).collect();
    EngineConfig { memory_mib: 256, ..EngineConfig::new("test", command) }
}

pub fn start(config: EngineConfig) -> Engine {
    let (tell, states) = mpsc::channel();
    let handle = EngineHandle::start(config, move |state| drop(tell.send(state))).unwrap();
    Engine { handle, states }
}

pub fn metadata() -> Metadata {
    Metadata {
        path: b"/tmp/x".to_vec(),
        guest: "g1".into(),
        operation: Operation::Open,
        size: 1,
        archives: None,
    }
}

pub fn order(word: &str) -> Vec<u8> {
    format!("SEAWALL-FAULT {word}\n").into_bytes()
}

impl Engine {
    pub fn ready(self) -> Self {
        assert!(self.handle.wait_ready(LONG), "not ready: {:?}", self.handle.state());
        self
    }

    pub fn send(&self, content: &[u8], timeout: Duration) -> Receiver<ScanReport> {
        self.send_fd(SharedContent::new(content).unwrap(), timeout)
    }

    pub fn send_fd(&self, content: SharedContent, timeout: Duration) -> Receiver<ScanReport> {
        self.send_named(content, timeout).1
    }

    /// The same, with what cancels it.
    pub fn send_named(
        &self,
        content: SharedContent,
        timeout: Duration,
    ) -> (Option<ScanId>, Receiver<ScanReport>) {
        let (tell, reply) = mpsc::channel();
        let tell = move |report| drop(tell.send(report));
        (self.handle.scan(content, metadata(), Lane::OnAccess, timeout, tell), reply)
    }

    pub fn scan(&self, content: &[u8]) -> ScanReport {
        self.send(content, LONG).recv_timeout(LONG).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.handle.status().pid.unwrap()
    }

    /// Waits for a state that is as told.
    pub fn wait_state(&self, wanted: impl Fn(&EngineState) -> bool) -> EngineState {
        let deadline = Instant::now() + LONG;
        while Instant::now() < deadline {
            let state = self.handle.state();
            if wanted(&state) {
                return state;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("still {:?}", self.handle.state());
    }

    /// Waits until this many scans are at the process.
    pub fn wait_in_flight(&self, count: usize) {
        let deadline = Instant::now() + LONG;
        while self.handle.status().in_flight < count {
            assert!(Instant::now() < deadline, "never {count} in flight");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The processes of this test's own that run `program`, alive or not reaped.
pub fn alive(pid: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}
