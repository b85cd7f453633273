//! The policy of guests.

use super::{Style, table, text_of};
use seawall_client::text::printable;
use seawall_client::{
    GuestPolicy, PolicyCheck, PolicyExplanation, PolicyFinding, PolicyGroup, PolicyOrigin,
};
use std::fmt::Write;

pub fn check(check: &PolicyCheck, style: Style) -> String {
    let mut out = String::new();
    for finding in &check.findings {
        out += &found(finding);
    }
    let _ = if check.right {
        let changes: Vec<_> = check.changes.iter().map(|guest| printable(guest)).collect();
        let changes = match changes.as_slice() {
            [] => "no guest's policy".to_owned(),
            guests => format!("the policy of {}", guests.join(", ")),
        };
        writeln!(out, "{}: `seawall reload` would change {changes}.", style.good("good"))
    } else {
        writeln!(out, "{}: a reload would take nothing of it.", style.bad("wrong"))
    };
    out
}

fn found(finding: &PolicyFinding) -> String {
    let PolicyFinding { level, code, file, line, column, message, help } = finding;
    let place = match (line, column) {
        (Some(line), Some(column)) => format!(":{line}:{column}"),
        _ => String::new(),
    };
    let text = format!("{file}{place}: {level}[{code}]: {message}");
    format!("{}\n  help: {}\n", printable(&text), printable(help))
}

pub fn show(policy: &GuestPolicy) -> String {
    let mut out = title(&policy.guest, policy.group.as_ref());
    let mut rows = table(&["SETTING", "VALUE", "FROM"]);
    for setting in &policy.settings {
        let value = match &setting.value {
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        rows.add_row([
            printable(&setting.name),
            printable(&value),
            printable(&from(setting.from.as_ref())),
        ]);
    }
    out += &text_of(rows, &[]);
    out
}

pub fn explain(explanation: &PolicyExplanation, style: Style) -> String {
    let PolicyExplanation { guest, group, path, exec, scanned, steps } = explanation;
    let mut out = title(guest, group.as_ref());
    let what = if *exec { "executed" } else { "opened" };
    let end = if *scanned { style.good("scanned") } else { style.bad("not scanned") };
    let _ = writeln!(out, "{}, when it is {what}: {end}", printable(path));
    for step in steps {
        let line = format!("{} ({}, {})", step.what, step.setting, from(step.from.as_ref()));
        let _ = writeln!(out, "  {}", printable(&line));
    }
    out
}

fn title(guest: &str, group: Option<&PolicyGroup>) -> String {
    let group = match group {
        Some(group) => format!("group {} ({})", group.name, from(Some(&group.from))),
        None => "no group".to_owned(),
    };
    format!("{}\n", printable(&format!("Guest {guest}, {group}")))
}

fn from(origin: Option<&PolicyOrigin>) -> String {
    origin.map_or("default".to_owned(), |origin| format!("{}:{}", origin.file, origin.line))
}
