//! Groups of guests with a policy of their own: the files of `policy.d`.
//!
//! A guest belongs to the first group that names it, files in the order of their names; to none, and it has the
//! policy of the configuration file. What a group does not set is as it is there.

use super::error::{Found, Place};
use super::policy::PolicyConfig;
use super::{Config, ConfigError, GuestConfig, GuestName, GuestUuid, Tag, simple_name};
use seawall_proto::{Mode, POLICY_MAX, Rules};
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where the files are, beside the configuration file.
pub const FOLDER: &str = "policy.d";

/// Guests that have a policy in common.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    pub name: String,
    /// Where it is defined.
    pub path: PathBuf,
    pub line: usize,
    pub policy: PolicyConfig,
    members: Members,
    lines: Lines,
}

/// Whom a group names. One of them is enough.
#[derive(Debug, Clone, Default, PartialEq)]
struct Members {
    guests: Vec<Spanned<GuestName>>,
    uuids: Vec<Spanned<GuestUuid>>,
    tags: Vec<Spanned<Tag>>,
}

impl Members {
    fn is_empty(&self) -> bool {
        self.guests.is_empty() && self.uuids.is_empty() && self.tags.is_empty()
    }

    fn names(&self, guest: &GuestConfig) -> bool {
        self.guests.iter().any(|name| name.get_ref() == guest.name.get_ref())
            || guest.uuid.as_ref().is_some_and(|uuid| {
                self.uuids.iter().any(|named| named.get_ref() == uuid.get_ref())
            })
            || self.tags.iter().any(|tag| guest.tags.contains(tag.get_ref()))
    }
}

/// Where a file sets what, by settings named like `deadline.open_ms` or `exclude.paths[0]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Lines {
    path: PathBuf,
    text: Arc<str>,
    /// Each one's line, and its bytes in the text.
    of: BTreeMap<String, (usize, Range<usize>)>,
}

/// Tells the lines of a text: there may be very many settings on few of them.
struct Breaks(Vec<usize>);

impl Breaks {
    fn of(text: &str) -> Self {
        Self(text.match_indices('\n').map(|(at, _)| at).collect())
    }

    fn line(&self, at: usize) -> usize {
        self.0.partition_point(|newline| *newline < at) + 1
    }
}

impl Lines {
    /// Of the table at `place` in a file that is valid.
    pub fn of(path: &Path, text: &str, place: &[&str]) -> Self {
        let mut lines = Self::none(path, text);
        if let Ok(root) = DeTable::parse(text) {
            let mut table = Some(root.get_ref());
            for key in place {
                table = table.and_then(|table| table.get(*key)?.get_ref().as_table());
            }
            let breaks = Breaks::of(text);
            table.into_iter().for_each(|table| lines.add(&breaks, "", table));
        }
        lines
    }

    fn none(path: &Path, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.into(), of: BTreeMap::new() }
    }

    fn add(&mut self, breaks: &Breaks, prefix: &str, table: &DeTable<'_>) {
        let place = |span: Range<usize>| (breaks.line(span.start), span);
        for (key, value) in table {
            let name = format!("{prefix}{}", key.get_ref());
            match value.get_ref() {
                DeValue::Table(below) => {
                    self.add(breaks, &format!("{name}."), below);
                    self.of.insert(name, place(key.span()));
                }
                DeValue::Array(items) => {
                    for (number, item) in items.iter().enumerate() {
                        self.of.insert(format!("{name}[{number}]"), place(item.span()));
                    }
                    self.of.insert(name, place(key.span()));
                }
                _ => drop(self.of.insert(name, place(key.span()))),
            }
        }
    }

    fn origin(&self, setting: &str) -> Option<Origin<'_>> {
        self.of.get(setting).map(|(line, _)| Origin { path: &self.path, line: *line })
    }

    fn place(&self, setting: &str) -> Option<Place> {
        self.of.get(setting).map(|(_, span)| Place::of(&self.text, span.clone()))
    }

    /// Something about a setting, if this file sets it.
    fn find(&self, setting: &str, code: &'static str, message: String) -> Option<Found> {
        let place = self.place(setting)?;
        Some(Found { path: self.path.clone(), place: Some(place), code, message })
    }

    /// What is odd or wrong about what this file sets of a policy.
    fn odd(&self, policy: &PolicyConfig, stops_early: bool) -> Vec<Found> {
        let mut found = Vec::new();
        if stops_early && !policy.exclude.detections.is_empty() {
            let why = "a detection ends the scan ([scan] early_exit), so that an excluded one would keep the other engines \
                       from looking";
            found.extend(self.find("exclude.detections", "E-CONFLICT", why.into()));
        }
        if policy.mode == Mode::Exec {
            let why = "programs are scanned when they are executed, and nothing else: not a script that an \
                       interpreter reads, not a program that ld.so starts, not a library that dlopen loads";
            found.extend(self.find("mode", "W-EXEC-ONLY", why.into()));
        }
        if policy.mode == Mode::Off {
            found.extend(self.find("mode", "W-OFF", "nothing is scanned in these guests".into()));
        }
        let rules = Rules::from(policy.to_proto());
        let compared = rules.most_compared();
        if compared > COMPARED_MAX {
            let why = format!(
                "up to {compared} patterns are compared with one path, since they have no whole name in common with \
                 few others; each takes a part of a microsecond of an access"
            );
            found.extend(self.find("exclude.paths", "W-SLOW", why));
        }
        let len = rules.encoded_len();
        if len > POLICY_MAX {
            let why = format!("a policy of {len} bytes; drivers take at most {POLICY_MAX}");
            let place = ["exclude.paths", "exclude"].iter().find_map(|it| self.place(it));
            found.push(Found { path: self.path.clone(), place, code: "E-VALUE", message: why });
        }
        found
    }
}

