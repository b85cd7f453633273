//! What a rule's tags and metadata say of a detection.
//!
//! | word | from | meaning |
//! |---|---|---|
//! | severity | meta `severity`, a word or a number from 0 to 100 as `score`; a tag | low, medium, high or critical |
//! | `score` | meta, 0 to 100 | below 40 low, below 60 medium, below 90 high, else critical |
//! | family | meta `family`, `malware_family` or `malware` | the family's name |
//! | `cleaning` | meta | `delete`: nothing in the file is worth keeping; `cut`: the first match is the harmful part |
//!
//! Metadata goes before tags, `severity` before `score`. Without any of them a detection is of high severity.

use seawall_engine::{Cleaning, Detection, Diagnostic, Severity};
use yara_x::{MetaValue, Rule};

/// A detection by this rule; everything but where it matched.
pub fn detection(rule: &Rule<'_, '_>) -> Detection {
    let mut found = Detection::new(rule.identifier());
    let (mut named, mut scored, mut tagged) = (None, None, None);
    for (key, value) in rule.metadata() {
        match (key, value) {
            ("severity", value) => named = named.or_else(|| severity(&value)),
            ("score", MetaValue::Integer(score)) => scored = Some(of_score(score)),
            ("family" | "malware_family" | "malware", MetaValue::String(name)) => {
                found.family.get_or_insert_with(|| name.to_owned());
            }
            _ => {}
        }
    }
    for tag in rule.tags() {
        tagged = tagged.or_else(|| tag.identifier().parse::<Severity>().ok());
    }
    found.severity = named.or(scored).or(tagged).unwrap_or(found.severity);
    let first = rule.patterns().filter_map(|pattern| pattern.matches().next());
    let first = first.map(|found| found.range()).min_by_key(|range| range.start);
    found.offset = first.as_ref().map(|range| range.start as u64);
    found.cleaning = match cleaning(rule) {
        Some("delete") => Some(Cleaning::Delete),
        Some("cut") => first
            .map(|range| Cleaning::Cut { offset: range.start as u64, length: range.len() as u64 }),
        _ => None,
    };
    found
}

/// What a rule says in a way that nobody understands. Its author should know.
pub fn problems(rule: &Rule<'_, '_>) -> Vec<Diagnostic> {
    let name = rule.identifier();
    let mut found = Vec::new();
    for (key, value) in rule.metadata() {
        if key == "severity" && severity(&value).is_none() {
            let shown = match value {
                MetaValue::String(word) => word.to_owned(),
                other => format!("{other:?}"),
            };
            let reason = format!(
                "rule {name}: `{shown}` is no severity; use low, medium, high, critical or a number \
                 from 0 to 100"
            );
            found.push(Diagnostic::warning("yara-severity", reason));
        }
    }
    if let Some(word) = cleaning(rule).filter(|word| !matches!(*word, "delete" | "cut")) {
        let reason = format!("rule {name}: `{word}` is no cleaning; use delete or cut");
        found.push(Diagnostic::warning("yara-cleaning", reason));
    }
    found
}

fn cleaning<'r>(rule: &Rule<'_, 'r>) -> Option<&'r str> {
    rule.metadata().find_map(|(key, value)| match (key, value) {
        ("cleaning", MetaValue::String(word)) => Some(word),
        _ => None,
    })
}

fn severity(value: &MetaValue<'_>) -> Option<Severity> {
    match value {
        MetaValue::String(word) => word.parse().ok(),
        MetaValue::Integer(score @ 0..=100) => Some(of_score(*score)),
        _ => None,
    }
}

fn of_score(score: i64) -> Severity {
    match score {
        ..40 => Severity::Low,
        40..60 => Severity::Medium,
        60..90 => Severity::High,
        _ => Severity::Critical,
    }
}
