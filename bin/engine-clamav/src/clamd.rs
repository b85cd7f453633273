//! A clamd of our own: its configuration, its private folder, its start and its end.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use seawall_engine::runtime::{HelperFolders, start_helper};

use crate::Arguments;
use crate::session::Session;

/// clamd gives a scan up after this, in milliseconds; the service's limit comes before.
const SCAN_MS: u32 = 3_600_000;
/// Names of private folders begin with this.
const FOLDER: &str = "seawall-clamav-";
/// A file in it that its engine holds locked.
const LOCK: &str = "in-use";
/// clamd takes no larger content, in MiB: it counts in 31 bits.
pub const CONTENT_MAX_MIB: u64 = 2047;
/// Seconds for which clamd waits for the next command of a session: for ever, as far as it goes.
const FOR_EVER: u32 = 2_000_000;
/// How long to wait between two looks at a clamd that loads.
const LOOK: Duration = Duration::from_millis(100);
/// How long a clamd that closed its socket may take to end.
const ENDING: Duration = Duration::from_secs(5);

/// A running clamd. It dies with the thread that started it, and so with this process.
pub struct Clamd {
    child: Child,
    folder: PathBuf,
    socket: PathBuf,
    /// Held as long as the folder is in use.
    _lock: fs::File,
}

impl Clamd {
    /// Starts it; it loads its database in the background.
    pub fn start(arguments: &Arguments, threads: u32) -> io::Result<Self> {
        remove_leftovers(&arguments.temporary);
        let folder = tempfile::Builder::new()
            .prefix(FOLDER)
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&arguments.temporary)?
            .keep();
        let lock = fs::File::create(folder.join(LOCK))?;
        lock.lock()?;
        let (socket, config) = (folder.join("socket"), folder.join("clamd.conf"));
        let unpacked = folder.join("unpacked");
        fs::create_dir(&unpacked)?;
        fs::write(&config, configuration(arguments, threads, &folder, &unpacked, &socket))?;
        let listener = UnixListener::bind(&socket)?;
        let program =
            [arguments.clamd.display().to_string(), format!("--config-file={}", config.display())];
        let folders = HelperFolders {
            read: vec![arguments.database.clone(), arguments.clamd.clone()],
            write: vec![folder.clone()],
        };
        let child = start_helper(&program, listener.as_fd(), folders)?;
        Ok(Self { child, folder, socket, _lock: lock })
    }

    /// A session; its first answer comes when the database is loaded.
    pub fn session(&self) -> io::Result<Session> {
        Session::connect(&self.socket)
    }

    /// Fails when it has ended, with the last words of its log.
    pub fn check(&mut self) -> io::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                let log = self.log();
                let words: Vec<_> = log.lines().rev().take(3).collect();
                let words: Vec<_> = words.into_iter().rev().collect();
                Err(io::Error::other(format!("clamd ended ({status}): {}", words.join("; "))))
            }
        }
    }

    /// Why it is of no use: refused connections and ended sessions are often the first that is seen of its end, and
    /// then it says more than the error does.
    pub fn last_words(&mut self, error: io::Error) -> io::Error {
        let until = Instant::now() + ENDING;
        loop {
            match self.check() {
                Err(words) => return words,
                Ok(()) if Instant::now() >= until => return error,
                Ok(()) => std::thread::sleep(LOOK),
            }
        }
    }

    /// Its private folder.
    pub fn folder(&self) -> io::Result<OwnedFd> {
        Ok(fs::File::open(&self.folder)?.into())
    }

    /// How many signatures it says to have loaded.
    pub fn signatures(&self) -> Option<u32> {
        let log = self.log();
        let after = log.split_once("Loaded ")?.1;
        after.split_once(" signatures")?.0.trim().parse().ok()
    }

    fn log(&self) -> String {
        fs::read(self.folder.join("log")).map_or_else(
            |error| format!("its log cannot be read: {error}"),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }
}

impl Drop for Clamd {
    fn drop(&mut self) {
        // Not once the sandbox is entered: then the process ends, and clamd with it.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        let _removed = fs::remove_dir_all(&self.folder);
    }
}

/// Folders of engines that are gone: an engine in its sandbox can remove nothing.
fn remove_leftovers(temporary: &Path) {
    let entries = fs::read_dir(temporary).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(FOLDER.as_bytes()) {
            continue;
        }
        let lock = fs::File::open(entry.path().join(LOCK));
        // One without a lock file is just being made.
        let is_gone = lock.is_ok_and(|lock| lock.try_lock().is_ok());
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_gone && is_folder {
            let _removed = fs::remove_dir_all(entry.path());
        }
    }
}

/// clamd.conf(5). What goes beyond a limit is told and never taken for clean, and limits that say nothing
/// are as high as the largest content. clamd's own memory of clean files goes by MD5, which can be forged:
/// it is off. There is no reload in place.
fn configuration(
    arguments: &Arguments,
    threads: u32,
    folder: &Path,
    unpacked: &Path,
    socket: &Path,
) -> String {
    let (folder, unpacked) = (folder.display(), unpacked.display());
    format!(
        "Foreground yes\n\
         LocalSocket {socket}\n\
         DatabaseDirectory {database}\n\
         TemporaryDirectory {unpacked}\n\
         LogFile {folder}/log\n\
         LogFileMaxSize 1M\n\
         SelfCheck 0\n\
         MaxThreads {threads}\n\
         MaxQueue {queue}\n\
         AlertExceedsMax yes\n\
         DisableCache yes\n\
         MaxScanTime {scan_ms}\n\
         MaxEmbeddedPE {file_size}M\n\
         MaxHTMLNormalize {file_size}M\n\
         MaxHTMLNoTags {file_size}M\n\
         MaxScriptNormalize {file_size}M\n\
         MaxZipTypeRcg {file_size}M\n\
         PCREMaxFileSize {file_size}M\n\
         MaxScanSize {scan_size}M\n\
         MaxFileSize {file_size}M\n\
         MaxRecursion {recursion}\n\
         MaxFiles {files}\n\
         CommandReadTimeout {forever}\n\
         ReadTimeout {forever}\n\
         IdleTimeout {forever}\n",
        socket = socket.display(),
        database = arguments.database.display(),
        threads = threads.max(1),
        queue = 4 * (threads.max(1) + 2),
        forever = FOR_EVER,
        scan_ms = SCAN_MS,
        scan_size = arguments.scan_size,
        file_size = CONTENT_MAX_MIB,
        recursion = arguments.recursion,
        files = arguments.files,
    )
}

/// Digest of `more` and of all signature files: names and bytes.
///
/// # Errors
/// A file cannot be read, or there is none.
pub fn digest(database: &Path, more: &[&str]) -> io::Result<[u8; 32]> {
    let mut files: Vec<_> =
        fs::read_dir(database)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    files.retain(|path| path.is_file());
    files.sort();
    if files.is_empty() {
        return Err(io::Error::other("there is no file with signatures"));
    }
    let mut hasher = blake3::Hasher::new();
    for text in more {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    for path in files {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name);
        hasher.update(&fs::metadata(&path)?.len().to_le_bytes());
        hasher.update_reader(fs::File::open(&path)?)?;
    }
    Ok(*hasher.finalize().as_bytes())
}
