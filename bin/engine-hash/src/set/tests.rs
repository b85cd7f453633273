//! Compiled files, good and bad.

use std::io::{Seek, Write};
use std::os::unix::fs::FileExt;

use super::*;
use crate::compile::Builder;
use crate::format::{MAGIC, VERSION, checksum_mut};
use crate::parse::Entry;

fn digest(hex: &str) -> Digest {
    Digest::from_hex(hex.as_bytes()).unwrap()
}

/// A digest of this kind whose bytes follow from a number; the first eight are the number.
fn made(kind: Kind, number: u64) -> Digest {
    let mut bytes = blake3::hash(&number.to_le_bytes()).as_bytes().to_vec();
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    Digest::new(kind, &bytes[..kind.length()]).unwrap()
}

fn entry(digest: Digest, size: Option<u64>, name: &str) -> Entry {
    let severity = Severity::Medium;
    Entry { digest, size, name: name.into(), family: String::new(), severity }
}

fn denied(entries: &[Entry]) -> Builder {
    let mut builder = Builder::new();
    builder.list("bad.md5".into());
    entries.iter().for_each(|one| builder.add(one, Verdict::Denied, 1).unwrap());
    builder
}

/// The compiled form in memory.
fn compiled(builder: Builder) -> Vec<u8> {
    let mut file = tempfile::tempfile().unwrap();
    builder.write(&mut file).unwrap();
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn load(bytes: &[u8]) -> Result<Set, SetError> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    Set::load(file)
}

/// With the checksum that its bytes now ask for: what an attacker would do.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut header: [u8; HEADER] = bytes[..HEADER].try_into().unwrap();
    let mut hasher = blake3::Hasher::new();
    hasher.update(checked(&header));
    hasher.update(&bytes[HEADER..]);
    checksum_mut(&mut header).copy_from_slice(hasher.finalize().as_bytes());
    bytes[..HEADER].copy_from_slice(&header);
    bytes
}

fn names(set: &Set, digest: &Digest, size: u64) -> Vec<String> {
    let mut hits = Vec::new();
    set.find(digest, size, &mut hits).unwrap();
    hits.into_iter().map(|hit| hit.name).collect()
}

fn small() -> Vec<u8> {
    let mut builder = denied(&[
        entry(made(Kind::Md5, 7), Some(3), "A"),
        entry(made(Kind::Sha1, 8), None, ""),
        Entry { family: "fam".into(), ..entry(made(Kind::Sha256, 9), None, "C") },
        entry(made(Kind::Sha256, 10), Some(300), "D"),
    ]);
    builder.list("allow/good.sha256".into());
    builder.add(&entry(made(Kind::Sha256, 11), None, ""), Verdict::Allowed, 42).unwrap();
    compiled(builder)
}

#[test]
fn every_entry_is_found_and_no_other() {
    for kind in Kind::ALL {
        for count in [1u64, 2, 7, 8, 9, 1000, 40_000] {
            // Far apart, close together, and both ends of what there is.
            let number = |at: u64| match at % 4 {
                0 => at,
                1 => u64::MAX - at,
                2 => at.wrapping_mul(0x9e37_79b9_7f4a_7c15),
                _ => 1 << 40 | at,
            };
            let all: Vec<Entry> =
                (0..count).map(|at| entry(made(kind, number(at)), None, &at.to_string())).collect();
            let set = load(&compiled(denied(&all))).unwrap();
            assert_eq!(set.len(), count);
            for one in &all {
                assert_eq!(names(&set, &one.digest, 5), [one.name.as_str()]);
            }
            for at in count..count + 1000 {
                assert_eq!(names(&set, &made(kind, number(at)), 5), [""; 0]);
            }
        }
    }
}

