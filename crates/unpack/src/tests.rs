use std::io::Write;

use super::*;

const EVIL: &[u8] = b"some zq-evil words";
const LIMITS: ArchiveLimits =
    ArchiveLimits { depth: 6, members: 100, member: 1 << 20, unpacked: 8 << 20 };

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        writer.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut writer = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
    writer.write_all(bytes).unwrap();
    writer.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// What `xz` made of [`EVIL`].
fn xz() -> Vec<u8> {
    let hex = "fd377a585a000004e6d6b4460200210116000000742fe5a3010011736f6d65207a712d6576696c20776f726473000000f884dec844c8d2f400012a124b0854bc1fb6f37d010000000004595a";
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

fn is_evil(bytes: &[u8]) -> Result<Outcome, ScanError> {
    let found = bytes.windows(7).any(|window| window == b"zq-evil");
    Ok(if found { Outcome::Infected(vec![Detection::new("Evil")]) } else { Outcome::Clean })
}

fn judged(content: &[u8], limits: ArchiveLimits) -> Result<Outcome, ScanError> {
    walk(&mut Cursor::new(content), &|| Ok(content), limits, &|| Ok(()), &mut is_evil)
}

/// The members that are evil.
fn evil_in(content: &[u8]) -> Vec<String> {
    match judged(content, LIMITS).unwrap() {
        Outcome::Infected(found) => found.into_iter().map(|one| one.member.unwrap()).collect(),
        Outcome::Clean => Vec::new(),
        other => panic!("{other:?}"),
    }
}

fn why_not(content: &[u8], limits: ArchiveLimits) -> String {
    match judged(content, limits) {
        Err(ScanError::Failed { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_kind_is_looked_into_and_the_member_named() {
    assert_eq!(evil_in(&tar(&[("good", b"good"), ("docs/evil.txt", EVIL)])), ["docs/evil.txt"]);
    assert_eq!(evil_in(&zip(&[("docs/evil.txt", EVIL), ("good", b"good")])), ["docs/evil.txt"]);
    for compressed in [gzip(EVIL), bzip2(EVIL), zstd(EVIL), xz()] {
        assert_eq!(evil_in(&compressed), ["contents"]);
    }
    for good in [gzip(b"good"), tar(&[("good", b"good")]), zip(&[])] {
        assert_eq!(evil_in(&good), [""; 0]);
    }
    assert_eq!(evil_in(EVIL), [""; 0], "the whole is not this function's");
}

#[test]
fn archives_in_archives_are_looked_into() {
    let inner = zip(&[("evil.txt", EVIL)]);
    let middle = tar(&[("inner.zip", &inner), ("other.bz2", &bzip2(EVIL))]);
    assert_eq!(evil_in(&gzip(&middle)), ["inner.zip!/evil.txt", "other.bz2"]);
    let outer = zip(&[("a.tar.gz", &gzip(&middle))]);
    assert_eq!(evil_in(&outer), ["a.tar.gz!/inner.zip!/evil.txt", "a.tar.gz!/other.bz2"]);
    let two = [gzip(b"good"), gzip(EVIL)].concat();
    assert_eq!(evil_in(&two), ["contents"], "one stream after the other");
}

#[test]
fn what_lies_beyond_a_limit_is_never_clean() {
    let deep = (0..7).fold(b"good".to_vec(), |inner, _| gzip(&inner));
    assert!(why_not(&deep, LIMITS).contains("more than 6 layers"));
    let good: Vec<(String, &[u8])> = (0..101).map(|at| (at.to_string(), &b"good"[..])).collect();
    let many: Vec<(&str, &[u8])> =
        good.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    for archive in [tar(&many), zip(&many)] {
        assert!(why_not(&archive, LIMITS).contains("more than 100 members"));
    }
    assert!(evil_in(&tar(&many[..100])).is_empty());
    let large = vec![b'a'; (1 << 20) + 1];
    let reason = why_not(&tar(&[("large", &large), ("good", b"good")]), LIMITS);
    assert!(reason.contains("large: larger than 1 MiB"), "{reason}");
    assert!(evil_in(&tar(&[("fits", &large[1..])])).is_empty());
    // Whatever is found elsewhere counts, and does not hide that something was not looked at.
    let both = tar(&[("large", &large), ("evil", EVIL)]);
    assert_eq!(evil_in(&both), ["evil", "large: larger than 1 MiB"]);
}

#[test]
fn a_bomb_ends_where_the_limit_is() {
    let zeros = vec![0; 1 << 20];
    let members: Vec<(String, &[u8])> = (0..9).map(|at| (at.to_string(), &zeros[..])).collect();
    let members: Vec<(&str, &[u8])> =
        members.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    for bomb in [zip(&members), gzip(&tar(&members)), tar(&members)] {
        assert!(why_not(&bomb, LIMITS).contains("more than 8 MiB unpacked"));
    }
    // A quine's children would never end.
    let nested = (0..40).fold(b"good".to_vec(), |inner, _| zip(&[("inner.zip", &inner)]));
    assert!(why_not(&nested, LIMITS).contains("more than 6 layers"));
}

#[test]
fn archives_in_memory_are_bounded_together() {
    let large: Vec<u8> =
        (0..1_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let nested = (0..3).fold(large, |inner, _| {
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        writer.start_file("in", options).unwrap();
        writer.write_all(&inner).unwrap();
        writer.finish().unwrap().into_inner()
    });
    assert!(why_not(&nested, LIMITS).contains("in!/in!/in: larger than what is left"));
}

#[test]
fn a_password_is_told_and_damage_breaks_nothing() {
    let mut locked = zip(&[("secret", EVIL)]);
    // General purpose bit 0, in the local header and in the central directory (APPNOTE.TXT 4.4.4).
    let central = locked.windows(4).position(|four| four == b"PK\x01\x02").unwrap();
    locked[6] |= 1;
    locked[central + 8] |= 1;
    let reason = why_not(&locked, LIMITS);
    assert!(reason.contains("secret: ") && reason.to_lowercase().contains("password"), "{reason}");
    let whole = [
        gzip(&tar(&[("good", b"good"), ("evil", EVIL)])),
        zip(&[("good", b"good"), ("evil", EVIL)]),
        tar(&[("good", b"good"), ("evil", EVIL)]),
        bzip2(EVIL),
        zstd(EVIL),
        xz(),
    ];
    for archive in whole {
        for at in 0..archive.len() {
            let _cut = judged(&archive[..at], LIMITS);
            let mut flipped = archive.clone();
            flipped[at] ^= 0x41;
            let _flipped = judged(&flipped, LIMITS);
        }
    }
}

#[test]
fn what_only_looks_like_an_archive_is_looked_at_as_what_it_is() {
    let mut program = vec![0; 600];
    program[257..262].copy_from_slice(b"ustar");
    program.extend_from_slice(EVIL);
    let script = [b"BZh9\n".as_slice(), EVIL].concat();
    for fake in [program, script] {
        assert_eq!(evil_in(&zip(&[("setup.exe", &fake)]))[0], "setup.exe");
    }
    let inner = gzip(b"known by its digest");
    let packed = tar(&[("in.gz", &inner)]);
    let by_digest = &mut |bytes: &[u8]| {
        Ok(if bytes == inner {
            Outcome::Infected(vec![Detection::new("D")])
        } else {
            Outcome::Clean
        })
    };
    let told = walk(&mut Cursor::new(&packed), &|| Ok(&packed), LIMITS, &|| Ok(()), by_digest);
    let Ok(Outcome::Infected(found)) = told else { panic!("{told:?}") };
    assert_eq!(found[0].member.as_deref(), Some("in.gz"));
}

#[test]
fn what_does_not_unpack_to_its_end_is_never_clean() {
    let good = [
        gzip(&tar(&[("good", &[b'x'; 5000])])),
        zip(&[("good", &[b'x'; 5000])]),
        bzip2(b"good"),
        zstd(&[b'x'; 5000]),
    ];
    for archive in good {
        assert!(evil_in(&archive).is_empty());
        for cut in [archive.len() / 2, archive.len() - 1] {
            let why = why_not(&archive[..cut], LIMITS);
            assert!(why.starts_with("not all of the archive"), "{why}");
        }
    }
    // Packed by a method that is not known here, in both headers (APPNOTE.TXT 4.4.5).
    let mut odd = zip(&[("odd", &[b'x'; 5000])]);
    let central = odd.windows(4).position(|four| four == b"PK\x01\x02").unwrap();
    odd[8] = 14;
    odd[central + 10] = 14;
    assert!(why_not(&odd, LIMITS).contains("odd: it is packed in a way"));
    // Half of the second layer's window would do.
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0, 0x98, 1, 0, 0];
    assert!(why_not(&window, LIMITS).contains("not all of the archive"));
}

#[test]
fn every_member_is_looked_at_whatever_its_archive_says_of_it() {
    // A size of one byte, and the mode of a link, in the central directory (APPNOTE.TXT 4.4.9, 4.4.15).
    let mut lying = zip(&[("evil", EVIL)]);
    let central = lying.windows(4).position(|four| four == b"PK\x01\x02").unwrap();
    lying[central + 24..][..4].copy_from_slice(&1_u32.to_le_bytes());
    lying[central + 38..][..4].copy_from_slice(&(0o120_777_u32 << 16).to_le_bytes());
    assert_eq!(evil_in(&lying), ["evil"]);
    let folder = zip(&[("evil", EVIL)]);
    let named = |bytes: &[u8]| {
        let text: Vec<u8> = bytes.to_vec();
        let at: Vec<_> = (0..text.len() - 4).filter(|at| &text[*at..at + 4] == b"evil").collect();
        let mut text = text;
        for at in [at[0], at[at.len() - 1]] {
            text[at + 3] = b'/';
        }
        text
    };
    assert_eq!(evil_in(&named(&folder)), ["evi/"]);
    let mut tar = tar(&[("evil", EVIL)]);
    tar[156] = b'a';
    let sum = tar[..512].iter().map(|byte| u32::from(*byte)).sum::<u32>()
        - tar[148..156].iter().map(|byte| u32::from(*byte)).sum::<u32>()
        + 8 * 32;
    tar[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(evil_in(&tar), ["evil"]);
    let long = format!("{}evil", "d/".repeat(120));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(EVIL.len() as u64);
    builder.append_data(&mut header, &long, EVIL).unwrap();
    assert_eq!(evil_in(&builder.into_inner().unwrap()), [long.as_str()]);
}

#[test]
fn every_frame_of_zstandard_is_unpacked() {
    let skipped = [0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let frames = [&skipped[..], &zstd(b"good"), &skipped, &zstd(EVIL)].concat();
    assert_eq!(evil_in(&frames), ["contents"]);
    let mut unsure = frames.clone();
    unsure.extend_from_slice(b"more");
    assert_eq!(evil_in(&unsure).len(), 2, "and what follows is told");
    assert!(why_not(&[&zstd(b"good")[..], b"mo"].concat(), LIMITS).contains("not all"));
}

#[test]
fn one_name_is_told_once_and_hides_nothing() {
    let pua: Vec<(String, &[u8])> = (0..40).map(|at| (at.to_string(), &b"zq-evil"[..])).collect();
    let mut all: Vec<(&str, &[u8])> =
        pua.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    all.push(("last", b"zq-worse"));
    let look = &mut |bytes: &[u8]| {
        let name = if bytes == b"zq-evil" { "Pua" } else { "Worse" };
        let hit = bytes.starts_with(b"zq-") && bytes.len() < 20;
        Ok(if hit { Outcome::Infected(vec![Detection::new(name)]) } else { Outcome::Clean })
    };
    let packed = tar(&all);
    let told = walk(&mut Cursor::new(&packed), &|| Ok(&packed), LIMITS, &|| Ok(()), look);
    let Ok(Outcome::Infected(found)) = told else { panic!("{told:?}") };
    let names: Vec<_> = found.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["Pua", "Pua", "Pua", "Worse"]);
}

#[test]
fn a_scan_ends_when_it_must() {
    let archive = tar(&[("a", b"good"), ("b", b"good")]);
    let asked = Cell::new(0);
    let late = || {
        asked.set(asked.get() + 1);
        if asked.get() > 3 { Err(ScanError::TimedOut) } else { Ok(()) }
    };
    let told = walk(&mut Cursor::new(&archive), &|| Ok(&archive), LIMITS, &late, &mut is_evil);
    assert!(matches!(told, Err(ScanError::TimedOut)), "{told:?}");
    // What was found until then counts.
    asked.set(0);
    let evil = tar(&[("evil", EVIL), ("b", b"good"), ("c", b"good")]);
    let patient =
        || if asked.replace(asked.get() + 1) > 5 { Err(ScanError::TimedOut) } else { Ok(()) };
    let told = walk(&mut Cursor::new(&evil), &|| Ok(&evil), LIMITS, &patient, &mut is_evil);
    let Ok(Outcome::Infected(found)) = told else { panic!("{told:?}") };
    assert_eq!((found[0].name.as_str(), found[1].name.as_str()), ("Evil", NOT_ALL));
    let failing = &mut |_: &[u8]| Err(ScanError::Failed { reason: "no".into() });
    assert!(
        walk(&mut Cursor::new(&archive), &|| Ok(&archive), LIMITS, &|| Ok(()), failing).is_err()
    );
}

#[test]
fn names_are_shown_without_control_characters_and_not_without_end() {
    let name = format!("{}\n\u{1b}[31mevil", "d/".repeat(400));
    let found = evil_in(&zip(&[(&name, EVIL)]));
    assert!(found[0].ends_with("\u{fffd}\u{fffd}[31mevil"), "{found:?}");
    assert!(found[0].len() <= MAX_MEMBER);
}

#[test]
fn what_the_whole_shows_too_is_told_of_the_member() {
    let (whole, other) = (Detection::new("Evil"), Detection::new("Other"));
    let member = Detection { member: Some("a".into()), ..Detection::new("Evil") };
    let both = vec![whole, other.clone()];
    let found = with_members(both.clone(), Ok(Outcome::Infected(vec![member.clone()])));
    assert_eq!(found, [member, other]);
    let late = with_members(both.clone(), Err(ScanError::TimedOut));
    let names: Vec<_> = late.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["Evil", NOT_ALL, "Other"]);
    assert_eq!(with_members(both.clone(), Ok(Outcome::Clean)), both);
}
