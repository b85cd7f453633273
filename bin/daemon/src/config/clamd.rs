//! `[clamd]`: where clamd's protocol is served, and within what bounds.

use super::{ListenAddress, within};
use serde::{Deserialize, Deserializer, Serialize, de};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// Who may reach the scanner by clamd's protocol, and for how long.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Clamd {
    pub socket: SocketPath,
    pub socket_mode: SocketMode,
    pub socket_group: String,
    pub tcp_listen: ListenAddress,
    pub scan_paths: Vec<ScanPath>,
    #[serde(deserialize_with = "within::<_, u64, 1, 65536>")]
    pub stream_max_mib: u64,
    #[serde(deserialize_with = "within::<_, u32, 1, 86400>")]
    pub idle_timeout_s: u32,
    #[serde(deserialize_with = "within::<_, u32, 1, 86400>")]
    pub read_timeout_s: u32,
    #[serde(deserialize_with = "within::<_, u32, 2, 100000>")]
    pub max_sessions: u32,
}

impl Default for Clamd {
    fn default() -> Self {
        Self {
            socket: SocketPath(None),
            socket_mode: SocketMode(0o660),
            socket_group: String::new(),
            tcp_listen: ListenAddress(None),
            scan_paths: Vec::new(),
            stream_max_mib: 100,
            idle_timeout_s: 30,
            read_timeout_s: 120,
            max_sessions: 1000,
        }
    }
}

impl Clamd {
    /// The longest stream, in bytes.
    pub fn stream_max(&self) -> u64 {
        self.stream_max_mib << 20
    }

    /// How long a client may take for its first command.
    pub fn idle_timeout(&self) -> Duration {
        Duration::from_secs(self.idle_timeout_s.into())
    }

    /// How long it may take for whatever comes then, its reading of answers included.
    pub fn read_timeout(&self) -> Duration {
        Duration::from_secs(self.read_timeout_s.into())
    }
}

/// The path of a unix socket, or empty for none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketPath(pub Option<PathBuf>);

impl Serialize for SocketPath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.as_deref().unwrap_or(Path::new("")).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SocketPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = PathBuf::deserialize(deserializer)?;
        if path.as_os_str().is_empty() {
            return Ok(Self(None));
        }
        if !path.is_absolute() {
            return Err(de::Error::custom("the path must be absolute (begin with `/`) or empty"));
        }
        Ok(Self(Some(path)))
    }
}

/// Permissions of a socket, written in octal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(pub u32);

impl Serialize for SocketMode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:04o}", self.0))
    }
}

impl<'de> Deserialize<'de> for SocketMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o777);
        mode.map(Self).ok_or_else(|| {
            de::Error::custom(format!("`{text}` is not a mode in octal, like \"0660\""))
        })
    }
}

/// A folder or file whose content clients may have scanned by its path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ScanPath(pub PathBuf);

impl<'de> Deserialize<'de> for ScanPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = PathBuf::deserialize(deserializer)?;
        let climbs = path.components().any(|part| part == Component::ParentDir);
        if !path.is_absolute() || climbs {
            return Err(de::Error::custom(format!(
                "`{}` must be an absolute path without `..`",
                path.display()
            )));
        }
        Ok(Self(path))
    }
}
