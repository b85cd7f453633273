//! One driver at a time.
//!
//! Two workers with a session each would write into the same region, and the host would judge one
//! file by another's content. So a worker connects only while it holds a lock (fcntl(2), "Advisory
//! record locking") on a file beside the control socket; the kernel gives it back when the process
//! ends, however it ends.
//!
//! A worker that finds the lock taken asks its holder to retire, and kills one that does not. A
//! worker whose own supervisor has died meanwhile gives way instead: whoever holds the lock was
//! started after it.

use crate::control;
use crate::driver::Driver;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the other driver may take to end by itself, and after being killed.
const PATIENCE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(100);

/// Why this worker may not go on.
#[derive(Debug, thiserror::Error)]
pub enum SoleError {
    /// The lock file cannot be made or locked.
    #[error("{path}: {reason}")]
    Io { path: PathBuf, reason: io::Error },
    /// This worker's supervisor is dead, and another driver is there.
    #[error("another driver has taken over")]
    GiveWay,
    /// The other driver holds the lock even after it was killed.
    #[error("another driver (process {pid}) does not end")]
    Stuck { pid: i32 },
}

/// The lock. Held as long as this lives.
#[derive(Debug)]
pub struct Sole(#[expect(dead_code, reason = "it is held, not used")] Flock<File>);

/// Waits until this worker is the only one.
pub fn become_sole(driver: &Driver, control: &Path) -> Result<Sole, SoleError> {
    let path = control.with_extension("lock");
    let error = |reason: io::Error| SoleError::Io { path: path.clone(), reason };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(error)?;
    }
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let mut file = file.map_err(&error)?;
    let start = Instant::now();
    let mut killed = false;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(Sole(held)),
            Err((file, nix::Error::EWOULDBLOCK)) => file,
            Err((_, reason)) => return Err(error(reason.into())),
        };
        let pid = holder(&file).map_err(&error)?;
        if !driver.is_supervised() {
            return Err(SoleError::GiveWay);
        }
        if start.elapsed() > PATIENCE * 2 {
            return Err(SoleError::Stuck { pid });
        }
        if start.elapsed() > PATIENCE && !killed && pid > 0 {
            tracing::warn!(pid, "the other driver does not end; it is killed");
            let _gone = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
            killed = true;
        }
        if control::retire_other(control) {
            tracing::info!(pid, "took over from another driver");
        }
        std::thread::sleep(TICK);
    }
}

/// The process that holds the lock, from /proc/locks (proc_locks(5)); 0 when it has just let go.
fn holder(file: &File) -> io::Result<i32> {
    let metadata = file.metadata()?;
    let (major, minor) = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
    let wanted = format!("{major:02x}:{minor:02x}:{}", metadata.ino());
    let locks = std::fs::read_to_string("/proc/locks")?;
    let pid = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let is_flock = fields.next()? == "FLOCK";
        let (pid, file) = (fields.nth(2)?, fields.next()?);
        let same = is_flock && file == wanted;
        same.then(|| pid.parse().ok())?
    };
    Ok(locks.lines().find_map(pid).unwrap_or(0))
}
