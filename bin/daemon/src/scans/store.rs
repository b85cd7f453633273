//! The files of scans: one each, replaced as a whole.

use super::job::{Job, Kept};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

pub struct Store {
    folder: PathBuf,
    /// Whether the last write failed, so that a full disk is told once.
    failed: AtomicBool,
    writing: Mutex<()>,
}

impl Store {
    pub fn open(folder: PathBuf) -> Self {
        if let Err(error) = fs::create_dir_all(&folder) {
            tracing::error!(%error, folder = %folder.display(), "scans are not kept over a restart");
        }
        Self { folder, failed: AtomicBool::new(false), writing: Mutex::default() }
    }

    fn path(&self, id: u64) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    /// What can be read.
    pub fn read(&self) -> Vec<Job> {
        let names = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let paths = names.map(|name| name.path());
        let files = paths.filter(|path| path.extension().is_some_and(|end| end == "json"));
        files
            .filter_map(|path| match read(&path) {
                Ok(kept) => Some(Job::of(kept)),
                Err(error) => {
                    tracing::warn!(%error, path = %path.display(), "this scan is left out");
                    None
                }
            })
            .collect()
    }

    /// Writes these and removes those. Gives the numbers of those that cannot be written.
    pub fn write(&self, changed: &[Kept], gone: &[u64]) -> Vec<u64> {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut unwritten = Vec::new();
        for id in gone {
            let _not_there = fs::remove_file(self.path(*id));
        }
        for kept in changed {
            let result = self.write_one(kept);
            let fails = result.is_err();
            unwritten.extend(fails.then_some(kept.scan.id));
            if let Err(error) = result
                && !self.failed.load(Ordering::Relaxed)
            {
                tracing::error!(%error, "a scan cannot be written; after a restart it is where it was before");
            }
            self.failed.store(fails, Ordering::Relaxed);
        }
        unwritten
    }

    fn write_one(&self, kept: &Kept) -> io::Result<()> {
        let path = self.path(kept.scan.id);
        let new = path.with_extension("new");
        let mut file = fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec(kept)?)?;
        file.sync_data()?;
        fs::rename(new, path)
    }
}

fn read(path: &Path) -> io::Result<Kept> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}
