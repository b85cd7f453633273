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
    Invalid(Box<Invalid>),
}

/// Where and how the file is wrong.
#[derive(Debug, PartialEq, Eq)]
pub struct Invalid {
    path: PathBuf,
    line: usize,
    column: usize,
    /// Characters to underline.
    width: usize,
    /// The whole line.
    source: String,
    code: &'static str,
    message: String,
    help: &'static str,
}

impl std::error::Error for Invalid {}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, line, column, width, source, code, message, help } = self;
        let margin = line.to_string().len();
        writeln!(f, "{}:{line}:{column}: error[{code}]: {message}", path.display())?;
        writeln!(f, "{:margin$} |", "")?;
        writeln!(f, "{line} | {source}")?;
        writeln!(f, "{:margin$} | {:before$}{}", "", "", "^".repeat(*width), before = column - 1)?;
        write!(f, "{:margin$} = help: {help}", "")
    }
}

impl ConfigError {
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

    /// A message about the bytes `span` of `text`.
    pub fn at(
        path: &Path,
        text: &str,
        span: Range<usize>,
        code: &'static str,
        message: &str,
    ) -> Self {
        let start = text.floor_char_boundary(span.start.min(text.len()));
        let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let source = text[line_start..].lines().next().unwrap_or_default();
        let column = text[line_start..start].chars().count() + 1;
        let end = text.floor_char_boundary(span.end.min(line_start + source.len()).max(start));
        let width = text[start..end].chars().count().max(1);
        Self::Invalid(Box::new(Invalid {
            path: path.to_owned(),
            line: text[..start].matches('\n').count() + 1,
            column,
            width,
            source: seawall_client::text::printable(source),
            code,
            message: message.replace('\n', " "),
            help: help(code),
        }))
    }
}

fn help(code: &str) -> &'static str {
    match code {
        "E-KEY" => "remove it or correct its spelling; packaging/seawalld.toml shows every key",
        "E-MISSING" => "add the key; packaging/seawalld.toml shows every key with its default",
        "E-SYNTAX" => "correct the line; the format is TOML (https://toml.io)",
        "E-CONFLICT" => "change this entry or the one that it conflicts with",
        _ => "correct the value; packaging/seawalld.toml says what each key takes",
    }
}
