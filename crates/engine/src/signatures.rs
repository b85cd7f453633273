//! Files of signatures below a folder, found in one way by every engine.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::report::Diagnostic;

/// Deepest folder that is looked into.
pub const DEEPEST: usize = 32;

/// What lies below a folder.
#[derive(Debug, Default)]
pub struct Found {
    /// Files, in the order of their paths.
    pub files: Vec<PathBuf>,
    /// Folders that could not be read.
    pub problems: Vec<Diagnostic>,
}

/// All files below `folder` that `wanted` takes by their path. Hidden names are left out. Folders that are
/// symbolic links are not followed (they can form a circle), files are. A folder below that cannot be read,
/// or lies more than [`DEEPEST`] deep, is a problem with this code, and the others count.
///
/// # Errors
/// The folder itself cannot be read.
///
/// ```
/// let folder = tempfile::tempdir()?;
/// std::fs::write(folder.path().join("a.yar"), "rule a { condition: true }")?;
/// std::fs::write(folder.path().join("notes"), "")?;
/// let is_rule = |path: &std::path::Path| path.extension().is_some_and(|end| end == "yar");
/// let found = seawall_engine::signatures::walk(folder.path(), "yara-read", is_rule)?;
/// assert_eq!(found.files, [folder.path().join("a.yar")]);
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn walk(folder: &Path, code: &str, wanted: impl Fn(&Path) -> bool) -> io::Result<Found> {
    let mut found = Found::default();
    let mut left = vec![(folder.to_owned(), 0)];
    while let Some((next, depth)) = left.pop() {
        let listed = if depth <= DEEPEST {
            list(&next, &wanted, &mut found.files)
        } else {
            Err(io::Error::other("too many folders in one another"))
        };
        match listed {
            Ok(below) => left.extend(below.into_iter().map(|path| (path, depth + 1))),
            Err(error) if depth == 0 => return Err(error),
            Err(error) => {
                let reason = format!("cannot read the folder: {error}");
                found.problems.push(Diagnostic::error(code, reason).in_file(&next));
            }
        }
    }
    found.files.sort();
    found.problems.sort_by(|a, b| a.file.cmp(&b.file));
    Ok(found)
}

/// Adds the files of one folder, and gives the folders in it.
fn list(
    folder: &Path,
    wanted: &impl Fn(&Path) -> bool,
    files: &mut Vec<PathBuf>,
) -> io::Result<Vec<PathBuf>> {
    let mut below = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if is_hidden(&entry.file_name()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            below.push(path);
        } else if wanted(&path) {
            files.push(path);
        }
    }
    Ok(below)
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_are_found_in_order_and_neither_hidden_ones_nor_circles() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for name in ["b", "sub/deep/a", ".hidden/c", "sub/.d", "no"] {
            fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
            fs::write(root.join(name), "").unwrap();
        }
        symlink(root, root.join("sub/circle")).unwrap();
        symlink(root.join("b"), root.join("z-link")).unwrap();
        let found = walk(root, "code", |path| !path.ends_with("no")).unwrap();
        let names = ["b", "sub/circle", "sub/deep/a", "z-link"].map(|name| root.join(name));
        assert_eq!(found.files, names, "a link to a folder is a file that cannot be read");
        assert!(found.problems.is_empty());
        assert!(walk(&root.join("gone"), "code", |_| true).is_err());
    }

    #[test]
    fn folders_in_one_another_have_an_end_and_cost_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let mut deep = folder.path().to_owned();
        for level in 1..=DEEPEST + 2 {
            deep.push(level.to_string());
            fs::create_dir(&deep).unwrap();
            fs::write(deep.join("file"), "").unwrap();
        }
        let found = walk(folder.path(), "code", |_| true).unwrap();
        assert_eq!(found.files.len(), DEEPEST);
        assert_eq!(found.problems.len(), 1);
        assert_eq!(found.problems[0].code, "code");
        assert!(found.problems[0].reason.contains("too many folders"), "{:?}", found.problems);
    }
}
