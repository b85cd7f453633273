//! The lines of the lists: what each format says, and what is wrong with a line.
//!
//! | name ends in | a line |
//! |---|---|
//! | `.md5` `.sha1` `.sha256` | a digest of that kind, then optionally white space or a comma and a name |
//! | `.txt` | the same, of any kind: the number of hex digits tells which |
//! | `.hdb` `.hsb` `.fp` `.sfp` | ClamAV's `digest:size:name`, optionally `:least level` and `:most level`; with the size `*` the least level is there and 73 or more |
//! | `.csv` | comma-separated cells; the first line names the columns `md5`, `sha1`, `sha256` (at least one of them; `_hash` may follow), `name`, `family`, `severity`; others are ignored |
//!
//! In all of them a line that is empty or begins with `#` says nothing, white space around a line
//! does not count, and a line has at most [`LONGEST_LINE`] bytes. A CSV record is one line: a quote
//! that was forgotten then spoils its own line and not the rest of the file. ClamAV's levels are
//! checked to be numbers and not compared with anything. A name has at most [`LONGEST_TEXT`] bytes,
//! of a longer one the beginning is kept.

use seawall_engine::{Level, Severity};

use crate::digest::{Digest, Kind, NoDigest};

/// Longest line, in bytes without its end.
pub const LONGEST_LINE: usize = 4096;
/// Longest name or family, in bytes: what a record's one byte can count.
pub const LONGEST_TEXT: usize = u8::MAX as usize;
/// ClamAV's first functionality level that knows entries of any size (its signature manual, "Hash
/// signatures with unknown size").
const ANY_SIZE_LEVEL: u32 = 73;

/// How the lines of a file are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A digest, and perhaps a name. With a kind, digests of others are wrong.
    Plain(Option<Kind>),
    /// ClamAV's hash signatures.
    Clam,
    /// Comma-separated, with a header.
    Csv,
}

/// One digest of a list, and what is said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Digest of the content.
    pub digest: Digest,
    /// Size of the content in bytes; None = any.
    pub size: Option<u64>,
    /// Name, empty when there is none.
    pub name: String,
    /// Malware family, empty when there is none.
    pub family: String,
    /// How bad it is.
    pub severity: Severity,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// An error where an entry is missing for it.
    pub level: Level,
    /// Bytes of the line before it.
    pub at: usize,
    /// For people.
    pub reason: String,
}

impl Wrong {
    fn error(at: usize, reason: impl Into<String>) -> Self {
        Self { level: Level::Error, at, reason: reason.into() }
    }
}

/// Reads one file's lines, one after the other.
pub struct Parser {
    format: Format,
    csv: Csv,
}

impl Parser {
    /// For a file of this format.
    pub fn new(format: Format) -> Self {
        Self { format, csv: Csv::new() }
    }

    /// Reads one line, without its end, and adds what it says to `found` and what is wrong with it
    /// to `wrong`.
    pub fn line(&mut self, line: &[u8], found: &mut Vec<Entry>, wrong: &mut Vec<Wrong>) {
        let at = line.len() - line.trim_ascii_start().len();
        let words = line.trim_ascii();
        if words.is_empty() || words.starts_with(b"#") {
            return;
        }
        let parsed = match self.format {
            Format::Plain(kind) => plain(words, kind).map(|entry| found.push(entry)),
            Format::Clam => clam(words).map(|entry| found.push(entry)),
            Format::Csv => self.csv.line(words, at, found, wrong),
        };
        if let Err(one) = parsed {
            wrong.push(Wrong { at: one.at + at, ..one });
        }
    }

    /// Whether further lines cannot say anything.
    pub fn is_over(&self) -> bool {
        matches!(self.csv.header, Header::Useless)
    }
}

