//! Signature sets and their changes.

use super::{Style, bytes, table, text_of};
use seawall_client::text::printable;
use seawall_client::{ChangeKind, Diagnostic, SetEngine, SignatureChange, SignatureSet};
use std::fmt::Write;

/// Diagnostics of an engine that are shown; --json has more.
const MOST_SHOWN: usize = 10;
/// Files left out that are named.
const MOST_LEFT_OUT: usize = 5;

pub fn list(sets: &[SignatureSet], style: Style) -> String {
    if sets.is_empty() {
        return "No signature set was applied yet: `seawall signatures apply DIR` takes a folder.\n".to_owned();
    }
    let mut lines = table(&["SET", "STATE", "TAKEN", "ENGINES", "FROM"]);
    for set in sets {
        let state = match (set.in_use, set.standby) {
            (true, _) => style.good("in use"),
            (false, true) => "loaded".to_owned(),
            (false, false) => "kept".to_owned(),
        };
        let engines: Vec<_> = set.engines.iter().map(what).collect();
        lines.add_row([
            printable(&set.set),
            state,
            printable(&set.taken),
            printable(&engines.join(", ")),
            printable(&set.from.join(", ")),
        ]);
    }
    text_of(lines, &["TAKEN", "ENGINES"])
}

fn what(part: &SetEngine) -> String {
    match part.rules {
        Some(rules) => format!("{} {rules}", part.engine),
        None => format!("{} ({} files)", part.engine, part.files),
    }
}

pub fn history(changes: &[SignatureChange], style: Style) -> String {
    if changes.is_empty() {
        return "Nothing was changed yet.\n".to_owned();
    }
    let mut lines = table(&["TIME", "WHAT", "END", "SET", "FROM", "WHY"]);
    for change in changes {
        let end = if change.taken { style.good("taken") } else { style.bad("refused") };
        lines.add_row([
            printable(&change.at),
            word(change.kind).to_owned(),
            end,
            printable(change.set.as_deref().unwrap_or("-")),
            printable(&change.from.join(", ")),
            printable(change.reason.as_deref().unwrap_or("")),
        ]);
    }
    text_of(lines, &["FROM", "SET"])
}

fn word(kind: ChangeKind) -> &'static str {
    match kind {
        ChangeKind::First => "first",
        ChangeKind::Apply => "apply",
        ChangeKind::Check => "check",
        ChangeKind::Watch => "watch",
        ChangeKind::Rollback => "rollback",
    }
}

pub fn change(change: &SignatureChange, style: Style) -> String {
    let mut out = String::new();
    let set = printable(change.set.as_deref().unwrap_or(""));
    let took =
        format!("{:.1} s", f64::from(u32::try_from(change.took_ms).unwrap_or(u32::MAX)) / 1000.0);
    let _ = match (change.taken, change.kind) {
        (true, ChangeKind::Check) => {
            writeln!(
                out,
                "{}: `seawall signatures apply` would take set {set} into use ({took}).",
                style.good("good")
            )
        }
        (true, _) => match &change.reason {
            Some(reason) => writeln!(out, "Set {set}: {}.", printable(reason)),
            None => writeln!(out, "Set {set} is {} ({took}).", style.good("in use")),
        },
        (false, kind) => {
            let why = printable(change.reason.as_deref().unwrap_or("it is not said why"));
            let stays = if kind == ChangeKind::Check { "" } else { " What was in use stays." };
            writeln!(out, "{}: {why}.{stays}", style.bad("refused"))
        }
    };
    if !change.engines.is_empty() {
        let mut lines = table(&["ENGINE", "FILES", "SIZE", "RULES", "LOADED IN", "MEMORY"]);
        for part in &change.engines {
            let none = || "-".to_owned();
            let unchanged = || "as before".to_owned();
            lines.add_row([
                printable(&part.engine),
                part.files.to_string(),
                bytes(part.bytes),
                part.rules.map_or_else(none, |rules| rules.to_string()),
                part.load_ms.map_or_else(unchanged, |ms| format!("{} ms", ms)),
                part.resident_bytes.map_or_else(none, bytes),
            ]);
        }
        out += &text_of(lines, &["MEMORY", "SIZE"]);
    }
    if change.known_bad + change.known_good > 0 {
        let _ = writeln!(
            out,
            "Tried: {} known bad and {} known good.",
            change.known_bad, change.known_good
        );
    }
    for part in &change.engines {
        for found in part.diagnostics.iter().take(MOST_SHOWN) {
            let _ = writeln!(out, "  {}", printable(&line(found)));
        }
        let more = part.diagnostics.len().saturating_sub(MOST_SHOWN);
        if more > 0 {
            let _ =
                writeln!(out, "  {more} more of engine {}: see --json", printable(&part.engine));
        }
    }
    if change.left_out_count > 0 {
        let _ = writeln!(out, "Left out, since no engine takes them ({}):", change.left_out_count);
        for file in change.left_out.iter().take(MOST_LEFT_OUT) {
            let _ = writeln!(out, "  {}", printable(file));
        }
    }
    out
}

/// A diagnostic as compilers show theirs.
pub fn line(found: &Diagnostic) -> String {
    let place = match (found.file.as_str(), found.line) {
        ("", _) => String::new(),
        (file, 0) => format!("{file}: "),
        (file, line) => format!("{file}:{line}:{}: ", found.column),
    };
    format!("{place}{}[{}]: {}", found.level, found.code, found.reason)
}
