//! Answers for people. Whatever came from a guest or a file is made printable before it gets here
//! or here at the latest.

pub mod golden;
pub mod policy;
pub mod scans;
pub mod signatures;

use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Table};
use seawall_client::text::printable;
use seawall_client::{
    Approval, DriverCounters, Engine, EngineReport, EngineState, Event, EventKind, Guest,
    GuestState, Quarantine, QuarantineEntry, QuarantineState, Reload, ScanReport, Status, Verdict,
};
use std::fmt::Write;
use std::io::IsTerminal;

/// Whether words may be coloured.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// Colours only on a terminal, and not where NO_COLOR asks for none (no-color.org).
    pub fn of_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colour: std::io::stdout().is_terminal() && !refused }
    }

    fn paint(self, code: u8, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn good(self, text: &str) -> String {
        self.paint(32, text)
    }

    fn bad(self, text: &str) -> String {
        self.paint(31, text)
    }
}

/// The program's tables: no frame, one line of heads; on a terminal fitted to its width.
fn table(heads: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    if std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        table.force_no_tty();
    }
    table.set_header(heads.iter().map(Cell::new));
    table
}

/// Of the last column at least so much is shown before others are left out.
const LAST_COLUMN: u16 = 24;

/// The table as text. On a terminal that is too narrow it leaves out columns, the first of `dispensable`
/// first, and then breaks the last one's lines.
fn text_of(mut table: Table, dispensable: &[&str]) -> String {
    let width = table.width().filter(|width| *width > 0 && table.is_tty());
    if let Some(width) = width {
        fit(&mut table, width, dispensable);
    }
    let mut text = String::new();
    for line in table.lines() {
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn fit(table: &mut Table, width: u16, dispensable: &[&str]) {
    // One space on each side.
    let mut widths: Vec<u16> = table.column_max_content_widths().iter().map(|w| w + 2).collect();
    let last = widths.pop().unwrap_or(0).min(LAST_COLUMN);
    let mut hidden = dispensable.iter();
    while widths.iter().sum::<u16>() + last > width
        && let Some(name) = hidden.next()
    {
        let heads = table.header().map(|row| row.cell_iter().map(Cell::content));
        let at = heads.and_then(|mut heads| heads.position(|head| head == *name));
        if let Some(at) = at.filter(|at| *at < widths.len()) {
            widths[at] = 0;
        }
    }
    for (at, width) in widths.iter().enumerate() {
        let constraint = match width {
            0 => ColumnConstraint::Hidden,
            _ => ColumnConstraint::ContentWidth,
        };
        if let Some(column) = table.column_mut(at) {
            column.set_constraint(constraint);
        }
    }
    table.set_content_arrangement(ContentArrangement::Dynamic);
}

fn state_word(state: QuarantineState) -> &'static str {
    match state {
        QuarantineState::Stored => "stored",
        QuarantineState::Quarantined => "quarantined",
        QuarantineState::Stays => "stays in guest",
        QuarantineState::Restored => "restored",
    }
}

pub fn quarantine(all: &Quarantine) -> String {
    let mut out = String::new();
    if all.entries.is_empty() {
        let _ = writeln!(out, "Nothing is in quarantine.");
    } else {
        let mut lines = table(&["ID", "STORED", "GUEST", "PATH", "DETECTION", "SIZE", "STATE"]);
        for entry in &all.entries {
            lines.add_row([
                entry.id.clone(),
                entry.stored.clone(),
                printable(&entry.guest),
                printable(&entry.path),
                printable(&entry.detection),
                entry.size.to_string(),
                state_word(entry.state).to_owned(),
            ]);
        }
        out = text_of(lines, &["SIZE", "STORED", "DETECTION"]);
    }
    let percent = all.used_bytes * 100 / all.most_bytes.max(1);
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let _ = writeln!(
        out,
        "\n{} of {} MiB are used ({percent} %)",
        mib(all.used_bytes),
        mib(all.most_bytes)
    );
    out
}

pub fn quarantine_entry(entry: &QuarantineEntry, style: Style) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(out, "{name:<11} {}", printable(value));
    };
    line("id", &entry.id);
    line("guest", &entry.guest);
    line("path", &entry.path);
    line("detection", &format!("{} ({})", entry.detection, entry.engine));
    line("hash", &entry.hash);
    line("size", &format!("{} bytes", entry.size));
    line("stored", &entry.stored);
    if let Some(attributes) = &entry.attributes {
        let owner = format!("{}:{}, mode {}", attributes.uid, attributes.gid, attributes.mode);
        line("owner", &owner);
        line("modified", &attributes.modified);
        if !attributes.xattrs.is_empty() {
            line("attributes", &attributes.xattrs.join(", "));
        }
        if attributes.sparse {
            line("holes", "yes");
        }
    }
    let word = state_word(entry.state);
    let word = match entry.state {
        QuarantineState::Stays => style.bad(word),
        _ => style.good(word),
    };
    let detail = if entry.detail.is_empty() { "" } else { ": " };
    let _ = writeln!(out, "{:<11} {word}{detail}{}", "state", printable(&entry.detail));
    out
}

