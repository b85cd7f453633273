//! What an operator is told about a wrong configuration: file, line, column, a stable code, the
//! line itself, and what to do.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error(
        "{}: error[E-READ]: the configuration cannot be read: {reason}\n  help: name an existing, \
         readable file with --config",
        path.display()
    )]
    Unreadable { path: PathBuf, reason: io::Error },
    /// The file is not a valid configuration.
    #[error(transparent)]
    Invalid(Box<Found>),
    /// So are files of groups: all that was found.
    #[error("{}", all(found))]
    Groups { found: Vec<Found> },
}

fn all(found: &[Found]) -> String {
    found.iter().map(Found::to_string).collect::<Vec<_>>().join("\n\n")
}

/// What is wrong with a file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub path: PathBuf,
    /// Where in the file; None where the whole file is meant.
    pub place: Option<Place>,
    /// Begins with `E-` where the file is not used for it, else with `W-`.
    pub code: &'static str,
    pub message: String,
}

/// A place in a file. Lines and columns count from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub line: usize,
    pub column: usize,
    /// Characters to underline.
    width: usize,
    /// The whole line.
    source: String,
}

impl Place {
    /// Where the bytes `span` of `text` are.
    pub fn of(text: &str, span: Range<usize>) -> Self {
        let start = text.floor_char_boundary(span.start.min(text.len()));
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let source = text[line_start..].lines().next().unwrap_or_default();
        let column = text[line_start..start].chars().count() + 1;
        let end = text.floor_char_boundary(span.end.min(line_start + source.len()).max(start));
        let width = text[start..end].chars().count().max(1);
        Self {
            line: text[..start].matches('\n').count() + 1,
            column,
            width,
            source: seawall_client::text::printable(source),
        }
    }
}

impl std::error::Error for Found {}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, place, code, message } = self;
        let level = if self.is_error() { "error" } else { "warning" };
        write!(f, "{}:", path.display())?;
        let Some(Place { line, column, width, source }) = place else {
            return write!(f, " {level}[{code}]: {message}\n  help: {}", self.help());
        };
        let margin = line.to_string().len();
        writeln!(f, "{line}:{column}: {level}[{code}]: {message}")?;
        writeln!(f, "{:margin$} |", "")?;
        writeln!(f, "{line} | {source}")?;
        writeln!(f, "{:margin$} | {:before$}{}", "", "", "^".repeat(*width), before = column - 1)?;
        write!(f, "{:margin$} = help: {}", "", self.help())
    }
}

impl Found {
    /// A message about the bytes `span` of `text`, the content of `path`.
    pub fn at(
        path: &Path,
        text: &str,
        span: Range<usize>,
        code: &'static str,
        message: &str,
    ) -> Self {
        let place = Some(Place::of(text, span));
        Self { path: path.to_owned(), place, code, message: message.replace('\n', " ") }
    }

    /// About a whole file.
    pub fn in_file(path: &Path, code: &'static str, message: String) -> Self {
        Self { path: path.to_owned(), place: None, code, message }
    }

    /// What the TOML reader says, at the place where it says it.
    pub fn from_toml(path: &Path, text: &str, error: &toml::de::Error) -> Self {
        let message = error.message();
        let code = if message.starts_with("unknown field") {
            "E-KEY"
        } else if message.starts_with("missing field") {
            "E-MISSING"
        } else if toml::from_str::<toml::Table>(text).is_err() {
            "E-SYNTAX"
        } else {
            "E-VALUE"
        };
        Self::at(path, text, error.span().unwrap_or(0..0), code, message)
    }

    /// Its line, from 1; None where the whole file is meant.
    pub fn line(&self) -> Option<usize> {
        self.place.as_ref().map(|place| place.line)
    }

    /// Whether the file cannot be used for it.
    pub fn is_error(&self) -> bool {
        self.code.starts_with("E-")
    }

    /// What to do about it.
    pub fn help(&self) -> &'static str {
        help(self.code)
    }
}

impl ConfigError {
    /// What the TOML reader says, at the place where it says it.
    pub fn from_toml(path: &Path, text: &str, error: &toml::de::Error) -> Self {
        Self::Invalid(Box::new(Found::from_toml(path, text, error)))
    }

    /// A message about the bytes `span` of `text`.
    pub fn at(
        path: &Path,
        text: &str,
        span: Range<usize>,
        code: &'static str,
        message: &str,
    ) -> Self {
        Self::Invalid(Box::new(Found::at(path, text, span, code, message)))
    }
}

fn help(code: &str) -> &'static str {
    match code {
        "E-KEY" => "remove it or correct its spelling; packaging/seawalld.toml shows every key",
        "E-MISSING" => "add the key; packaging/seawalld.toml shows every key with its default",
        "E-SYNTAX" => "correct the line; the format is TOML (https://toml.io)",
        "E-READ" => "make it a readable file in UTF-8, or move it out of the folder",
        "E-NO-MATCH" => "add `guests`, `uuids` or `tags`, or remove the group",
        "W-NO-GUEST" => "correct the spelling, or remove it once it is not needed any more",
        "W-OVERLAP" => {
            "the first group counts, files in the order of their names; take the guest out of one of them"
        }
        "W-EXEC-ONLY" => "use `smart`, unless what this does not stop is stopped otherwise",
        "W-OFF" => "remove it to have them protected",
        "W-SLOW" => "begin the patterns with more whole names, or exclude the folder above",
        "E-CONFLICT" => "change this entry or the one that it conflicts with",
        _ => "correct the value; packaging/seawalld.toml says what each key takes",
    }
}
