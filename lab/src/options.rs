//! What a lab shall look like.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::bail;
use serde::{Deserialize, Serialize};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name { $($(#[$variant_doc])* #[serde(rename = $word)] $variant),+ }

        impl $name {
            /// Every value, in the order of the help text.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word used on the command line and in files.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = anyhow::Error;

            fn from_str(word: &str) -> anyhow::Result<Self> {
                match Self::ALL.iter().find(|value| value.as_str() == word) {
                    Some(value) => Ok(*value),
                    None => bail!("`{word}` is none of {}", Self::ALL.iter().map(|v| v.as_str()).collect::<Vec<_>>().join(", ")),
                }
            }
        }
    };
}

words! {
    /// What a guest boots into.
    Image {
        /// A stock Debian kernel with our own small init.
        Initramfs = "initramfs",
        /// A full Debian 12 with systemd.
        Debian = "debian",
    }
}

words! {
    /// What scans.
    Engine {
        /// YARA-X with the lab's rules.
        Yara = "yara",
        /// clamd with the lab's signatures.
        Clamav = "clamav",
        /// The lab's hash lists.
        Hash = "hash",
    }
}

words! {
    /// The guest's kernel, by Debian's series.
    Kernel {
        /// Debian 12's own.
        V6_1 = "6.1",
        /// Debian 13's, as Debian 12 ships it too.
        V6_12 = "6.12",
    }
}

words! {
    /// What carries the messages between driver and service.
    Link {
        /// TCP over the lab's bridge.
        Tcp = "tcp",
        /// vsock through `vhost-device-vsock`.
        Vsock = "vsock",
        /// A virtio-serial channel, through a relay that the lab can cut.
        Serial = "serial",
    }
}

/// How [`Lab::up`](crate::Lab::up) builds a lab.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Several labs live side by side under different names. Letters, digits and `-`, at most 20.
    pub name: String,
    /// How many guests.
    pub guests: u32,
    /// What they boot into.
    pub image: Image,
    /// Their kernel.
    pub kernel: Kernel,
    /// Their link to the service.
    pub link: Link,
    /// Whether the guests have a region. Without one they have a key.
    pub region: bool,
    /// Whether the guests get their key by fw_cfg too, for where they cannot map their region.
    pub key: bool,
    /// Whether the driver runs in the guests.
    pub agent: bool,
    /// Whether the service runs on the host side.
    pub daemon: bool,
    /// Leaves the lab up when the [`Lab`](crate::Lab) is dropped, and its processes when ours ends.
    pub keep: bool,
    /// TOML laid over the service's generated configuration, for example `[policy.deadline]\nopen_ms = 500`.
    /// An array (such as `engine`) replaces the generated one.
    pub config: String,
    /// Rules for the engine; a generated folder when absent.
    pub rules: Option<PathBuf>,
    /// The engines, in the order in which they decide.
    pub engines: Vec<Engine>,
    /// Memory of each guest in MiB; 512, or 1024 for debian, when absent.
    pub memory_mib: Option<u32>,
    /// Words added to the guests' kernel command line.
    pub kernel_arguments: String,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            name: "lab".into(),
            guests: 1,
            image: Image::Initramfs,
            kernel: Kernel::V6_12,
            link: Link::Vsock,
            region: true,
            key: false,
            agent: true,
            daemon: true,
            keep: true,
            config: String::new(),
            rules: None,
            engines: vec![Engine::Yara],
            memory_mib: None,
            kernel_arguments: String::new(),
        }
    }
}

impl LabOptions {
    /// Defaults under a name of its own, taken down on drop.
    pub fn for_test() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self { name: format!("t{}-{count}", std::process::id()), keep: false, ..Self::default() }
    }

    /// The same without driver and service, for tests of the lab itself.
    pub fn bare() -> Self {
        Self { agent: false, daemon: false, ..Self::for_test() }
    }

    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if self.name.is_empty() || self.name.len() > 20 || !self.name.chars().all(plain) {
            bail!(
                "`{}` is no name for a lab: letters, digits and `-`, at most 20 of them",
                self.name
            );
        }
        if !(1..=200).contains(&self.guests) {
            bail!("a lab has 1 to 200 guests, not {}", self.guests);
        }
        if !self.region && !self.daemon {
            bail!("guests without a region need the service: it writes their keys");
        }
        Ok(())
    }
}