/// In memory all of these are one and the same.
#[test]
fn the_whole_digest_decides() {
    let with = |last: u8| {
        let mut bytes = [7; 32];
        bytes[31] = last;
        Digest::new(Kind::Sha256, &bytes).unwrap()
    };
    let all: Vec<Entry> =
        (0..=200).step_by(2).map(|last| entry(with(last), None, &last.to_string())).collect();
    let set = load(&compiled(denied(&all))).unwrap();
    for last in 0..=255 {
        let known = last <= 200 && last % 2 == 0;
        let expected: Vec<String> = known.then(|| last.to_string()).into_iter().collect();
        assert_eq!(names(&set, &with(last), 1), expected);
    }
    let set = load(&compiled(denied(&all[..1]))).unwrap();
    assert_eq!(names(&set, &with(1), 1), [""; 0]);
    assert_eq!(names(&set, &with(0), 1), ["0"]);
}

#[test]
fn the_size_decides_too() {
    let known = made(Kind::Md5, 1);
    let sizes = [Some(3), Some(4), Some(1 << 40), None];
    let named = |size: &Option<u64>| entry(known, *size, &format!("{size:?}"));
    let all: Vec<Entry> = sizes.iter().map(named).collect();
    let set = load(&compiled(denied(&all))).unwrap();
    assert_eq!(names(&set, &known, 3), ["Some(3)", "None"]);
    assert_eq!(names(&set, &known, 1 << 40), ["Some(1099511627776)", "None"]);
    assert_eq!(names(&set, &known, 5), ["None"]);
    let set = load(&compiled(denied(&all[..2]))).unwrap();
    assert_eq!(names(&set, &known, 4), ["Some(4)"]);
    assert_eq!(names(&set, &known, 5), [""; 0]);
}

#[test]
fn a_digest_that_no_size_asks_for_is_not_wanted() {
    let set = load(&small()).unwrap();
    let wants = |size| Kind::ALL.map(|kind| set.wants(kind, size));
    assert_eq!(wants(3), [true, true, true]);
    assert_eq!(wants(4), [false, true, true]);
    let set = load(&compiled(denied(&[entry(made(Kind::Sha256, 1), Some(9), "")]))).unwrap();
    let wanted = (0..10_000).filter(|size| set.wants(Kind::Sha256, *size)).collect::<Vec<u64>>();
    assert_eq!(wanted, [9]);
    assert!(!set.wants(Kind::Md5, 9));
}

#[test]
fn entries_that_say_the_same_are_one_and_the_name_stays() {
    let known = made(Kind::Sha1, 1);
    let mut builder = denied(&[
        entry(known, None, ""),
        entry(known, None, "first"),
        entry(known, None, "another"),
        entry(known, None, ""),
    ]);
    builder.add(&entry(known, None, "allowed"), Verdict::Allowed, 1).unwrap();
    let set = load(&compiled(builder)).unwrap();
    assert_eq!(set.len(), 2);
    assert_eq!(names(&set, &known, 1), ["allowed", "first"]);
    assert_eq!((set.allowed(Kind::Sha1), set.allowed(Kind::Md5)), (1, 0));
}

#[test]
fn a_hit_says_all_that_the_list_said() {
    let set = load(&small()).unwrap();
    let mut hits = Vec::new();
    for (kind, number) in [(Kind::Md5, 7), (Kind::Sha1, 8), (Kind::Sha256, 9), (Kind::Sha256, 11)] {
        set.find(&made(kind, number), 3, &mut hits).unwrap();
    }
    let hit = |verdict, name: &str, family: Option<&str>| Hit {
        verdict,
        name: name.into(),
        family: family.map(str::to_owned),
        severity: Severity::Medium,
    };
    assert_eq!(
        hits,
        [
            hit(Verdict::Denied, "A", None),
            hit(Verdict::Denied, "Hash.SHA1.0000000000000008", None),
            hit(Verdict::Denied, "C", Some("fam")),
            hit(Verdict::Allowed, "allow/good.sha256:42", None),
        ]
    );
}

