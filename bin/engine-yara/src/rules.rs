//! A folder of rules, compiled.
//!
//! Each file is a unit with a namespace of its own, named by its path below the folder. A file that another
//! one includes is no unit: it is compiled into the namespace of each that includes it. What yara-x does not
//! take is left out rule by rule, and each error is reported with file, line, column, yara-x's code and the
//! rule's name; all else is used.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use seawall_engine::signatures::{self, DEEPEST};
use seawall_engine::{Diagnostic, Generation, Level};
use yara_x::errors::CompileError;
use yara_x::warnings::Warning;
use yara_x::{Compiler, Rules, SourceCode};
use yara_x_parser::ast::{AST, Item, WithSpan};

use crate::meta;
use crate::slow::{self, Suspect};

/// Largest rule file that is read, in bytes: against a mistake (a device, a disk image), not an
/// attack; whoever writes rules decides what is detected anyway.
const LARGEST_FILE: u64 = 64 << 20;
/// What a rule may ask of the file besides its content. The first of each pair is ours, the second what
/// public rules call it.
pub const NAMES: [&str; 6] = ["path", "filepath", "name", "filename", "extension", "guest"];
/// The same of what follows from the content alone, or is the same for all: a verdict does not depend on it.
/// Public rules ask for types and owners, which a host does not know: they are empty.
pub const OTHERS: [&str; 3] = ["size", "filetype", "owner"];
/// yara-x's code for an identifier that nobody has defined.
const UNKNOWN_IDENTIFIER: &str = "E009";

/// Rules ready to scan with.
pub struct RuleSet {
    /// Compiled rules of all good files.
    pub rules: Rules,
    /// Number of rules.
    pub count: u32,
    /// Digest of what is in use.
    pub generation: Generation,
    /// Those of [`NAMES`] and [`OTHERS`] that rules use.
    pub variables: BTreeSet<&'static str>,
    /// What is wrong, errors first.
    pub diagnostics: Vec<Diagnostic>,
    /// Those that can be slow, each by itself.
    pub suspects: Vec<Suspect>,
}

/// A rule file in memory: compiled and hashed from the same bytes.
struct Source {
    /// Path below the folder, also the namespace.
    name: String,
    /// Path for people.
    shown: String,
    /// Without its include statements: spaces stand where they stood.
    bytes: Vec<u8>,
    /// Names of the sources that it includes, in order.
    includes: Vec<String>,
}

impl RuleSet {
    /// Loads all rule files below `folder`. With `strict` any error refuses the whole; without it
    /// only a folder that cannot be read, or that has no usable rule, does.
    pub fn load(folder: &Path, strict: bool) -> Result<Self, Vec<Diagnostic>> {
        let mut errors = Vec::new();
        let sources = read_all(folder, &mut errors)?;
        let mut made = Compiled::from(&sources, &BTreeSet::new(), None);
        if !made.asking.is_empty() {
            // Of each rule the compiler tells the first unknown identifier, so those files are asked again
            // and again, and then all is compiled once more.
            let mut variables = made.unknown;
            let asking = made.asking;
            loop {
                let probe = Compiled::from(&sources, &variables, Some(&asking));
                if probe.unknown.is_empty() {
                    break;
                }
                variables.extend(probe.unknown);
            }
            made = Compiled::from(&sources, &variables, None);
        }
        errors.append(&mut made.errors);
        if strict && !errors.is_empty() {
            return Err(errors);
        }
        let rules = made.compiler.build();
        let count = u32::try_from(rules.iter().len()).unwrap_or(u32::MAX);
        if count == 0 {
            // An engine that is ready calls content clean; without a rule nobody looked at it.
            let reason = format!("no usable rule in {}", folder.display());
            errors.push(Diagnostic::error("yara-empty", reason));
            return Err(errors);
        }
        errors.append(&mut made.warnings);
        for rule in rules.iter() {
            let found = meta::problems(&rule).into_iter().map(|mut one| {
                one.file = folder.join(rule.namespace()).display().to_string();
                one
            });
            errors.extend(found);
        }
        let generation = digest(sources.values());
        let mut suspects = Vec::new();
        for (unit, parts) in made.units {
            slow::suspects(&unit.name, &text_of(&parts), &mut suspects, |text| {
                compile_alone(&unit.name, text, &made.variables)
            });
        }
        let (variables, diagnostics) = (made.variables, errors);
        Ok(Self { rules, count, generation, variables, diagnostics, suspects })
    }

