//! Whether policy excludes a file or an access. The driver goes by it, and the host explains with it.
//!
//! A driver decides while a process waits, over as many exclusions as an operator cares to write. So each is
//! filed under one word that whatever it excludes must have: a pattern of paths under its rarest name of a
//! folder or file, everything else under its value. A decision looks up the words of one file, and compares
//! only what is filed there.

use crate::{Exclude, FailMode, Policy};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;

/// A policy that is ready to decide.
///
/// A pattern of paths begins with `/`. It means the file or folder of that path and all beneath it. Where it
/// has one of `*?[{\`, `*` stands for any part of one name, `?` for one byte of it, `[a-z]` for one of these,
/// `{a,b}` for either, `**` alone between slashes for any folders or none, and `\` takes the meaning away.
#[derive(Debug, Default)]
pub struct Rules {
    policy: Policy,
    /// By the digest of a word: the numbers of exclusions in their lists.
    filed: Vec<(u64, u32)>,
    /// Patterns that have no such word.
    wild: Vec<u32>,
    /// Whether a pattern is filed under what a name ends with.
    by_ending: bool,
}

/// What is known of a file and an access to it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts<'a> {
    /// The file's path, where it is true.
    pub path: Option<&'a [u8]>,
    /// Its owner's user id.
    pub owner: Option<u32>,
    /// The type of its file system, as in mountinfo.
    pub file_system: Option<&'a str>,
    /// Who opens it: the path of the program, where it is true, and the real user id.
    pub process: Option<(&'a [u8], u32)>,
}

/// Which exclusion counts, by its number in its list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusion {
    /// Of [`Exclude::paths`].
    Path(usize),
    /// Of [`Exclude::extensions`].
    Extension(usize),
    /// Of [`Exclude::file_systems`].
    FileSystem(usize),
    /// Of [`Exclude::owners`].
    Owner(usize),
    /// Of [`Exclude::processes`].
    Process(usize),
}

