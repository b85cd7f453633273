//! Golden images.

use super::{table, text_of};
use seawall_client::text::printable;
use seawall_client::{GoldenList, GoldenReport};
use std::fmt::Write;
use std::path::PathBuf;

/// Files that are named.
const MOST_SHOWN: usize = 20;

pub fn report(report: &GoldenReport) -> String {
    let mut out = if report.lists.is_empty() {
        "No golden image was learned yet: `seawall golden learn GUEST` learns a template.\n".into()
    } else {
        let mut rows = table(&["NAME", "OF", "TENANT", "FILES", "LEARNED", "KNOWN", "SAMPLED"]);
        for list in &report.lists {
            rows.add_row([
                printable(&list.name),
                printable(&list.source),
                list.tenant.as_deref().map_or_else(|| "-".to_owned(), printable),
                list.files.to_string(),
                printable(&list.learned),
                list.known.to_string(),
                list.sampled.to_string(),
            ]);
        }
        text_of(rows, &["LEARNED", "TENANT", "OF"])
    };
    for one in &report.distrusted {
        let _ = writeln!(
            out,
            "{} is no clone of {}: {} was another on {}. No golden image is used for it; `seawall golden trust {}` \
             changes that.",
            printable(&one.guest),
            printable(&one.list),
            printable(&one.path),
            printable(&one.since),
            printable(&one.guest),
        );
    }
    out
}

pub fn learned(list: &GoldenList) -> String {
    format!(
        "{}: {} files of {} are known\n",
        printable(&list.name),
        list.files,
        printable(&list.source)
    )
}

pub fn left_out(infected: &[PathBuf], other: &[(PathBuf, String)]) -> String {
    let mut out = String::new();
    for path in infected.iter().take(MOST_SHOWN) {
        let _ = writeln!(out, "infected: {}", printable(&path.to_string_lossy()));
    }
    for (path, why) in other.iter().take(MOST_SHOWN) {
        let path = printable(&path.to_string_lossy());
        let _ = writeln!(out, "left out: {path}: {}", printable(why));
    }
    let more = infected.len().saturating_sub(MOST_SHOWN) + other.len().saturating_sub(MOST_SHOWN);
    if more > 0 {
        let _ = writeln!(out, "and {more} more");
    }
    out
}