fn plain(words: &[u8], kind: Option<Kind>) -> Result<Entry, Wrong> {
    let end = words.iter().position(|byte| byte.is_ascii_whitespace() || *byte == b',');
    let (word, rest) = words.split_at(end.unwrap_or(words.len()));
    let digest = digest(word, 0)?;
    if let Some(kind) = kind
        && kind != digest.kind()
    {
        let reason = format!(
            "a digest of {} in a list of {}, as the file's name says; move it to a list of its own",
            digest.kind(),
            kind
        );
        return Err(Wrong::error(0, reason));
    }
    let rest = rest.trim_ascii_start();
    let rest = rest.strip_prefix(b",").unwrap_or(rest).trim_ascii_start();
    // sha256sum's mark of a file read as binary.
    let name = rest.strip_prefix(b"*").unwrap_or(rest);
    let name = if name.starts_with(b"#") { &[] } else { name };
    Ok(entry(digest, name))
}

fn clam(words: &[u8]) -> Result<Entry, Wrong> {
    let mut fields = Vec::with_capacity(5);
    let mut at = 0;
    for field in words.split(|byte| *byte == b':') {
        fields.push((at, field));
        at += field.len() + 1;
    }
    let (digest_word, size, name, levels) = match fields.as_slice() {
        [(_, digest), size, (_, name), levels @ ..] if levels.len() <= 2 => {
            (*digest, *size, *name, levels)
        }
        _ => {
            let reason = "not digest:size:name, which two levels may follow; correct or remove it";
            return Err(Wrong::error(fields.get(5).map_or(0, |(at, _)| *at), reason));
        }
    };
    let digest = digest(digest_word, 0)?;
    let mut numbers = [0, u32::MAX];
    for ((at, level), number) in levels.iter().zip(&mut numbers) {
        *number = parsed(level).ok_or_else(|| Wrong::error(*at, "a level is a number"))?;
    }
    let (size_at, size) = size;
    let size = if size == b"*" {
        if numbers[0] < ANY_SIZE_LEVEL {
            let reason = "an entry of any size (`*`) ends in the level :73 or a higher one";
            return Err(Wrong::error(size_at, reason));
        }
        None
    } else {
        let wrong = || Wrong::error(size_at, "a size is a number of bytes, or `*` for any");
        // The largest number stands for any size in the compiled form.
        Some(parsed(size).filter(|size| *size != u64::MAX).ok_or_else(wrong)?)
    };
    Ok(Entry { size, ..entry(digest, name) })
}

/// A number of ASCII digits and nothing else.
fn parsed<T: std::str::FromStr>(word: &[u8]) -> Option<T> {
    let digits = !word.is_empty() && word.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(word).ok().filter(|_| digits)?.parse().ok()
}

/// The digest that a word is; `at` = where it stands.
fn digest(word: &[u8], at: usize) -> Result<Digest, Wrong> {
    Digest::from_hex(word).map_err(|error| {
        let within = if let NoDigest::Digit { at } = error { at } else { 0 };
        Wrong::error(at + within, error.to_string())
    })
}

fn entry(digest: Digest, name: &[u8]) -> Entry {
    Entry {
        digest,
        size: None,
        name: readable(name.trim_ascii()),
        family: String::new(),
        severity: Severity::High,
    }
}

/// Text for reports and logs: valid, without control characters, at most [`LONGEST_TEXT`] bytes.
pub fn readable(bytes: &[u8]) -> String {
    // Nearly all are.
    let plain = |bytes: &[u8]| bytes.iter().all(|byte| matches!(byte, b' '..=b'~'));
    if bytes.len() <= LONGEST_TEXT
        && plain(bytes)
        && let Ok(text) = str::from_utf8(bytes)
    {
        return text.to_owned();
    }
    let mut text = String::from_utf8_lossy(bytes).into_owned();
    if text.contains(char::is_control) {
        text = text.replace(char::is_control, "\u{fffd}");
    }
    text.truncate(text.floor_char_boundary(LONGEST_TEXT));
    text
}

/// What the header of a CSV file said.
enum Header {
    /// Not yet seen.
    Missing,
    /// Where the columns are.
    Known(Columns),
    /// No column holds digests.
    Useless,
}

