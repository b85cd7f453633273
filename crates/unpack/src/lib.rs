//! Archives, unpacked in an engine's sandbox, so that the engine sees each member by itself.
//!
//! An engine that knows nothing of archives looks at the whole content, and then has [`look_into`] show it what lies in it,
//! where the service wants that. Nothing is written anywhere: layers that can be read from front to back are,
//! and only members lie in memory, one for each layer at most.
//!
//! ```text
//!  content ──► look          a.tar.gz ──► gzip ──► tar ──► member ──► look
//!         └──► its layers                              └─► inner.zip ──► look, and its members
//! ```
//!
//! What lies beyond a limit, needs a password, is packed in a way that is not known here, or does not unpack to its end, was
//! not looked at: unless something is found elsewhere, that is an error and never clean. Each member is judged as
//! a whole too, whatever it seems to be: what only begins like an archive hides nothing.

mod zstd;

use std::cell::{Cell, RefCell};
use std::io::{self, BufReader, Cursor, Read};
use std::time::Duration;

use seawall_engine::archive::{HEAD, Kind, kind};
use seawall_engine::content::Content;
use seawall_engine::runtime::{Request, ScanError};
use seawall_engine::{ArchiveLimits, Detection, MAX_MEMBER, Outcome};

/// Raised whenever more, less or something else is looked at: verdicts depend on it.
pub const REVISION: u32 = 1;

/// Detections of different names after which no further member is looked at.
const ENOUGH: usize = 16;
/// Members of which one and the same detection is told.
const MEMBERS_TOLD: usize = 3;
/// What is found besides where not everything was looked at: no exclusion of the others hides that.
const NOT_ALL: &str = "Seawall.Archive.NotAllLookedAt";
/// Most memory that the decoder of the outermost layer may take for what it must look back at, in bytes; each
/// layer below may take half of the one above. `xz -9` takes 64 MiB, `zstd -19` 8.
const WINDOW_MAX: u64 = 128 << 20;
/// Longest name of a member, or longest list of its attributes, in a tar, in bytes.
const LONG_NAME: u64 = 64 << 10;
/// Bytes of the content read at a time.
const PIECE: usize = 64 << 10;
/// What a scan's end stays before the hard limit: the report still has to travel.
const HEAD_START: Duration = Duration::from_millis(200);
/// How a member without a name is called.
const NAMELESS: &str = "contents";

/// What a content is worth that was found to be `whole` as a whole: has `look` judge each member of the archive that it
/// is, as far as [`Metadata::archives`] wants that. What is allowed as a whole is, whatever is in it; a member
/// that `look` allows is spared, and no other. What was found in the whole and is found in a member too is told of the member.
///
/// # Errors
/// Unless something was found in the whole: those of `look`; the scan is cancelled or late; something in the archive was not
/// looked at and nothing was found elsewhere.
///
/// [`Metadata::archives`]: seawall_engine::Metadata::archives
pub fn look_into(
    request: &Request<'_>,
    whole: Outcome,
    mut look: impl FnMut(&[u8]) -> Result<Outcome, ScanError>,
) -> Result<Outcome, ScanError> {
    let found = match &whole {
        Outcome::Clean => Vec::new(),
        Outcome::Infected(found) => found.clone(),
        Outcome::Allowed { .. } => return Ok(whole),
    };
    let Some(limits) = request.metadata.archives else { return Ok(whole) };
    let may_go_on = || {
        if request.is_cancelled() {
            Err(ScanError::Cancelled)
        } else if request.left() < HEAD_START.min(request.limit / 2) {
            Err(ScanError::TimedOut)
        } else {
            Ok(())
        }
    };
    let mut reader = BufReader::with_capacity(PIECE, Reader { content: request.content, at: 0 });
    let bytes = || request.content.bytes().map_err(ScanError::from);
    let members = walk(&mut reader, &bytes, limits, &may_go_on, &mut look);
    if found.is_empty() { members } else { Ok(Outcome::Infected(with_members(found, members))) }
}

/// Second, where no bound of a report's length cuts it off.
fn not_all(reason: &str) -> Detection {
    Detection { member: Some(readable(reason)), ..Detection::new(NOT_ALL) }
}

