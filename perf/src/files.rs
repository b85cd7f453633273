//! The files that are opened.
//!
//! All are there before anybody watches. A file written under the driver's eyes would be scanned
//! after its close, and its first open would not be its first look any more; and all are older than
//! two clock ticks by then, so that they can be remembered.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::plan::{Amounts, Case, Random, SIZES, Setup, What};

/// Different contents of each size that the host knows.
pub const CONTENTS: u32 = 16;

/// The files of one setup: paths as open(2) wants them.
#[derive(Debug)]
pub struct Files {
    /// For each size, one file of each content; opened again and again.
    again: Vec<(u32, Vec<CString>)>,
    /// For each case and round, files that are opened once.
    once: Vec<(Case, Vec<Vec<CString>>)>,
}

impl Files {
    /// Writes the files that the cases of `setup` need.
    pub fn write(folder: &Path, setup: Setup, amounts: &Amounts) -> anyhow::Result<Self> {
        // New contents are the same in each run: the host starts with no knowledge.
        let mut random = Random(0);
        let mut all = Self { again: Vec::new(), once: Vec::new() };
        for size in SIZES {
            // The same for each setup.
            let mut known = Random(size.into());
            let contents: Vec<Vec<u8>> = (0..CONTENTS).map(|_| content(size, &mut known)).collect();
            let write = |(n, content): (usize, &Vec<u8>)| {
                write_file(folder, &format!("again-{size}-{n}"), content)
            };
            let paths = contents.iter().enumerate().map(write).collect::<anyhow::Result<_>>()?;
            all.again.push((size, paths));
            let cases = Case::all().into_iter().enumerate().filter(|(_, case)| {
                case.setup == setup && case.size == size && case.what.needs_new_files()
            });
            for (number, case) in cases {
                let mut rounds = Vec::new();
                for round in 0..amounts.rounds {
                    let mut paths = Vec::new();
                    for n in 0..amounts.opens(&case) {
                        let name = format!("once-{number}-{round}-{n}");
                        let path = if case.what == What::KnownContent {
                            write_file(folder, &name, &contents[(n % CONTENTS) as usize])
                        } else {
                            write_file(folder, &name, &content(size, &mut random))
                        };
                        paths.push(path?);
                    }
                    rounds.push(paths);
                }
                all.once.push((case, rounds));
            }
        }
        Ok(all)
    }

    /// The files that one case opens in one round.
    pub fn of(&self, case: &Case, round: u32) -> &[CString] {
        if !case.what.needs_new_files() {
            return self.again(case.size);
        }
        let found = self.once.iter().find(|(once, _)| once == case);
        found.and_then(|(_, rounds)| rounds.get(round as usize)).map_or(&[], Vec::as_slice)
    }

    /// The files of one size that are opened again and again.
    pub fn again(&self, size: u32) -> &[CString] {
        let found = self.again.iter().find(|(of, _)| *of == size);
        found.map_or(&[], |(_, paths)| paths.as_slice())
    }
}

fn content(size: u32, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    random.fill(&mut bytes);
    bytes
}

fn write_file(folder: &Path, name: &str, content: &[u8]) -> anyhow::Result<CString> {
    let path = folder.join(name);
    fs::write(&path, content)?;
    Ok(CString::new(path.as_os_str().as_bytes())?)
}