#[test]
fn of_a_long_list_name_the_end_and_the_line_stay() {
    let mut builder = Builder::new();
    builder.list(format!("{}/allow.md5", "é".repeat(300)));
    builder.add(&entry(made(Kind::Md5, 1), None, ""), Verdict::Allowed, u32::MAX).unwrap();
    let set = load(&compiled(builder)).unwrap();
    let name = &names(&set, &made(Kind::Md5, 1), 1)[0];
    assert!(name.ends_with("é/allow.md5:4294967295"), "{name}");
    assert!(name.len() <= seawall_engine::report::MAX_NAME);
}

/// The layout is a promise to files that were written before.
#[test]
fn golden_bytes() {
    let known = digest("900150983cd24fb0d6963f7d28e17f72");
    let bytes = compiled(denied(&[entry(known, Some(3), "Abc")]));
    let golden = "5357484c00020000000000000000000100000000000000000000000000000000\
                  00000000000000090000000000000003\
                  00076261642e6d6435\
                  900150983cd24fb0d6963f7d28e17f72000000000000000301010300416263";
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(format!("{}{}", hex(&bytes[..48]), hex(&bytes[80..])), golden);
    assert_eq!((VERSION, MAGIC), (2, *b"SWHL"));
}

#[test]
fn damage_is_refused_wherever_it_is() {
    let good = small();
    for at in 0..good.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            let refused = load(&bytes).map(drop).unwrap_err();
            let expected = match at {
                0..4 => matches!(refused, SetError::Magic),
                4..6 => matches!(refused, SetError::Version { .. }),
                6..8 => matches!(refused, SetError::Features { .. }),
                8..48 => matches!(refused, SetError::Length { .. }),
                _ => matches!(refused, SetError::Checksum),
            };
            assert!(expected, "byte {at}: {refused:?}");
        }
    }
    for length in 0..good.len() {
        let refused = load(&good[..length]).map(drop).unwrap_err();
        let expected = match length {
            0..4 => matches!(refused, SetError::Magic),
            _ => matches!(refused, SetError::Length { .. }),
        };
        assert!(expected, "{length} bytes: {refused:?}");
    }
    let longer = [good.as_slice(), b"x"].concat();
    assert!(matches!(load(&longer), Err(SetError::Length { .. })));
}

/// A checksum is no signature: anyone can make one. Such a file is refused or says something else,
/// but nothing breaks, and it never knows content by less than a whole digest.
#[test]
fn a_hostile_file_breaks_nothing() {
    let good = small();
    let known = [
        (made(Kind::Md5, 7), 3),
        (made(Kind::Sha1, 8), 3),
        (made(Kind::Sha256, 9), 3),
        (made(Kind::Sha256, 10), 300),
        (made(Kind::Sha256, 11), 3),
    ];
    let mut loaded = 0;
    for at in 0..good.len() {
        for flip in 1..=255 {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            let Ok(set) = load(&sealed(&bytes)) else { continue };
            loaded += 1;
            for (digest, size) in known {
                let written =
                    bytes.windows(digest.bytes().len()).any(|some| some == digest.bytes());
                let hits = names(&set, &digest, size);
                assert!(hits.is_empty() || written, "byte {at}");
            }
        }
    }
    assert!(loaded > 1000, "{loaded} loaded");
}

#[test]
fn hostile_headers_cost_no_memory() {
    let good = small();
    for at in (8..48).step_by(8) {
        for number in [u64::MAX, u64::MAX / 37, 1 << 60, 1 << 33, 1 << 20, 0] {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&number.to_be_bytes());
            assert!(matches!(load(&sealed(&bytes)), Err(SetError::Length { .. })), "{at} {number}");
        }
    }
    // Sums that are as long as the file only when the numbers overflow.
    let mut bytes = good.clone();
    bytes[32..40].copy_from_slice(&(u64::MAX - 100).to_be_bytes());
    bytes[40..48].copy_from_slice(&(good.len() as u64 + 21).to_be_bytes());
    assert!(matches!(load(&sealed(&bytes)), Err(SetError::Length { .. })));
}

