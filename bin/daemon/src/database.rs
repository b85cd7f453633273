//! A SQLite file of the service: opened, checked, and set aside when it is damaged.
//!
//! [`Database`] is owned by one thread, which alone writes. A file that cannot be opened or written
//! is tried again later; what was to be written meanwhile is the caller's loss to count. A file that
//! is damaged, or of a version that this build does not know, is renamed and a new one begun.
//!
//! ```text
//!          opened, checked               damage
//! Closed ───────────────────► Open ───────────────────► renamed, Closed
//!   ▲  later: again             │ the file was taken away
//!   └───────────────────────────┘
//! ```

use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use std::fs::{OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long after a failure a file is opened again.
const AGAIN: Duration = Duration::from_secs(5);
/// How long a statement waits for another connection's lock.
const BUSY: Duration = Duration::from_secs(2);
/// Of the files that were set aside, so many are kept.
const SET_ASIDE_KEPT: usize = 3;

/// What is in a file.
pub struct Format {
    /// Tells our files from others (SQLite's `application_id`).
    pub application: i32,
    /// Raised with every change of the tables (SQLite's `user_version`).
    pub version: i32,
    /// Makes the tables.
    pub schema: &'static str,
}

/// Why a database could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// The system refuses.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// SQLite refuses: a full disk, a lock, damage.
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    /// SQLite's check found damage.
    #[error("its check says: {0}")]
    Check(String),
    /// Another program's file, or another version's.
    #[error(
        "it is of format {application:#x} version {version}; this build writes {ours:#x} version {our_version}"
    )]
    Foreign { application: i32, version: i32, ours: i32, our_version: i32 },
    /// It was opened in vain a moment ago.
    #[error("it could not be opened a moment ago")]
    Closed,
}

impl DatabaseError {
    /// Whether the file itself is bad: another attempt would not help.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Check(_) | Self::Foreign { .. } => true,
            Self::Sqlite(rusqlite::Error::SqliteFailure(error, _)) => matches!(
                error.code,
                // Unknown is SQLITE_ERROR: a table or column that should be there is not.
                ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::Unknown
            ),
            Self::Sqlite(
                rusqlite::Error::SqlInputError { .. } | rusqlite::Error::InvalidColumnType(..),
            ) => true,
            _ => false,
        }
    }
}

/// A file that was set aside, and why.
#[derive(Debug, Clone)]
pub struct SetAside {
    pub from: PathBuf,
    pub to: PathBuf,
    pub why: String,
}

/// Why the database cannot be used now, for the status; shared with whoever shows it.
#[derive(Debug, Clone, Default)]
pub struct Problem(Arc<Mutex<Option<String>>>);

impl Problem {
    pub fn get(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives what was there before.
    fn set(&self, to: Option<String>) -> Option<String> {
        std::mem::replace(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), to)
    }
}

/// A database that is opened when it can be, and again when it has failed.
pub struct Database {
    path: PathBuf,
    format: &'static Format,
    open: Option<Open>,
    not_before: Option<Instant>,
    problem: Problem,
    set_aside: Vec<SetAside>,
}

struct Open {
    connection: Connection,
    /// Device and inode: tells whether somebody took the file away.
    file: (u64, u64),
}

impl Database {
    /// Opens nothing yet.
    pub fn new(path: PathBuf, format: &'static Format) -> Self {
        Self {
            path,
            format,
            open: None,
            not_before: None,
            problem: Problem::default(),
            set_aside: Vec::new(),
        }
    }

    pub fn problem(&self) -> Problem {
        self.problem.clone()
    }

    /// The files that were set aside since this was asked last.
    pub fn take_set_aside(&mut self) -> Vec<SetAside> {
        std::mem::take(&mut self.set_aside)
    }

    /// Whether a file was set aside of which nobody was told yet.
    pub fn was_set_aside(&self) -> bool {
        !self.set_aside.is_empty()
    }

    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Looks whether the file is damaged, and sets it aside if so.
    pub fn check(&mut self) {
        let found = self.connection().and_then(|connection| quick_check(connection));
        if let Err(error) = found {
            self.failed(&error);
        }
    }

