//! The configuration file: what is in it, its defaults, and what an operator is told about a wrong
//! one.
//!
//! A value that got through here is valid: names are distinct, addresses parse, paths are absolute.

mod clamd;
mod engines;
mod error;

pub use clamd::{Clamd, ScanPath};
pub use engines::{EngineConfig, EngineOrder, Engines, FOLDER, ScanOrder, Signatures, Takes};
pub use error::ConfigError;

use crate::events::store::Retention;
use seawall_client::PolicyInForce;
use seawall_client::text::escape;
use seawall_proto::{FailMode, Policy};
use serde::{Deserialize, Deserializer, Serialize, de};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Everything in the file.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub service: Service,
    #[serde(rename = "guest")]
    pub guests: Vec<GuestConfig>,
    #[serde(rename = "engine")]
    pub engines: Engines,
    #[serde(rename = "scan")]
    pub order: ScanOrder,
    pub signatures: Signatures,
    pub policy: PolicyConfig,
    pub alarm: Alarm,
    pub limits: Limits,
    pub quarantine: QuarantineConfig,
    pub events: EventsConfig,
    pub clamd: Clamd,
}

/// Where the service keeps and offers things.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Service {
    pub api_socket: AbsolutePath,
    pub state_dir: AbsolutePath,
    pub tcp_listen: ListenAddress,
    pub vsock_listen: bool,
}

impl Default for Service {
    fn default() -> Self {
        Self {
            api_socket: AbsolutePath(seawall_client::DEFAULT_SOCKET.into()),
            state_dir: AbsolutePath("/var/lib/seawall".into()),
            tcp_listen: ListenAddress(None),
            vsock_listen: false,
        }
    }
}

/// One guest. Two are equal when they say the same, wherever they stand in their files.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    pub name: Spanned<GuestName>,
    /// The file behind its region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Spanned<AbsolutePath>>,
    /// The file with its key, for QEMU's fw_cfg: where the guest cannot map a region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<Spanned<AbsolutePath>>,
    /// The unix socket on which its connections arrive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<Spanned<AbsolutePath>>,
    /// The unix socket to which QEMU connects its virtio-serial channel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_socket: Option<Spanned<AbsolutePath>>,
    /// Its AF_VSOCK context id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_cid: Option<Spanned<u32>>,
}

impl GuestConfig {
    pub fn is_named(&self, name: &str) -> bool {
        self.name.get_ref().0 == name
    }
}

/// What the drivers are told to do.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    pub exclude_paths: Vec<ExcludePath>,
    #[serde(deserialize_with = "within::<_, u64, 1, 65536>")]
    pub whole_file_limit_mib: u64,
    pub deadline: Deadline,
    pub fail_mode: FailModes,
    pub action: Actions,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            exclude_paths: Vec::new(),
            whole_file_limit_mib: 256,
            deadline: Deadline::default(),
            fail_mode: FailModes::default(),
            action: Actions::default(),
        }
    }
}

impl PolicyConfig {
    /// The largest file that is scanned on access, in bytes.
    pub fn whole_file_limit(&self) -> u64 {
        self.whole_file_limit_mib << 20
    }

    /// As `status` tells it, in the words of the file.
    pub fn shown(&self) -> PolicyInForce {
        let word = |value: Result<toml::Value, toml::ser::Error>| {
            let value = value.ok();
            value.as_ref().and_then(toml::Value::as_str).unwrap_or_default().to_owned()
        };
        let excluded = self.exclude_paths.iter();
        PolicyInForce {
            infected: word(toml::Value::try_from(self.action.infected)),
            fail_mode_open: word(toml::Value::try_from(self.fail_mode.open)),
            fail_mode_exec: word(toml::Value::try_from(self.fail_mode.exec)),
            whole_file_limit_bytes: self.whole_file_limit(),
            exclude_paths: excluded.map(|path| escape(path.0.as_bytes())).collect(),
        }
    }

    /// As the drivers get it.
    pub fn to_proto(&self) -> Policy {
        Policy {
            fail_open: match self.fail_mode.open {
                OpenFailMode::Open => FailMode::Open,
                OpenFailMode::Closed => FailMode::Closed,
            },
            fail_exec: match self.fail_mode.exec {
                ExecFailMode::Open => FailMode::Open,
                ExecFailMode::Closed => FailMode::Closed,
                ExecFailMode::ClosedIfUserWritable => FailMode::ClosedIfUserWritable,
            },
            open_deadline_ms: self.deadline.open_ms,
            exec_deadline_ms: self.deadline.exec_ms,
            deadline_per_64_mib_ms: self.deadline.per_64_mib_ms,
            most_deadline_ms: self.deadline.most_ms,
            whole_file_limit: self.whole_file_limit(),
            exclude_paths: self
                .exclude_paths
                .iter()
                .map(|path| path.0.clone().into_bytes().into())
                .collect(),
        }
    }
}

