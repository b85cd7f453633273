//! The table of events: written by the writer alone, read page by page.

use super::filter::{Filter, name};
use crate::database::{self, DatabaseError, Format};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Transaction, params_from_iter};
use seawall_client::Event;
use std::path::Path;

/// Its version 1: `line` is the whole event as [`Event`] in JSON; the other columns are what filters
/// look for. `AUTOINCREMENT` keeps an id from being used again when its row is gone.
pub const FORMAT: Format = Format {
    application: 0x5357_4556, // "SWEV"
    version: 1,
    schema: "CREATE TABLE events (
                 id INTEGER PRIMARY KEY AUTOINCREMENT,
                 at_ms INTEGER NOT NULL,
                 kind TEXT NOT NULL,
                 guest TEXT,
                 verdict TEXT,
                 hash TEXT,
                 line TEXT NOT NULL
             ) STRICT;
             CREATE INDEX events_at ON events (at_ms);
             CREATE INDEX events_hash ON events (hash) WHERE hash IS NOT NULL;",
};

/// Rows that one step of the retention drops, and steps in one transaction.
const DROPPED_AT_ONCE: u32 = 200;
const STEPS: u32 = 16;
/// Free pages beyond this are given back to the file system, so many at a time.
const FREE_PAGES: i64 = 256;
const DAY_MS: i64 = 24 * 3600 * 1000;

/// An event as it is written.
#[derive(Debug)]
pub struct Line {
    pub id: u64,
    /// When, in milliseconds since the epoch.
    pub at: i64,
    pub event: Event,
    /// The event in JSON, without a line end.
    pub text: String,
}

/// How long events are kept.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Days; older ones are dropped.
    pub days: u32,
    /// Bytes of the database; above it the oldest are dropped.
    pub most: u64,
}

pub fn append(transaction: &Transaction<'_>, lines: &[impl AsRef<Line>]) -> rusqlite::Result<()> {
    let mut insert = transaction.prepare(
        "INSERT INTO events (id, at_ms, kind, guest, verdict, hash, line)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?;
    for line in lines {
        let line = line.as_ref();
        let event = &line.event;
        insert.execute((
            signed(line.id),
            line.at,
            name(&event.kind),
            &event.guest,
            event.verdict.as_ref().map(name),
            &event.hash,
            &line.text,
        ))?;
    }
    Ok(())
}

/// The highest id that was ever used.
pub fn last_id(transaction: &Transaction<'_>) -> rusqlite::Result<Option<u64>> {
    let sql = "SELECT seq FROM sqlite_sequence WHERE name = 'events'";
    let last: Option<i64> = transaction.query_row(sql, (), |row| row.get(0)).optional()?;
    Ok(last.map(i64::cast_unsigned))
}

/// Drops what is too old at `now` (milliseconds since the epoch; none: nothing is) or too much. Gives
/// whether there is more to drop: one call is bounded.
pub fn trim(
    transaction: &Transaction<'_>,
    keep: Retention,
    now: Option<i64>,
) -> rusqlite::Result<bool> {
    let oldest = now.map_or(i64::MIN, |now| now - i64::from(keep.days) * DAY_MS);
    for _ in 0..STEPS {
        let mut dropped = transaction.execute(
            "DELETE FROM events WHERE id IN
                 (SELECT id FROM events WHERE at_ms < ?1 ORDER BY at_ms LIMIT ?2)",
            (oldest, DROPPED_AT_ONCE),
        )?;
        let excess = used(transaction)?.saturating_sub(keep.most);
        if excess > 0 {
            dropped += drop_oldest(transaction, excess)?;
        }
        if dropped == 0 {
            return give_back(transaction);
        }
    }
    Ok(true)
}

/// Drops the oldest events that take about `bytes`: an event has from a hundred bytes to 24 KiB.
fn drop_oldest(transaction: &Transaction<'_>, bytes: u64) -> rusqlite::Result<usize> {
    let mut select =
        transaction.prepare("SELECT id, length(line) FROM events ORDER BY id LIMIT ?1")?;
    let mut rows = select.query([DROPPED_AT_ONCE])?;
    let (mut last, mut sum) = (0, 0);
    while sum < bytes
        && let Some(row) = rows.next()?
    {
        last = row.get::<_, i64>(0)?;
        sum += row.get::<_, i64>(1)?.cast_unsigned();
    }
    transaction.execute("DELETE FROM events WHERE id <= ?1", [last])
}

fn pragma(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, name, |row| row.get(0))
}

/// Bytes of the pages that hold something.
fn used(connection: &Connection) -> rusqlite::Result<u64> {
    let pages = pragma(connection, "page_count")? - pragma(connection, "freelist_count")?;
    Ok(u64::try_from(pages * pragma(connection, "page_size")?).unwrap_or(0))
}

/// Gives whether there is more to give back.
fn give_back(connection: &Connection) -> rusqlite::Result<bool> {
    if pragma(connection, "freelist_count")? <= FREE_PAGES {
        return Ok(false);
    }
    let mut vacuum = connection.prepare(&format!("PRAGMA incremental_vacuum({FREE_PAGES})"))?;
    let mut pages = vacuum.query(())?;
    // One page each.
    while pages.next()?.is_some() {}
    Ok(true)
}

/// Reads events for one request.
pub struct Reader {
    connection: Connection,
    filter: Filter,
}

impl Reader {
    pub fn open(path: &Path, filter: Filter) -> Result<Self, DatabaseError> {
        Ok(Self { connection: database::read(path, &FORMAT)?, filter })
    }

    /// The id with which the newest `count` wanted events begin; one past the last where there are
    /// none.
    pub fn newest(&self, count: u32) -> Result<u64, DatabaseError> {
        let (condition, mut values) = self.filter.sql();
        let sql = format!(
            "SELECT coalesce(min(id), (SELECT coalesce(max(id), 0) + 1 FROM events)) FROM
             (SELECT id FROM events WHERE {condition} ORDER BY id DESC LIMIT ?)"
        );
        values.push(i64::from(count).into());
        let id: i64 =
            self.connection.query_row(&sql, params_from_iter(values), |row| row.get(0))?;
        Ok(id.cast_unsigned())
    }

    /// At most `count` wanted events from the id `from` on, with their ids.
    pub fn page(&self, from: u64, count: u32) -> Result<Vec<(u64, String)>, DatabaseError> {
        let (condition, mut values) = self.filter.sql();
        let sql = format!(
            "SELECT id, line FROM events WHERE {condition} AND id >= ? ORDER BY id LIMIT ?"
        );
        values.extend([Value::from(signed(from)), Value::from(i64::from(count))]);
        let mut statement = self.connection.prepare(&sql)?;
        let rows = statement.query_map(params_from_iter(values), |row| {
            Ok((row.get::<_, i64>(0)?.cast_unsigned(), row.get(1)?))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

/// SQLite knows no unsigned numbers; ours stay far below.
fn signed(id: u64) -> i64 {
    i64::try_from(id).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