#[test]
fn records_out_of_order_or_without_sense_are_refused() {
    let two = compiled(denied(&[
        entry(made(Kind::Md5, 7), Some(3), "A"),
        entry(made(Kind::Md5, 8), Some(3), "B"),
    ]));
    let place = HEADER + "..bad.md5".len();
    let length = fixed_length(Kind::Md5) + 1;
    let mut swapped = two.clone();
    let (first, rest) = swapped[place..].split_at_mut(length);
    first.swap_with_slice(&mut rest[..length]);
    let what = |bytes: &[u8]| match load(&sealed(bytes)) {
        Err(SetError::Content { what }) => what,
        other => panic!("{:?}", other.map(drop)),
    };
    assert_eq!(what(&swapped), "its records are not in order");
    let mut twice = two.clone();
    twice.copy_within(place..place + length, place + length);
    assert_eq!(what(&twice), "its records are not in order");
    // Verdict, severity, name, family.
    for (at, byte) in [(24, 2), (25, 4), (26, 255), (27, 255)] {
        let mut bytes = two.clone();
        bytes[place + at] = byte;
        assert_eq!(what(&bytes), "a record makes no sense", "byte {at}");
    }
    let mut cut = two.clone();
    cut[HEADER + 1] = 200;
    assert_eq!(what(&cut), "list names are cut off");
}

/// Nobody should, but whoever does must not turn a known bad file into a clean one.
#[test]
fn a_file_changed_in_place_is_an_error_of_the_scan() {
    let known = made(Kind::Md5, 7);
    let good = compiled(denied(&[entry(known, None, "A")]));
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&good).unwrap();
    file.rewind().unwrap();
    let set = Set::load(file.try_clone().unwrap()).unwrap();
    assert_eq!(names(&set, &known, 1), ["A"]);
    file.write_all_at(&[0; 8], (HEADER + "..bad.md5".len()) as u64).unwrap();
    assert!(set.find(&known, 1, &mut Vec::new()).is_err());
    file.set_len(10).unwrap();
    assert!(set.find(&known, 1, &mut Vec::new()).is_err());
    assert_eq!(names(&set, &made(Kind::Md5, 9), 1), [""; 0]);
}

/// A record keeps the length that it had when it was loaded.
#[test]
fn a_length_changed_in_place_is_an_error_of_the_scan() {
    let all: Vec<Entry> = (0..3).map(|at| entry(made(Kind::Md5, at), None, "A")).collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&compiled(denied(&all))).unwrap();
    file.rewind().unwrap();
    let set = Set::load(file.try_clone().unwrap()).unwrap();
    let name_length = HEADER + "..bad.md5".len() + 26;
    for byte in [0, 2, 250] {
        file.write_all_at(&[byte], name_length as u64).unwrap();
        assert!(set.find(&made(Kind::Md5, 0), 1, &mut Vec::new()).is_err(), "{byte}");
        assert_eq!(names(&set, &made(Kind::Md5, 1), 1), ["A"]);
    }
}

/// In the last page of what is left zeros follow: a denied content must not become an allowed or an unknown one.
#[test]
fn wherever_a_file_is_cut_nothing_denied_is_let_through() {
    let known = made(Kind::Md5, 7);
    // A name as long as what an allowed entry has in its place.
    let good = compiled(denied(&[entry(known, None, "Abcdefgh")]));
    for end in HEADER..good.len() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&good).unwrap();
        file.rewind().unwrap();
        let set = Set::load(file.try_clone().unwrap()).unwrap();
        file.set_len(end as u64).unwrap();
        let mut hits = Vec::new();
        if set.find(&known, 1, &mut hits).is_ok() {
            assert_eq!(
                hits.iter().map(|hit| hit.verdict).collect::<Vec<_>>(),
                [Verdict::Denied],
                "{end}"
            );
        }
    }
}
