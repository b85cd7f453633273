//! A folder of lists, loaded.
//!
//! What a file is, its name tells: the formats are in [`crate::parse`], a `.swhash` file is a
//! compiled one. A list says that content is known to be good when its name ends in `.fp` or
//! `.sfp`, when its name begins with `allow`, or when a folder that it lies in, the folder of lists
//! included, is named `allow`; small and large letters do not matter. Every other list says that
//! content is bad. A compiled file keeps what was said when it was compiled.
//!
//! A wrong line is left out, the others are used. Lists that are not compiled are compiled into a
//! temporary file without a name, so that there is one way to look something up.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use seawall_engine::signatures::{self, Found};
use seawall_engine::{Diagnostic, Generation, Level};

use crate::compile::Builder;
use crate::digest::{Digest, Kind};
use crate::format::{SetError, Verdict};
use crate::parse::{Entry, Format, LONGEST_LINE, Parser, Wrong};
use crate::report::Report;
use crate::set::{Hit, Set};

/// Ending of a compiled file's name.
pub const COMPILED: &str = "swhash";
/// Most compiled files in one folder. Each is a descriptor, of which the sandbox leaves few.
const MOST_COMPILED: usize = 4;

/// All lists of a folder, ready to be asked.
pub struct Lists {
    sets: Vec<Set>,
    /// Number of entries.
    pub count: u64,
    /// Digest of what is in use.
    pub generation: Generation,
    /// What is wrong.
    pub report: Report,
}

impl Lists {
    /// Loads all lists below `folder`. With `strict` any error refuses the whole; without it only a
    /// folder that cannot be read, too little memory, or a folder without a usable entry does.
    pub fn load(folder: &Path, strict: bool) -> Result<Self, Report> {
        let mut report = Report::new();
        let sources = find(folder, &mut report);
        let (compiled, plain): (Vec<Source>, Vec<Source>) =
            sources.into_iter().partition(|source| source.class == Class::Compiled);
        let mut sets = Vec::new();
        for (number, source) in compiled.iter().enumerate() {
            let loaded = if number < MOST_COMPILED {
                File::open(&source.path).map_err(SetError::from).and_then(Set::load)
            } else {
                Err(SetError::Content { what: "one compiled file too many: four can be used" })
            };
            match loaded {
                Ok(set) => sets.push(set),
                Err(error) => report.add(source.error("hash-compiled", error.to_string())),
            }
        }
        match collect(&plain, &mut report).and_then(compile_here) {
            Ok(set) => sets.extend(set),
            Err(error) => {
                report.add(about(folder, "hash-memory", error.to_string()));
                return Err(report);
            }
        }
        if strict && report.errors() > 0 {
            return Err(report);
        }
        sets.retain(|set| !set.is_empty());
        let count = sets.iter().map(Set::len).sum();
        if count == 0 {
            // An engine that is ready calls content clean; without an entry nobody looked at it.
            let reason = format!("no usable entry in {}", folder.display());
            report.add(Diagnostic::error("hash-empty", reason));
            return Err(report);
        }
        warn_of_weak(&sets, &mut report);
        Ok(Self { generation: generation(&sets), sets, count, report })
    }

    /// Which digests can be in a list for content of `size` bytes, in the order of [`Kind::ALL`].
    pub fn wanted(&self, size: u64) -> [bool; 3] {
        Kind::ALL.map(|kind| self.sets.iter().any(|set| set.wants(kind, size)))
    }

    /// All that the lists say of content with these digests and `size` bytes.
    pub fn find(&self, digests: &[Digest], size: u64) -> io::Result<Vec<Hit>> {
        let mut hits = Vec::new();
        for set in &self.sets {
            for digest in digests {
                set.find(digest, size, &mut hits)?;
            }
        }
        Ok(hits)
    }
}

