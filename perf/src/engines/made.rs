//! Rules and contents: made by rule from numbers, the same in each run.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;

use crate::plan::Random;

/// Folders with files as a guest has them.
const SYSTEM: [&str; 3] = ["/usr/bin", "/usr/sbin", "/usr/lib/x86_64-linux-gnu"];
/// Larger ones would make the last scan of a pass a matter of luck.
const FILE_MAX: u64 = 8 << 20;

/// A word that looks like one, of three to five syllables.
fn word(random: &mut Random) -> String {
    const SYLLABLES: [&str; 32] = [
        "ba", "cer", "dom", "en", "fi", "gol", "hu", "in", "jak", "ko", "lu", "mor", "na", "ot",
        "pe", "qua", "ri", "sta", "tur", "un", "ver", "wim", "xo", "yel", "zan", "shi", "cra",
        "blo", "key", "log", "net", "sys",
    ];
    (0..3 + pick(random, 3)).map(|_| SYLLABLES[pick(random, 32)]).collect()
}

fn pick(random: &mut Random, below: usize) -> usize {
    (random.next() % below as u64) as usize
}

/// `count` rules in one file, in the mix of public collections: mostly texts, then byte patterns behind
/// a look at the file's first bytes and its size, some regular expressions, some rules that look at the
/// file's head alone. One in fifty asks the PE module.
pub fn write_rules(folder: &Path, count: usize) -> anyhow::Result<()> {
    let mut random = Random(1);
    let mut out = String::from("import \"pe\"\n");
    for number in 0..count {
        rule(&mut out, number, &mut random)?;
    }
    fs::create_dir_all(folder)?;
    fs::write(folder.join("made.yar"), out)?;
    Ok(())
}

fn rule(out: &mut String, number: usize, random: &mut Random) -> std::fmt::Result {
    let score = 40 + pick(random, 60);
    write!(
        out,
        "rule Made_{number} : made {{\n  meta:\n    author = \"bench\"\n    score = {score}\n"
    )?;
    // A rule in some hundreds finds what real files hold, so that reports are not all empty.
    if number % 500 == 7 {
        return out.write_str(
            "  strings:\n    $a = \"GNU General Public License\"\n    $b = \"getaddrinfo\"\n  \
             condition:\n    uint32(0) == 0x464c457f and all of them\n}\n",
        );
    }
    match pick(random, 20) {
        0..9 => {
            out.write_str("  strings:\n")?;
            for at in 0..2 + pick(random, 4) {
                let how = ["", " ascii wide", " nocase", " fullword", ""][pick(random, 5)];
                let text = match pick(random, 3) {
                    0 => format!("{}\\\\{}.exe", word(random), word(random)),
                    1 => format!("{} {} {}", word(random), word(random), word(random)),
                    _ => format!("{}_{}", word(random), word(random)),
                };
                writeln!(out, "    $s{at} = \"{text}\"{how}")?;
            }
            let condition = ["2 of them", "all of them", "filesize < 2MB and 2 of ($s*)"];
            writeln!(out, "  condition:\n    {}\n}}", condition[pick(random, 3)])
        }
        9..15 => {
            out.write_str("  strings:\n")?;
            for at in 0..1 + pick(random, 2) {
                writeln!(out, "    $h{at} = {{ {} }}", hex(random))?;
            }
            let size = 1 + pick(random, 5);
            writeln!(
                out,
                "  condition:\n    uint16(0) == 0x5a4d and filesize < {size}MB and any of them\n}}"
            )
        }
        15..17 => {
            let (one, two) = (word(random), word(random));
            writeln!(out, "  strings:\n    $r = /{one}[0-9a-f]{{4,16}}\\.(php|js|exe)/")?;
            writeln!(out, "    $s = \"{two}\"\n  condition:\n    $r and $s\n}}")
        }
        17..19 => {
            let (magic, least) = (random.next() as u32, 100 + pick(random, 100_000));
            writeln!(
                out,
                "  condition:\n    uint32(0) == {magic:#010x} and filesize > {least} and filesize < \
                 {}\n}}",
                10 * least
            )
        }
        _ => {
            let sections = 2 + pick(random, 8);
            writeln!(out, "  strings:\n    $s = \"{}\"\n  condition:", word(random))?;
            writeln!(out, "    pe.number_of_sections == {sections} and $s\n}}")
        }
    }
}