    /// Whether a verdict depends on more than the content.
    pub fn by_name(&self) -> bool {
        NAMES.iter().any(|name| self.variables.contains(name))
    }
}

/// All sources in a compiler.
struct Compiled<'a> {
    compiler: Compiler<'a>,
    variables: BTreeSet<&'static str>,
    /// Variables that rules ask for and that were not defined.
    unknown: BTreeSet<&'static str>,
    /// The units in which they do.
    asking: BTreeSet<&'a str>,
    /// Each unit with its sources, in order.
    units: Vec<(&'a Source, Vec<&'a Source>)>,
    errors: Vec<Diagnostic>,
    warnings: Vec<Diagnostic>,
}

impl<'a> Compiled<'a> {
    /// Compiles all units, or `only` these.
    fn from(
        sources: &'a BTreeMap<String, Source>,
        variables: &BTreeSet<&'static str>,
        only: Option<&BTreeSet<&str>>,
    ) -> Self {
        let (compiler, errors) = compiler(variables);
        let (unknown, asking, units, warnings) = Default::default();
        let variables = variables.clone();
        let mut all = Self { compiler, variables, unknown, asking, units, errors, warnings };
        let included: BTreeSet<_> = sources.values().flat_map(|source| &source.includes).collect();
        let mut seen = BTreeSet::new();
        let (inner, units): (Vec<_>, Vec<_>) =
            sources.values().partition(|one| included.contains(&one.name));
        // Those that include one another in a circle are in no unit.
        for unit in units.into_iter().chain(inner) {
            let is_wanted = only.is_none_or(|only| only.contains(unit.name.as_str()));
            if is_wanted && !seen.contains(unit.name.as_str()) {
                let unknown = std::mem::take(&mut all.unknown);
                all.compiler.new_namespace(&unit.name);
                all.units.push((unit, Vec::new()));
                let mut done = BTreeSet::new();
                all.add(sources, unit, &mut Vec::new(), &mut done);
                seen.append(&mut done);
                if !all.unknown.is_empty() {
                    all.asking.insert(&unit.name);
                }
                all.unknown.extend(unknown);
            }
        }
        let place = |one: &Diagnostic| (one.file.clone(), one.line, one.column);
        all.errors.sort_by_key(place);
        all
    }

    /// Adds what the source includes, then itself; each once in a namespace.
    fn add(
        &mut self,
        sources: &'a BTreeMap<String, Source>,
        source: &'a Source,
        stack: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) {
        if stack.contains(&source.name.as_str()) || stack.len() > DEEPEST {
            let one = Diagnostic::error("yara-include", "this file includes itself");
            return self.errors.push(one.in_file(&source.shown));
        }
        if !done.insert(&source.name) {
            return;
        }
        stack.push(&source.name);
        for name in &source.includes {
            if let Some(included) = sources.get(name) {
                self.add(sources, included, stack, done);
            }
        }
        stack.pop();
        if let Some((_, parts)) = self.units.last_mut() {
            parts.push(source);
        }
        let (errors, warnings) = (self.compiler.errors().len(), self.compiler.warnings().len());
        let code = SourceCode::from(source.bytes.as_slice()).with_origin(&source.shown);
        // The errors are all in the compiler; the one returned here is the first of them.
        let _first = self.compiler.add_source(code);
        for error in &self.compiler.errors()[errors..] {
            match unknown_variable(source, error) {
                Some(variable) if !self.variables.contains(variable) => {
                    self.unknown.insert(variable);
                }
                _ => self.errors.push(self::error(source, error)),
            }
        }
        let warnings = self.compiler.warnings()[warnings..].iter().map(|w| warning(source, w));
        self.warnings.extend(warnings);
    }
}