/// Compiles all lists below `folder` that are not compiled yet into the file `out`, which is
/// replaced at once or not at all. Tells the number of entries. Any error refuses the whole: a
/// compiled file that stood there before stays.
pub fn compile(folder: &Path, out: &Path) -> Result<(u64, Report), Report> {
    let mut report = Report::new();
    let mut sources = find(folder, &mut report);
    sources.retain(|source| {
        let compiled = source.class == Class::Compiled;
        if compiled {
            let reason = "compiled already; it does not become part of another one";
            report
                .add(Diagnostic { level: Level::Warning, ..source.error("hash-compiled", reason) });
        }
        !compiled
    });
    if out.extension().is_none_or(|end| end != COMPILED) {
        let reason = format!("a compiled list's name ends in .{COMPILED}, or it is not loaded");
        report.add(about(out, "hash-out", reason));
    }
    let builder = match collect(&sources, &mut report) {
        Ok(builder) => builder,
        Err(error) => {
            report.add(about(folder, "hash-memory", error.to_string()));
            return Err(report);
        }
    };
    if builder.is_empty() {
        let reason = format!("no usable entry in {}", folder.display());
        report.add(Diagnostic::error("hash-empty", reason));
    }
    if report.errors() > 0 {
        return Err(report);
    }
    match write(builder, out) {
        Ok(count) => Ok((count, report)),
        Err(error) => {
            report.add(about(out, "hash-out", error.to_string()));
            Err(report)
        }
    }
}

/// Writes beside `out`, under a hidden name that no engine loads, and renames.
fn write(builder: Builder, out: &Path) -> Result<u64, SetError> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut file = tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(folder.unwrap_or(Path::new(".")))?;
    let count = builder.write(file.as_file_mut())?;
    file.as_file().sync_all()?;
    file.persist(out).map_err(|error| error.error)?;
    Ok(count)
}

/// Compiles into a file without a name. None when there is nothing to compile.
fn compile_here(builder: Builder) -> Result<Option<Set>, SetError> {
    if builder.is_empty() {
        return Ok(None);
    }
    let mut file = tempfile::tempfile()?;
    builder.write(&mut file)?;
    // Loading reads from the start, through its own offset.
    io::Seek::rewind(&mut file)?;
    Set::load(file).map(Some)
}

/// The checksums of all compiled forms, whatever their order, and the versions of this program and of
/// what unpacks for it.
fn generation(sets: &[Set]) -> Generation {
    let mut sums: Vec<&[u8; 32]> = sets.iter().map(Set::checksum).collect();
    sums.sort();
    let mut hasher = blake3::Hasher::new();
    hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
    hasher.update(&seawall_unpack::REVISION.to_le_bytes());
    for sum in sums {
        hasher.update(sum);
    }
    Generation(*hasher.finalize().as_bytes())
}

/// Allowing by a digest that can be forged allows whatever the forger made with it.
fn warn_of_weak(sets: &[Set], report: &mut Report) {
    let weak = Kind::ALL.into_iter().filter(|kind| kind.is_weak());
    let count: u64 = weak.map(|kind| sets.iter().map(|set| set.allowed(kind)).sum::<u64>()).sum();
    if count > 0 {
        let reason = format!(
            "{count} entries allow content by MD5 or SHA-1: whoever makes a harmless and a harmful \
             file with the same digest gets both allowed; use SHA-256"
        );
        report.add(Diagnostic::warning("hash-weak", reason));
    }
}

/// What a file is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Compiled,
    List(Format, Verdict),
}

/// A file with entries.
struct Source {
    path: PathBuf,
    /// Path below the folder of lists.
    name: String,
    class: Class,
}

impl Source {
    fn error(&self, code: &str, reason: impl Into<String>) -> Diagnostic {
        about(&self.path, code, reason)
    }
}

fn about(path: &Path, code: &str, reason: impl Into<String>) -> Diagnostic {
    Diagnostic { file: path.display().to_string(), ..Diagnostic::error(code, reason) }
}

/// The class that a file's name tells; `folder` is what all lists lie in.
fn classify(folder: &Path, path: &Path) -> Option<Class> {
    let lower = |text: &std::ffi::OsStr| text.to_string_lossy().to_lowercase();
    let ending = lower(path.extension()?);
    let format = match ending.as_str() {
        COMPILED => return Some(Class::Compiled),
        "md5" => Format::Plain(Some(Kind::Md5)),
        "sha1" => Format::Plain(Some(Kind::Sha1)),
        "sha256" => Format::Plain(Some(Kind::Sha256)),
        "txt" => Format::Plain(None),
        "hdb" | "hsb" | "fp" | "sfp" => Format::Clam,
        "csv" => Format::Csv,
        _ => return None,
    };
    let own = folder.file_name();
    let below = path.strip_prefix(folder).unwrap_or(path).parent();
    let mut folders = own.into_iter().chain(below.into_iter().flatten());
    let allows = ["fp", "sfp"].contains(&ending.as_str())
        || path.file_name().is_some_and(|name| lower(name).starts_with("allow"))
        || folders.any(|name| lower(name) == "allow");
    Some(Class::List(format, if allows { Verdict::Allowed } else { Verdict::Denied }))
}