/// Numbers of columns, from 0.
struct Columns {
    digests: [Option<usize>; 3],
    name: Option<usize>,
    family: Option<usize>,
    severity: Option<usize>,
}

/// Reads CSV lines.
struct Csv {
    reader: csv_core::Reader,
    header: Header,
    /// The cells of the line at hand, without quotes, one after the other.
    text: Vec<u8>,
    /// For each cell, where it stands in the line, and in `text`.
    cells: Vec<(usize, std::ops::Range<usize>)>,
}

impl Csv {
    fn new() -> Self {
        let (text, cells) = (Vec::new(), Vec::new());
        Self { reader: csv_core::Reader::new(), header: Header::Missing, text, cells }
    }

    /// Reads a line that begins `shift` bytes after the file's own. The error's place does not
    /// count them, those added to `wrong` do.
    fn line(
        &mut self,
        words: &[u8],
        shift: usize,
        found: &mut Vec<Entry>,
        wrong: &mut Vec<Wrong>,
    ) -> Result<(), Wrong> {
        if words.iter().filter(|byte| **byte == b'"').count() % 2 == 1 {
            let at = words.iter().rposition(|byte| *byte == b'"').unwrap_or_default();
            return Err(Wrong::error(at, "a quote that is not closed on its line"));
        }
        self.split(words);
        match &self.header {
            Header::Useless => Ok(()),
            Header::Missing => self.read_header(),
            Header::Known(columns) => self.record(columns, words, shift, found, wrong),
        }
    }

    /// Splits a line into cells.
    fn split(&mut self, words: &[u8]) {
        self.reader.reset();
        self.cells.clear();
        // A cell is never longer than what it is written as.
        self.text.resize(words.len() + 1, 0);
        let (mut at, mut end) = (0, 0);
        // Without more input the reader takes the record for ended.
        loop {
            let begin = at;
            let start = end;
            let ended = loop {
                let (result, read, written) =
                    self.reader.read_field(&words[at..], &mut self.text[end..]);
                at += read;
                end += written;
                match result {
                    csv_core::ReadFieldResult::InputEmpty => {}
                    csv_core::ReadFieldResult::Field { record_end } => break record_end,
                    csv_core::ReadFieldResult::OutputFull | csv_core::ReadFieldResult::End => {
                        return;
                    }
                }
            };
            self.cells.push((begin, start..end));
            if ended {
                return;
            }
        }
    }

    fn read_header(&mut self) -> Result<(), Wrong> {
        let names: Vec<String> = self
            .cells
            .iter()
            .map(|(_, cell)| readable(bare(&self.text[cell.clone()]).1).to_ascii_lowercase())
            .collect();
        let column = |wanted: &str| names.iter().position(|name| name == wanted);
        let digests = Kind::ALL.map(|kind| {
            let name = kind.to_string().to_ascii_lowercase();
            column(&name).or_else(|| column(&format!("{name}_hash")))
        });
        if digests == [None; 3] {
            self.header = Header::Useless;
            let reason = "the first line names no column md5, sha1 or sha256; add a header";
            return Err(Wrong::error(0, reason));
        }
        self.header = Header::Known(Columns {
            digests,
            name: column("name"),
            family: column("family"),
            severity: column("severity"),
        });
        Ok(())
    }

