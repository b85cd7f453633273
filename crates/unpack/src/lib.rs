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
//! What lies beyond a limit, or needs a password, was not looked at: unless something is found elsewhere, that is an error and
//! never clean. An archive that is damaged is looked into as far as it can be unpacked; beyond that it is
//! what everything else is, too, content that was looked at as a whole.

use std::cell::{Cell, RefCell};
use std::io::{self, BufReader, Cursor, Read, Seek, SeekFrom};

use seawall_engine::archive::{HEAD, Kind, kind};
use seawall_engine::content::Content;
use seawall_engine::runtime::{Request, ScanError};
use seawall_engine::{ArchiveLimits, Detection, MAX_MEMBER, Outcome};

/// Detections after which no further member is looked at.
const ENOUGH: usize = 16;
/// Most memory that a decoder may take for what it must look back at, in bytes. `xz -9` takes 64 MiB, `zstd -19` 8.
const WINDOW_MAX: u64 = 128 << 20;
/// Bytes of the content read at a time.
const PIECE: usize = 64 << 10;
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
        } else if request.left().is_zero() {
            Err(ScanError::TimedOut)
        } else {
            Ok(())
        }
    };
    let mut reader = BufReader::with_capacity(PIECE, Reader { content: request.content, at: 0 });
    let members = walk(&mut reader, limits, &may_go_on, &mut look);
    if found.is_empty() { members } else { Ok(Outcome::Infected(with_members(found, members))) }
}

/// What was found in a whole and, where they could be looked at, in its members.
fn with_members(whole: Vec<Detection>, members: Result<Outcome, ScanError>) -> Vec<Detection> {
    let Ok(Outcome::Infected(mut found)) = members else { return whole };
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

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::Current(by) => (self.at, by),
            SeekFrom::End(by) => (self.content.len(), by),
        };
        self.at = base.checked_add_signed(by).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

fn walk(
    content: &mut dyn Seekable,
    limits: ArchiveLimits,
    may_go_on: &dyn Fn() -> Result<(), ScanError>,
    look: &mut dyn FnMut(&[u8]) -> Result<Outcome, ScanError>,
) -> Result<Outcome, ScanError> {
    let failed = |error: io::Error| ScanError::Failed { reason: error.to_string() };
    let mut head = Vec::with_capacity(HEAD);
    content.take(HEAD as u64).read_to_end(&mut head).map_err(failed)?;
    let Some(outer) = kind(&head) else { return Ok(Outcome::Clean) };
    content.rewind().map_err(failed)?;
    let meter = Meter { limits, may_go_on, unpacked: Cell::new(0), stop: RefCell::default() };
    let mut walk =
        Walk { meter: &meter, look, members: 0, held: 0, found: Vec::new(), missed: None };
    let walked = match outer {
        Kind::Zip => walk.zip(content, "", 1),
        other => walk.stream(other, content, "", 1),
    };
    let Walk { found, missed, .. } = walk;
    match walked {
        Err(Stop::Error(error)) => return Err(error),
        Ok(()) | Err(Stop::Enough) => {}
    }
    if !found.is_empty() {
        return Ok(Outcome::Infected(found));
    }
    match missed {
        None => Ok(Outcome::Clean),
        Some(reason) => Err(ScanError::Failed {
            reason: format!("not all of the archive was looked at: {reason}"),
        }),
    }
}

/// Why no further member is looked at.
enum Stop {
    /// The whole scan ends.
    Error(ScanError),
    /// With what is known.
    Enough,
}

/// What a zip is read from: its list is at its end.
trait Seekable: Read + Seek {}

