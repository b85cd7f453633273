//! A guest's region: the file behind its BAR, with a header that this service wrote.
//!
//! Each file that appears at the configured path gets a random name and key once. The header in the
//! file is never read: the guest can write it.

use crate::quiet::Complaints;
use seawall_proto::{Key, RegionId};
use seawall_region::{Header, HostRegion, HostRegionError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Why a guest's region cannot be used now.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    #[error(transparent)]
    File(#[from] HostRegionError),
    #[error("no random bytes for the region's key: {0}")]
    Random(getrandom::Error),
}

/// What a driver proves that it can read: a region's header, or a key file's.
#[derive(Debug)]
pub struct OpenRegion {
    /// None where the guest has the key without a region: its content comes inline.
    pub slots: Option<HostRegion>,
    pub header: Header,
}

impl OpenRegion {
    fn prepare(path: &Path) -> Result<Self, RegionError> {
        let slots = HostRegion::open(path)?;
        let header = new_header()?;
        slots.write_header(&header)?;
        Ok(Self { slots: Some(slots), header })
    }

    fn is_file_at(&self, path: &Path) -> bool {
        self.slots.as_ref().is_some_and(|slots| slots.is_file_at(path))
    }
}

/// A name and a key that nobody had before.
pub fn new_header() -> Result<Header, RegionError> {
    Ok(Header { region: RegionId(random()?), key: Key(random()?) })
}

/// Random bytes from the system.
pub fn random<const LEN: usize>() -> Result<[u8; LEN], RegionError> {
    let mut bytes = [0; LEN];
    getrandom::fill(&mut bytes).map_err(RegionError::Random)?;
    Ok(bytes)
}

/// What stands at a guest's region path.
#[derive(Debug)]
pub struct GuestRegion {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Arc<OpenRegion>>,
    fault: Option<String>,
}

impl GuestRegion {
    pub fn new(path: PathBuf) -> Self {
        Self { path, state: Mutex::default() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Why the region cannot be used, if so.
    pub fn fault(&self) -> Option<String> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).fault.clone()
    }

    /// The region as it is now; gives a new file at the path its header. A file that is gone leaves
    /// the one that was open: the guest still has it.
    pub fn refresh(&self, guest: &str, complaints: &Complaints) -> Option<Arc<OpenRegion>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_current = state.current.as_ref().is_some_and(|region| region.is_file_at(&self.path));
        if !is_current {
            match OpenRegion::prepare(&self.path) {
                Ok(region) => {
                    let slots = region.slots.as_ref().map(|slots| slots.geometry().slots());
                    tracing::info!(guest, slots, "a new region file has its header");
                    state.current = Some(Arc::new(region));
                    state.fault = None;
                }
                Err(error) => {
                    let fault = error.to_string();
                    if state.fault.as_ref() != Some(&fault) {
                        report(guest, &error, complaints);
                        state.fault = Some(fault);
                    }
                }
            }
        }
        state.current.clone()
    }
}

/// A file that is not there yet is a guest that is not running yet: nothing to act upon.
fn report(guest: &str, error: &RegionError, complaints: &Complaints) {
    match error {
        RegionError::File(HostRegionError::Io { reason, .. })
            if reason.kind() == io::ErrorKind::NotFound =>
        {
            tracing::info!(guest, "there is no region file; the guest is not running");
        }
        _ => complaints.say(guest, &error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use seawall_region::GuestRegion as Driver;

    #[test]
    fn each_new_file_gets_a_header_of_its_own_and_an_old_one_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("region");
        let region = GuestRegion::new(path.clone());
        let complaints = Complaints::default();
        let refresh = || region.refresh("g", &complaints);
        assert!(refresh().is_none());
        assert!(region.fault().is_some_and(|fault| fault.contains("cannot be opened")));

        let make = || {
            let new = folder.path().join("new");
            std::fs::File::create(&new).unwrap().set_len(1 << 20).unwrap();
            std::fs::rename(new, &path).unwrap();
        };
        make();
        let first = refresh().unwrap();
        assert_eq!(region.fault(), None);
        assert_eq!(Driver::open_file(&path).unwrap().header().unwrap(), first.header);
        assert_eq!(refresh().unwrap().header, first.header);

        make();
        let second = refresh().unwrap();
        assert_ne!(second.header, first.header);
        assert_eq!(Driver::open_file(&path).unwrap().header().unwrap(), second.header);

        std::fs::remove_file(&path).unwrap();
        assert_eq!(refresh().unwrap().header, second.header, "the guest still has it");
    }
}