/// A compiler that knows these variables.
fn compiler<'a>(variables: &BTreeSet<&'static str>) -> (Compiler<'a>, Vec<Diagnostic>) {
    let mut compiler = Compiler::new();
    // They are resolved here: see `Source::includes`.
    compiler.enable_includes(false);
    // What YARA takes and yara-x by itself does not.
    compiler.relaxed_re_syntax(true);
    // A matter of taste; the name is checked by the tests, where it would show.
    let _ = compiler.switch_warning("text_as_hex", false);
    let mut errors = Vec::new();
    for variable in variables {
        let defined = if *variable == "size" {
            compiler.define_global(variable, 0)
        } else {
            compiler.define_global(variable, "")
        };
        if let Err(error) = defined {
            errors.push(Diagnostic::error("yara-variable", error.to_string()));
        }
    }
    (compiler, errors)
}

/// All sources of a unit in one.
fn text_of(parts: &[&Source]) -> String {
    parts.iter().map(|part| String::from_utf8_lossy(&part.bytes) + "\n").collect()
}

fn compile_alone(unit: &str, text: &str, variables: &BTreeSet<&'static str>) -> Option<Rules> {
    let (mut compiler, _) = compiler(variables);
    compiler.new_namespace(unit);
    compiler.add_source(text).ok()?;
    Some(compiler.build())
}

/// The variable of ours that the error is about.
fn unknown_variable(source: &Source, error: &CompileError) -> Option<&'static str> {
    if error.code() != UNKNOWN_IDENTIFIER {
        return None;
    }
    let span = error.labels().next().map(|label| label.span().start()..label.span().end())?;
    let word = source.bytes.get(span)?;
    NAMES.into_iter().chain(OTHERS).find(|name| name.as_bytes() == word)
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
    let rule = label.as_ref().and_then(|(at, _)| rule_around(&source.bytes, *at));
    let mut reason = rule.map(|rule| format!("rule {rule}: ")).unwrap_or_default();
    reason += title;
    if let Some((_, text)) = label.filter(|(_, text)| !text.is_empty()) {
        reason += &format!(": {text}");
    }
    Diagnostic { level, file: source.shown.clone(), line, column, code: code.to_owned(), reason }
}

/// The name of the rule in which a byte offset lies. A rule that does not parse is in no syntax tree: its
/// head is looked for in the text.
fn rule_around(bytes: &[u8], offset: usize) -> Option<String> {
    let line_end = bytes[offset.min(bytes.len())..].iter().position(|byte| *byte == b'\n');
    let end = line_end.map_or(bytes.len(), |at| offset + at);
    let text = String::from_utf8_lossy(&bytes[..end.min(bytes.len())]);
    text.lines().rev().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let first = words.find(|word| !matches!(*word, "private" | "global"))?;
        let name = (first == "rule").then(|| words.next())??;
        let is_part = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
        let name: String = name.chars().take_while(is_part).collect();
        (!name.is_empty()).then_some(name)
    })
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

/// Names, contents and the versions of the library, of this program and of what unpacks for it: everything that a verdict depends on.
fn digest<'a>(sources: impl Iterator<Item = &'a Source>) -> Generation {
    let mut hasher = blake3::Hasher::new();
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    field(yara_x::VERSION.as_bytes());
    field(env!("CARGO_PKG_VERSION").as_bytes());
    field(&seawall_unpack::REVISION.to_le_bytes());
    for source in sources {
        field(source.name.as_bytes());
        field(&source.bytes);
        source.includes.iter().for_each(|name| field(name.as_bytes()));
    }
    Generation(*hasher.finalize().as_bytes())
}

