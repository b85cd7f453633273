//! A ClamAV database of our own making, in the mix of the official one.
//!
//! The official database has 8.7 million signatures: 6,647,427 in main.cvd and some 2.05 million in daily.cvd
//! (freshclam tells both; in 2024 clamscan said 8,701,623). How many are of which kind is not published in one
//! place; here nearly all are hashes of files or of sections of Windows programs, and one in twenty is a
//! pattern. Names are as long as official ones.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use crate::plan::Random;

/// Signatures of the official size.
pub const OFFICIAL: u64 = 8_700_000;

/// Kinds and their shares of a thousand.
const KINDS: [(&str, u64); 5] =
    [("made.mdb", 500), ("made.hdb", 240), ("made.hsb", 210), ("made.ndb", 15), ("made.ldb", 35)];

/// Writes `count` signatures. Gives the bytes that they take.
pub fn write(folder: &Path, count: u64) -> anyhow::Result<u64> {
    fs::create_dir_all(folder)?;
    let mut random = Random(2);
    let mut line = String::new();
    for (name, share) in KINDS {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(folder.join(name))?);
        for number in 0..count * share / 1000 {
            line.clear();
            signature(&mut line, name, number, &mut random)?;
            file.write_all(line.as_bytes())?;
        }
        file.flush()?;
    }
    // One that real files meet, so that reports are not all alike: programs that resolve names.
    let text: String = b"getaddrinfo".iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(folder.join("found.ndb"), format!("Unix.Test.Found-1-0:6:*:{text}\n"))?;
    let sizes = fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len()));
    Ok(sizes.sum::<std::io::Result<u64>>()?)
}

/// clamav's manual, "Creating signatures": hash-based, extended and logical ones.
fn signature(line: &mut String, file: &str, number: u64, random: &mut Random) -> std::fmt::Result {
    let family = ["Agent", "Generic", "Emotet", "Dropper", "Zbot", "Virut"][(number % 6) as usize];
    let size = 1000 + random.next() % 4_000_000;
    match file {
        "made.mdb" => {
            write!(line, "{size}:")?;
            hex(line, 16, random)?;
            writeln!(line, ":Win.Trojan.{family}-{}-0", 1_000_000 + number)
        }
        "made.hdb" => {
            hex(line, 16, random)?;
            writeln!(line, ":{size}:Win.Malware.{family}-{}-0", 5_000_000 + number)
        }
        "made.hsb" => {
            hex(line, 32, random)?;
            writeln!(line, ":{size}:Win.Malware.{family}-{}-0:73", 7_000_000 + number)
        }
        "made.ndb" => {
            // Windows programs, any place; some with a gap.
            write!(line, "Win.Trojan.{family}-{}:1:*:", 10_000 + number)?;
            hex(line, 20, random)?;
            if number.is_multiple_of(3) {
                line.push_str("{4-32}");
                hex(line, 12, random)?;
            }
            line.push('\n');
            Ok(())
        }
        _ => {
            write!(
                line,
                "Win.Packed.{family}-{}-0;Engine:81-255,Target:1;0&1&2;",
                9_000_000 + number
            )?;
            for part in 0..3 {
                line.push_str(if part > 0 { ";" } else { "" });
                hex(line, 12 + 4 * part, random)?;
            }
            line.push('\n');
            Ok(())
        }
    }
}

fn hex(line: &mut String, bytes: usize, random: &mut Random) -> std::fmt::Result {
    let mut buffer = [0; 32];
    random.fill(&mut buffer[..bytes]);
    buffer[..bytes].iter().try_for_each(|byte| write!(line, "{byte:02x}"))
}
