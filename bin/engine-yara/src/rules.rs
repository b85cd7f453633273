//! A folder of rules, compiled.
//!
//! Each file is a unit with a namespace of its own, named by its path below the folder. A file with
//! an error is left out as a whole, so that half a rule set is never taken for a whole one, and each
//! of its errors is reported with file, line, column and yara-x's code. The others are used.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use seawall_engine::{Diagnostic, Generation, Level, Severity};
use yara_x::errors::CompileError;
use yara_x::warnings::Warning;
use yara_x::{Compiler, MetaValue, Rules, SourceCode};

/// Largest rule file that is read, in bytes: against a mistake (a device, a disk image), not an
/// attack; whoever writes rules decides what is detected anyway.
const LARGEST_FILE: u64 = 64 << 20;
/// Deepest folder that is looked into.
const DEEPEST: usize = 32;

/// Rules ready to scan with.
pub struct RuleSet {
    /// Compiled rules of all good files.
    pub rules: Rules,
    /// Number of rules.
    pub count: u32,
    /// Digest of what is in use.
    pub generation: Generation,
    /// What is wrong, errors first.
    pub diagnostics: Vec<Diagnostic>,
}

/// A rule file in memory: compiled and hashed from the same bytes.
struct Source {
    /// Path below the folder, also the namespace.
    name: String,
    /// Path for people.
    shown: String,
    bytes: Vec<u8>,
}

impl RuleSet {
    /// Loads all rule files below `folder`. With `strict` any error refuses the whole; without it
    /// only a folder that cannot be read, or that has no usable rule, does.
    pub fn load(folder: &Path, strict: bool) -> Result<Self, Vec<Diagnostic>> {
        let mut errors = Vec::new();
        let sources = read_all(folder, &mut errors)?;
        let (mut compiler, mut warnings, broken) = compile(&sources, &mut errors);
        if strict && !errors.is_empty() {
            return Err(errors);
        }
        let good: Vec<&Source> =
            sources.iter().zip(&broken).filter(|(_, broken)| !**broken).map(|(s, _)| s).collect();
        if good.len() < sources.len() {
            // The compiler keeps the rules before an error; only a fresh one leaves the file out.
            let mut ignored = Vec::new();
            (compiler, warnings, _) = compile(good.iter().copied(), &mut ignored);
            errors.append(&mut ignored);
        }
        let rules = compiler.build();
        let count = u32::try_from(rules.iter().len()).unwrap_or(u32::MAX);
        if count == 0 {
            // An engine that is ready calls content clean; without a rule nobody looked at it.
            let reason = format!("no usable rule in {}", folder.display());
            errors.push(Diagnostic::error("yara-empty", reason));
            return Err(errors);
        }
        warnings.extend(bad_severities(folder, &rules));
        errors.append(&mut warnings);
        Ok(Self { rules, count, generation: digest(&good), diagnostics: errors })
    }
}

/// Compiles each source into its own namespace. Tells warnings, and which sources are broken.
fn compile<'a>(
    sources: impl IntoIterator<Item = &'a Source>,
    errors: &mut Vec<Diagnostic>,
) -> (Compiler<'a>, Vec<Diagnostic>, Vec<bool>) {
    let mut compiler = Compiler::new();
    // An included file is no unit of the set: neither watched nor part of the generation.
    compiler.enable_includes(false);
    // A matter of taste; the name is checked by the tests, where it would show.
    let _ = compiler.switch_warning("text_as_hex", false);
    let mut warnings = Vec::new();
    let mut broken = Vec::new();
    for source in sources {
        let (errors_before, warnings_before) = (compiler.errors().len(), compiler.warnings().len());
        compiler.new_namespace(&source.name);
        let code = SourceCode::from(source.bytes.as_slice()).with_origin(&source.shown);
        // The errors are all in the compiler; the one returned here is the first of them.
        let failed = compiler.add_source(code).is_err();
        broken.push(failed);
        errors.extend(compiler.errors()[errors_before..].iter().map(|e| error(source, e)));
        warnings.extend(compiler.warnings()[warnings_before..].iter().map(|w| warning(source, w)));
    }
    (compiler, warnings, broken)
}

fn error(source: &Source, error: &CompileError) -> Diagnostic {
    let label = error.labels().next().map(|label| (label.span().start(), label.text().to_owned()));
    diagnostic(source, Level::Error, error.code(), error.title(), label)
}

