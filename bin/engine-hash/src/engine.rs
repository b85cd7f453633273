//! Asking the lists about content.

use std::time::Duration;

use seawall_engine::runtime::{Engine, LoadError, Request, ScanError, Scanner};
use seawall_engine::{Cleaning, Description, Detection, Outcome};

use crate::digest::{Digest, Hashers};
use crate::format::Verdict;
use crate::lists::Lists;
use crate::set::Hit;

/// Bytes hashed at a time: they stay in a core's cache while each digest takes them.
const PIECE: usize = 64 << 10;
/// Bytes after which a scan looks whether it is to end.
const LOOK: usize = 1 << 20;
/// What a scan's end stays before the hard limit: the report still has to travel.
const HEAD_START: Duration = Duration::from_millis(200);

/// Lists as an engine.
pub struct Hash {
    lists: Lists,
}

impl Hash {
    /// Takes the lists.
    pub fn new(lists: Lists) -> Self {
        Self { lists }
    }
}

impl Engine for Hash {
    fn describe(&self) -> Description {
        let (diagnostics, omitted) = self.lists.report.diagnostics();
        let plain = Description::new("hash", env!("CARGO_PKG_VERSION"), self.lists.generation);
        Description { omitted, ..plain.with_rules(self.lists.count).with_diagnostics(diagnostics) }
    }

    fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError> {
        Ok(Box::new(HashScanner { lists: &self.lists }))
    }
}

struct HashScanner<'l> {
    lists: &'l Lists,
}

impl Scanner for HashScanner<'_> {
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        let whole = self.judge(request.content.len(), |wanted| digests(request, wanted))?;
        seawall_unpack::look_into(request, whole, |member| {
            self.judge(member.len() as u64, |wanted| {
                let mut hashers = Hashers::new(wanted);
                member.chunks(PIECE).for_each(|piece| hashers.update(piece));
                Ok(hashers.finish())
            })
        })
    }
}

impl HashScanner<'_> {
    /// What the lists say of content of `size` bytes.
    fn judge(
        &self,
        size: u64,
        digests: impl FnOnce([bool; 3]) -> Result<Vec<Digest>, ScanError>,
    ) -> Result<Outcome, ScanError> {
        let wanted = self.lists.wanted(size);
        if wanted == [false; 3] {
            return Ok(Outcome::Clean);
        }
        let hits = self.lists.find(&digests(wanted)?, size).map_err(|error| ScanError::Failed {
            reason: format!("cannot read the compiled list: {error}"),
        })?;
        Ok(judge(hits))
    }
}

/// Hashes the content where it lies, or piece by piece where that would take a copy.
fn digests(request: &Request<'_>, wanted: [bool; 3]) -> Result<Vec<Digest>, ScanError> {
    let mut hashers = Hashers::new(wanted);
    let content = request.content;
    if content.is_in_place() {
        for part in content.bytes()?.chunks(LOOK) {
            may_go_on(request)?;
            part.chunks(PIECE).for_each(|piece| hashers.update(piece));
        }
    } else {
        let mut buffer = vec![0; LOOK];
        let mut at = 0;
        while at < content.len() {
            may_go_on(request)?;
            let count = content.read_at(at, &mut buffer)?;
            buffer[..count].chunks(PIECE).for_each(|piece| hashers.update(piece));
            at += count as u64;
        }
    }
    Ok(hashers.finish())
}

fn may_go_on(request: &Request<'_>) -> Result<(), ScanError> {
    if request.is_cancelled() {
        return Err(ScanError::Cancelled);
    }
    // Of a short limit half is kept for the work.
    if request.left() < HEAD_START.min(request.limit / 2) {
        return Err(ScanError::TimedOut);
    }
    Ok(())
}

/// What is allowed is not denied: that is how a list corrects another one.
fn judge(hits: Vec<Hit>) -> Outcome {
    let mut detections: Vec<Detection> = Vec::new();
    for hit in hits {
        match hit.verdict {
            Verdict::Allowed => return Outcome::Allowed { name: hit.name },
            Verdict::Denied => {
                if detections.iter().all(|one| one.name != hit.name) {
                    detections.push(Detection {
                        severity: hit.severity,
                        family: hit.family,
                        cleaning: Some(Cleaning::Delete),
                        ..Detection::new(hit.name)
                    });
                }
            }
        }
    }
    if detections.is_empty() { Outcome::Clean } else { Outcome::Infected(detections) }
}