/// With more patterns for one path an operator is warned.
const COMPARED_MAX: usize = 256;

/// Where a setting comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin<'a> {
    pub path: &'a Path,
    pub line: usize,
}

/// The policy of a guest, and why.
#[derive(Debug, Clone, Copy)]
pub struct Governed<'a> {
    pub group: Option<&'a Group>,
    pub policy: &'a PolicyConfig,
    base: &'a Lines,
}

impl<'a> Governed<'a> {
    /// Where this setting, named like `deadline.open_ms` or `exclude.paths[0]`, comes from; None where it is the
    /// default.
    pub fn origin(&self, setting: &str) -> Option<Origin<'a>> {
        let of_group = self.group.and_then(|group| group.lines.origin(setting));
        of_group.or_else(|| self.base.origin(setting))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupFile {
    #[serde(default, rename = "group")]
    groups: Vec<GroupTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupTable {
    name: Spanned<GroupName>,
    #[serde(default)]
    guests: Vec<Spanned<GuestName>>,
    #[serde(default)]
    uuids: Vec<Spanned<GuestUuid>>,
    #[serde(default)]
    tags: Vec<Spanned<Tag>>,
    /// It is checked as if it were a whole policy; what counts is what it sets.
    #[serde(default, rename = "policy")]
    _policy: PolicyConfig,
}

struct GroupName(String);

impl<'de> Deserialize<'de> for GroupName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        simple_name(deserializer, "a group's name").map(Self)
    }
}

/// A file of groups as it was read.
struct Source {
    path: PathBuf,
    text: String,
}

