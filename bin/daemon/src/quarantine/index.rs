//! The index of the quarantine: what a listing shows, in SQLite.
//!
//! It repeats what the entries say and is made from them whenever it does not fit them: a damaged
//! database, one of another version, or one that misses what a service wrote just before it died.

use super::QuarantineError;
use super::entry::{Entry, State};
use super::store::{Store, parse_hash};
use rusqlite::{Connection, OptionalExtension, Row, params};
use seawall_proto::{ContentHash, Ticket};
use std::collections::HashSet;
use std::path::Path;

/// Version of the tables (`PRAGMA user_version`).
const VERSION: i64 = 1;

const TABLES: &str = "
    CREATE TABLE entry (
        ticket    TEXT PRIMARY KEY,
        hash      TEXT NOT NULL,
        size      INTEGER NOT NULL,
        guest     TEXT NOT NULL,
        path      BLOB NOT NULL,
        detection TEXT NOT NULL,
        engine    TEXT NOT NULL,
        stored_ms INTEGER NOT NULL,
        state     TEXT NOT NULL,
        detail    TEXT NOT NULL
    ) STRICT;
    CREATE INDEX by_hash ON entry (hash);
    CREATE INDEX by_age ON entry (stored_ms);
    PRAGMA user_version = 1;
";

/// A line of the listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub ticket: Ticket,
    pub hash: ContentHash,
    pub size: u64,
    pub guest: String,
    pub path: Vec<u8>,
    pub detection: String,
    pub engine: String,
    pub stored_ms: i64,
    pub state: String,
    pub detail: String,
}

pub struct Index(Connection);

fn line(row: &Row<'_>) -> rusqlite::Result<Option<Line>> {
    let (ticket, hash): (String, String) = (row.get(0)?, row.get(1)?);
    let (Ok(ticket), Some(hash)) = (u64::from_str_radix(&ticket, 16), parse_hash(&hash)) else {
        return Ok(None);
    };
    Ok(Some(Line {
        ticket: Ticket(ticket),
        hash,
        size: u64::try_from(row.get::<_, i64>(2)?).unwrap_or(0),
        guest: row.get(3)?,
        path: row.get(4)?,
        detection: row.get(5)?,
        engine: row.get(6)?,
        stored_ms: row.get(7)?,
        state: row.get(8)?,
        detail: row.get(9)?,
    }))
}

impl Index {
    /// Opens the index and brings it in line with the store. `told` is called with what was wrong.
    ///
    /// # Errors
    /// When not even a new database can be made.
    pub fn open(
        path: &Path,
        store: &Store,
        mut told: impl FnMut(&str),
    ) -> Result<Self, QuarantineError> {
        let existed = path.exists();
        let index = match Self::existing(path) {
            Ok(Some(index)) => index,
            broken => {
                if existed {
                    let why =
                        broken.err().map_or("it is of another version".into(), |e| e.to_string());
                    told(&format!("the index {} is made anew: {why}", path.display()));
                    set_aside(path);
                }
                let connection = Connection::open(path)?;
                connection.execute_batch(TABLES)?;
                Self::set_up(&connection)?;
                Self(connection)
            }
        };
        index.follow(store, told)?;
        Ok(index)
    }

    fn set_up(connection: &Connection) -> rusqlite::Result<()> {
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // The entries are durable; the index is made from them if it must.
        connection.pragma_update(None, "synchronous", "NORMAL")
    }