/// How long an access is held at most.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Deadline {
    #[serde(deserialize_with = "within::<_, u32, 10, 600000>")]
    pub open_ms: u32,
    #[serde(deserialize_with = "within::<_, u32, 10, 600000>")]
    pub exec_ms: u32,
    #[serde(deserialize_with = "within::<_, u32, 0, 600000>")]
    pub per_64_mib_ms: u32,
    #[serde(deserialize_with = "within::<_, u32, 10, 600000>")]
    pub most_ms: u32,
}

impl Default for Deadline {
    fn default() -> Self {
        Self { open_ms: 5_000, exec_ms: 10_000, per_64_mib_ms: 1_000, most_ms: 30_000 }
    }
}

/// What an access gets that no verdict decided.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct FailModes {
    pub open: OpenFailMode,
    pub exec: ExecFailMode,
}

impl Default for FailModes {
    fn default() -> Self {
        Self { open: OpenFailMode::Open, exec: ExecFailMode::ClosedIfUserWritable }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OpenFailMode {
    Open,
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExecFailMode {
    Open,
    Closed,
    ClosedIfUserWritable,
}

/// What is done with a file besides answering its access.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Actions {
    pub infected: Action,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The access is denied and the file stays.
    #[default]
    Deny,
    /// The access is denied and the file goes to quarantine.
    Quarantine,
}

/// How much the quarantine keeps.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuarantineConfig {
    #[serde(deserialize_with = "within::<_, u64, 1, 1048576>")]
    pub most_mib: u64,
    #[serde(deserialize_with = "within::<_, u32, 1, 36500>")]
    pub keep_days: u32,
}

impl Default for QuarantineConfig {
    fn default() -> Self {
        Self { most_mib: 10_240, keep_days: 90 }
    }
}

impl QuarantineConfig {
    /// The most bytes of contents on disk.
    pub fn most(&self) -> u64 {
        self.most_mib << 20
    }

    /// How long an entry is kept, in milliseconds.
    pub fn keep_ms(&self) -> i64 {
        i64::from(self.keep_days) * 24 * 3600 * 1000
    }
}

/// When a guest counts as unprotected.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(try_from = "AlarmKeys")]
pub struct Alarm {
    pub heartbeat_ms: u32,
    pub unprotected_after_ms: u32,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct AlarmKeys {
    #[serde(deserialize_with = "within::<_, u32, 50, 60000>")]
    heartbeat_ms: u32,
    #[serde(deserialize_with = "within::<_, u32, 100, 600000>")]
    unprotected_after_ms: u32,
}

impl Default for AlarmKeys {
    fn default() -> Self {
        let Alarm { heartbeat_ms, unprotected_after_ms } = Alarm::default();
        Self { heartbeat_ms, unprotected_after_ms }
    }
}

impl TryFrom<AlarmKeys> for Alarm {
    type Error = String;

    fn try_from(keys: AlarmKeys) -> Result<Self, String> {
        let AlarmKeys { heartbeat_ms, unprotected_after_ms } = keys;
        if unprotected_after_ms <= heartbeat_ms {
            return Err(format!(
                "a guest sends a heartbeat every {heartbeat_ms} ms and would be unprotected after {unprotected_after_ms} ms without one"
            ));
        }
        Ok(Self { heartbeat_ms, unprotected_after_ms })
    }
}

impl Default for Alarm {
    fn default() -> Self {
        Self { heartbeat_ms: 1_000, unprotected_after_ms: 5_000 }
    }
}

/// What the service may use.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    #[serde(deserialize_with = "within::<_, u64, 4, 1048576>")]
    pub private_copies_mib: u64,
    #[serde(deserialize_with = "within::<_, u64, 1000, 100000000>")]
    pub verdict_cache_entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { private_copies_mib: 512, verdict_cache_entries: 500_000 }
    }
}

/// How long events are kept.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventsConfig {
    #[serde(deserialize_with = "within::<_, u32, 1, 36500>")]
    pub keep_days: u32,
    #[serde(deserialize_with = "within::<_, u64, 1, 1048576>")]
    pub most_mib: u64,
}

impl Default for EventsConfig {
    fn default() -> Self {
        Self { keep_days: 90, most_mib: 1024 }
    }
}

impl EventsConfig {
    pub fn retention(&self) -> Retention {
        Retention { days: self.keep_days, most: self.most_mib << 20 }
    }
}

