//! A guest's key file: a header for a guest that cannot map its region, or has none.
//!
//! Whoever starts the guest hands the file to QEMU (`-fw_cfg name=opt/seawall/key,file=FILE`); in the
//! guest only root can read it. The service writes it when it is not there, and never changes one that
//! is: the key is new whenever somebody removes the file, which is done before the guest starts. The
//! guest cannot write it, so it may be read, unlike a region's header.

use crate::quiet::Complaints;
use crate::region::{OpenRegion, RegionError, new_header};
use seawall_region::layout::ENCODED_HEADER_LEN;
use seawall_region::{Header, LayoutError};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
enum KeyError {
    #[error("the key file cannot be {action}: {reason}")]
    Io { action: &'static str, reason: io::Error },
    #[error("the key file is readable or writable for others than its owner; remove it")]
    Open,
    #[error("the key file holds no key; remove it, and the service writes a new one")]
    NoKey(#[source] LayoutError),
    #[error(transparent)]
    Random(#[from] RegionError),
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> KeyError {
    move |reason| KeyError::Io { action, reason }
}

/// What stands at a guest's key path.
#[derive(Debug)]
pub struct KeyFile {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Current>,
    fault: Option<String>,
}

#[derive(Debug)]
struct Current {
    /// Device, inode and change time in nanoseconds.
    identity: (u64, u64, i64, i64),
    header: Arc<OpenRegion>,
}

impl KeyFile {
    pub fn new(path: PathBuf) -> Self {
        Self { path, state: Mutex::default() }
    }

    /// Why the key cannot be used, if so.
    pub fn fault(&self) -> Option<String> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).fault.clone()
    }

    /// The key as it is now; writes the file when it is not there.
    pub fn refresh(&self, guest: &str, complaints: &Complaints) -> Option<Arc<OpenRegion>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let known = state.current.as_ref().map(|current| current.identity);
        if known.is_none() || known != identity_at(&self.path) {
            match self.read_or_write(guest) {
                Ok(current) => *state = State { current: Some(current), fault: None },
                Err(error) => {
                    let fault = error.to_string();
                    if state.fault.as_ref() != Some(&fault) {
                        complaints.say(guest, &fault);
                    }
                    *state = State { current: None, fault: Some(fault) };
                }
            }
        }
        state.current.as_ref().map(|current| Arc::clone(&current.header))
    }

    fn read_or_write(&self, guest: &str) -> Result<Current, KeyError> {
        if !self.path.exists() {
            write(&self.path)?;
            tracing::info!(guest, "a new key file is written");
        }
        let mut file = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
            .open(&self.path)
            .map_err(io_error("opened"))?;
        let found = file.metadata().map_err(io_error("examined"))?;
        if found.mode() & 0o077 != 0 || !found.is_file() {
            return Err(KeyError::Open);
        }
        let mut bytes = [0; ENCODED_HEADER_LEN];
        file.read_exact(&mut bytes).map_err(io_error("read"))?;
        let header = Header::parse(&bytes).map_err(KeyError::NoKey)?;
        let header = Arc::new(OpenRegion { slots: None, header });
        Ok(Current { identity: identity(&found), header })
    }
}

fn identity(found: &std::fs::Metadata) -> (u64, u64, i64, i64) {
    (found.dev(), found.ino(), found.ctime(), found.ctime_nsec())
}

fn identity_at(path: &Path) -> Option<(u64, u64, i64, i64)> {
    path.symlink_metadata().ok().map(|found| identity(&found))
}

/// Whole or not at all: QEMU may look for it at any time.
fn write(path: &Path) -> Result<(), KeyError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let write = || {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        let header = new_header().map_err(io::Error::other)?;
        options.open(&new)?.write_all(&header.to_bytes())?;
        std::fs::rename(&new, path)
    };
    write().map_err(io_error("written"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_stays_until_its_file_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let complaints = Complaints::default();
        let key = KeyFile::new(path.clone());
        let first = key.refresh("g", &complaints).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(key.refresh("g", &complaints).unwrap().header, first.header);
        // Another start of the service reads the same.
        let again = KeyFile::new(path.clone()).refresh("g", &complaints).unwrap();
        assert_eq!(again.header, first.header);
        assert!(again.slots.is_none());
        std::fs::remove_file(&path).unwrap();
        assert_ne!(key.refresh("g", &complaints).unwrap().header, first.header);
    }

    #[test]
    fn a_file_that_is_no_key_or_not_secret_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let complaints = Complaints::default();
        let key = KeyFile::new(path.clone());
        key.refresh("g", &complaints).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(key.refresh("g", &complaints).is_none());
        assert!(key.fault().unwrap().contains("for others"));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert!(key.refresh("g", &complaints).is_some());
        std::fs::write(&path, [0; ENCODED_HEADER_LEN]).unwrap();
        assert!(key.refresh("g", &complaints).is_none());
        assert!(key.fault().unwrap().contains("holds no key"));
        std::fs::remove_file(&path).unwrap();
        assert!(key.refresh("g", &complaints).is_some());
        assert_eq!(key.fault(), None);
    }
}
