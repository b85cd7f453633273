//! Where content goes: through the region while there is one, else on the link.
//!
//! ```text
//!   none ──mapped, with a header──► region ──gone──► none
//! ```
//!
//! Owns the mapping and knows by which key the driver attaches: that in the region's header, else the
//! one that QEMU hands in (fw_cfg), else the last region's. A session uses the region by whose header
//! it was attached, or none. When a region comes back a new session begins with it: requests of the
//! old one may still be read by the host, so the new mapping's slots are not theirs.

use crate::driver::Driver;
use crate::ring;
use crate::session::Session;
use seawall_proto::RegionId;
use seawall_region::layout::ENCODED_HEADER_LEN;
use seawall_region::{GuestRegion, GuestRegionError, Header, LayoutError};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Pauses between attempts to map what the kernel forbids; it tells its log of each.
const FORBIDDEN_MIN: Duration = Duration::from_secs(1);
const FORBIDDEN_MAX: Duration = Duration::from_secs(60);

/// Why the driver cannot prove who it is.
#[derive(Debug, thiserror::Error)]
pub enum NoKey {
    #[error("{region}; and no key comes by fw_cfg ({}: {key})", path.display())]
    Nowhere { region: GuestRegionError, path: PathBuf, key: io::Error },
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: LayoutError },
}

/// What a session attaches with.
pub struct Credentials {
    pub region: Option<GuestRegion>,
    pub header: Header,
    /// Why there is no region.
    pub why: String,
}

/// The region, or that there is none.
#[derive(Debug)]
pub struct Region {
    path: PathBuf,
    key: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    mapped: Option<GuestRegion>,
    /// The header of the region that was there last.
    last: Option<Header>,
    /// A region that the host does not know, or no longer.
    refused: Option<RegionId>,
    /// When the kernel forbade to map which file, with what error number.
    forbidden: Option<(Instant, PathBuf, i32)>,
    pause: Duration,
}

impl Region {
    /// `path` is `auto` for the PCI device, or an ordinary file; `key` is where fw_cfg shows the key.
    pub fn new(path: PathBuf, key: PathBuf) -> Self {
        let state = State {
            mapped: None,
            last: None,
            refused: None,
            forbidden: None,
            pause: FORBIDDEN_MIN,
        };
        Self { path, key, state: Mutex::new(state) }
    }