/// What was found in a whole, which is something, and, where they could be looked at, in its members.
fn with_members(whole: Vec<Detection>, members: Result<Outcome, ScanError>) -> Vec<Detection> {
    let mut found = match members {
        Ok(Outcome::Infected(found)) => found,
        Ok(_) => return whole,
        Err(error) => {
            let mut found = whole;
            found.insert(1, not_all(&error.to_string()));
            return found;
        }
    };
    let is_told = |one: &Detection| found.iter().any(|member| member.name == one.name);
    let rest: Vec<_> = whole.into_iter().filter(|one| !is_told(one)).collect();
    found.extend(rest);
    found
}

/// A content, read like a file.
struct Reader<'c> {
    content: &'c Content,
    at: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.content.read_at(self.at, buffer).map_err(io::Error::other)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// `content` is read where front to back will do, and `bytes` where not.
fn walk<'c>(
    content: &mut dyn Read,
    bytes: &dyn Fn() -> Result<&'c [u8], ScanError>,
    limits: ArchiveLimits,
    may_go_on: &dyn Fn() -> Result<(), ScanError>,
    look: &mut dyn FnMut(&[u8]) -> Result<Outcome, ScanError>,
) -> Result<Outcome, ScanError> {
    let failed = |error: io::Error| ScanError::Failed { reason: error.to_string() };
    let mut head = Vec::with_capacity(HEAD);
    content.take(HEAD as u64).read_to_end(&mut head).map_err(failed)?;
    let Some(outer) = kind(&head) else { return Ok(Outcome::Clean) };
    let meter = Meter { limits, may_go_on, unpacked: Cell::new(0), stop: RefCell::default() };
    let mut walk = Walk {
        meter: &meter,
        look,
        members: 0,
        held: 0,
        found: Vec::new(),
        names: 0,
        missed: None,
    };
    let walked = match outer {
        Kind::Zip => walk.zip(bytes()?, "", 1),
        other => walk.stream(other, &mut Cursor::new(head).chain(content), "", 1),
    };
    let Walk { mut found, mut missed, .. } = walk;
    match walked {
        Err(Stop::Error(error)) if found.is_empty() => return Err(error),
        Err(Stop::Error(error)) => missed = Some(error.to_string()),
        Ok(()) | Err(Stop::Enough) => {}
    }
    match missed {
        None if found.is_empty() => Ok(Outcome::Clean),
        None => Ok(Outcome::Infected(found)),
        Some(reason) if found.is_empty() => Err(ScanError::Failed {
            reason: format!("not all of the archive was looked at: {reason}"),
        }),
        Some(reason) => {
            found.insert(1, not_all(&reason));
            Ok(Outcome::Infected(found))
        }
    }
}

/// Why no further member is looked at.
enum Stop {
    /// The whole scan ends.
    Error(ScanError),
    /// With what is known.
    Enough,
}

/// What all layers of a content share: how much came out of them.
struct Meter<'m> {
    limits: ArchiveLimits,
    may_go_on: &'m dyn Fn() -> Result<(), ScanError>,
    unpacked: Cell<u64>,
    /// Why reading ended with an error, where the archive is not to blame.
    stop: RefCell<Option<Ended>>,
}

/// What ended a read.
enum Ended {
    Scan(ScanError),
    /// All of [`ArchiveLimits::unpacked`] came.
    Limit,
}

/// Counts what a decoder yields.
struct Counted<'m, R> {
    from: R,
    meter: &'m Meter<'m>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let end = |ended| {
            *self.meter.stop.borrow_mut() = Some(ended);
            Err(io::Error::other("the scan ends here"))
        };
        if let Err(error) = (self.meter.may_go_on)() {
            return end(Ended::Scan(error));
        }
        let count = self.from.read(buffer)?;
        let unpacked = self.meter.unpacked.get() + count as u64;
        self.meter.unpacked.set(unpacked);
        if unpacked > self.meter.limits.unpacked {
            return end(Ended::Limit);
        }
        Ok(count)
    }
}

/// One content's layers.
struct Walk<'w> {
    meter: &'w Meter<'w>,
    look: &'w mut dyn FnMut(&[u8]) -> Result<Outcome, ScanError>,
    members: u32,
    /// Bytes of members in memory.
    held: u64,
    found: Vec<Detection>,
    /// How many names are among them.
    names: usize,
    /// The first that was not looked at, and why.
    missed: Option<String>,
}