/// Reads every rule file below the folder and what they include. A file that cannot be read is an error
/// of that file.
fn read_all(
    folder: &Path,
    errors: &mut Vec<Diagnostic>,
) -> Result<BTreeMap<String, Source>, Vec<Diagnostic>> {
    let is_rule = |path: &Path| path.extension().is_some_and(|end| end == "yar" || end == "yara");
    let found = signatures::walk(folder, "yara-read", is_rule)
        .map_err(|error| vec![unreadable(folder, &format!("cannot read the folder: {error}"))])?;
    errors.extend(found.problems);
    let mut files = found.files;
    if files.is_empty() {
        errors.push(unreadable(folder, "no *.yar or *.yara file: nothing can be detected"));
    }
    let mut sources = BTreeMap::new();
    // Those that are included may have any name, and include others.
    while let Some(file) = files.pop() {
        let name = file.strip_prefix(folder).unwrap_or(&file).display().to_string();
        if sources.contains_key(&name) {
            continue;
        }
        let mut bytes = match read(&file) {
            Ok(bytes) => bytes,
            Err(error) => {
                errors.push(unreadable(&file, &format!("cannot read: {error}")));
                continue;
            }
        };
        let shown = file.display().to_string();
        let mut includes = Vec::new();
        for (path, offset) in take_includes(&mut bytes) {
            match find_included(folder, &file, &path) {
                Ok(found) => {
                    let below = found.strip_prefix(folder).unwrap_or(&found);
                    includes.push(below.display().to_string());
                    files.push(found);
                }
                Err(reason) => {
                    let mut one = Diagnostic::error("yara-include", format!("{path}: {reason}"));
                    (one.line, one.column) = position(&bytes, offset);
                    one.file.clone_from(&shown);
                    errors.push(one);
                }
            }
        }
        sources.insert(name.clone(), Source { name, shown, bytes, includes });
    }
    Ok(sources)
}

/// Takes the include statements out, leaving spaces, and gives what they name and where they stood.
fn take_includes(bytes: &mut [u8]) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    if let Ok(text) = std::str::from_utf8(bytes)
        && text.contains("include")
    {
        for item in AST::from(text).items() {
            if let Item::Include(include) = item {
                found.push((
                    include.file_name.to_owned(),
                    include.span().start(),
                    include.span().end(),
                ));
            }
        }
    }
    for (_, start, end) in &found {
        bytes[*start..*end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
    }
    found.into_iter().map(|(path, start, _)| (path, start)).collect()
}

/// Beside the including file first, then from the folder of rules; nothing outside of it.
fn find_included(folder: &Path, from: &Path, path: &str) -> Result<PathBuf, String> {
    let beside = from.parent().map(|parent| parent.join(path));
    let found = beside.into_iter().chain([folder.join(path)]).find(|path| path.is_file());
    let found = found.ok_or("there is no such file beside it or in the folder of rules")?;
    let real = |path: &Path| fs::canonicalize(path).map_err(|error| error.to_string());
    let (found, folder_is) = (real(&found)?, real(folder)?);
    let below = found.strip_prefix(&folder_is);
    below.map(|below| folder.join(below)).map_err(|_| "it is outside the folder of rules".into())
}