    fn record(
        &self,
        columns: &Columns,
        words: &[u8],
        shift: usize,
        found: &mut Vec<Entry>,
        wrong: &mut Vec<Wrong>,
    ) -> Result<(), Wrong> {
        // The cell without white space around it, and where in the line it begins.
        let cell = |column: Option<usize>| {
            let (at, place) = self.cells.get(column?)?;
            let text = &self.text[place.clone()];
            let quote = usize::from(words.get(*at) == Some(&b'"'));
            let (before, text) = bare(text);
            Some((at + quote + before, text)).filter(|(_, text)| !text.is_empty())
        };
        let text = |column| cell(column).map_or_else(String::new, |(_, text)| readable(text));
        let severity = match cell(columns.severity) {
            None => Severity::High,
            Some((at, word)) => readable(word).parse().unwrap_or_else(|error| {
                let reason = format!("{error}; taken as high");
                wrong.push(Wrong { level: Level::Warning, at: at + shift, reason });
                Severity::High
            }),
        };
        let mut any = false;
        for (kind, column) in Kind::ALL.into_iter().zip(columns.digests) {
            let Some((at, word)) = cell(column) else { continue };
            any = true;
            let digest = match digest(word, at) {
                Ok(digest) if digest.kind() == kind => digest,
                Ok(digest) => {
                    let reason = format!("a digest of {} in the column of {kind}", digest.kind());
                    wrong.push(Wrong::error(at + shift, reason));
                    continue;
                }
                Err(one) => {
                    wrong.push(Wrong { at: one.at + shift, ..one });
                    continue;
                }
            };
            let (name, family) = (text(columns.name), text(columns.family));
            found.push(Entry { digest, size: None, name, family, severity });
        }
        if any { Ok(()) } else { Err(Wrong::error(0, "a record without a digest")) }
    }
}