    /// Whether the region is the PCI device's memory and not an ordinary file.
    pub fn is_device(&self) -> bool {
        self.path.as_os_str() == "auto"
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to attach with now.
    pub fn credentials(&self) -> Result<Credentials, NoKey> {
        let mut state = self.lock();
        let (region, error) = match self.look(&mut state) {
            Ok((region, header)) => (Some((region, header)), None),
            Err(error) => (None, Some(error)),
        };
        if let Some((mapped, header)) = &region
            && state.refused != Some(header.region)
        {
            let (region, header, why) = (Some(mapped.clone()), header.clone(), String::new());
            return Ok(Credentials { region, header, why });
        }
        let why = match &error {
            Some(error) => error.to_string(),
            None => "the host does not know this region".into(),
        };
        match (read_key(&self.key), region, state.last.clone(), error) {
            (Ok(bytes), ..) => {
                let wrong = |reason| NoKey::File { path: self.key.clone(), reason };
                let header = Header::parse(&bytes).map_err(wrong)?;
                Ok(Credentials { region: None, header, why })
            }
            // Refused once; but there is no other.
            (Err(_), Some((region, header)), ..) => {
                Ok(Credentials { region: Some(region), header, why: String::new() })
            }
            (Err(_), None, Some(header), _) => Ok(Credentials { region: None, header, why }),
            (Err(key), None, None, error) => {
                let region = error.unwrap_or(GuestRegionError::Gone);
                Err(NoKey::Nowhere { region, path: self.key.clone(), key })
            }
        }
    }

    /// The region and its header, mapped now if it was not.
    fn look(&self, state: &mut State) -> Result<(GuestRegion, Header), GuestRegionError> {
        if let Some(region) = &state.mapped {
            match region.header() {
                Ok(header) => {
                    state.last = Some(header.clone());
                    return Ok((region.clone(), header));
                }
                // Another device may be on the bus by now, or another file at the path.
                Err(_) => state.mapped = None,
            }
        }
        let region = self.map(state)?;
        let header = region.header()?;
        state.last = Some(header.clone());
        state.mapped = Some(region.clone());
        Ok((region, header))
    }

    fn map(&self, state: &mut State) -> Result<GuestRegion, GuestRegionError> {
        if let Some((at, path, errno)) = &state.forbidden
            && at.elapsed() < state.pause
        {
            let (path, reason) = (path.clone(), io::Error::from_raw_os_error(*errno));
            return Err(GuestRegionError::Io { path, action: "mapped", reason });
        }
        let mapped = if self.is_device() {
            GuestRegion::open_pci()
        } else {
            GuestRegion::open_file(&self.path)
        };
        match &mapped {
            Err(GuestRegionError::Io { path, reason, .. })
                if reason.kind() == io::ErrorKind::PermissionDenied =>
            {
                if state.forbidden.is_some() {
                    state.pause = (state.pause * 2).min(FORBIDDEN_MAX);
                }
                let errno = reason.raw_os_error().unwrap_or_default();
                state.forbidden = Some((Instant::now(), path.clone(), errno));
            }
            _ => (state.forbidden, state.pause) = (None, FORBIDDEN_MIN),
        }
        mapped
    }

    /// The host knows no region, or key, of this name.
    pub fn refused(&self, region: RegionId) {
        self.lock().refused = Some(region);
    }

    /// Whether a region can be used that a session without one does not use.
    fn is_back(&self) -> bool {
        let mut state = self.lock();
        let refused = state.refused;
        self.look(&mut state).is_ok_and(|(_, header)| refused != Some(header.region))
    }

    /// The region is gone.
    fn lose(&self) {
        self.lock().mapped = None;
    }
}

fn read_key(path: &Path) -> io::Result<[u8; ENCODED_HEADER_LEN]> {
    let mut bytes = [0; ENCODED_HEADER_LEN];
    File::open(path)?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The session's region is gone: it goes on without.
pub fn lose(driver: &Driver, session: &Session) {
    driver.region.lose();
    ring::end(driver, session);
    if session.lose_region() {
        tracing::warn!("the region is gone; content travels on the link until it is back");
    }
}

/// Looks whether the region went or came back. Done about once a second.
pub fn look(driver: &Driver, session: &Session) {
    match session.region() {
        Some(region) if !region.is_there() => lose(driver, session),
        Some(_) => (),
        None if driver.region.is_back() => {
            tracing::info!("there is a region; a new session begins with it");
            session.end();
        }
        None => (),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use seawall_proto::Key;
    use std::fs;

    fn header(n: u8) -> Header {
        Header { region: RegionId([n; 16]), key: Key([n; 32]) }
    }

    fn make(path: &Path, header: &Header) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.resize(1 << 20, 0);
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn the_region_comes_first_then_the_key_then_the_last_region() {
        let folder = tempfile::tempdir().unwrap();
        let (path, key) = (folder.path().join("region"), folder.path().join("key"));
        let region = Region::new(path.clone(), key.clone());
        let error = region.credentials().err().unwrap().to_string();
        assert!(error.contains("region") && error.contains("fw_cfg"), "{error}");
        make(&path, &header(1));
        fs::write(&key, header(2).to_bytes()).unwrap();
        let with = region.credentials().unwrap();
        assert!(with.region.is_some() && with.header == header(1));
        assert!(!region.is_back() || with.region.is_some());

        fs::remove_file(&path).unwrap();
        region.lose();
        let with = region.credentials().unwrap();
        assert!(with.region.is_none() && with.header == header(2));
        assert!(with.why.contains("opened"), "{}", with.why);
        assert!(!region.is_back());
        fs::remove_file(&key).unwrap();
        let with = region.credentials().unwrap();
        assert!(with.region.is_none() && with.header == header(1), "the last region's");

        make(&path, &header(3));
        assert!(region.is_back());
        let with = region.credentials().unwrap();
        assert!(with.region.is_some() && with.header == header(3));
    }

    #[test]
    fn a_region_that_the_host_does_not_know_gives_way_to_the_key() {
        let folder = tempfile::tempdir().unwrap();
        let (path, key) = (folder.path().join("region"), folder.path().join("key"));
        make(&path, &header(1));
        let region = Region::new(path.clone(), key.clone());
        region.refused(header(1).region);
        assert_eq!(region.credentials().unwrap().header, header(1), "there is no other");
        fs::write(&key, header(2).to_bytes()).unwrap();
        let with = region.credentials().unwrap();
        assert!(with.region.is_none() && with.header == header(2));
        assert!(!region.is_back());
        make(&path, &header(4));
        assert!(region.is_back());
    }
}