#[derive(Hash)]
enum Word<'a> {
    /// A name in a path.
    Name(&'a [u8]),
    /// What a name in a path ends with behind its last dot.
    Ending(&'a [u8]),
    Extension(&'a [u8]),
    FileSystem(&'a str),
    Owner(u32),
    Process(&'a [u8], u32),
}

impl Word<'_> {
    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

impl Deref for Rules {
    type Target = Policy;

    fn deref(&self) -> &Policy {
        &self.policy
    }
}

impl From<Policy> for Rules {
    fn from(policy: Policy) -> Self {
        let mut rules = Self { policy, ..Self::default() };
        rules.file();
        rules
    }
}

impl Rules {
    fn file(&mut self) {
        let Exclude { paths, extensions, file_systems, owners, processes } = &self.policy.exclude;
        let mut patterns_with: HashMap<u64, u32> = HashMap::new();
        for pattern in paths {
            for word in words(pattern) {
                *patterns_with.entry(word.digest()).or_default() += 1;
            }
        }
        let (mut filed, mut wild, mut by_ending) = (Vec::new(), Vec::new(), false);
        for (number, pattern) in (0..).zip(paths) {
            match words(pattern).min_by_key(|word| patterns_with.get(&word.digest())) {
                Some(rarest) => {
                    by_ending |= matches!(rarest, Word::Ending(_));
                    filed.push((rarest.digest(), number));
                }
                None => wild.push(number),
            }
        }
        let mut file = |word: Word<'_>, number| filed.push((word.digest(), number));
        (0..).zip(extensions).for_each(|(n, it)| file(Word::Extension(it), n));
        (0..).zip(file_systems).for_each(|(n, it)| file(Word::FileSystem(it), n));
        (0..).zip(owners).for_each(|(n, it)| file(Word::Owner(*it), n));
        (0..).zip(processes).for_each(|(n, it)| file(Word::Process(&it.path, it.user), n));
        filed.sort_unstable();
        filed.shrink_to_fit();
        (self.filed, self.wild, self.by_ending) = (filed, wild, by_ending);
    }

    /// The exclusion that holds for this; the first of its list, and lists in the order of [`Exclusion`].
    #[must_use]
    pub fn exclusion(&self, facts: &Facts<'_>) -> Option<Exclusion> {
        let Facts { path, owner, file_system, process } = *facts;
        let Exclude { extensions, file_systems, owners, processes, .. } = &self.policy.exclude;
        if self.filed.is_empty() && self.wild.is_empty() {
            return None;
        }
        let of_path = path.and_then(|path| self.path(path)).map(Exclusion::Path);
        of_path
            .or_else(|| {
                let path = path.filter(|_| !extensions.is_empty())?;
                let extension = extension(path)?.to_ascii_lowercase();
                let is_it = |n: &usize| extensions.get(*n).is_some_and(|it| **it == *extension);
                self.find(&Word::Extension(&extension), is_it).map(Exclusion::Extension)
            })
            .or_else(|| {
                let is_it = |n: &usize| file_systems.get(*n).map(String::as_str) == file_system;
                self.find(&Word::FileSystem(file_system?), is_it).map(Exclusion::FileSystem)
            })
            .or_else(|| {
                self.find(&Word::Owner(owner?), |n| owners.get(*n) == owner.as_ref())
                    .map(Exclusion::Owner)
            })
            .or_else(|| {
                let (path, user) = process?;
                let is_it = |n: &usize| {
                    processes.get(*n).is_some_and(|it| *it.path == *path && it.user == user)
                };
                self.find(&Word::Process(path, user), is_it).map(Exclusion::Process)
            })
    }

    /// What an access to a file with this path gets that no verdict decides, and the number of the pattern that says so.
    #[must_use]
    pub fn fail_mode(&self, path: &[u8]) -> Option<(usize, FailMode)> {
        let mut all = self.policy.fail_paths.iter().enumerate();
        all.find(|(_, it)| holds(&it.path, path)).map(|(number, it)| (number, it.mode))
    }

    /// Whether it matters who opens a file.
    #[must_use]
    pub fn ask_who_opens(&self) -> bool {
        !self.policy.exclude.processes.is_empty()
    }

    /// Whether it matters which file is opened, beyond its content and size.
    #[must_use]
    pub fn asks_which_file(&self) -> bool {
        let Exclude { paths, extensions, owners, .. } = &self.policy.exclude;
        let by_file = !paths.is_empty() || !extensions.is_empty() || !owners.is_empty();
        by_file || self.ask_who_opens() || !self.policy.fail_paths.is_empty()
    }

    /// How many patterns are compared with a path at most: those filed under one word, and those that have none.
    #[must_use]
    pub fn most_compared(&self) -> usize {
        let together = self.filed.chunk_by(|(a, _), (b, _)| a == b).map(<[_]>::len);
        together.max().unwrap_or(0) + self.wild.len()
    }

    fn path(&self, path: &[u8]) -> Option<usize> {
        let ending = |name| if self.by_ending { ending(name) } else { None };
        let words = names(path)
            .flat_map(|name| [Some(Word::Name(name)), ending(name).map(Word::Ending)])
            .flatten();
        let filed = words.flat_map(|word| self.filed(word.digest()));
        let paths = &self.policy.exclude.paths;
        let mut first = None::<usize>;
        for number in filed.chain(self.wild.iter().map(|n| *n as usize)) {
            if first.is_none_or(|first| number < first)
                && paths.get(number).is_some_and(|pattern| holds(pattern, path))
            {
                first = Some(number);
            }
        }
        first
    }

    fn find(&self, word: &Word<'_>, is_it: impl FnMut(&usize) -> bool) -> Option<usize> {
        self.filed(word.digest()).find(is_it)
    }

    fn filed(&self, digest: u64) -> impl Iterator<Item = usize> + '_ {
        let from = self.filed.partition_point(|(filed, _)| *filed < digest);
        let of_it = self.filed[from..].iter().take_while(move |(filed, _)| *filed == digest);
        of_it.map(|(_, number)| *number as usize)
    }
}

/// Whether a pattern of paths is one.
///
/// # Errors
/// Says why not.
pub fn check_pattern(pattern: &str) -> Result<(), String> {
    let names = pattern.strip_prefix('/').map(|rest| rest.strip_suffix('/').unwrap_or(rest));
    let is_plain = |names: &str| names.split('/').all(|name| !matches!(name, "" | "." | ".."));
    if !names.is_some_and(is_plain) || pattern.contains('\0') || pattern.len() > 4096 {
        return Err("it must be an absolute path other than `/`, without `.`, `..` or `//`".into());
    }
    if !is_wild(pattern.as_bytes()) {
        return Ok(());
    }
    fast_glob::validate(pattern).map_err(|error| error.to_string())?;
    // In braces a slash would make names of half a brace.
    let split = names.unwrap_or_default().split('/').any(|name| fast_glob::validate(name).is_err());
    if split { Err("`{}` and `[]` must not hold a `/`".into()) } else { Ok(()) }
}

/// Whether a pattern of detections' names is one: the words of a pattern of paths, but for `**`.
///
/// # Errors
/// Says why not.
pub fn check_name_pattern(pattern: &str) -> Result<(), String> {
    match pattern.trim_start_matches('*') {
        "" => Err("it would stand for every name".into()),
        rest if rest.starts_with('!') => Err("it begins with `!`".into()),
        _ => fast_glob::validate(pattern).map_err(|error| error.to_string()),
    }
}

/// Whether a detection's name fits a pattern.
#[must_use]
pub fn name_fits(pattern: &str, name: &str) -> bool {
    fast_glob::glob_match(pattern, name)
}

fn is_wild(pattern: &[u8]) -> bool {
    pattern.iter().any(|byte| b"*?[{\\".contains(byte))
}

fn names(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
}

/// What a file's name ends with behind its last dot. A name that begins with its only dot has none.
fn extension(path: &[u8]) -> Option<&[u8]> {
    let name = path.rsplit(|byte| *byte == b'/').next()?;
    ending(name).filter(|ending| ending.len() + 1 < name.len())
}

fn ending(name: &[u8]) -> Option<&[u8]> {
    name.iter().rposition(|byte| *byte == b'.').map(|dot| &name[dot + 1..])
}

/// The words that a path must have which this pattern means.
fn words(pattern: &[u8]) -> impl Iterator<Item = Word<'_>> {
    let is_literal = |ending: &&[u8]| !ending.iter().any(|byte| b"*?[]{},\\".contains(byte));
    names(pattern).filter_map(move |name| match is_wild(name) {
        false => Some(Word::Name(name)),
        true => ending(name).filter(is_literal).map(Word::Ending),
    })
}

/// Whether a pattern means a path or a folder above it.
fn holds(pattern: &[u8], path: &[u8]) -> bool {
    let pattern = pattern.strip_suffix(b"/").unwrap_or(pattern);
    if !is_wild(pattern) {
        let rest = path.strip_prefix(pattern);
        return rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'/');
    }
    let is_end = |at: &usize| *at == path.len() || path[*at] == b'/';
    let mut ends = (1..=path.len()).filter(is_end);
    if names(pattern).any(|name| name == b"**") {
        return ends.any(|end| fast_glob::glob_match(pattern, &path[..end]));
    }
    // Each name in the pattern stands for one in the path.
    let depth = names(pattern).count();
    ends.nth(depth - 1).is_some_and(|end| fast_glob::glob_match(pattern, &path[..end]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExcludedProcess;
    use proptest::prelude::*;
    use serde_bytes::ByteBuf;

    fn rules(paths: &[&str]) -> Rules {
        let paths = paths.iter().map(|path| ByteBuf::from(path.as_bytes())).collect();
        Policy { exclude: Exclude { paths, ..Exclude::default() }, ..Policy::default() }.into()
    }

    fn of_path(path: &str) -> Facts<'_> {
        Facts { path: Some(path.as_bytes()), ..Facts::default() }
    }

    #[test]
    fn a_pattern_means_what_it_says_and_what_is_beneath() {
        let cases: &[(&str, &[&str], &[&str])] = &[
            (
                "/var/cache",
                &["/var/cache", "/var/cache/x/y"],
                &["/var/cachet", "/var", "/x/var/cache"],
            ),
            ("/var/cache/", &["/var/cache", "/var/cache/x"], &["/var/cachet"]),
            (
                "/home/*/.cache",
                &["/home/a/.cache/x", "/home/b/.cache"],
                &["/home/a/b/.cache", "/home/.cache"],
            ),
            (
                "/**/node_modules",
                &["/node_modules/x", "/srv/a/node_modules/b/c"],
                &["/srv/node_module"],
            ),
            (
                "/srv/**/*.iso",
                &["/srv/x.iso", "/srv/a/b/.iso", "/srv/d.iso/inside"],
                &["/srv/x.iso2", "/x.iso"],
            ),
            ("/**/*.{mp4,mkv}", &["/a/b.mp4", "/b.mkv"], &["/a/b.mp3"]),
            ("/data/[a-c]?", &["/data/a1", "/data/c2/x"], &["/data/d1", "/data/a", "/data/a12"]),
            ("/srv/\\[x]", &["/srv/[x]/y"], &["/srv/x"]),
            ("/srv/a.*", &["/srv/a.b/c"], &["/srv/ab"]),
            ("/*", &["/a", "/b/c"], &[]),
        ];
        for (pattern, excluded, others) in cases {
            assert_eq!(check_pattern(pattern), Ok(()), "{pattern}");
            // Among others, under whose words it may be filed.
            let rules = rules(&["/none", pattern, "/none/srv/var/home/*/data", "/*/none.iso"]);
            for path in *excluded {
                assert_eq!(
                    rules.exclusion(&of_path(path)),
                    Some(Exclusion::Path(1)),
                    "{pattern} {path}"
                );
            }
            for path in *others {
                assert_eq!(rules.exclusion(&of_path(path)), None, "{pattern} {path}");
            }
        }
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for pattern in [
            "", "/", "//", "x", "**/x", "/a//b", "/a/../b", "/a/.", "/a[", "/{a", "/a\\",
            "/{a/b,c}", "/a\0",
        ] {
            assert!(check_pattern(pattern).is_err(), "{pattern}");
        }
        for pattern in ["/a", "/a/", "/**", "/a b", "/ä", "/a]"] {
            assert_eq!(check_pattern(pattern), Ok(()), "{pattern}");
        }
    }

    #[test]
    fn names_of_detections_fit_patterns() {
        for (pattern, name, fits) in [
            ("Eicar*", "Eicar-Test-Signature", true),
            ("PUA.*", "PUA.Win.Packer.Upx-49", true),
            ("PUA.*", "Win.PUA.x", false),
            ("Eicar", "eicar", false),
            ("{A,B}.x", "B.x", true),
        ] {
            assert_eq!(check_name_pattern(pattern), Ok(()));
            assert_eq!(name_fits(pattern, name), fits, "{pattern} {name}");
        }
        assert!(["", "*", "**", "!x", "[a"].iter().all(|it| check_name_pattern(it).is_err()));
    }

    #[test]
    fn each_kind_excludes_what_it_names_and_nothing_else() {
        let process = |path: &[u8], user| ExcludedProcess { path: ByteBuf::from(path), user };
        let exclude = Exclude {
            paths: vec![ByteBuf::from("/srv")],
            extensions: vec![ByteBuf::from("log"), ByteBuf::from("iso")],
            file_systems: vec!["squashfs".into()],
            owners: vec![7, 113],
            processes: vec![process(b"/usr/bin/rsync", 0), process(b"/usr/bin/rsync", 113)],
        };
        let rules = Rules::from(Policy { exclude, ..Policy::default() });
        let none = Facts::default();
        let iso = Facts { path: Some(b"/a/x.ISO"), ..none };
        for (facts, exclusion) in [
            (Facts { path: Some(b"/srv/x.iso"), ..none }, Some(Exclusion::Path(0))),
            (iso, Some(Exclusion::Extension(1))),
            (Facts { path: Some(b"/a.iso/x"), ..none }, None),
            (Facts { path: Some(b"/a/.iso"), ..none }, None),
            (Facts { path: Some(b"/a/iso"), ..none }, None),
            (Facts { file_system: Some("squashfs"), ..none }, Some(Exclusion::FileSystem(0))),
            (Facts { file_system: Some("ext4"), owner: Some(0), ..none }, None),
            (Facts { owner: Some(113), ..none }, Some(Exclusion::Owner(1))),
            (
                Facts { process: Some((b"/usr/bin/rsync", 113)), ..none },
                Some(Exclusion::Process(1)),
            ),
            (Facts { process: Some((b"/usr/bin/rsync", 1)), ..none }, None),
            (Facts { owner: Some(7), ..iso }, Some(Exclusion::Extension(1))),
            (none, None),
        ] {
            assert_eq!(rules.exclusion(&facts), exclusion, "{facts:?}");
        }
        assert!(rules.ask_who_opens());
    }

    #[test]
    fn ten_thousand_patterns_are_compared_with_few() {
        let many = |pattern: fn(usize) -> String| {
            let paths: Vec<_> = (0..10_000).map(pattern).collect();
            rules(&paths.iter().map(String::as_str).collect::<Vec<_>>()).most_compared()
        };
        assert_eq!(many(|n| format!("/var/lib/app/{n}")), 1);
        assert_eq!(many(|n| format!("/home/*/app{n}/**/cache")), 1);
        assert_eq!(many(|n| format!("/**/*.x{n}")), 1);
        assert_eq!(many(|n| format!("/home/user{n}*")), 10_000, "and who writes this is warned");
    }

    proptest! {
        #[test]
        fn filing_changes_nothing(
            patterns in prop::collection::vec("(/([ab]|\\*|\\*\\.[ab]|a\\.b|\\*\\*)){1,3}", 0..8),
            path in "(/[ab](\\.[ab])?){1,4}",
        ) {
            let patterns: Vec<_> = patterns.iter().map(String::as_str).collect();
            let expected = patterns.iter().position(|pattern| holds(pattern.as_bytes(), path.as_bytes()));
            prop_assert_eq!(rules(&patterns).exclusion(&of_path(&path)), expected.map(Exclusion::Path));
        }

        #[test]
        fn any_bytes_are_decided_about(pattern in any::<Vec<u8>>(), path in any::<Vec<u8>>()) {
            let exclude = Exclude { paths: vec![ByteBuf::from(pattern)], ..Exclude::default() };
            let rules = Rules::from(Policy { exclude, ..Policy::default() });
            let _either = rules.exclusion(&Facts { path: Some(&path), ..Facts::default() });
        }
    }
}
