//! Which rule it was that took so long.
//!
//! yara-x does not tell: its feature for that (rules-profiling) calls out of the compiled conditions for each
//! rule of each scan. So rules that can be slow at all are compiled once more, each by itself, when the set is
//! loaded; later there is no executable memory to be had. After a scan that was given up they are tried on that
//! content, one after the other, in the time that is left.
//!
//! A rule can be slow that has a loop in its condition, or a pattern that repeats with a wide range or without
//! end. All others take a time that is bounded by the content's length.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use yara_x::errors::ScanError;
use yara_x::{Rules, Scanner};
use yara_x_parser::ast::dfs::{DFSEvent, DFSIter};
use yara_x_parser::ast::{AST, Expr, HexSubPattern, HexToken, Item, Pattern, Rule, WithSpan};

/// Most rules that are compiled once more, in the order of the files; each takes memory.
const MOST: usize = 512;
/// A repetition up to so many bytes is fast.
const WIDE: u32 = 64;
/// What must be left for trying one more rule: yara-x counts whole seconds.
const LEAST: Duration = Duration::from_millis(1300);
/// From here on a rule is worth a word.
const SLOW: Duration = Duration::from_millis(100);
/// Most rules that are named.
const NAMED: usize = 3;

/// A rule that can be slow, compiled without the others.
pub struct Suspect {
    rule: String,
    /// The unit that it is in.
    file: String,
    rules: Rules,
}

/// The suspects of one unit, whose text is in its namespace in this order. `compile` gives nothing for a text
/// that has errors.
pub fn suspects(
    file: &str,
    text: &str,
    found: &mut Vec<Suspect>,
    compile: impl Fn(&str) -> Option<Rules>,
) {
    // Parsing is the dearest of it, and most files hold nothing of the kind.
    if found.len() >= MOST || !may_hold_one(text) {
        return;
    }
    let ast = AST::from(text);
    let parts = parts(text, &ast);
    for part in parts.values().filter(|part| can_be_slow(part.rule)) {
        if found.len() >= MOST {
            return;
        }
        if let Some(rules) = compile(&alone(part, &parts, &ast)) {
            let rule = part.rule.identifier.name.to_owned();
            found.push(Suspect { rule, file: file.to_owned(), rules });
        }
    }
}

/// True too often rather than too seldom.
fn may_hold_one(text: &str) -> bool {
    let loops = text.contains("for ") && text.contains(" in ");
    let regexps = text.lines().any(|line| {
        let value = line.split_once('=').map_or("", |(_, value)| value.trim_start());
        value.starts_with('/') && value.contains(['*', '+', '{'])
    });
    let jumps = text.split('[').skip(1).any(|rest| {
        let range = rest.split(']').next().unwrap_or_default();
        range.contains('-') && range.len() < 16
    });
    loops || regexps || jumps
}

/// A rule with the text that is its own.
struct Part<'t> {
    rule: &'t Rule<'t>,
    text: &'t str,
}

/// All rules by name. A rule's text goes from the end of the last one to its own last brace.
fn parts<'t>(text: &'t str, ast: &'t AST<'t>) -> BTreeMap<&'t str, Part<'t>> {
    let mut parts = BTreeMap::new();
    let mut from = 0;
    for item in ast.items() {
        let Item::Rule(rule) = item else {
            continue;
        };
        let end = closing_brace(text.as_bytes(), rule.condition.span().end());
        if let Some(own) = text.get(from..end) {
            parts.insert(rule.identifier.name, Part { rule, text: own });
        }
        from = end.max(from);
    }
    parts
}

/// Behind the next brace that is in no comment.
fn closing_brace(bytes: &[u8], mut at: usize) -> usize {
    let past = |end: &[u8], at: usize| {
        let found = bytes[at..].windows(end.len()).position(|window| window == end);
        found.map_or(bytes.len(), |found| at + found + end.len())
    };
    while at < bytes.len() {
        match &bytes[at..] {
            [b'}', ..] => return at + 1,
            [b'/', b'/', ..] => at = past(b"\n", at),
            [b'/', b'*', ..] => at = past(b"*/", at + 2),
            _ => at += 1,
        }
    }
    bytes.len()
}

/// A text with this rule, those that it asks for, and the modules.
fn alone(part: &Part<'_>, parts: &BTreeMap<&str, Part<'_>>, ast: &AST<'_>) -> String {
    let mut needed = BTreeSet::from([part.rule.identifier.name]);
    let mut left = vec![part];
    while let Some(part) = left.pop() {
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        for word in part.text.split(|c| !is_part(c)) {
            if let Some((name, asked)) = parts.get_key_value(word)
                && needed.insert(*name)
            {
                left.push(asked);
            }
        }
    }
    let mut text = String::new();
    for item in ast.items() {
        match item {
            Item::Import(import) => text += &format!("import \"{}\"\n", import.module_name),
            Item::Rule(rule) if needed.contains(rule.identifier.name) => {
                text += parts.get(rule.identifier.name).map_or("", |part| part.text);
            }
            _ => {}
        }
    }
    text
}

