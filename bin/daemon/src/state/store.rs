//! The tables of the state database.

use crate::database::Format;
use crate::generation::SetDigest;
use crate::pipeline::Known;
use jiff::Timestamp;
use rusqlite::{OptionalExtension, Row, Statement, Transaction, params};
use seawall_client::Detection;
use seawall_proto::ContentHash;
use std::collections::HashMap;
use std::sync::Arc;

/// Its version 1. `used` counts: the set in use last has the highest. `detections` is JSON, NULL for
/// clean. `seal` ([`seal`]) tells a row that went bad on the disk.
pub const FORMAT: Format = Format {
    application: 0x5357_5354, // "SWST"
    version: 1,
    schema: "CREATE TABLE sets (
                 id INTEGER PRIMARY KEY,
                 digest BLOB NOT NULL UNIQUE,
                 used INTEGER NOT NULL
             ) STRICT;
             CREATE TABLE verdicts (
                 number INTEGER PRIMARY KEY,
                 set_id INTEGER NOT NULL,
                 hash BLOB NOT NULL,
                 detections TEXT,
                 seal BLOB NOT NULL,
                 UNIQUE (set_id, hash)
             ) STRICT;
             CREATE TABLE guests (
                 name TEXT PRIMARY KEY,
                 first_ms INTEGER NOT NULL,
                 last_ms INTEGER NOT NULL
             ) STRICT;",
};

/// Rows dropped in one call.
const DROPPED_AT_ONCE: u64 = 5000;

/// All guests that were seen: name, first and last time.
pub fn guests(
    transaction: &Transaction<'_>,
) -> rusqlite::Result<Vec<(String, Timestamp, Timestamp)>> {
    let mut select = transaction.prepare("SELECT name, first_ms, last_ms FROM guests")?;
    let time = |row: &Row<'_>, column: usize| {
        Ok::<_, rusqlite::Error>(Timestamp::from_millisecond(row.get(column)?).unwrap_or_default())
    };
    let rows = select.query_map((), |row| Ok((row.get(0)?, time(row, 1)?, time(row, 2)?)))?;
    rows.collect()
}

pub fn see(
    transaction: &Transaction<'_>,
    guest: &str,
    first: Timestamp,
    last: Timestamp,
) -> rusqlite::Result<()> {
    let sql = "INSERT INTO guests VALUES (?1, ?2, ?3)
               ON CONFLICT (name) DO UPDATE SET last_ms = excluded.last_ms";
    transaction.execute(sql, (guest, first.as_millisecond(), last.as_millisecond()))?;
    Ok(())
}

pub fn forget(transaction: &Transaction<'_>, guest: &str) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM guests WHERE name = ?1", [guest])?;
    Ok(())
}

/// The number of a set, if anything is kept of it; it is now the one that was in use last.
pub fn use_set(transaction: &Transaction<'_>, set: SetDigest) -> rusqlite::Result<Option<i64>> {
    let sql =
        "UPDATE sets SET used = (SELECT max(used) + 1 FROM sets) WHERE digest = ?1 RETURNING id";
    transaction.query_row(sql, [set.0], |row| row.get(0)).optional()
}

/// Writes verdicts in one transaction.
pub struct Writer<'t> {
    transaction: &'t Transaction<'t>,
    insert: Statement<'t>,
    sets: HashMap<SetDigest, i64>,
}

impl<'t> Writer<'t> {
    pub fn new(transaction: &'t Transaction<'t>) -> rusqlite::Result<Self> {
        let insert = transaction.prepare(
            "INSERT OR REPLACE INTO verdicts (set_id, hash, detections, seal)
             VALUES (?1, ?2, ?3, ?4)",
        )?;
        Ok(Self { transaction, insert, sets: HashMap::new() })
    }

    pub fn put(
        &mut self,
        set: SetDigest,
        hash: ContentHash,
        known: &Known,
    ) -> rusqlite::Result<()> {
        let id = match self.sets.get(&set) {
            Some(id) => *id,
            None => {
                let sql = "INSERT INTO sets (digest, used)
                           VALUES (?1, (SELECT coalesce(max(used), 0) + 1 FROM sets))
                           ON CONFLICT (digest) DO UPDATE SET digest = digest RETURNING id";
                let id = self.transaction.query_row(sql, [set.0], |row| row.get(0))?;
                self.sets.insert(set, id);
                id
            }
        };
        let detections = match known {
            None => None,
            Some(found) => match serde_json::to_string(&**found) {
                Ok(text) => Some(text),
                // Text alone: there is nothing that JSON cannot say.
                Err(_) => return Ok(()),
            },
        };
        let seal = seal(set, hash.0, detections.as_deref());
        self.insert.execute(params![id, hash.0, detections, seal])?;
        Ok(())
    }
}