fn warning(source: &Source, warning: &Warning) -> Diagnostic {
    let label =
        warning.labels().next().map(|label| (label.span().start(), label.text().to_owned()));
    diagnostic(source, Level::Warning, warning.code(), warning.title(), label)
}

/// yara-x gives a byte offset and two texts, what kind of error and what is wrong there.
fn diagnostic(
    source: &Source,
    level: Level,
    code: &str,
    title: &str,
    label: Option<(usize, String)>,
) -> Diagnostic {
    let (line, column) = label.as_ref().map_or((0, 0), |(at, _)| position(&source.bytes, *at));
    let reason = match label {
        Some((_, text)) if !text.is_empty() => format!("{title}: {text}"),
        _ => title.to_owned(),
    };
    Diagnostic { level, file: source.shown.clone(), line, column, code: code.to_owned(), reason }
}

/// Line and column of a byte offset, both from 1; the column in characters.
fn position(bytes: &[u8], offset: usize) -> (u32, u32) {
    let before = &bytes[..offset.min(bytes.len())];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
    let number = |value| u32::try_from(value).unwrap_or(u32::MAX);
    (number(line), number(column))
}

/// A rule whose `severity` is no severity counts as high; its author should know.
fn bad_severities(folder: &Path, rules: &Rules) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    for rule in rules.iter() {
        for (key, value) in rule.metadata() {
            if let ("severity", MetaValue::String(word)) = (key, value)
                && let Err(error) = word.parse::<Severity>()
            {
                let reason = format!("rule {}: {error}; taken as high", rule.identifier());
                let mut one = Diagnostic::warning("yara-severity", reason);
                one.file = folder.join(rule.namespace()).display().to_string();
                found.push(one);
            }
        }
    }
    found
}

/// Names, contents and the library's version: everything that a verdict depends on.
fn digest(sources: &[&Source]) -> Generation {
    let mut hasher = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(yara_x::VERSION.as_bytes());
    field(env!("CARGO_PKG_VERSION").as_bytes());
    for source in sources {
        field(source.name.as_bytes());
        field(&source.bytes);
    }
    Generation(*hasher.finalize().as_bytes())
}

/// Reads every rule file below the folder, in the order of their paths. A file that cannot be read
/// is an error of that file.
fn read_all(folder: &Path, errors: &mut Vec<Diagnostic>) -> Result<Vec<Source>, Vec<Diagnostic>> {
    let mut files = Vec::new();
    walk(folder, 0, &mut files, errors)
        .map_err(|error| vec![unreadable(folder, &format!("cannot read the folder: {error}"))])?;
    files.sort();
    if files.is_empty() {
        errors.push(unreadable(folder, "no *.yar or *.yara file: nothing can be detected"));
    }
    let mut sources = Vec::new();
    for file in files {
        match read(&file) {
            Ok(bytes) => {
                let name = file.strip_prefix(folder).unwrap_or(&file);
                let (name, shown) = (name.display().to_string(), file.display().to_string());
                sources.push(Source { name, shown, bytes });
            }
            Err(error) => errors.push(unreadable(&file, &format!("cannot read: {error}"))),
        }
    }
    Ok(sources)
}

fn unreadable(path: &Path, reason: &str) -> Diagnostic {
    let mut one = Diagnostic::error("yara-read", reason);
    one.file = path.display().to_string();
    one
}