impl Config {
    /// The policy of a guest, and why.
    pub fn governed(&self, guest: &GuestConfig) -> Governed<'_> {
        let group = self.groups.iter().find(|group| group.members.names(guest));
        let policy = group.map_or(&self.policy, |group| &group.policy);
        Governed { group, policy, base: &self.policy_lines }
    }

    /// Whether a detection of one engine keeps another from looking.
    fn stops_early(&self) -> bool {
        self.order.early_exit && self.engines.0.len() > 1
    }

    /// Reads the groups of a folder. One that is not there has none.
    pub(super) fn read_groups(&mut self, folder: &Path) -> Result<(), ConfigError> {
        let (sources, mut found) = read(folder);
        found.extend(self.policy_lines.odd(&self.policy, self.stops_early()));
        let mut spans = Vec::new();
        for source in &sources {
            match toml::from_str::<GroupFile>(&source.text) {
                Ok(file) => self.add_groups(source, file, &mut spans, &mut found),
                Err(error) => found.push(Found::from_toml(&source.path, &source.text, &error)),
            }
        }
        let in_order = |found: &mut Vec<Found>| {
            found.sort_by(|a, b| (&a.path, a.line()).cmp(&(&b.path, b.line())));
        };
        if found.iter().any(Found::is_error) {
            in_order(&mut found);
            return Err(ConfigError::Groups { found });
        }
        self.warn(&sources, &spans, &mut found);
        in_order(&mut found);
        self.warnings = found;
        Ok(())
    }

    /// `spans` gets for each group its file and where its name is.
    fn add_groups(
        &mut self,
        source: &Source,
        file: GroupFile,
        spans: &mut Vec<(PathBuf, Range<usize>)>,
        found: &mut Vec<Found>,
    ) {
        let Source { path, text } = source;
        let raw: toml::Table = toml::from_str(text).unwrap_or_default();
        let raw = raw.get("group").and_then(toml::Value::as_array);
        for (number, table) in file.groups.into_iter().enumerate() {
            let GroupTable { name, guests, uuids, tags, .. } = table;
            let part = raw.and_then(|all| all.get(number)?.get("policy")?.as_table());
            let (span, GroupName(name)) = (name.span(), name.into_inner());
            let members = Members { guests, uuids, tags };
            let mut wrong = |code, message: &str| {
                found.push(Found::at(path, text, span.clone(), code, message));
            };
            if members.is_empty() {
                wrong("E-NO-MATCH", &format!("group `{name}` names no guest"));
            }
            if let Some(other) = self.groups.iter().find(|group| group.name == name) {
                let place = format!("{}:{}", other.path.display(), other.line);
                wrong("E-CONFLICT", &format!("group `{name}` is defined at {place} already"));
            }
            let policy = part.map_or(Ok(self.policy.clone()), |part| self.policy.with(part));
            let policy = policy.unwrap_or_else(|why| {
                wrong("E-VALUE", &format!("the policy of group `{name}` is none: {why}"));
                PolicyConfig::default()
            });
            let lines = lines_of_group(path, text, number);
            found.extend(lines.odd(&policy, self.stops_early()));
            self.groups.push(Group {
                line: Place::of(text, span.clone()).line,
                name,
                path: path.clone(),
                policy,
                members,
                lines,
            });
            spans.push((path.clone(), span));
        }
    }

    /// What is odd about groups that can be used.
    fn warn(&self, sources: &[Source], spans: &[(PathBuf, Range<usize>)], found: &mut Vec<Found>) {
        let texts: HashMap<&Path, &str> =
            sources.iter().map(|source| (source.path.as_path(), source.text.as_str())).collect();
        let mut warn = |path: &Path, span, code, message: String| {
            let text = texts.get(path).copied().unwrap_or_default();
            found.push(Found::at(path, text, span, code, &message));
        };
        let no_guest = "W-NO-GUEST";
        for group in &self.groups {
            let Members { guests, uuids, tags } = &group.members;
            for name in guests {
                if !self.guests.iter().any(|guest| guest.name.get_ref() == name.get_ref()) {
                    let message = format!("no guest is named `{}`", name.get_ref().0);
                    warn(&group.path, name.span(), no_guest, message);
                }
            }
            for uuid in uuids {
                let has = |guest: &GuestConfig| {
                    guest.uuid.as_ref().is_some_and(|own| own.get_ref() == uuid.get_ref())
                };
                if !self.guests.iter().any(has) {
                    let message = format!("no guest has the UUID {}", uuid.get_ref().0);
                    warn(&group.path, uuid.span(), no_guest, message);
                }
            }
            for tag in tags {
                if !self.guests.iter().any(|guest| guest.tags.contains(tag.get_ref())) {
                    let message = format!("no guest has the tag `{}`", tag.get_ref().0);
                    warn(&group.path, tag.span(), no_guest, message);
                }
            }
        }
        for guest in &self.guests {
            let name = &guest.name.get_ref().0;
            let mut all =
                self.groups.iter().zip(spans).filter(|(group, _)| group.members.names(guest));
            let Some((first, _)) = all.next() else { continue };
            for (group, (path, span)) in all {
                let message = format!(
                    "guest `{name}` belongs to group `{}` ({}:{}), not to `{}`, which names it too",
                    first.name,
                    first.path.display(),
                    first.line,
                    group.name,
                );
                warn(path, span.clone(), "W-OVERLAP", message);
            }
        }
    }
}

/// Reads all files of a folder whose name ends with `.toml`, in the order of their names; what cannot be read is found.
fn read(folder: &Path) -> (Vec<Source>, Vec<Found>) {
    let (mut sources, mut found) = (Vec::new(), Vec::new());
    let unreadable = |path: &Path, error: &io::Error| {
        Found::in_file(path, "E-READ", format!("it cannot be read: {error}"))
    };
    let mut paths = Vec::new();
    match fs::read_dir(folder) {
        Ok(entries) => {
            for entry in entries {
                match entry {
                    Ok(entry) => paths.push(entry.path()),
                    Err(error) => found.push(unreadable(folder, &error)),
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => (),
        Err(error) => found.push(unreadable(folder, &error)),
    }
    paths.retain(|path| {
        let is_hidden =
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        path.extension().is_some_and(|end| end == "toml") && !is_hidden
    });
    paths.sort();
    for path in paths {
        let read = match fs::metadata(&path) {
            // Opening a FIFO would wait for somebody who writes it.
            Ok(found) if !found.is_file() => Err(io::Error::other("it is no regular file")),
            Ok(_) => fs::read_to_string(&path),
            Err(error) => Err(error),
        };
        match read {
            Ok(text) => sources.push(Source { path, text }),
            Err(error) => found.push(unreadable(&path, &error)),
        }
    }
    (sources, found)
}

/// Of the policy of group `number` in a file that is valid.
fn lines_of_group(path: &Path, text: &str, number: usize) -> Lines {
    let mut lines = Lines::none(path, text);
    if let Ok(root) = DeTable::parse(text)
        && let Some(group) = root.get_ref().get("group").and_then(|all| all.get_ref().get(number))
        && let Some(policy) = group.get_ref().get("policy").and_then(|it| it.get_ref().as_table())
    {
        lines.add(&Breaks::of(text), "", policy);
    }
    lines
}