/// Some verdicts of a set.
pub struct Page {
    pub verdicts: Vec<(ContentHash, Known)>,
    /// The last row's number; `None` when there was none.
    pub last: Option<i64>,
}

/// At most `count` verdicts of a set with numbers below `below`, the newest first. A row that went
/// bad is left out.
pub fn page(
    transaction: &Transaction<'_>,
    id: i64,
    set: SetDigest,
    below: i64,
    count: u32,
) -> rusqlite::Result<Page> {
    let mut select = transaction.prepare(
        "SELECT number, hash, detections, seal FROM verdicts
         WHERE set_id = ?1 AND number < ?2 ORDER BY number DESC LIMIT ?3",
    )?;
    let mut rows = select.query((id, below, count))?;
    let mut page = Page { verdicts: Vec::new(), last: None };
    while let Some(row) = rows.next()? {
        page.last = Some(row.get(0)?);
        if let Some(verdict) = read(row, set)? {
            page.verdicts.push(verdict);
        }
    }
    Ok(page)
}

fn read(row: &Row<'_>, set: SetDigest) -> rusqlite::Result<Option<(ContentHash, Known)>> {
    let (hash, detections): (Vec<u8>, Option<String>) = (row.get(1)?, row.get(2)?);
    let Ok(hash) = <[u8; 32]>::try_from(hash) else { return Ok(None) };
    if row.get::<_, Vec<u8>>(3)? != seal(set, hash, detections.as_deref()) {
        return Ok(None);
    }
    let known = match detections {
        None => None,
        Some(text) => match serde_json::from_str::<Vec<Detection>>(&text) {
            Ok(found) if !found.is_empty() => Some(Arc::new(found)),
            _ => return Ok(None),
        },
    };
    Ok(Some((ContentHash(hash), known)))
}

/// The first eight bytes of a digest over everything that a row says. Against a disk that errs, not
/// against somebody who writes the file.
fn seal(set: SetDigest, hash: [u8; 32], detections: Option<&str>) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&set.0).update(&hash);
    if let Some(text) = detections {
        hasher.update(b"infected").update(text.as_bytes());
    }
    let mut seal = [0; 8];
    hasher.finalize_xof().fill(&mut seal);
    seal
}

/// Drops sets beyond the last `sets`, and the oldest verdicts beyond `most`, those of sets that are
/// not in use first. Gives whether there is more to drop: one call is bounded.
pub fn trim(transaction: &Transaction<'_>, sets: u32, most: u64) -> rusqlite::Result<bool> {
    let old = "SELECT id FROM sets ORDER BY used DESC LIMIT -1 OFFSET ?1";
    let of_old_sets = transaction.execute(
        &format!(
            "DELETE FROM verdicts WHERE number IN
                 (SELECT number FROM verdicts WHERE set_id IN ({old}) LIMIT ?2)"
        ),
        (sets, DROPPED_AT_ONCE.cast_signed()),
    )?;
    if of_old_sets > 0 {
        return Ok(true);
    }
    transaction.execute(&format!("DELETE FROM sets WHERE id IN ({old})"), [sets])?;
    let count: i64 =
        transaction.query_row("SELECT count(*) FROM verdicts", (), |row| row.get(0))?;
    let excess = count.cast_unsigned().saturating_sub(most);
    let now = excess.min(DROPPED_AT_ONCE);
    if now > 0 {
        let of_others = transaction.execute(
            "DELETE FROM verdicts WHERE number IN (SELECT number FROM verdicts
                 WHERE set_id <> (SELECT id FROM sets ORDER BY used DESC LIMIT 1)
                 ORDER BY number LIMIT ?1)",
            [now.cast_signed()],
        )?;
        let sql = "DELETE FROM verdicts WHERE number IN
                       (SELECT number FROM verdicts ORDER BY number LIMIT ?1)";
        transaction.execute(sql, [now.saturating_sub(of_others as u64).cast_signed()])?;
    }
    Ok(excess > now)
}