fn can_be_slow(rule: &Rule<'_>) -> bool {
    let loops =
        DFSIter::new(&rule.condition).any(|event| matches!(event, DFSEvent::Enter(Expr::ForIn(_))));
    loops || rule.patterns.iter().flatten().any(repeats)
}

fn repeats(pattern: &Pattern<'_>) -> bool {
    match pattern {
        Pattern::Text(_) => false,
        Pattern::Hex(hex) => jumps(&hex.sub_patterns),
        Pattern::Regexp(regexp) => {
            let text = regexp.regexp.src;
            // Within one another they multiply.
            let all = text
                .split('{')
                .skip(1)
                .try_fold(1_u32, |all, range| Some(all.saturating_mul(most(range)?.max(1))));
            text.contains(['*', '+']) || all.is_none_or(|all| all > WIDE)
        }
    }
}

/// How often what stands before a brace is repeated at most: `1,100}`. None: without end, `3,}`.
fn most(text: &str) -> Option<u32> {
    let (range, _) = text.split_once('}')?;
    range.split(',').next_back()?.trim().parse().ok()
}

fn jumps(hex: &HexSubPattern) -> bool {
    hex.iter().any(|token| match token {
        HexToken::Jump(jump) => {
            jump.end.is_none_or(|end| end.saturating_sub(jump.start.unwrap_or(0)) > WIDE)
        }
        HexToken::Alternative(either) => either.alternatives.iter().any(jumps),
        HexToken::Byte(_) | HexToken::NotByte(_) => false,
    })
}

/// How long one rule took.
struct Time<'s> {
    suspect: &'s Suspect,
    took: Duration,
    ended: bool,
}

/// Tries the suspects on content whose scan was given up, as long as there is time, and names those that take
/// long. None when none of them does.
pub fn name(
    suspects: &[Suspect],
    content: &[u8],
    left: impl Fn() -> Duration,
    prepare: impl Fn(&mut Scanner<'_>),
) -> Option<String> {
    let mut times = Vec::new();
    let mut tried = 0;
    for suspect in suspects {
        let left = left();
        if left < LEAST {
            break;
        }
        let mut scanner = Scanner::new(&suspect.rules);
        scanner.fast_scan(true);
        prepare(&mut scanner);
        // Ends it after one to two seconds, or within the one that is left.
        scanner.set_timeout(Duration::from_secs(if left > LEAST * 2 { 2 } else { 1 }));
        let since = Instant::now();
        let ended = !matches!(scanner.scan(content), Err(ScanError::Timeout));
        let took = since.elapsed();
        tried += 1;
        if took >= SLOW {
            times.push(Time { suspect, took, ended });
        }
    }
    times.sort_by_key(|time| (time.ended, std::cmp::Reverse(time.took)));
    let named: Vec<_> = times.iter().take(NAMED).map(describe).collect();
    let rest = suspects.len() - tried;
    let untried = if rest > 0 { format!(" ({rest} others were not tried)") } else { String::new() };
    (!named.is_empty()).then(|| format!("slowest: {}{untried}", named.join(", ")))
}

fn describe(time: &Time<'_>) -> String {
    let Suspect { rule, file, .. } = time.suspect;
    let more = if time.ended { "" } else { "more than " };
    format!("rule {rule} ({file}) {more}{:.1} s", time.took.as_secs_f64())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        let mut all = Vec::new();
        suspects("a.yar", text, &mut all, |text| yara_x::compile(text).ok());
        all.into_iter().map(|one| one.rule).collect()
    }

    #[test]
    fn rules_with_loops_and_wide_patterns_are_suspect_and_no_others() {
        let text = r#"
            rule plain { strings: $a = "for all i in (0..9)" condition: $a }
            rule looping { condition: for all i in (0..filesize) : (uint8(i) == 0) }
            rule endless { strings: $a = /ab.*cd/ condition: $a }
            rule broad { strings: $a = /ab.{1,100}cd/ condition: $a } // }
            rule open { strings: $a = /ab.{1,}cd/ condition: $a }
            rule narrow { strings: $a = /ab[a-z]{1,10}cd{3}/ condition: $a }
            rule hex { strings: $a = { 41 42 [1-] 43 44 } condition: $a }
            rule jump { strings: $a = { 41 42 [1-4] 43 44 } condition: $a }"#;
        assert_eq!(found(text), ["broad", "endless", "hex", "looping", "open"]);
    }

    #[test]
    fn a_suspect_is_compiled_with_what_it_asks_for() {
        let text = r#"import "math"
            rule helper { condition: filesize > 3 } // a brace in a comment }
            rule group_a { condition: helper /* and here } */ }
            rule other { strings: $x = "x" condition: $x }
            rule top { condition: group_a and for any i in (0..math.abs(3)) : (i == 2) }"#;
        let mut all = Vec::new();
        suspects("a.yar", text, &mut all, |text| yara_x::compile(text).ok());
        let names: Vec<_> = all[0].rules.iter().map(|rule| rule.identifier().to_owned()).collect();
        assert_eq!(
            (all.len(), names),
            (1, ["helper", "group_a", "top"].map(str::to_owned).to_vec())
        );
    }
}