pub fn approvals(all: &[Approval]) -> String {
    if all.is_empty() {
        return "No content passes that is detected.\n".to_owned();
    }
    let mut lines = table(&["HASH", "GUEST", "SINCE"]);
    for one in all {
        let guest = one.guest.as_deref().unwrap_or("all");
        lines.add_row([printable(&one.hash), printable(guest), one.since.clone()]);
    }
    text_of(lines, &["SINCE"])
}

pub fn status(status: &Status, style: Style) -> String {
    let mut out = String::new();
    let word = if status.healthy { style.good("healthy") } else { style.bad("not healthy") };
    let _ = writeln!(
        out,
        "seawalld {} is {word}, running since {}",
        printable(&status.version),
        status.started
    );
    for problem in &status.problems {
        let _ = writeln!(out, "  - {}", printable(problem));
    }
    let guests = &status.guests;
    let _ = writeln!(
        out,
        "\nGuests: {} protected, {} silent, {} unprotected, {} never seen",
        guests.protected, guests.silent, guests.unprotected, guests.never_seen
    );
    let mut engines = table(&[
        "ENGINE",
        "STATE",
        "RULES",
        "SIGNATURES",
        "SCANS",
        "FAILED",
        "QUEUED",
        "RESTARTS",
        "MEMORY",
    ]);
    for engine in &status.engines {
        engines.add_row(engine_row(engine));
    }
    let _ = write!(out, "\n{}", text_of(engines, &["SIGNATURES", "QUEUED", "RULES", "RESTARTS"]));
    if let Some(set) = &status.signatures.set {
        let _ = writeln!(out, "Signature set {} is in use.", printable(set));
    }
    if let Some(from) = &status.signatures.loading {
        let _ = writeln!(out, "New signatures from {} are loaded and tried.", printable(from));
    }
    for engine in &status.engines {
        for found in engine.diagnostics.iter().chain(&engine.refused) {
            let _ = writeln!(out, "  {}", printable(&signatures::line(found)));
        }
    }
    let done = &status.counters;
    let _ = writeln!(
        out,
        "\nRequests: {} ({} copied), {} scans, {} answered from memory, {} joined another's scan",
        done.requests,
        bytes(done.bytes_copied),
        done.scans,
        done.cache_hits,
        done.joined
    );
    let verdicts = &done.verdicts;
    let _ = writeln!(
        out,
        "Verdicts: {} clean, {} infected, {} errors, {} timed out; {} remembered, generation {}",
        verdicts.clean,
        verdicts.infected,
        verdicts.error,
        verdicts.timed_out,
        status.cached_verdicts,
        status.generation
    );
    if done.events_dropped > 0 {
        let _ = writeln!(out, "Events left out of the log: {}", done.events_dropped);
    }
    let policy = &status.policy;
    let _ = writeln!(
        out,
        "Policy where no group says otherwise: mode {}; infected files: {}; without a verdict: open {}, exec {}; \
         files up to {} on access; {} exclusions",
        printable(&policy.mode),
        printable(&policy.infected),
        printable(&policy.fail_mode_open),
        printable(&policy.fail_mode_exec),
        bytes(policy.whole_file_limit_bytes),
        policy.exclusions
    );
    let kept = &status.quarantine;
    let _ = writeln!(out, "Quarantine: {} of {}", bytes(kept.used_bytes), bytes(kept.most_bytes));
    let (copies, own) = (&status.private_copies, &status.resources);
    let _ = writeln!(
        out,
        "Private copies: {} of {} in memory, {} on disk\nService: {} resident, {:.1} s CPU, {} threads",
        bytes(copies.memory_bytes),
        bytes(copies.memory_limit_bytes),
        bytes(copies.spooled_bytes),
        bytes(own.resident_kib << 10),
        seconds(own.cpu_ms),
        own.threads
    );
    out
}

