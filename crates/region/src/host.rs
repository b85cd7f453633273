//! The host's side: the file behind the BAR, by pread and pwrite.
//!
//! Owns the open file and the geometry it had when it was opened. It never
//! reads the header, and hands out nothing but bytes that were copied once.

use crate::layout::{Geometry, Header, LayoutError};
use crate::mapping::Mapping;
use crate::ring;
use seawall_proto::SlotRef;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Why the host cannot use a region.
#[derive(Debug, thiserror::Error)]
pub enum HostRegionError {
    /// The file could not be opened, read or written, or was cut short by somebody.
    #[error("the region's file cannot be {action}: {reason}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the system says.
        reason: io::Error,
    },
    /// The path names something else than a regular file.
    #[error("the region's path is not a regular file")]
    NotAFile,
    /// Its length or something that the guest named does not fit the layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> HostRegionError {
    move |reason| HostRegionError::Io { action, reason }
}

/// One guest's region as the host sees it.
#[derive(Debug)]
pub struct HostRegion {
    file: File,
    geometry: Geometry,
    identity: (u64, u64),
}

impl HostRegion {
    /// Opens the file behind a guest's BAR.
    ///
    /// # Errors
    /// [`HostRegionError`] when it cannot be opened, is no regular file, or has no usable length.
    pub fn open(path: &Path) -> Result<Self, HostRegionError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(io_error("opened"))?;
        let metadata = file.metadata().map_err(io_error("examined"))?;
        if !metadata.is_file() {
            return Err(HostRegionError::NotAFile);
        }
        let geometry = Geometry::of(metadata.len())?;
        Ok(Self { file, geometry, identity: (metadata.dev(), metadata.ino()) })
    }

    /// Whether `path` still names the file that is open here. A guest that starts anew gets a new
    /// file.
    #[must_use]
    pub fn is_file_at(&self, path: &Path) -> bool {
        path.metadata().is_ok_and(|now| (now.dev(), now.ino()) == self.identity)
    }

    /// How many slots there are.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Writes the header. A driver that reads it half-written sees none.
    ///
    /// # Errors
    /// [`HostRegionError::Io`].
    pub fn write_header(&self, header: &Header) -> Result<(), HostRegionError> {
        self.file.write_all_at(&header.to_bytes(), 0).map_err(io_error("written"))
    }

    /// Copies what `slot` names into `copy`, once. `copy` must be as long as `slot.len`.
    ///
    /// # Errors
    /// [`LayoutError::Slot`] when the guest named bytes outside the slots; an I/O error when the
    /// file was cut short.
    ///
    /// # Panics
    /// When `copy` has another length than `slot.len`.
    pub fn copy_slot(&self, slot: SlotRef, copy: &mut [u8]) -> Result<(), HostRegionError> {
        assert_eq!(copy.len(), slot.len as usize, "the caller sizes the copy by the slot");
        let offset = self.geometry.offset(slot)?;
        self.file.read_exact_at(copy, offset).map_err(io_error("read"))
    }

    /// Takes the ring's memory and empties it.
    pub(crate) fn clear_ring(&self) -> Result<(), HostRegionError> {
        let zeros = vec![0; usize::try_from(ring::END - ring::START).expect("it is short")];
        self.file.write_all_at(&zeros, ring::START).map_err(io_error("written"))
    }

    /// Maps it.
    pub(crate) fn map(&self) -> Result<Mapping, HostRegionError> {
        let len = self.geometry.len();
        Mapping::new(&self.file, len, len).map_err(io_error("mapped"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::DEFAULT_LEN;

    #[test]
    fn a_file_cut_short_is_an_error_and_not_a_signal() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(DEFAULT_LEN).unwrap();
        let region = HostRegion::open(file.path()).unwrap();
        let slot = SlotRef { index: 200, len: 4096 };
        let mut copy = vec![0; 4096];
        region.copy_slot(slot, &mut copy).unwrap();
        file.as_file().set_len(4096).unwrap();
        let error = region.copy_slot(slot, &mut copy).unwrap_err();
        assert!(matches!(error, HostRegionError::Io { action: "read", .. }), "{error}");
    }

    #[test]
    fn slots_out_of_range_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(DEFAULT_LEN).unwrap();
        let region = HostRegion::open(file.path()).unwrap();
        for (index, len) in [(255, 1), (u16::MAX, 0), (0, 65_537)] {
            let error = region.copy_slot(SlotRef { index, len }, &mut vec![0; len as usize]);
            assert!(matches!(error, Err(HostRegionError::Layout(LayoutError::Slot { .. }))));
        }
    }

    #[test]
    fn a_folder_a_fifo_and_an_empty_file_are_no_regions() {
        let folder = tempfile::tempdir().unwrap();
        assert!(HostRegion::open(folder.path()).is_err());
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(
            HostRegion::open(empty.path()),
            Err(HostRegionError::Layout(LayoutError::Length { len: 0 }))
        ));
        assert!(HostRegion::open(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn a_new_file_at_the_path_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r");
        let make = |name: &Path| File::create(name).unwrap().set_len(DEFAULT_LEN).unwrap();
        make(&path);
        let region = HostRegion::open(&path).unwrap();
        assert!(region.is_file_at(&path));
        let other = folder.path().join("new");
        make(&other);
        std::fs::rename(&other, &path).unwrap();
        assert!(!region.is_file_at(&path));
    }
}
