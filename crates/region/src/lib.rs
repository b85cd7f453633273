//! The region: memory that one guest and the host share, one ivshmem-plain BAR per guest.
//!
//! The host writes a [`Header`] at its start; the rest is slots of content that the driver fills and
//! the host copies out. [`layout`] says where everything is. [`HostRegion`] is the host's side, by
//! pread and pwrite on the file behind the BAR: a file that somebody truncates gives
//! an error and not a SIGBUS. [`GuestRegion`] is the driver's side: the BAR mapped write-combining,
//! with a pool of [`Slot`]s that are filled straight from a file and never read back. Between header and slots is the
//! [`ring`], whose words both sides touch themselves.
//!
//! ```
//! use seawall_proto::{Key, RegionId, SlotRef};
//! use seawall_region::{GuestRegion, Header, HostRegion};
//! # use std::io::Write;
//!
//! # let file = tempfile::NamedTempFile::new()?;
//! # file.as_file().set_len(16 << 20)?;
//! # let mut content = tempfile::tempfile()?;
//! # content.write_all(b"hello")?;
//! let host = HostRegion::open(file.path())?;
//! host.write_header(&Header { region: RegionId([1; 16]), key: Key([2; 32]) })?;
//!
//! let guest = GuestRegion::open_file(file.path())?;
//! let mut slot = guest.take_slot().expect("all are free");
//! let len = slot.fill(&content, 0)?;
//! guest.publish();
//!
//! let mut copy = vec![0; len as usize];
//! host.copy_slot(SlotRef { index: slot.index(), len }, &mut copy)?;
//! assert_eq!(copy, b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod guard;
mod guest;
mod guest_ring;
mod host;
mod host_ring;
pub mod layout;
mod mapping;
pub mod ring;

pub use guest::{FillError, GuestRegion, GuestRegionError, Slot};
pub use guest_ring::GuestRing;
pub use host::{HostRegion, HostRegionError};
pub use host_ring::HostRing;
pub use layout::{Geometry, Header, LayoutError};
pub use ring::{Filled, HostLooks, Query, Reply};
