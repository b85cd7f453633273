//! The lab: real guests in QEMU on a real Linux bridge, with the Seawall service on the host side.
//!
//! A [`Lab`] is a network namespace with two bridges, a service, and guests named g1, g2, …; each
//! [`Guest`] has its own region, link, data disk and console, and runs commands for whoever asks.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use seawall_lab::{Lab, LabOptions};
//! let lab = Lab::up(LabOptions { guests: 2, ..LabOptions::for_test() })?;
//! let g1 = lab.guest("g1")?;
//! g1.push_bytes(b"plain words", "/data/file", 0o644)?;
//! assert_eq!(g1.exec(["cat", "/data/file"])?.stdout, b"plain words");
//! # Ok(()) }
//! ```
//!
//! Nothing here depends on Seawall's own crates, and the exec server in the guest does not either: the
//! lab must be able to look at a Seawall that does not work. Emulated guests tell nothing about time;
//! [`Native`] runs service and driver on this machine for that.
//!
//! Two bridges, because the link can be cut: `br0` (10.77.0.0/24) carries the guests' traffic and the
//! TCP link, `mgmt` (10.78.0.0/24) carries only the lab's own commands.

mod binaries;
mod daemon;
mod debian;
mod guest;
mod initramfs;
mod lab;
mod native;
mod net;
mod options;
mod paths;
mod process;
mod qemu;
mod qmp;
mod rules;
mod setup;
mod state;
pub mod wire;

pub use binaries::{BUILT, Binaries, Need, build_program, ensure_binaries};
pub use debian::ensure_image as ensure_debian_image;
pub use guest::{Command, FileError, Guest, Output, Running};
pub use lab::Lab;
pub use native::{Native, NativeOptions};
pub use options::{Engine, Image, Kernel, LabOptions, Link};
pub use paths::{cache_dir, labs_dir, workspace};
pub use process::Process;
pub use rules::{eicar, write_rules};
pub use setup::{ensure as ensure_setup, setup};
pub use state::{GuestState, LabState};