/// Folders that are symbolic links are not followed (they can form a circle), files are.
fn walk(
    folder: &Path,
    depth: usize,
    files: &mut Vec<PathBuf>,
    errors: &mut Vec<Diagnostic>,
) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            let below = if depth < DEEPEST {
                walk(&path, depth + 1, files, errors)
            } else {
                Err(io::Error::other("too many folders in one another"))
            };
            if let Err(error) = below {
                errors.push(unreadable(&path, &format!("cannot read the folder: {error}")));
            }
        } else if path.extension().is_some_and(|end| end == "yar" || end == "yara") {
            files.push(path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let about = fs::metadata(path)?;
    if !about.is_file() {
        return Err(io::Error::other("not a file"));
    }
    if about.len() > LARGEST_FILE {
        return Err(io::Error::other(format!("larger than {} MiB", LARGEST_FILE >> 20)));
    }
    fs::read(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GOOD: &str = "rule good { strings: $a = \"abc\" condition: $a }";

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn load(files: &[(&str, &str)]) -> RuleSet {
        RuleSet::load(folder(files).path(), false).unwrap()
    }

    #[test]
    fn files_below_the_folder_count_and_others_do_not() {
        let set = load(&[
            ("a.yar", GOOD),
            ("sub/deep/b.yara", GOOD),
            ("notes.txt", "not a rule"),
            (".hidden/c.yar", GOOD),
            (".d.yar", GOOD),
        ]);
        assert_eq!(set.count, 2);
        assert!(set.diagnostics.is_empty(), "{:?}", set.diagnostics);
    }

    #[test]
    fn a_broken_file_is_left_out_as_a_whole_and_named_exactly() {
        let broken = format!("{GOOD}\nrule bad {{\n  condition: é and $no\n}}\n");
        let folder = folder(&[("a.yar", GOOD), ("b.yar", &broken), ("c.yar", "rule c { bad }")]);
        let set = RuleSet::load(folder.path(), false).unwrap();
        assert_eq!(set.count, 1);
        assert_eq!(set.diagnostics.len(), 2, "{:?}", set.diagnostics);
        let [first, second] = &set.diagnostics[..] else { panic!("not two") };
        assert_eq!(first.file, folder.path().join("b.yar").display().to_string());
        assert_eq!((first.line, first.column, first.code.as_str()), (3, 14, "E001"));
        assert_eq!(second.line, 1);
        let refused = RuleSet::load(folder.path(), true).map(drop).unwrap_err();
        assert_eq!(refused, set.diagnostics);
    }

    #[test]
    fn an_unknown_identifier_is_told_with_its_place() {
        let set = load(&[("a.yar", "rule a {\n condition:\n   unknown_thing\n}"), ("b.yar", GOOD)]);
        let one = &set.diagnostics[0];
        assert_eq!((one.line, one.column), (3, 4));
        assert!(one.reason.contains("unknown_thing"), "{one}");
    }

    #[test]
    fn the_generation_is_of_what_is_in_use() {
        let one = load(&[("a.yar", GOOD)]).generation;
        assert_eq!(load(&[("a.yar", GOOD)]).generation, one);
        assert_ne!(load(&[("b.yar", GOOD)]).generation, one);
        assert_ne!(load(&[("a.yar", GOOD), ("b.yar", GOOD)]).generation, one);
        assert_eq!(load(&[("a.yar", GOOD), ("b.yar", "rule b {")]).generation, one);
    }

    #[test]
    fn an_include_is_refused() {
        let set = load(&[("a.yar", "include \"/etc/passwd\""), ("b.yar", GOOD)]);
        assert_eq!(set.count, 1);
        assert_eq!(set.diagnostics[0].level, Level::Error);
    }

    #[test]
    fn a_wrong_severity_is_a_warning() {
        let rule = "rule a { meta: severity = \"awful\" condition: true }";
        let set = load(&[("a.yar", rule)]);
        let one = set.diagnostics.iter().find(|one| one.code == "yara-severity").unwrap();
        assert_eq!(one.level, Level::Warning);
        assert!(one.file.ends_with("/a.yar"), "{one}");
    }

    #[test]
    fn a_folder_without_a_usable_rule_is_no_set() {
        for files in [&[][..], &[("a.yar", "rule a {")], &[("a.yar", "// none\n")]] {
            for strict in [false, true] {
                assert!(RuleSet::load(folder(files).path(), strict).is_err(), "{files:?}");
            }
            let errors = RuleSet::load(folder(files).path(), false).map(drop).unwrap_err();
            assert!(errors.iter().any(|one| one.reason.starts_with("no usable rule in ")));
        }
        assert!(RuleSet::load(Path::new("/nonexistent/rules"), false).is_err());
    }

    #[test]
    fn bytes_that_are_no_text_are_an_error_of_that_file() {
        let folder = folder(&[("a.yar", GOOD)]);
        fs::write(folder.path().join("b.yar"), b"rule b { condition: \xff\xfe }").unwrap();
        let set = RuleSet::load(folder.path(), false).unwrap();
        assert_eq!((set.count, set.diagnostics.len()), (1, 1));
    }
}