    fn existing(path: &Path) -> rusqlite::Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let connection = Connection::open(path)?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let whole: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        Self::set_up(&connection)?;
        Ok((version == VERSION && whole == "ok").then_some(Self(connection)))
    }

    /// Adds what only the store has, and drops what it has no more. A content that no readable entry
    /// has any more goes, unless an entry cannot be read: it may be that one's.
    fn follow(&self, store: &Store, mut told: impl FnMut(&str)) -> Result<(), QuarantineError> {
        let there: HashSet<Ticket> = store.tickets()?.into_iter().collect();
        let known: HashSet<Ticket> = self.list(None)?.into_iter().map(|line| line.ticket).collect();
        for ticket in known.difference(&there) {
            self.remove(*ticket)?;
        }
        let mut all_readable = true;
        for ticket in &there {
            match store.read_entry(*ticket) {
                Ok(entry) => self.put(&entry)?,
                Err(error) => {
                    all_readable = false;
                    self.remove(*ticket)?;
                    told(&format!("an entry of the quarantine cannot be used: {error}"));
                }
            }
        }
        for hash in store.contents()? {
            // A service died between content and entry; the guest still has the file.
            if all_readable && self.uses(hash)? == 0 {
                store.remove_content(hash)?;
            }
        }
        Ok(())
    }

    /// Adds an entry or what has become of it.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn put(&self, entry: &Entry) -> rusqlite::Result<()> {
        let Entry { ticket, hash, size, guest, path, detection, engine, stored_ms, state, .. } =
            entry;
        self.0.execute(
            "INSERT OR REPLACE INTO entry VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            params![
                ticket.to_string(),
                hash.to_string(),
                i64::try_from(*size).unwrap_or(i64::MAX),
                guest,
                path,
                detection,
                engine,
                stored_ms,
                state.word(),
                state.detail()
            ],
        )?;
        Ok(())
    }

    /// Drops an entry.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn remove(&self, ticket: Ticket) -> rusqlite::Result<()> {
        self.0.execute("DELETE FROM entry WHERE ticket = ?1", [ticket.to_string()])?;
        Ok(())
    }

    /// The listing, newest first; of one guest if named.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn list(&self, guest: Option<&str>) -> rusqlite::Result<Vec<Line>> {
        let mut query = self.0.prepare(
            "SELECT * FROM entry WHERE ?1 IS NULL OR guest = ?1 ORDER BY stored_ms DESC, ticket",
        )?;
        let lines = query.query_map([guest], line)?;
        lines.filter_map(Result::transpose).collect()
    }

    /// The tickets that begin with these hexadecimal digits.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn find(&self, prefix: &str) -> rusqlite::Result<Vec<Ticket>> {
        let mut query = self
            .0
            .prepare("SELECT * FROM entry WHERE substr(ticket, 1, length(?1)) = ?1 LIMIT 2")?;
        let lines = query.query_map([prefix], line)?;
        lines.filter_map(Result::transpose).map(|line| line.map(|line| line.ticket)).collect()
    }

    /// The entry of this very file, if there is one whose file may be in the guest still.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn of_file(
        &self,
        guest: &str,
        path: &[u8],
        hash: ContentHash,
    ) -> rusqlite::Result<Option<Ticket>> {
        let mut query = self.0.prepare(
            "SELECT * FROM entry WHERE hash = ?1 AND guest = ?2 AND path = ?3 AND state IN (?4, ?5)",
        )?;
        let open = (State::Stored.word(), State::Stays(seawall_proto::remedy::Stays::Gone).word());
        let found = query
            .query_row(params![hash.to_string(), guest, path, open.0, open.1], line)
            .optional()?;
        Ok(found.flatten().map(|line| line.ticket))
    }

    /// The oldest entry of this guest.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn oldest_of(&self, guest: &str) -> rusqlite::Result<Option<Line>> {
        let query = "SELECT * FROM entry WHERE guest = ?1 ORDER BY stored_ms, ticket LIMIT 1";
        Ok(self.0.query_row(query, [guest], line).optional()?.flatten())
    }

    /// The oldest entry of all but these guests.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn oldest_but(&self, guests: &[&str]) -> rusqlite::Result<Option<Line>> {
        let query = "SELECT * FROM entry WHERE guest NOT IN (SELECT value FROM json_each(?1))
             ORDER BY stored_ms, ticket LIMIT 1";
        let guests = serde_json::Value::from(guests).to_string();
        Ok(self.0.query_row(query, [guests], line).optional()?.flatten())
    }

    /// Bytes of all entries of this guest, each content as often as it is there.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn size_of(&self, guest: &str) -> rusqlite::Result<u64> {
        let query = "SELECT coalesce(sum(size), 0) FROM entry WHERE guest = ?1";
        self.0.query_row(query, [guest], |row| {
            row.get::<_, i64>(0).map(|size| u64::try_from(size).unwrap_or(0))
        })
    }

    /// The oldest entry of this guest, or of the one that has the most, those first that are in no guest any more for
    /// sure: what has not been confirmed may be in its guest still.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn next_to_drop(&self, guest: Option<&str>) -> rusqlite::Result<Option<Line>> {
        let query = "SELECT * FROM entry WHERE guest = coalesce(?2,
                (SELECT guest FROM entry GROUP BY guest ORDER BY sum(size) DESC, guest LIMIT 1))
             ORDER BY state = ?1, stored_ms, ticket LIMIT 1";
        let values = params![State::Stored.word(), guest];
        Ok(self.0.query_row(query, values, line).optional()?.flatten())
    }

    /// How many entries have this content.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn uses(&self, hash: ContentHash) -> rusqlite::Result<u64> {
        let query = "SELECT count(*) FROM entry WHERE hash = ?1";
        self.0.query_row(query, [hash.to_string()], |row| {
            row.get::<_, i64>(0).map(|count| u64::try_from(count).unwrap_or(0))
        })
    }
}

/// Keeps a damaged database for whoever wants to look at it.
fn set_aside(path: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        let mut from = path.as_os_str().to_owned();
        from.push(suffix);
        let mut to = path.as_os_str().to_owned();
        to.push(format!("{suffix}.damaged"));
        let _gone = std::fs::rename(&from, &to);
    }
}

#[cfg(test)]
mod tests {
    use super::super::store::tests::entry;
    use super::*;

    #[test]
    fn what_goes_first_is_found_for_all_and_for_one_guest() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let index = Index::open(&folder.path().join("index.db"), &store, |_| ()).unwrap();
        // Ticket, guest, bytes, age; all of them confirmed but for the fourth.
        let all =
            [(1, "a", 10, 3), (2, "a", 10, 1), (3, "b", 50, 2), (4, "b", 10, 9), (5, "c", 1, 5)];
        for (ticket, guest, size, age) in all {
            let state = if ticket == 4 { State::Stored } else { State::Quarantined { links: 0 } };
            let stored_ms = 1_000 - age;
            let one = Entry { guest: guest.into(), size, stored_ms, state, ..entry(ticket, b"x") };
            index.put(&one).unwrap();
        }
        let ticket =
            |found: rusqlite::Result<Option<Line>>| found.unwrap().map(|line| line.ticket.0);
        assert_eq!(ticket(index.next_to_drop(None)), Some(3), "of the one that has the most");
        assert_eq!(ticket(index.next_to_drop(Some("a"))), Some(1));
        assert_eq!(ticket(index.next_to_drop(Some("d"))), None);
        assert_eq!(ticket(index.oldest_of("b")), Some(4));
        assert_eq!(ticket(index.oldest_but(&[])), Some(4));
        assert_eq!(ticket(index.oldest_but(&["b", "d"])), Some(5));
        assert_eq!(ticket(index.oldest_but(&["a", "b", "c"])), None);
        assert_eq!(index.size_of("a").unwrap(), 20);
        assert_eq!(index.size_of("d").unwrap(), 0);
    }
}