/// A guest's name: it stands in logs, tables and addresses.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct GuestName(pub String);

impl<'de> Deserialize<'de> for GuestName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        simple_name(deserializer, "a guest's name").map(Self)
    }
}

fn simple_name<'de, D: Deserializer<'de>>(from: D, what: &str) -> Result<String, D::Error> {
    let name = String::deserialize(from)?;
    let is_simple = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(is_simple) {
        return Err(de::Error::custom(format!(
            "{what} must be 1 to 64 letters, digits, `-`, `_` or `.`"
        )));
    }
    Ok(name)
}

/// A path that does not depend on where the service was started.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct AbsolutePath(pub PathBuf);

impl AbsolutePath {
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl<'de> Deserialize<'de> for AbsolutePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = PathBuf::deserialize(deserializer)?;
        if !path.is_absolute() {
            return Err(de::Error::custom("the path must be absolute (begin with `/`)"));
        }
        Ok(Self(path))
    }
}

/// `ADDRESS:PORT`, or empty for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenAddress(pub Option<SocketAddr>);

impl Serialize for ListenAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.map(|address| address.to_string()).unwrap_or_default())
    }
}

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Ok(Self(None));
        }
        text.parse().map(|address| Self(Some(address))).map_err(|_| {
            de::Error::custom(format!(
                "`{text}` is not an address with a port, like \"10.77.0.1:7325\""
            ))
        })
    }
}

/// A prefix of paths that are not scanned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExcludePath(pub String);

impl<'de> Deserialize<'de> for ExcludePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = String::deserialize(deserializer)?;
        let inner = path.trim_matches('/');
        let is_plain = !inner.is_empty()
            && path.starts_with('/')
            && !path.contains('\0')
            && path.len() <= 4096
            && inner.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !is_plain {
            return Err(de::Error::custom(format!(
                "`{path}` is no exclusion: it must be an absolute path other than `/`, without `.`, `..` or `//`"
            )));
        }
        Ok(Self(path))
    }
}

fn within<'de, D, T, const LEAST: u64, const MOST: u64>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    // Signed, so that a negative number is told the range and not a type.
    let value = i64::deserialize(deserializer)?;
    u64::try_from(value)
        .ok()
        .filter(|value| (LEAST..=MOST).contains(value))
        .and_then(|value| T::try_from(value).ok())
        .ok_or_else(|| de::Error::custom(format!("{value} is not from {LEAST} to {MOST}")))
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|reason| ConfigError::Unreadable { path: path.to_owned(), reason })?;
        Self::parse(path, &text)
    }

    /// Checks what was read; `path` is for the messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let wrong = |error: &toml::de::Error| ConfigError::from_toml(path, text, error);
        let config: Self = toml::from_str(text).map_err(|error| wrong(&error))?;
        config.check().map_err(|(span, message)| {
            ConfigError::at(path, text, span, "E-CONFLICT", message.as_str())
        })?;
        Ok(config)
    }

    /// What one value alone does not tell.
    fn check(&self) -> Result<(), (Range<usize>, String)> {
        let (mut names, mut paths, mut cids) = (HashSet::new(), HashSet::new(), HashSet::new());
        for guest in &self.guests {
            let name = guest.name.get_ref();
            if !names.insert(name) {
                return Err((guest.name.span(), format!("two guests are named `{}`", name.0)));
            }
            let GuestConfig { region, key_file, socket, serial_socket, .. } = guest;
            for path in [region, key_file, socket, serial_socket].into_iter().flatten() {
                if !paths.insert(path.get_ref()) {
                    let path_text = path.get_ref().0.display();
                    return Err((
                        path.span(),
                        format!(
                            "`{path_text}` is used twice; each guest has its own files and sockets"
                        ),
                    ));
                }
            }
            if let Some(cid) = &guest.vsock_cid
                && !cids.insert(*cid.get_ref())
            {
                return Err((
                    cid.span(),
                    format!("two guests have the context id {}", cid.get_ref()),
                ));
            }
            if region.is_none() && key_file.is_none() {
                return Err((guest.name.span(), "this guest has neither `region` nor `key_file`: its driver could not prove that it is the guest's root".into()));
            }
            let has_link = socket.is_some()
                || serial_socket.is_some()
                || guest.vsock_cid.is_some() && self.service.vsock_listen
                || self.service.tcp_listen.0.is_some();
            if !has_link {
                return Err((guest.name.span(), "this guest has no link: it needs a `socket`, a `serial_socket`, a `vsock_cid` with `vsock_listen = true`, or `tcp_listen`".into()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