/// Bytes with a wildcard here and a jump there.
fn hex(random: &mut Random) -> String {
    let mut out = String::new();
    for at in 0..12 + pick(random, 20) {
        match pick(random, 12) {
            0 if at > 5 => out.push_str("?? "),
            1 if at > 8 && !out.ends_with("] ") => out.push_str("[2-6] "),
            _ => {
                let _infallible = write!(out, "{:02x} ", random.next() as u8);
            }
        }
    }
    // A pattern may not end with a jump.
    out + "c3"
}

/// Content that is neither all random nor all text: code, words and gaps, as in a program.
pub fn content(size: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::with_capacity(size + 512);
    bytes.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    while bytes.len() < size {
        match pick(&mut random, 4) {
            0 => bytes.extend((0..16).flat_map(|_| word(&mut random).into_bytes())),
            1 => bytes.resize(bytes.len() + 64, 0),
            _ => {
                let mut code = [0; 128];
                random.fill(&mut code);
                // Frequent bytes are small or all ones.
                code.iter_mut().filter(|byte| **byte % 3 == 0).for_each(|byte| *byte &= 0x48);
                bytes.extend_from_slice(&code);
            }
        }
    }
    bytes.truncate(size);
    bytes
}

/// Copies of this machine's own programs and libraries.
pub struct Corpus {
    pub folder: PathBuf,
    pub files: Vec<PathBuf>,
    pub bytes: u64,
}

impl Corpus {
    /// At most `most` bytes of them, in the order of their names.
    pub fn copy(folder: &Path, most: u64) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let mut corpus = Self { folder: folder.to_owned(), files: Vec::new(), bytes: 0 };
        for (path, length) in Self::find(most)? {
            let copy = folder.join(path.file_name().unwrap_or_default());
            fs::copy(&path, &copy)?;
            corpus.bytes += length;
            corpus.files.push(copy);
        }
        Ok(corpus)
    }

    /// Which these are, no two of one name, and how long each is.
    pub fn find(most: u64) -> anyhow::Result<Vec<(PathBuf, u64)>> {
        let mut found = Vec::new();
        for place in SYSTEM {
            for entry in fs::read_dir(place).into_iter().flatten() {
                let entry = entry?;
                let data = entry.metadata()?;
                if data.is_file() && (1..=FILE_MAX).contains(&data.len()) {
                    found.push((entry.file_name(), entry.path(), data.len()));
                }
            }
        }
        // By a hash of the name: of all kinds some, whatever the limit is.
        found.sort_by_key(|(name, ..)| by_chance(name));
        let (mut files, mut bytes, mut names) = (Vec::new(), 0, HashSet::new());
        for (name, path, length) in found {
            if bytes + length <= most && names.insert(name) {
                bytes += length;
                files.push((path, length));
            }
        }
        ensure!(!files.is_empty(), "no file is there to be scanned");
        Ok(files)
    }

    /// What the report says of it.
    pub fn describe(&self) -> String {
        format!("{} files, {} MiB", self.files.len(), self.bytes >> 20)
    }
}

/// A number that a name has in each run, for an order without a pattern.
pub fn by_chance(name: &OsStr) -> u64 {
    let bytes = name.as_encoded_bytes().iter();
    bytes.fold(7, |sum, byte| Random(sum ^ u64::from(*byte)).next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_the_same_each_time_and_compile() {
        let text = |count| {
            let folder = tempfile::tempdir().ok()?;
            write_rules(folder.path(), count).ok()?;
            fs::read_to_string(folder.path().join("made.yar")).ok()
        };
        let rules = text(600).unwrap_or_default();
        assert_eq!(Some(&rules), text(600).as_ref());
        let mut compiler = yara_x::Compiler::new();
        let added = compiler.add_source(rules.as_str()).map(drop);
        assert!(
            added.is_ok(),
            "{}",
            added.err().map(|error| error.to_string()).unwrap_or_default()
        );
        assert_eq!(compiler.build().iter().len(), 600);
    }
}