fn engine_row(engine: &Engine) -> Vec<Cell> {
    let state = match engine.state {
        EngineState::Ready if engine.loading => Cell::new("ready, loading new signatures"),
        EngineState::Ready => Cell::new("ready").fg(Color::Green),
        EngineState::Starting => Cell::new("starting"),
        EngineState::Restarting => Cell::new("restarting").fg(Color::Red),
        EngineState::Failed => Cell::new("failed").fg(Color::Red),
    };
    let or_dash = |text: Option<String>| Cell::new(text.unwrap_or_else(|| "-".into()));
    vec![
        Cell::new(printable(&engine.name)),
        state,
        or_dash(engine.rules.map(|rules| rules.to_string())),
        or_dash(
            engine.signatures.as_ref().map(|digest| printable(digest).chars().take(12).collect()),
        ),
        Cell::new(engine.scans),
        Cell::new(engine.failures),
        Cell::new(engine.queued + engine.in_flight),
        Cell::new(engine.restarts),
        or_dash(engine.resources.map(|used| bytes(used.resident_kib << 10))),
    ]
}

pub fn guests(guests: &[Guest]) -> String {
    if guests.is_empty() {
        return "No guest is configured: add a [[guest]] section to the service's configuration.\n"
            .into();
    }
    let mut rows = table(&[
        "GUEST",
        "STATE",
        "GROUP",
        "SINCE",
        "LINK",
        "DRIVER",
        "KERNEL",
        "REQUESTS",
        "INFECTED",
        "UNSCANNED",
        "EXPOSED",
        "WATCHED",
    ]);
    for guest in guests {
        rows.add_row(guest_row(guest));
    }
    let dispensable = ["GROUP", "KERNEL", "DRIVER", "SINCE", "LINK", "REQUESTS", "INFECTED"];
    let mut out = text_of(rows, &dispensable);
    for guest in guests {
        let name = printable(&guest.name);
        if !guest.reason.is_empty() {
            let _ = writeln!(out, "{name}: {}", printable(&guest.reason));
        }
        if let Some(fault) = &guest.region_fault {
            let region = guest.region.iter().map(|path| format!(" {path}")).collect::<String>();
            let _ = writeln!(out, "{name}: region{}: {}", printable(&region), printable(fault));
        }
        for system in guest.session.iter().flat_map(|session| &session.coverage.uncovered) {
            let line = format!("{} ({}): {}", system.mount_point, system.fs_type, system.reason);
            let _ = writeln!(out, "{name}: not watched: {}", printable(&line));
        }
    }
    out
}

fn guest_row(guest: &Guest) -> Vec<Cell> {
    let state = match guest.state {
        GuestState::Protected => match guest.mode.as_str() {
            "smart" => Cell::new("protected").fg(Color::Green),
            "off" => Cell::new("off").fg(Color::Red),
            mode => Cell::new(format!("protected ({})", printable(mode))).fg(Color::Green),
        },
        GuestState::Silent => Cell::new("silent").fg(Color::Yellow),
        GuestState::Unprotected => Cell::new("unprotected").fg(Color::Red),
        GuestState::NeverSeen => Cell::new("never seen"),
    };
    // What a driver said before it fell silent is not how things are.
    let session = guest.session.as_ref().filter(|_| guest.state == GuestState::Protected);
    let of_session = |text: Option<String>| Cell::new(text.unwrap_or_else(|| "-".into()));
    vec![
        Cell::new(printable(&guest.name)),
        state,
        Cell::new(printable(guest.group.as_deref().unwrap_or("-"))),
        Cell::new(printable(&guest.since)),
        of_session(session.map(|session| format!("{:?}", session.link).to_lowercase())),
        of_session(session.map(|session| printable(&session.driver.version))),
        of_session(session.map(|session| printable(&session.driver.kernel))),
        Cell::new(guest.requests),
        Cell::new(guest.verdicts.infected),
        of_session(session.map(|session| session.counters.unscanned.to_string())),
        of_session(session.map(|session| exposed(&session.counters))),
        of_session(session.map(|session| {
            let coverage = &session.coverage;
            format!(
                "{} of {}",
                coverage.covered,
                coverage.covered as usize + coverage.uncovered.len()
            )
        })),
    ]
}

/// Files that wait for their scan; with a plus where there are more than the driver can note.
fn exposed(counters: &DriverCounters) -> String {
    let more = if counters.mounts_exposed > 0 { "+" } else { "" };
    format!("{}{more}", counters.exposed)
}

pub fn events(events: &[Event]) -> String {
    if events.is_empty() {
        return "No events.\n".into();
    }
    let mut rows = table(&["TIME", "GUEST", "KIND", "WHAT"]);
    for event in events {
        let Parts { time, guest, kind, what } = parts(event);
        rows.add_row(vec![
            Cell::new(time),
            Cell::new(guest),
            kind_cell(event, &kind),
            Cell::new(what),
        ]);
    }
    text_of(rows, &[])
}

