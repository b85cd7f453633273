//! Builds the programs that a lab runs.

use std::ops::BitOr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, bail, ensure};

use crate::paths::{target_dir, workspace};

/// A static binary of the same target as the host's, in a folder of its own.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// How programs for guests are built.
const GUEST: [&str; 4] = ["--profile", "guest", "--target", TARGET];
const GUEST_RUSTFLAGS: &str = "-C target-feature=+crt-static";
/// How programs for the host are built.
const HOST: [&str; 1] = ["--release"];

/// All programs of the host, resolved as `cargo xtask test` resolves its packages: the same ones, and with a test,
/// since only then the features that tests need count. With other features of some small crate cargo compiles YARA-X
/// and all that it stands on once more.
const HOST_PROGRAMS: [&str; 17] = [
    "--workspace",
    "--exclude",
    "seawall-lab",
    "--exclude",
    "seawall-tests",
    "--bin",
    "seawalld",
    "--bin",
    "seawall",
    "--bin",
    "seawall-engine-yara",
    "--bin",
    "seawall-engine-clamav",
    "--bin",
    "seawall-engine-hash",
    "--test",
    "protocol_document",
];

fn folder(guest: bool) -> PathBuf {
    if guest { target_dir().join(TARGET).join("guest") } else { target_dir().join("release") }
}

/// Environment variable that says that cargo has built everything already, so that each of many tests
/// need not ask it again.
pub const BUILT: &str = "SEAWALL_LAB_BUILT";

/// Which programs are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// The guest driver.
    pub agent: bool,
    /// Service, CLI and engine.
    pub host: bool,
}

impl BitOr for Need {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self { agent: self.agent || other.agent, host: self.host || other.host }
    }
}

impl Need {
    /// All of them.
    pub const ALL: Self = Self { agent: true, host: true };
}

/// Where the programs are. One that was not asked for may be absent.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// The lab's own program in the guest, static.
    pub lab_guest: PathBuf,
    /// The guest driver, static.
    pub agent: PathBuf,
    /// The service.
    pub daemon: PathBuf,
    /// The operator's command line.
    pub cli: PathBuf,
    /// The YARA engine.
    pub engine_yara: PathBuf,
    /// The ClamAV engine.
    pub engine_clamav: PathBuf,
    /// The hash-list engine.
    pub engine_hash: PathBuf,
}

impl Binaries {
    /// The places, without building anything: `SEAWALL_BIN_DIR`, or cargo's target folder.
    pub fn locate() -> Self {
        let (host, guest) = match std::env::var_os("SEAWALL_BIN_DIR") {
            Some(folder) => (PathBuf::from(&folder), PathBuf::from(folder)),
            None => (folder(false), folder(true)),
        };
        Self {
            lab_guest: guest.join("lab-guest"),
            agent: guest.join("seawall-agent"),
            daemon: host.join("seawalld"),
            cli: host.join("seawall"),
            engine_yara: host.join("seawall-engine-yara"),
            engine_clamav: host.join("seawall-engine-clamav"),
            engine_hash: host.join("seawall-engine-hash"),
        }
    }

    fn wanted(&self, need: Need) -> Vec<&Path> {
        let mut all: Vec<&Path> = vec![&self.lab_guest];
        if need.agent {
            all.push(&self.agent);
        }
        if need.host {
            all.extend([self.daemon.as_path(), &self.cli]);
            all.extend([self.engine_yara.as_path(), &self.engine_clamav, &self.engine_hash]);
        }
        all
    }
}

/// Builds what is wanted and not up to date, once in a process. With `SEAWALL_BIN_DIR` set, or
/// [`BUILT`], it only checks that all is there.
pub fn ensure_binaries(need: Need) -> anyhow::Result<Binaries> {
    static DONE: Mutex<Option<Need>> = Mutex::new(None);
    let binaries = Binaries::locate();
    let mut done = DONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let ready = ["SEAWALL_BIN_DIR", BUILT].iter().any(|name| std::env::var_os(name).is_some());
    let covered = done.is_some_and(|done| done | need == done);
    if !ready && !covered {
        let mut guest = vec!["--package", "seawall-lab", "--bin", "lab-guest"];
        if need.agent {
            guest.extend(["--package", "seawall-agent", "--bin", "seawall-agent"]);
        }
        cargo(&guest, true)?;
        if need.host {
            cargo(&HOST_PROGRAMS, false)?;
        }
    }
    *done = Some(done.unwrap_or_default() | need);
    for path in binaries.wanted(need) {
        ensure!(path.exists(), "{} is not there", path.display());
    }
    Ok(binaries)
}

/// Builds the one program of `package`, for a guest or for the host, unless `SEAWALL_BIN_DIR` has it. Where
/// it is.
pub fn build_program(package: &str, guest: bool) -> anyhow::Result<PathBuf> {
    let made =
        std::env::var_os("SEAWALL_BIN_DIR").map(|folder| PathBuf::from(folder).join(package));
    if let Some(path) = made.filter(|path| path.exists()) {
        return Ok(path);
    }
    cargo(&["--package", package], guest)?;
    Ok(folder(guest).join(package))
}

/// Runs a build; cargo's progress is shown only when there is something to build and to see.
fn cargo(arguments: &[&str], guest: bool) -> anyhow::Result<()> {
    use std::io::IsTerminal;
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args(["build", "--locked"]).args(arguments);
    command.args(if guest { &GUEST[..] } else { &HOST });
    if !std::io::stderr().is_terminal() {
        command.arg("--quiet");
    }
    if guest {
        command.env("RUSTFLAGS", GUEST_RUSTFLAGS).env_remove("CARGO_ENCODED_RUSTFLAGS");
    }
    let status = command.stdin(std::process::Stdio::null()).status().context("cannot run cargo")?;
    if !status.success() {
        bail!("the build failed: cargo build --locked {}", arguments.join(" "));
    }
    Ok(())
}