impl Walk<'_> {
    /// Goes through what can be read from front to back. `name` is what leads to it.
    fn stream(
        &mut self,
        kind: Kind,
        from: &mut dyn Read,
        name: &str,
        depth: u32,
    ) -> Result<(), Stop> {
        if self.is_too_deep(name, depth) {
            return Ok(());
        }
        let window = WINDOW_MAX >> (depth - 1).min(32);
        match kind {
            Kind::Tar => self.tar(from, name, depth),
            Kind::Gzip => self.member(&mut flate2::read::MultiGzDecoder::new(from), name, depth),
            Kind::Bzip2 => self.member(&mut bzip2::read::MultiBzDecoder::new(from), name, depth),
            Kind::Xz => {
                let most = u32::try_from(window >> 10).unwrap_or(u32::MAX);
                let mut decoder = lzma_rust2::XzReader::new_mem_limit(from, true, most);
                self.member(&mut decoder, name, depth)
            }
            Kind::Zstd => self.member(&mut zstd::Frames::new(from, window), name, depth),
            // `member` and `walk` see to it.
            Kind::Zip => Ok(()),
        }
    }

    fn is_too_deep(&mut self, name: &str, depth: u32) -> bool {
        let most = self.meter.limits.depth;
        if depth > most {
            self.miss(name, &format!("more than {most} layers"));
        }
        depth > most
    }

    /// Every entry that has content is looked at, whatever it is said to be: programs that unpack differ in that.
    fn tar(&mut self, from: &mut dyn Read, name: &str, depth: u32) -> Result<(), Stop> {
        let mut archive = tar::Archive::new(from);
        let entries = match archive.entries() {
            Ok(entries) => entries.raw(true),
            Err(error) => {
                self.miss(name, &error.to_string());
                return Ok(());
            }
        };
        let mut long_name = None;
        for entry in entries {
            self.ended(name)?;
            let mut entry = match entry {
                Ok(entry) => entry,
                // What follows a damaged header cannot be found.
                Err(error) => {
                    self.miss(name, &error.to_string());
                    break;
                }
            };
            self.count(name)?;
            let kind = entry.header().entry_type();
            if kind.is_gnu_longname() || kind.is_pax_local_extensions() {
                let mut text = Vec::new();
                let read = entry.by_ref().take(LONG_NAME + 1).read_to_end(&mut text);
                self.ended(name)?;
                if read.is_err() || text.len() as u64 > LONG_NAME {
                    self.miss(name, "a name that is too long");
                } else if kind.is_gnu_longname() {
                    long_name = Some(text);
                } else {
                    for one in tar::PaxExtensions::new(&text).flatten() {
                        match one.key_bytes() {
                            b"path" => long_name = Some(one.value_bytes().to_vec()),
                            b"size" => self.miss(name, "a size among a member's attributes"),
                            _ => {}
                        }
                    }
                }
                continue;
            }
            let path = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
            let path = String::from_utf8_lossy(path.trim_ascii_end()).into_owned();
            let path = path.trim_end_matches('\0');
            if entry.size() > 0 {
                self.member(&mut entry, &below(name, path), depth)?;
            }
        }
        self.ended(name)
    }

    fn zip(&mut self, bytes: &[u8], name: &str, depth: u32) -> Result<(), Stop> {
        if self.is_too_deep(name, depth) {
            return Ok(());
        }
        let archive = match rawzip::ZipArchive::from_slice(bytes) {
            Ok(archive) => archive,
            Err(error) => {
                self.miss(name, &error.to_string());
                return Ok(());
            }
        };
        let mut entries = archive.entries();
        loop {
            let entry = match entries.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => return Ok(()),
                Err(error) => {
                    self.miss(name, &error.to_string());
                    return Ok(());
                }
            };
            self.count(name)?;
            if entry.compressed_size_hint() == 0 {
                continue;
            }
            let path = String::from_utf8_lossy(entry.file_path().as_bytes()).into_owned();
            let path = below(name, &path);
            if entry.flags().is_encrypted() {
                self.miss(&path, "it needs a password");
                continue;
            }
            let mut packed = match archive.get_entry(entry.wayfinder()) {
                Ok(found) => found.data(),
                Err(error) => {
                    self.miss(&path, &error.to_string());
                    continue;
                }
            };
            match entry.compression_method() {
                rawzip::CompressionMethod::STORE => self.member(&mut packed, &path, depth)?,
                rawzip::CompressionMethod::DEFLATE => {
                    self.member(&mut flate2::read::DeflateDecoder::new(packed), &path, depth)?;
                }
                _ => self.miss(&path, "it is packed in a way that is not known here"),
            }
        }
    }

    /// Counts an entry of an archive, with content or without.
    fn count(&mut self, name: &str) -> Result<(), Stop> {
        (self.meter.may_go_on)().map_err(Stop::Error)?;
        self.members += 1;
        let most = self.meter.limits.members;
        if self.members > most {
            self.miss(name, &format!("more than {most} members"));
            return Err(Stop::Enough);
        }
        Ok(())
    }

    /// Has a member looked at, and what lies in it.
    fn member(&mut self, from: &mut dyn Read, name: &str, depth: u32) -> Result<(), Stop> {
        let mut from = Counted { from, meter: self.meter };
        // Archives in archives in memory take no more than two of the largest members.
        let largest = self.meter.limits.member;
        let most = largest.min((2 * largest + 1).saturating_sub(self.held));
        let mut bytes = Vec::new();
        let read = from.by_ref().take(most + 1).read_to_end(&mut bytes);
        self.ended(name)?;
        if let Err(error) = read {
            // What came of it is looked at all the same.
            self.miss(name, &error.to_string());
        }
        let is_whole = bytes.len() as u64 <= most;
        let before = self.found.len();
        if is_whole {
            self.judge(&bytes, name)?;
        }
        let after = self.found.len();
        self.held += bytes.len() as u64;
        let held = bytes.len() as u64;
        match kind(&bytes) {
            Some(Kind::Zip) if is_whole => self.zip(&bytes, name, depth + 1)?,
            // Of a larger one that unpacks to its end all members are looked at.
            Some(inner) if inner != Kind::Zip => {
                self.stream(inner, &mut Cursor::new(bytes).chain(from), name, depth + 1)?;
            }
            _ if is_whole => {}
            _ if most == largest => self.miss(name, &format!("larger than {} MiB", most >> 20)),
            _ => self.miss(name, "larger than what is left for archives in archives"),
        }
        self.held -= held;
        // What is in a member of it is told of that.
        let (of_it, within) = self.found.split_at(after);
        let is_told = |one: &Detection| within.iter().any(|inner| inner.name == one.name);
        let kept: Vec<_> = of_it[before..].iter().filter(|one| !is_told(one)).cloned().collect();
        self.found.splice(before..after, kept);
        Ok(())
    }

    fn judge(&mut self, bytes: &[u8], name: &str) -> Result<(), Stop> {
        (self.meter.may_go_on)().map_err(Stop::Error)?;
        match (self.look)(bytes).map_err(Stop::Error)? {
            Outcome::Clean | Outcome::Allowed { .. } => Ok(()),
            Outcome::Infected(found) => {
                let member = Some(readable(name));
                for one in found {
                    let told = self.found.iter().filter(|told| told.name == one.name).count();
                    self.names += usize::from(told == 0);
                    if told < MEMBERS_TOLD {
                        // Neither says anything of the archive.
                        let (offset, cleaning) = (None, None);
                        self.found.push(Detection {
                            offset,
                            cleaning,
                            member: member.clone(),
                            ..one
                        });
                    }
                }
                if self.names < ENOUGH {
                    return Ok(());
                }
                self.miss(name, "so much is found before it that what follows is not looked at");
                Err(Stop::Enough)
            }
        }
    }

    /// Whether reading ended for a reason that is not the archive's.
    fn ended(&mut self, name: &str) -> Result<(), Stop> {
        match self.meter.stop.borrow_mut().take() {
            None => Ok(()),
            Some(Ended::Scan(error)) => Err(Stop::Error(error)),
            Some(Ended::Limit) => {
                let most = self.meter.limits.unpacked >> 20;
                self.miss(name, &format!("more than {most} MiB unpacked"));
                Err(Stop::Enough)
            }
        }
    }

    fn miss(&mut self, name: &str, why: &str) {
        self.missed.get_or_insert_with(|| format!("{}: {why}", readable(name)));
    }
}

/// What leads to a member of the archive that `name` leads to.
fn below(name: &str, member: &str) -> String {
    if name.is_empty() { member.to_owned() } else { format!("{name}!/{member}") }
}

/// A name as it can be shown: of a long one, the end.
fn readable(name: &str) -> String {
    let name = if name.is_empty() { NAMELESS } else { name };
    let name = name.replace(char::is_control, "\u{fffd}");
    let start = name.ceil_char_boundary(name.len().saturating_sub(MAX_MEMBER));
    name[start..].to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