/// A cell without white space around it, nor the quotes that stand after white space, which are none
/// to the CSV reader; and how many bytes that takes from its front.
fn bare(cell: &[u8]) -> (usize, &[u8]) {
    let blank = cell.len() - cell.trim_ascii_start().len();
    let cell = cell.trim_ascii();
    match cell {
        [b'"', inner @ .., b'"'] => (blank + 1, inner),
        _ => (blank, cell),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MD5: &str = "900150983cd24fb0d6963f7d28e17f72";
    const SHA1: &str = "a9993e364706816aba3e25717850c26c9cd0d89d";
    const SHA256: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn read(format: Format, lines: &[&str]) -> (Vec<Entry>, Vec<Wrong>) {
        let (mut found, mut wrong) = (Vec::new(), Vec::new());
        let mut parser = Parser::new(format);
        lines.iter().for_each(|line| parser.line(line.as_bytes(), &mut found, &mut wrong));
        (found, wrong)
    }

    fn good(format: Format, line: &str) -> Entry {
        let (found, wrong) = read(format, &[line]);
        assert_eq!((found.len(), wrong.as_slice()), (1, &[][..]), "{line}");
        found[0].clone()
    }

    /// Place and reason of the one thing that is wrong.
    fn bad(format: Format, line: &str) -> (usize, String) {
        let (found, wrong) = read(format, &[line]);
        assert_eq!((found.len(), wrong.len()), (0, 1), "{line}");
        (wrong[0].at, wrong[0].reason.clone())
    }

    #[test]
    fn plain_lines() {
        for (line, name) in [
            (MD5.to_owned(), ""),
            (format!("  {MD5}\t\r"), ""),
            (format!("{MD5}  Evil.A"), "Evil.A"),
            (format!("{MD5} *a file.exe"), "a file.exe"),
            (format!("{MD5},Evil, B"), "Evil, B"),
            (format!("{MD5} , Evil"), "Evil"),
            (format!("{MD5} # seen in May"), ""),
            (format!("{MD5} bad\u{7}bell"), "bad\u{fffd}bell"),
        ] {
            let entry = good(Format::Plain(None), &line);
            assert_eq!((entry.name.as_str(), entry.size), (name, None), "{line}");
            assert_eq!(entry.digest.to_string(), MD5);
            assert_eq!(good(Format::Plain(Some(Kind::Md5)), &line), entry);
        }
        assert_eq!(read(Format::Plain(None), &["", "  ", "# x", "  # y"]).0, []);
        assert_eq!(good(Format::Plain(None), SHA1).digest.kind(), Kind::Sha1);
        assert_eq!(good(Format::Plain(None), SHA256).digest.kind(), Kind::Sha256);
        assert_eq!(bad(Format::Plain(Some(Kind::Md5)), SHA1).0, 0);
        assert_eq!(bad(Format::Plain(None), "  12x4").0, 4);
        assert_eq!(bad(Format::Plain(None), &MD5[1..]).0, 0);
    }

    #[test]
    fn a_long_name_keeps_its_beginning() {
        let entry = good(Format::Plain(None), &format!("{MD5} {}", "é".repeat(200)));
        assert_eq!(entry.name, "é".repeat(127));
    }

    #[test]
    fn clam_lines() {
        for (line, size) in [
            (format!("{MD5}:3:Evil"), Some(3)),
            (format!("{SHA1}:3:Evil:73"), Some(3)),
            (format!("{SHA256}:*:Evil:73"), None),
            (format!("{SHA256}:*:Evil:90:120"), None),
        ] {
            let entry = good(Format::Clam, &line);
            assert_eq!((entry.name.as_str(), entry.size), ("Evil", size), "{line}");
        }
        for (line, at) in [
            (format!("{MD5}:3"), 0),
            (MD5.to_owned(), 0),
            (format!("{MD5}:*:Evil"), 33),
            (format!("{MD5}:*:Evil:72"), 33),
            (format!("{MD5}:x:Evil"), 33),
            (format!("{MD5}:+3:Evil"), 33),
            (format!("{MD5}:-1:Evil"), 33),
            (format!("{MD5}::Evil"), 33),
            (format!("{MD5}:18446744073709551615:Evil"), 33),
            (format!("{MD5}:99999999999999999999:Evil"), 33),
            (format!("{MD5}:3:Evil:x"), 40),
            (format!("{MD5}:3:Evil:73:"), 43),
            (format!("{MD5}:3:Evil:1:2:3"), 44),
            ("12:3:Evil".to_owned(), 0),
        ] {
            assert_eq!(bad(Format::Clam, &line).0, at, "{line}");
        }
    }

    #[test]
    fn csv_lines() {
        let header = "# comment\n SHA256_hash, \"Name\",md5,other,family,severity";
        let mut lines: Vec<&str> = header.lines().collect();
        let both = format!("{SHA256},\"Evil, \"\"A\"\"\",{MD5},x,fam,low");
        let one = format!("\"{SHA256}\",,,");
        lines.extend([both.as_str(), &one]);
        let (found, wrong) = read(Format::Csv, &lines);
        assert_eq!(wrong, []);
        let said: Vec<_> = found
            .iter()
            .map(|one| {
                (one.digest.to_string(), one.name.as_str(), one.family.as_str(), one.severity)
            })
            .collect();
        assert_eq!(
            said,
            [
                (MD5.to_owned(), "Evil, \"A\"", "fam", Severity::Low),
                (SHA256.to_owned(), "Evil, \"A\"", "fam", Severity::Low),
                (SHA256.to_owned(), "", "", Severity::High),
            ]
        );
    }

    #[test]
    fn what_is_wrong_in_csv_is_placed() {
        let header = "name,md5,sha1,severity";
        for (line, at, entries) in [
            (" a,,,", 1, 0),
            ("a,\"12x4\",", 5, 0),
            ("a,  12x4,", 6, 0),
            ("a,\"123,", 2, 0),
            (&format!("a,{SHA1},{SHA1},high"), 2, 1),
            (&format!("a,{MD5},,awful"), 36, 1),
            (&format!("  \"a\",{MD5},,awful"), 40, 1),
        ] {
            let (found, wrong) = read(Format::Csv, &[header, line]);
            assert_eq!(wrong.iter().map(|one| one.at).collect::<Vec<_>>(), [at], "{line}");
            assert_eq!(found.len(), entries, "{line}");
        }
        let mut parser = Parser::new(Format::Csv);
        let (mut found, mut wrong) = (Vec::new(), Vec::new());
        parser.line(b"name,hash", &mut found, &mut wrong);
        assert!(parser.is_over() && wrong.len() == 1);
        parser.line(MD5.as_bytes(), &mut found, &mut wrong);
        assert_eq!((found.len(), wrong.len()), (0, 1), "told once");
    }
}
