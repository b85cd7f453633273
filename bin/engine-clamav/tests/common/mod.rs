//! An engine under a real handle, and content for it.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use seawall_engine::host::{
    EngineConfig, EngineHandle, Lane, Metadata, Operation, Outcome, ScanError, ScanReport,
    SharedContent,
};

/// Far longer than anything here takes; a test that needs it has failed.
pub const LONG: Duration = Duration::from_secs(60);
pub const WORD: &[u8] = b"seawall-clamav-test-word";

/// A signature that finds `word`.
pub fn signature(name: &str, word: &[u8]) -> String {
    let hex: String = word.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{name}:0:*:{hex}\n")
}

/// A folder with one signature, which finds [`WORD`].
pub fn database() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("test.ndb"), signature("Test.Seawall.Word-1", WORD)).unwrap();
    folder
}

pub struct Engine {
    pub handle: EngineHandle,
}

pub fn start_command(command: Vec<String>) -> Engine {
    let config = EngineConfig { threads: 2, ..EngineConfig::new("clamav", command) };
    Engine { handle: EngineHandle::start(config, |_| ()).unwrap() }
}

impl Engine {
    pub fn send(&self, content: &[u8], limit: Duration) -> mpsc::Receiver<ScanReport> {
        let (tell, reply) = mpsc::channel();
        let metadata = Metadata {
            path: Vec::new(),
            guest: "g".into(),
            operation: Operation::Open,
            size: 0,
            archives: None,
        };
        let content = SharedContent::new(content).unwrap();
        let told = move |report| drop(tell.send(report));
        self.handle.scan(content, metadata, Lane::OnAccess, limit, told);
        reply
    }

    pub fn scan(&self, content: &[u8]) -> Result<Outcome, ScanError> {
        self.send(content, LONG).recv_timeout(LONG).unwrap().result
    }

    pub fn names(&self, content: &[u8]) -> Vec<String> {
        match self.scan(content).unwrap() {
            Outcome::Infected(found) => found.into_iter().map(|one| one.name).collect(),
            _ => Vec::new(),
        }
    }
}

pub fn gzip(content: &[u8]) -> Vec<u8> {
    let mut gzip = Command::new("gzip")
        .arg("-c")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = gzip.stdin.take().unwrap();
    let content = content.to_vec();
    let writer = std::thread::spawn(move || input.write_all(&content));
    let output = gzip.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    output.stdout
}

/// Bytes that do not compress to nothing.
pub fn noise(length: usize) -> Vec<u8> {
    let mut noise = Vec::with_capacity(length + 8);
    let mut state = 1_u64;
    while noise.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise
}

/// Daily signatures of this number that find `word`: a container as clamd takes it unsigned (.cud), which is
/// a header of 512 bytes and a tar archive.
pub fn daily(database: &Path, number: u32, word: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output =
            Command::new(program).args(arguments).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let made = 1_795_000_000 + number;
    let header = format!("ClamAV-VDB:26 Nov 2026 10-00 +0000:{number}:1:90:X:X:nobody:{made}");
    let signatures = signature("Test.Seawall.Word-1", word);
    fs::write(folder.path().join("daily.ndb"), &signatures).unwrap();
    let sum = String::from_utf8(run("sha256sum", &["daily.ndb"])).unwrap();
    let info = format!("{header}\ndaily.ndb:{}:{}\n", signatures.len(), &sum[..64]);
    fs::write(folder.path().join("daily.info"), info).unwrap();
    fs::write(folder.path().join("COPYING"), "for tests").unwrap();
    let files = ["--format=ustar", "-cf", "-", "COPYING", "daily.info", "daily.ndb"];
    let mut container = format!("{header:512}").into_bytes();
    container.extend(run("tar", &files));
    fs::write(folder.path().join("whole"), container).unwrap();
    fs::copy(folder.path().join("whole"), database.join("new")).unwrap();
    fs::rename(database.join("new"), database.join("daily.cud")).unwrap();
}