impl<T: Read + Seek> Seekable for T {}

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
        match kind {
            Kind::Tar => self.tar(from, name, depth),
            Kind::Gzip => self.member(&mut flate2::read::MultiGzDecoder::new(from), name, depth),
            Kind::Bzip2 => self.member(&mut bzip2::read::MultiBzDecoder::new(from), name, depth),
            Kind::Xz => {
                let mut decoder =
                    lzma_rust2::XzReader::new_mem_limit(from, true, (WINDOW_MAX >> 10) as u32);
                self.member(&mut decoder, name, depth)
            }
            Kind::Zstd => {
                let mut frames = ruzstd::decoding::FrameDecoder::new();
                frames.set_max_window_size(WINDOW_MAX);
                match ruzstd::decoding::StreamingDecoder::new_with_decoder(from, frames) {
                    Ok(mut decoder) => self.member(&mut decoder, name, depth),
                    Err(_) => Ok(()),
                }
            }
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

    fn tar(&mut self, from: &mut dyn Read, name: &str, depth: u32) -> Result<(), Stop> {
        let mut archive = tar::Archive::new(from);
        let Ok(entries) = archive.entries() else { return Ok(()) };
        for entry in entries {
            // What follows a damaged header cannot be found.
            let Ok(mut entry) = entry else { break };
            let kind = entry.header().entry_type();
            if !(kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse()) {
                continue;
            }
            let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            self.member(&mut entry, &below(name, &path), depth)?;
        }
        self.ended(name)
    }

    fn zip(&mut self, from: &mut dyn Seekable, name: &str, depth: u32) -> Result<(), Stop> {
        if self.is_too_deep(name, depth) {
            return Ok(());
        }
        let Ok(mut archive) = zip::ZipArchive::new(from) else { return Ok(()) };
        for at in 0..archive.len() {
            let path =
                archive.name_for_index(at).and_then(Result::ok).unwrap_or_default().into_owned();
            let path = below(name, &path);
            match archive.by_index(at) {
                Ok(entry) if !entry.is_file() => {}
                Ok(mut entry) => self.member(&mut entry, &path, depth)?,
                Err(zip::result::ZipError::UnsupportedArchive(why)) => self.miss(&path, why),
                // Damaged, and only this one.
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Has a member looked at, and what lies in it.
    fn member(&mut self, from: &mut dyn Read, name: &str, depth: u32) -> Result<(), Stop> {
        let mut from = Counted { from, meter: self.meter };
        let mut head = Vec::with_capacity(HEAD);
        // A damaged one is judged by what came of it.
        let _damaged = from.by_ref().take(HEAD as u64).read_to_end(&mut head);
        self.ended(name)?;
        let inner = kind(&head);
        if let Some(inner) = inner.filter(|inner| *inner != Kind::Zip) {
            let mut whole = Cursor::new(head).chain(from);
            return self.stream(inner, &mut whole, name, depth + 1);
        }
        self.members += 1;
        if self.members > self.meter.limits.members {
            self.miss(name, &format!("more than {} members", self.meter.limits.members));
            return Err(Stop::Enough);
        }
        // Archives in archives in memory take no more than two of the largest members.
        let largest = self.meter.limits.member;
        let most = largest.min((2 * largest).saturating_sub(self.held));
        let mut bytes = head;
        let _damaged =
            from.take(most.saturating_sub(bytes.len() as u64) + 1).read_to_end(&mut bytes);
        self.ended(name)?;
        if bytes.len() as u64 > most {
            self.miss(
                name,
                &match most == largest {
                    true => format!("larger than {} MiB", most >> 20),
                    false => "larger than what is left for archives in archives".to_owned(),
                },
            );
            return Ok(());
        }
        self.judge(&bytes, name)?;
        if inner.is_none() {
            return Ok(());
        }
        self.held += bytes.len() as u64;
        self.zip(&mut Cursor::new(&bytes), name, depth + 1)?;
        self.held -= bytes.len() as u64;
        Ok(())
    }

    fn judge(&mut self, bytes: &[u8], name: &str) -> Result<(), Stop> {
        (self.meter.may_go_on)().map_err(Stop::Error)?;
        match (self.look)(bytes).map_err(Stop::Error)? {
            Outcome::Clean | Outcome::Allowed { .. } => Ok(()),
            Outcome::Infected(found) => {
                let member = Some(readable(name));
                self.found.extend(found.into_iter().map(|one| Detection {
                    // Neither says anything of the archive.
                    offset: None,
                    cleaning: None,
                    member: member.clone(),
                    ..one
                }));
                if self.found.len() >= ENOUGH { Err(Stop::Enough) } else { Ok(()) }
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