/// All files with entries below the folder, in the order of their paths. Those whose name says
/// nothing are told.
fn find(folder: &Path, report: &mut Report) -> Vec<Source> {
    let found = signatures::walk(folder, "hash-read", |_| true).unwrap_or_else(|error| {
        report.add(about(folder, "hash-read", format!("cannot read the folder: {error}")));
        Found::default()
    });
    found.problems.into_iter().for_each(|one| report.add(one));
    let mut sources = Vec::new();
    for path in found.files {
        if let Some(class) = classify(folder, &path) {
            let name = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
            sources.push(Source { path, name, class });
        } else {
            let reason = "not used: its name ends in none of .md5 .sha1 .sha256 .txt .hdb .hsb .fp \
                          .sfp .csv .swhash; rename or hide it";
            let one = about(&path, "hash-name", reason);
            report.add(Diagnostic { level: Level::Warning, ..one });
        }
    }
    sources
}

/// The entries of all lists. Only too little memory is an error here, the rest is in the report.
fn collect(sources: &[Source], report: &mut Report) -> Result<Builder, SetError> {
    let mut builder = Builder::new();
    for source in sources {
        let Class::List(format, verdict) = source.class else { continue };
        builder.list(source.name.clone());
        report.begin_file();
        match read(source, format, verdict, &mut builder, report) {
            Ok(()) => {}
            Err(SetError::Io(error)) => {
                report.add(source.error("hash-read", format!("cannot read: {error}")));
            }
            Err(error) => return Err(error),
        }
        report.end_file(|level, more| Diagnostic {
            level,
            ..source.error("hash-line", format!("{more} more wrong lines"))
        });
    }
    Ok(builder)
}

/// Adds a list's entries. What is wrong with its lines is in the report.
fn read(
    source: &Source,
    format: Format,
    verdict: Verdict,
    builder: &mut Builder,
    report: &mut Report,
) -> Result<(), SetError> {
    if !fs::metadata(&source.path)?.is_file() {
        return Err(io::Error::other("not a file").into());
    }
    let mut reader = BufReader::with_capacity(1 << 18, File::open(&source.path)?);
    let mut parser = Parser::new(format);
    let mut line = Vec::new();
    let (mut found, mut wrong) = (Vec::new(), Vec::new());
    for number in 1u32.. {
        let Some(whole) = next_line(&mut reader, &mut line)? else { break };
        // Some editors begin a file with it.
        let text = line.as_slice();
        let text =
            if number == 1 { text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text) } else { text };
        if whole {
            parser.line(text, &mut found, &mut wrong);
        } else {
            let reason = format!("a line of more than {LONGEST_LINE} bytes");
            wrong.push(Wrong { level: Level::Error, at: 0, reason });
        }
        for entry in found.drain(..) {
            match useless(&entry, verdict) {
                Some(one) => wrong.push(one),
                None => builder.add(&entry, verdict, number)?,
            }
        }
        for one in wrong.drain(..) {
            report.add_line(|| placed(source, text, number, one));
        }
        if parser.is_over() {
            break;
        }
    }
    Ok(())
}

/// Denying every empty file helps nobody, and feeds do hold that digest.
fn useless(entry: &Entry, verdict: Verdict) -> Option<Wrong> {
    (verdict == Verdict::Denied && entry.digest.is_of_nothing()).then(|| Wrong {
        level: Level::Warning,
        at: 0,
        reason: "the digest of an empty file, which can do no harm; the entry is not used".into(),
    })
}

fn placed(source: &Source, text: &[u8], line: u32, wrong: Wrong) -> Diagnostic {
    let before = &text[..wrong.at.min(text.len())];
    let column = String::from_utf8_lossy(before).chars().count() + 1;
    Diagnostic {
        level: wrong.level,
        line,
        column: u32::try_from(column).unwrap_or(u32::MAX),
        ..source.error("hash-line", wrong.reason)
    }
}

/// Reads a line without its end; false when it is longer than any may be. None at the file's end.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Option<bool>> {
    line.clear();
    let most = LONGEST_LINE as u64 + 1;
    if reader.by_ref().take(most).read_until(b'\n', line)? == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(Some(true));
    }
    let whole = line.len() <= LONGEST_LINE;
    if !whole {
        reader.skip_until(b'\n')?;
    }
    Ok(Some(whole))
}