/// One event on a line of its own, for those that come one by one.
pub fn event_line(event: &Event, style: Style) -> String {
    let Parts { time, guest, kind, what } = parts(event);
    let kind = format!("{kind:18}");
    let kind = match weight(event) {
        Weight::Bad => style.bad(&kind),
        Weight::Doubtful => style.paint(33, &kind),
        Weight::Plain => kind,
    };
    format!("{time:24}  {guest:12}  {kind}  {what}")
}

/// How much an event should catch the eye.
enum Weight {
    Bad,
    Doubtful,
    Plain,
}

fn weight(event: &Event) -> Weight {
    match event.kind {
        EventKind::GuestUnprotected | EventKind::EngineFailed | EventKind::SignaturesRefused => {
            Weight::Bad
        }
        EventKind::Verdict if event.verdict == Some(Verdict::Infected) => Weight::Bad,
        EventKind::Mapped => Weight::Bad,
        EventKind::Unscanned
        | EventKind::ExposureGone
        | EventKind::MountExposed
        | EventKind::DatabaseSetAside => Weight::Doubtful,
        _ => Weight::Plain,
    }
}

struct Parts {
    time: String,
    guest: String,
    kind: String,
    what: String,
}

fn kind_cell(event: &Event, kind: &str) -> Cell {
    let cell = Cell::new(kind);
    match weight(event) {
        Weight::Bad => cell.fg(Color::Red),
        Weight::Doubtful => cell.fg(Color::Yellow),
        Weight::Plain => cell,
    }
}

fn parts(event: &Event) -> Parts {
    // The name that the event has in JSON.
    let kind = serde_json::to_value(event.kind).ok();
    let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or("unknown").replace('_', " ");
    Parts {
        time: printable(&event.time),
        guest: printable(event.guest.as_deref().unwrap_or("-")),
        kind,
        what: printable(&what(event)),
    }
}

/// How long an access was held.
fn held_for(microseconds: u64) -> String {
    match microseconds / 1000 {
        ms @ 0..1000 => format!("{ms} ms"),
        ms => format!("{:.1} s", std::time::Duration::from_millis(ms).as_secs_f64()),
    }
}

fn what(event: &Event) -> String {
    let mut words = Vec::new();
    if let Some(verdict) = event.verdict {
        words.push(verdict_word(verdict).to_owned());
    }
    if let Some(detection) = &event.detection {
        words.push(detection.clone());
        words.extend(event.member.as_ref().map(|member| format!("in {member}:")));
    }
    let is_about_engine = event.verdict.is_none() && event.detection.is_none();
    if let Some(engine) = event.engine.as_ref().filter(|_| is_about_engine) {
        words.push(format!("{engine}:"));
    }
    if let (Some(operation), Some(path)) = (&event.operation, &event.path) {
        words.push(match &event.decision {
            Some(decision) => format!("{decision} {operation} of {path}"),
            // Nobody waited, or the driver has not said what it did.
            None => format!("in a scan for {operation} of {path}"),
        });
    } else {
        words.extend(event.decision.clone());
        words.extend(event.path.clone());
    }
    if let Some(ticket) = &event.ticket {
        words.push(format!("(entry {ticket})"));
    } else if let (EventKind::Approved | EventKind::ApprovalRevoked, Some(hash)) =
        (event.kind, &event.hash)
    {
        words.push(hash.clone());
    }
    if let Some(process) = event.process.as_ref().filter(|process| !process.is_empty()) {
        words.push(format!("by {process}"));
    }
    match (event.pid, event.uid) {
        (Some(pid), Some(uid)) => words.push(format!("(pid {pid}, user {uid})")),
        (Some(pid), None) => words.push(format!("(pid {pid})")),
        (None, Some(uid)) => words.push(format!("(user {uid})")),
        (None, None) => {}
    }
    if let (EventKind::Unscanned, Some(held)) = (event.kind, event.duration_us) {
        words.push(format!("after {}", held_for(held)));
    }
    if let Some(occurred) = &event.occurred {
        words.push(format!("at {occurred}"));
    }
    let mut what = words.join(" ");
    if let Some(reason) = event.reason.as_ref().filter(|reason| !reason.is_empty()) {
        let gap = if what.is_empty() {
            ""
        } else if what.ends_with(':') {
            " "
        } else {
            ": "
        };
        let _ = write!(what, "{gap}{reason}");
    }
    if let (EventKind::Mapped, Some(more)) = (event.kind, event.count) {
        let _ = write!(what, " (and {more} more)");
    }
    if event.kind == EventKind::EventsDropped {
        let _ = write!(what, " ({} events)", event.count.unwrap_or(0));
    }
    what
}

fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Clean => "clean",
        Verdict::Infected => "infected",
        Verdict::Error => "error",
        Verdict::TimedOut => "timed out",
    }
}

pub fn scan(report: &ScanReport, style: Style) -> String {
    let mut out = String::new();
    let word = verdict_word(report.verdict);
    let word = match report.verdict {
        Verdict::Clean => style.good(word),
        _ => style.bad(word),
    };
    let _ = writeln!(out, "{}: {word}", printable(&report.name));
    for found in &report.detections {
        let family = found.family.as_ref().map(|family| format!(", family {family}"));
        let member = found.member.as_ref().map(|member| format!(" in {member}"));
        let line = format!(
            "{}{} (severity {}{}, engine {})",
            found.name,
            member.unwrap_or_default(),
            found.severity,
            family.unwrap_or_default(),
            found.engine
        );
        let _ = writeln!(out, "  {}", printable(&line));
    }
    if let Some(reason) = &report.reason {
        let _ = writeln!(out, "  {}", printable(reason));
    }
    for engine in report.engines.iter().filter(|_| !report.cached) {
        let _ = writeln!(out, "  {}", printable(&engine_line(engine)));
    }
    let known = if report.cached { ", known from an earlier scan" } else { "" };
    let _ = writeln!(
        out,
        "  {}, blake3 {}, {:.1} ms{known}",
        bytes(report.size),
        printable(&report.hash),
        std::time::Duration::from_micros(report.duration_us).as_secs_f64() * 1000.0
    );
    out
}

/// What one engine did with a content, in one line.
fn engine_line(report: &EngineReport) -> String {
    let mut line = format!(
        "{}: {} in {:.1} ms",
        report.engine,
        verdict_word(report.verdict),
        std::time::Duration::from_micros(report.scanned_us).as_secs_f64() * 1000.0
    );
    if let Some(entry) = &report.allowed {
        let _ = write!(line, ", known to be good by {entry}: no engine after it was asked");
    }
    if let Some(reason) = &report.reason {
        let _ = write!(line, ", {reason}");
    }
    line
}

pub fn reload(reload: &Reload) -> String {
    let mut out = String::new();
    if let Some(error) = &reload.config_error {
        let _ = writeln!(out, "The configuration is wrong; the running one stays.");
        for line in error.lines() {
            let _ = writeln!(out, "{}", printable(line));
        }
        return out;
    }
    let _ =
        writeln!(out, "The configuration was read again: guests, policy and alarm are as it says.");
    if !reload.restart_needed.is_empty() {
        let sections = reload.restart_needed.join(", ");
        let _ = writeln!(
            out,
            "Changes in {} count after a restart of the service.",
            printable(&sections)
        );
    }
    for engine in &reload.engines {
        let name = printable(&engine.engine);
        let _ = match (engine.taken, engine.rules) {
            (true, Some(rules)) => writeln!(out, "Engine {name}: {rules} rules are in use."),
            (true, None) => writeln!(out, "Engine {name}: its signatures were read again."),
            (false, _) => writeln!(
                out,
                "Engine {name}: the new signatures are refused; the last good set stays."
            ),
        };
        for found in &engine.diagnostics {
            let _ = writeln!(out, "  {}", printable(&signatures::line(found)));
        }
    }
    out
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    #[allow(clippy::cast_precision_loss)] // Shown with one decimal.
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn seconds(milliseconds: u64) -> f64 {
    std::time::Duration::from_millis(milliseconds).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_event_stays_one_harmless_line() {
        let mut event = Event::new(EventKind::Verdict).guest("g1");
        event.time = "2026-11-23T10:00:00.000Z".into();
        event.verdict = Some(Verdict::Infected);
        event.detection = Some("X\u{1b}]0;pwned\u{7}".into());
        event.operation = Some("open".into());
        event.decision = Some("deny".into());
        event.path = Some("/tmp/\u{202e}cod.exe\n2026 fake line".into());
        event.process = Some("sh\u{9b}31m".into());
        let line = event_line(&event, Style { colour: false });
        assert!(!line.chars().any(seawall_client::text::is_hostile), "{line:?}");
        assert_eq!(
            line,
            r"2026-11-23T10:00:00.000Z  g1            verdict             infected X\x1b]0;pwned\x07 deny open of /tmp/\u{202e}cod.exe\n2026 fake line by sh\u{9b}31m"
        );
        let table = events(&[event]);
        assert_eq!(table.lines().count(), 2, "{table}");
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
    }
}