    /// Does `work` in one transaction, opening the file first where need be. `Ok` means committed:
    /// it survives the end of the process, though not of the machine.
    pub fn write<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, DatabaseError> {
        let result = self.connection().and_then(|connection| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let done = work(&transaction)?;
            transaction.commit()?;
            Ok(done)
        });
        match &result {
            Ok(_) => self.works(),
            Err(DatabaseError::Closed) => {}
            Err(error) => self.failed(error),
        }
        result
    }

    fn connection(&mut self) -> Result<&mut Connection, DatabaseError> {
        if self.open.as_ref().is_some_and(|open| identity(&self.path).ok() != Some(open.file)) {
            tracing::warn!(path = %self.path.display(), "the file was taken away; a new one is begun");
            self.open = None;
        }
        if self.open.is_none() {
            if self.not_before.is_some_and(|at| Instant::now() < at) {
                return Err(DatabaseError::Closed);
            }
            self.open = Some(self.open_now()?);
        }
        self.open.as_mut().map(|open| &mut open.connection).ok_or(DatabaseError::Closed)
    }

    fn open_now(&mut self) -> Result<Open, DatabaseError> {
        match open(&self.path, self.format) {
            Err(error) if error.is_damage() => {
                self.put_aside(&error)?;
                open(&self.path, self.format)
            }
            result => result,
        }
    }

    fn works(&mut self) {
        self.not_before = None;
        if self.problem.set(None).is_some() {
            tracing::info!(path = %self.path.display(), "it can be written again");
        }
    }

    fn failed(&mut self, error: &DatabaseError) {
        if self.open.is_some() && error.is_damage() {
            self.open = None;
            if let Err(error) = self.put_aside(error) {
                tracing::error!(path = %self.path.display(), %error, "it cannot be set aside");
            }
            return;
        }
        if self.open.is_none() {
            self.not_before = Some(Instant::now() + AGAIN);
        }
        let what = format!("{} cannot be written: {error}", self.path.display());
        if self.problem.set(Some(what)).is_none() {
            tracing::error!(path = %self.path.display(), %error, "it cannot be written");
        }
    }

    /// Renames the file, and its log, out of the way.
    fn put_aside(&mut self, error: &DatabaseError) -> io::Result<()> {
        let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        let to = with_suffix(&self.path, &format!(".damaged-{time}"));
        std::fs::rename(&self.path, &to)?;
        // Only where there was one.
        let _ = std::fs::rename(with_suffix(&self.path, "-wal"), with_suffix(&to, "-wal"));
        let _ = std::fs::remove_file(with_suffix(&self.path, "-shm"));
        let why = error.to_string();
        tracing::warn!(path = %self.path.display(), to = %to.display(), "the database was set aside and a new one is begun: {why}");
        self.set_aside.push(SetAside { from: self.path.clone(), to, why });
        drop_old_ones(&self.path);
        Ok(())
    }
}

/// A connection beside the writer's that only reads.
pub fn read(path: &Path, format: &Format) -> Result<Connection, DatabaseError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    connection.execute_batch("PRAGMA query_only = ON; PRAGMA cache_size = -1024;")?;
    check_format(&connection, format)?;
    Ok(connection)
}

fn open(path: &Path, format: &Format) -> Result<Open, DatabaseError> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY)?;
    // What follows the end of the process is kept by the log without a flush to the disk for each
    // commit (sqlite.org/pragma.html, synchronous). Both of them bounded: 1 MiB of memory, 4 MiB of log.
    connection.execute_batch(
        "PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
         PRAGMA cache_size = -1024; PRAGMA journal_size_limit = 4194304; PRAGMA foreign_keys = ON;
         PRAGMA cell_size_check = ON; PRAGMA trusted_schema = OFF;",
    )?;
    let objects: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", (), |row| row.get(0))?;
    if objects == 0 {
        let transaction = connection.transaction()?;
        transaction.execute_batch(format.schema)?;
        transaction.pragma_update(None, "application_id", format.application)?;
        transaction.pragma_update(None, "user_version", format.version)?;
        transaction.commit()?;
    }
    check_format(&connection, format)?;
    quick_check(&connection)?;
    let file = identity(path)?;
    Ok(Open { connection, file })
}

fn quick_check(connection: &Connection) -> Result<(), DatabaseError> {
    let found: String = connection.query_row("PRAGMA quick_check(1)", (), |row| row.get(0))?;
    if found == "ok" { Ok(()) } else { Err(DatabaseError::Check(found)) }
}

