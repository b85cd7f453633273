//! Scans of guests.

use super::{Style, bytes, table, text_of};
use seawall_client::text::printable;
use seawall_client::{GuestScan, GuestScanState, ScheduleReport};
use std::fmt::Write;

/// Files that are shown; --json has more.
const MOST_SHOWN: usize = 50;

pub fn list(scans: &[GuestScan], style: Style) -> String {
    if scans.is_empty() {
        return "No guest was scanned yet: `seawall scan GUEST` has all its files scanned.\n"
            .into();
    }
    let mut rows = table(&[
        "SCAN",
        "GUEST",
        "STATE",
        "WHAT",
        "ASKED",
        "FILES",
        "DONE",
        "INFECTED",
        "NO VERDICT",
    ]);
    for scan in scans {
        let done = match (scan.expected, scan.state) {
            (_, GuestScanState::Done) => "100 %".to_owned(),
            (0, _) => "-".to_owned(),
            (expected, _) => format!("{} %", (scan.files * 100 / expected).min(99)),
        };
        let infected = scan.infected.to_string();
        rows.add_row([
            scan.id.to_string(),
            printable(&scan.guest),
            scan.state.word().to_owned(),
            printable(&what(scan)),
            printable(&scan.asked),
            scan.files.to_string(),
            done,
            if scan.infected > 0 { style.bad(&infected) } else { infected },
            (scan.missed + scan.errors).to_string(),
        ]);
    }
    let mut out = text_of(rows, &["ASKED", "WHAT", "NO VERDICT"]);
    for scan in scans.iter().filter(|scan| !scan.reason.is_empty() && !scan.state.has_ended()) {
        let _ = writeln!(out, "{}: {}", scan.id, printable(&scan.reason));
    }
    out
}

fn what(scan: &GuestScan) -> String {
    let all = if scan.paths.is_empty() { "everything".to_owned() } else { scan.paths.join(", ") };
    if scan.quick { format!("{all} (quick)") } else { all }
}

/// How far they are, in one line.
pub fn line(scans: &[GuestScan]) -> String {
    let sum = |of: fn(&GuestScan) -> u64| scans.iter().map(of).sum::<u64>();
    let (files, infected) = (sum(|scan| scan.files), sum(|scan| scan.infected));
    let rate: f64 = scans
        .iter()
        .filter(|scan| scan.state == GuestScanState::Running)
        .map(GuestScan::files_per_second)
        .sum();
    let left = scans.iter().filter_map(GuestScan::left_seconds).max();
    let left = left.map_or(String::new(), |left| format!(", about {left} s left"));
    let why = scans.iter().find(|scan| !scan.reason.is_empty());
    let why = why.map_or(String::new(), |scan| format!(" ({})", scan.reason));
    // Braces are the progress bar's.
    let why = printable(&why).replace(['{', '}'], "");
    format!("{files} files, {infected} infected, {rate:.0} files/s{left}{why}")
}

pub fn show(scan: &GuestScan, style: Style) -> String {
    let mut out = String::new();
    let state = scan.state.word();
    let state = match scan.state {
        GuestScanState::Done => style.good(state),
        GuestScanState::Failed => style.bad(state),
        _ => state.to_owned(),
    };
    let reason = if scan.reason.is_empty() { String::new() } else { format!(", {}", scan.reason) };
    let _ = writeln!(
        out,
        "Scan {} of guest {}, {}: {state}{}",
        scan.id,
        printable(&scan.guest),
        printable(&what(scan)),
        printable(&reason)
    );
    let expected =
        if scan.expected > 0 { format!(" of about {}", scan.expected) } else { String::new() };
    let _ = writeln!(
        out,
        "{} files{expected} in {:.1} s, {:.0} files/s; {} sent, {} known to be clean, {} excluded",
        scan.files,
        scan.took_ms as f64 / 1000.0,
        scan.files_per_second(),
        bytes(scan.bytes),
        scan.known,
        scan.excluded
    );
    let infected = format!("{} infected", scan.infected);
    let _ = writeln!(
        out,
        "{}, {} left out, {} without a verdict",
        if scan.infected > 0 { style.bad(&infected) } else { infected },
        scan.missed,
        scan.errors
    );
    if !scan.found.is_empty() {
        let mut rows = table(&["INFECTED", "DETECTION", "SEVERITY", "ENGINE", "ACTION"]);
        for found in scan.found.iter().take(MOST_SHOWN) {
            rows.add_row([
                printable(&match &found.member {
                    Some(member) => format!("{}!/{member}", found.path),
                    None => found.path.clone(),
                }),
                printable(&found.detection),
                printable(&found.severity),
                printable(&found.engine),
                printable(&found.action),
            ]);
        }
        out += &text_of(rows, &["ENGINE", "SEVERITY"]);
        more(&mut out, scan.found.len());
    }
    for left in scan.left_out.iter().take(MOST_SHOWN) {
        let line = format!("left out: {}: {}", left.path, left.reason);
        let _ = writeln!(out, "{}", printable(&line));
    }
    more(&mut out, scan.left_out.len());
    out
}

fn more(out: &mut String, count: usize) {
    if let Some(more @ 1..) = count.checked_sub(MOST_SHOWN) {
        let _ = writeln!(out, "and {more} more: --json has all that are named");
    }
}

pub fn schedules(schedules: &[ScheduleReport]) -> String {
    if schedules.is_empty() {
        return "There is no schedule: add a [[schedule]] section to the service's configuration.\n".into();
    }
    let mut rows = table(&["SCHEDULE", "TIMES", "NEXT", "LAST", "GUESTS", "WHAT", "WINDOW"]);
    for one in schedules {
        let next = one.next.as_deref().unwrap_or("never");
        let next = if one.skip { format!("{next} (one left out)") } else { next.to_owned() };
        let guests = match one.guests.len() {
            0..=3 => one.guests.join(", "),
            many => format!("{many} guests"),
        };
        let minutes = |minutes: u32| match minutes {
            0 => "-".to_owned(),
            minutes => format!("{minutes} min"),
        };
        rows.add_row([
            printable(&one.name),
            printable(&one.cron),
            printable(&next),
            printable(one.last.as_deref().unwrap_or("-")),
            if guests.is_empty() { "none".to_owned() } else { printable(&guests) },
            if one.quick { "quick".to_owned() } else { "everything".to_owned() },
            minutes(one.window_minutes),
        ]);
    }
    text_of(rows, &["WINDOW", "LAST", "WHAT"])
}
