//! The configuration file: what is in it, its defaults, and what an operator is told about a wrong
//! one.
//!
//! A value that got through here is valid: names are distinct, addresses parse, paths are absolute.

mod clamd;
mod engines;
mod error;
mod exclude;
mod groups;
mod policy;
mod schedule;

pub use clamd::{Clamd, ScanPath};
pub use engines::{EngineConfig, EngineOrder, Engines, FOLDER, ScanOrder, Signatures, Takes};
pub use error::{ConfigError, Found};
pub use groups::{Governed, Group, Origin};
pub use policy::{Action, ActionOnRunning, PolicyConfig, QuarantineShare, ReasonFailMode};
pub use schedule::Schedule;

use crate::events::store::Retention;
use groups::Lines;
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
    pub on_demand: OnDemand,
    #[serde(rename = "schedule")]
    pub schedules: Vec<Schedule>,
    pub alarm: Alarm,
    pub limits: Limits,
    pub quarantine: QuarantineConfig,
    pub events: EventsConfig,
    pub clamd: Clamd,
    /// Those of `policy.d`, in their order.
    #[serde(skip)]
    pub groups: Vec<Group>,
    /// What is wrong with the groups, though they can be used.
    #[serde(skip)]
    pub warnings: Vec<Found>,
    /// Where this file sets what of the policy.
    #[serde(skip)]
    policy_lines: Lines,
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
    /// That of its libvirt domain, by which groups may name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Spanned<GuestUuid>>,
    /// By which groups may name it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<Tag>,
}

impl GuestConfig {
    /// Whether it is reached in the same way: then its session goes on.
    pub fn is_reached_as(&self, other: &Self) -> bool {
        let reached = |one: &Self| Self { uuid: None, tags: Vec::new(), ..one.clone() };
        reached(self) == reached(other)
    }

    pub fn is_named(&self, name: &str) -> bool {
        self.name.get_ref().0 == name
    }
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

/// How guests' files are scanned when somebody asks for it.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct OnDemand {
    #[serde(deserialize_with = "within::<_, usize, 1, 1000>")]
    pub guests_at_once: usize,
    #[serde(deserialize_with = "within::<_, u64, 0, 1048576>")]
    pub mib_per_second: u64,
    #[serde(deserialize_with = "within::<_, u64, 1, 2047>")]
    pub file_limit_mib: u64,
    #[serde(deserialize_with = "within::<_, u8, 0, 100>")]
    pub pressure_percent: u8,
}

impl Default for OnDemand {
    fn default() -> Self {
        Self { guests_at_once: 4, mib_per_second: 0, file_limit_mib: 1024, pressure_percent: 40 }
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

/// As libvirt and QEMU show a guest's UUID, in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct GuestUuid(pub String);

impl<'de> Deserialize<'de> for GuestUuid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?.to_ascii_lowercase();
        let mut parts = text.split('-');
        let is_hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
        let is_uuid = [8, 4, 4, 4, 12]
            .iter()
            .all(|length| parts.next().is_some_and(|part| part.len() == *length && is_hex(part)))
            && parts.next().is_none();
        if !is_uuid {
            let example = "1b4e28ba-2fa1-11d2-883f-0016d3cca427";
            return Err(de::Error::custom(format!("`{text}` is no UUID like \"{example}\"")));
        }
        Ok(Self(text))
    }
}

/// A word that guests have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Tag(pub String);

impl<'de> Deserialize<'de> for Tag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        simple_name(deserializer, "a tag").map(Self)
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
    /// The guest of this name.
    pub fn guest(&self, name: &str) -> Option<&GuestConfig> {
        self.guests.iter().find(|guest| guest.is_named(name))
    }

    /// Reads and checks the file, and the folder `policy.d` beside it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|reason| ConfigError::Unreadable { path: path.to_owned(), reason })?;
        let mut config = Self::parse(path, &text)?;
        config.policy_lines = Lines::of(path, &text, &["policy"]);
        let folder = path.parent().unwrap_or(Path::new("")).join(groups::FOLDER);
        config.read_groups(&folder)?;
        Ok(config)
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
        let mut uuids = HashSet::new();
        let mut schedules = HashSet::new();
        for schedule in &self.schedules {
            let name = schedule.name.get_ref();
            if !schedules.insert(name) {
                return Err((
                    schedule.name.span(),
                    format!("two schedules are named `{}`", name.0),
                ));
            }
            if !schedule.all && schedule.guests.is_empty() && schedule.groups.is_empty() {
                let why = format!(
                    "schedule `{}` names no guest: it needs `guests`, `groups` or `all = true`",
                    name.0
                );
                return Err((schedule.name.span(), why));
            }
        }
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
            if let Some(uuid) = &guest.uuid
                && !uuids.insert(uuid.get_ref())
            {
                let text = &uuid.get_ref().0;
                return Err((uuid.span(), format!("two guests have the UUID {text}")));
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