fn check_format(connection: &Connection, format: &Format) -> Result<(), DatabaseError> {
    let number = |name: &str| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    let (application, version) = (number("application_id")?, number("user_version")?);
    if (application, version) == (format.application, format.version) {
        return Ok(());
    }
    let (ours, our_version) = (format.application, format.version);
    Err(DatabaseError::Foreign { application, version, ours, our_version })
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|data| (data.dev(), data.ino()))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Keeps the newest of what was set aside, so that damage that comes back does not fill the disk.
fn drop_old_ones(path: &Path) {
    let prefix = with_suffix(path, ".damaged-");
    let Some(entries) = path.parent().and_then(|folder| std::fs::read_dir(folder).ok()) else {
        return;
    };
    let is_it = |name: &Path| {
        let name = name.as_os_str().as_encoded_bytes();
        name.starts_with(prefix.as_os_str().as_encoded_bytes()) && !name.ends_with(b"-wal")
    };
    let mut all: Vec<_> =
        entries.flatten().map(|entry| entry.path()).filter(|name| is_it(name)).collect();
    // Their names end with the time.
    all.sort();
    for old in all.iter().rev().skip(SET_ASIDE_KEPT) {
        // What cannot be removed now is looked at next time.
        let _ = std::fs::remove_file(old);
        let _ = std::fs::remove_file(with_suffix(old, "-wal"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format =
        Format { application: 7, version: 2, schema: "CREATE TABLE t (n INTEGER) STRICT;" };

    fn add(database: &mut Database) -> Result<usize, DatabaseError> {
        database.write(|transaction| transaction.execute("INSERT INTO t VALUES (1)", ()))
    }

    fn count(path: &Path) -> i64 {
        let connection = read(path, &FORMAT).unwrap();
        connection.query_row("SELECT count(*) FROM t", (), |row| row.get(0)).unwrap()
    }

    #[test]
    fn what_is_committed_is_there_again_and_for_nobody_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.db");
        add(&mut Database::new(path.clone(), &FORMAT)).unwrap();
        let mut again = Database::new(path.clone(), &FORMAT);
        add(&mut again).unwrap();
        assert_eq!(count(&path), 2);
        for file in ["x.db", "x.db-wal", "x.db-shm"] {
            let mode = std::fs::metadata(folder.path().join(file)).unwrap().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        let reader = read(&path, &FORMAT).unwrap();
        assert!(reader.execute("INSERT INTO t VALUES (1)", ()).is_err(), "it only reads");
    }

    #[test]
    fn damage_and_foreign_files_are_set_aside_and_the_newest_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.db");
        let other = Format { version: 3, ..FORMAT };
        let spoil: [&dyn Fn(); 3] = [
            &|| {
                std::fs::write(&path, b"this is no database, but long enough to be read".repeat(99))
                    .unwrap()
            },
            &|| drop(open(&path, &other).unwrap()),
            &|| {
                let connection = open(&path, &FORMAT).unwrap().connection;
                connection.execute_batch("ALTER TABLE t RENAME TO u").unwrap();
            },
        ];
        for (number, spoil) in spoil.iter().enumerate() {
            let _ = std::fs::remove_file(&path);
            spoil();
            let mut database = Database::new(path.clone(), &FORMAT);
            // A missing table shows at the first use, and the next one has a new file.
            if add(&mut database).is_err() {
                add(&mut database).unwrap();
            }
            let aside = database.take_set_aside();
            assert_eq!(aside.len(), 1, "{number}: {aside:?}");
            assert!(aside[0].to.exists() && database.problem().get().is_none());
            assert_eq!(count(&path), 1);
        }
        for n in 0..9 {
            std::fs::write(folder.path().join(format!("x.db.damaged-2020010{n}T000000Z")), "")
                .unwrap();
        }
        drop_old_ones(&path);
        let kept = std::fs::read_dir(folder.path()).unwrap().flatten();
        let kept = kept.filter(|entry| entry.file_name().to_string_lossy().contains("damaged"));
        assert_eq!(kept.count(), SET_ASIDE_KEPT);
    }

    #[test]
    fn a_file_that_is_taken_away_is_begun_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.db");
        let mut database = Database::new(path.clone(), &FORMAT);
        add(&mut database).unwrap();
        std::fs::rename(&path, folder.path().join("y")).unwrap();
        for end in ["-wal", "-shm"] {
            std::fs::remove_file(with_suffix(&path, end)).unwrap();
        }
        add(&mut database).unwrap();
        assert_eq!(count(&path), 1);
    }

    #[test]
    fn a_folder_that_is_not_there_is_a_problem_and_no_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("later/x.db");
        let mut database = Database::new(path.clone(), &FORMAT);
        assert!(add(&mut database).is_err());
        assert!(database.problem().get().unwrap().contains("x.db cannot be written"));
        std::fs::create_dir(folder.path().join("later")).unwrap();
        assert!(matches!(add(&mut database), Err(DatabaseError::Closed)), "not at once");
        database.not_before = Some(Instant::now());
        add(&mut database).unwrap();
        assert_eq!(database.problem().get(), None);
    }
}