fn unreadable(path: &Path, reason: &str) -> Diagnostic {
    Diagnostic::error("yara-read", reason).in_file(path)
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

    /// Identifiers of the rules in use.
    fn names(set: &RuleSet) -> Vec<String> {
        set.rules.iter().map(|rule| rule.identifier().to_owned()).collect()
    }

    #[test]
    fn what_cannot_be_taken_is_left_out_rule_by_rule_and_named_exactly() {
        let broken = format!(
            "{GOOD}\nrule bad {{\n  condition: é and $no\n}}\nprivate rule worse: tag {{ condition: nothing }}\n\
             rule leans {{ condition: worse }}\nrule last {{ condition: filesize == 0 }}\n"
        );
        let folder = folder(&[("a.yar", GOOD), ("b.yar", &broken), ("c.yar", "rule c { bad }")]);
        let set = RuleSet::load(folder.path(), false).unwrap();
        assert_eq!(names(&set), ["good", "good", "last"]);
        let told: Vec<_> = set.diagnostics.iter().map(|one| (one.line, one.column)).collect();
        let reasons: Vec<_> = set.diagnostics.iter().map(|one| one.reason.as_str()).collect();
        let first = &set.diagnostics[0];
        assert_eq!(first.file, folder.path().join("b.yar").display().to_string());
        assert_eq!(first.code, "E001");
        for (number, rule) in
            [(0, "rule bad: "), (1, "rule worse: "), (2, "rule leans: "), (3, "rule c: ")]
        {
            assert!(reasons[number].starts_with(rule), "{reasons:#?}");
        }
        assert_eq!(told.len(), 4, "{reasons:#?}");
        assert_eq!(told[0], (3, 14));
        let refused = RuleSet::load(folder.path(), true).map(drop).unwrap_err();
        assert_eq!(refused, set.diagnostics);
    }

    #[test]
    fn an_included_file_belongs_to_those_that_include_it() {
        let index = "include \"sub/helper.inc\"\ninclude \"./sub/other.yar\"\nrule top { condition: helper and other }";
        let folder = folder(&[
            ("index.yar", index),
            ("sub/helper.inc", "rule helper { condition: true }"),
            ("sub/other.yar", "include \"helper.inc\"\nrule other { condition: helper }"),
        ]);
        let set = RuleSet::load(folder.path(), true).unwrap();
        assert_eq!(names(&set), ["helper", "other", "top"], "each once");
        fs::write(folder.path().join("sub/helper.inc"), "rule helper { condition: false }")
            .unwrap();
        let changed = RuleSet::load(folder.path(), true).unwrap();
        assert_ne!(changed.generation, set.generation, "what is included counts");
    }

    #[test]
    fn a_wrong_include_is_told_with_its_place_and_costs_nothing_else() {
        let folder = folder(&[
            ("a.yar", "rule a { condition: true }\n include \"../outside.yar\"\n"),
            ("b.yar", "include \"gone.yar\"\nrule b { condition: true }"),
            ("c.yar", "include \"/etc/passwd\"\nrule c { condition: true }"),
        ]);
        let outside = folder.path().parent().unwrap().join("outside.yar");
        let link = folder.path().join("link.yar");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        fs::write(folder.path().join("d.yar"), "include \"link.yar\"").unwrap();
        let set = RuleSet::load(folder.path(), false).unwrap();
        assert!(!outside.exists());
        let told: Vec<_> =
            set.diagnostics.iter().filter(|one| one.code == "yara-include").collect();
        assert_eq!(told.len(), 4, "{:#?}", set.diagnostics);
        assert!(
            told.iter().any(|one| one.file.ends_with("a.yar") && (one.line, one.column) == (2, 2))
        );
        assert_eq!(names(&set), ["a", "b", "c"]);
    }

    #[test]
    fn files_that_include_each_other_are_an_error_and_no_end() {
        let folder = folder(&[
            ("a.yar", "include \"b.yar\"\nrule a { condition: true }"),
            ("b.yar", "include \"a.yar\"\nrule b { condition: true }"),
            ("c.yar", GOOD),
        ]);
        let set = RuleSet::load(folder.path(), false).unwrap();
        assert!(
            set.diagnostics.iter().any(|one| one.code == "yara-include"),
            "{:?}",
            set.diagnostics
        );
        assert_eq!(names(&set), ["good", "b", "a"]);
    }

    #[test]
    fn variables_are_there_for_those_who_ask() {
        let plain = "rule a { meta: name = \"path\" strings: $s = \"extension\" condition: $s }";
        let set = load(&[("a.yar", plain)]);
        assert!(set.variables.is_empty() && !set.by_name());
        let set = load(&[("a.yar", "rule a { condition: size > 3 and owner == \"\" }")]);
        assert!(!set.by_name() && set.variables.len() == 2, "{:?}", set.variables);
        let asks =
            "import \"pe\" rule a { condition: for any s in pe.sections: (s.name == filename) }";
        let set = load(&[("a.yar", asks), ("b.yar", GOOD)]);
        assert!(set.by_name());
        assert_eq!((set.count, set.diagnostics.len()), (2, 0), "{:?}", set.diagnostics);
    }

    #[test]
    fn an_unknown_identifier_is_told_with_its_place() {
        let set = load(&[("a.yar", "rule a {\n condition:\n   unknown_thing\n}"), ("b.yar", GOOD)]);
        let one = &set.diagnostics[0];
        assert_eq!((one.line, one.column), (3, 4));
        assert!(one.reason.contains("unknown_thing"), "{one}");
    }

    #[test]
    fn the_generation_is_of_all_files() {
        let one = load(&[("a.yar", GOOD)]).generation;
        assert_eq!(load(&[("a.yar", GOOD)]).generation, one);
        assert_ne!(load(&[("b.yar", GOOD)]).generation, one);
        assert_ne!(load(&[("a.yar", GOOD), ("b.yar", GOOD)]).generation, one);
        assert_ne!(load(&[("a.yar", GOOD), ("b.yar", "rule b {")]).generation, one, "of all files");
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
