//! What the configuration says of engines and their signatures.

use super::{AbsolutePath, simple_name, within};
use serde::{Deserialize, Deserializer, Serialize, de};
use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

/// Stands in an engine's command for the folder with its part of the signature set.
pub const FOLDER: &str = "{signatures}";

/// The engines, in the order in which they decide; at least one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Engines(pub Vec<EngineConfig>);

impl Default for Engines {
    fn default() -> Self {
        Self(vec![EngineConfig {
            name: "yara".into(),
            command: ["seawall-engine-yara", "--rules", FOLDER].map(Into::into).into(),
            signatures: Takes::Kind(Kind::Yara),
            threads: 0,
            memory_mib: EngineConfig::memory_mib(),
            scan_timeout_ms: EngineConfig::scan_timeout_ms(),
            load_timeout_s: EngineConfig::load_timeout_s(),
            spare: false,
            may_allow: false,
        }])
    }
}

impl<'de> Deserialize<'de> for Engines {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let engines = Vec::<EngineConfig>::deserialize(deserializer)?;
        let mut names = HashSet::new();
        if let Some(twice) = engines.iter().find(|engine| !names.insert(&engine.name)) {
            return Err(de::Error::custom(format!("two engines are named `{}`", twice.name)));
        }
        if engines.is_empty() {
            return Err(de::Error::custom("there must be at least one engine"));
        }
        for EngineConfig { name, command, signatures, .. } in &engines {
            let has_folder = command.iter().any(|part| part.contains(FOLDER));
            if has_folder && signatures.is_nothing() {
                let what = format!(
                    "engine `{name}` has {FOLDER} in its command: say with `signatures` which files it gets \
                     (\"yara\", \"clamav\", \"hash\", or endings like [\"sig\"])"
                );
                return Err(de::Error::custom(what));
            }
            if !has_folder && !signatures.is_nothing() {
                let what = format!(
                    "engine `{name}` has `signatures` and no {FOLDER} in its command: it would not find them"
                );
                return Err(de::Error::custom(what));
            }
        }
        Ok(Self(engines))
    }
}

/// One engine.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    #[serde(deserialize_with = "engine_name")]
    pub name: String,
    #[serde(deserialize_with = "command")]
    pub command: Vec<String>,
    /// Which files of a signature set it gets.
    #[serde(default, skip_serializing_if = "Takes::is_nothing")]
    pub signatures: Takes,
    /// How many contents are scanned at the same time; 0: as fits the CPUs.
    #[serde(default, deserialize_with = "within::<_, u32, 0, 256>")]
    pub threads: u32,
    #[serde(
        default = "EngineConfig::memory_mib",
        deserialize_with = "within::<_, u64, 64, 1048576>"
    )]
    pub memory_mib: u64,
    #[serde(
        default = "EngineConfig::scan_timeout_ms",
        deserialize_with = "within::<_, u32, 100, 3600000>"
    )]
    pub scan_timeout_ms: u32,
    #[serde(
        default = "EngineConfig::load_timeout_s",
        deserialize_with = "within::<_, u32, 1, 86400>"
    )]
    pub load_timeout_s: u32,
    /// Whether a second process stands ready.
    #[serde(default)]
    pub spare: bool,
    /// Whether it may call content good, so that the engines after it do not look.
    #[serde(default)]
    pub may_allow: bool,
}

impl EngineConfig {
    fn memory_mib() -> u64 {
        2048
    }
    fn scan_timeout_ms() -> u32 {
        30_000
    }
    fn load_timeout_s() -> u32 {
        300
    }

    /// How many contents are scanned at the same time. The guests need most of the CPUs.
    pub fn threads(&self) -> u32 {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        match self.threads {
            0 => (u32::try_from(cpus).unwrap_or(u32::MAX) / 4).clamp(2, 4),
            threads => threads,
        }
    }

    /// How long one scan may take.
    pub fn scan_timeout(&self) -> Duration {
        Duration::from_millis(self.scan_timeout_ms.into())
    }

    /// How long it may take to load signatures.
    pub fn load_timeout(&self) -> Duration {
        Duration::from_secs(self.load_timeout_s.into())
    }

    /// Program and arguments, with the engine's part of a set.
    pub fn command_with(&self, folder: &Path) -> Vec<String> {
        let folder = folder.display().to_string();
        self.command.iter().map(|part| part.replace(FOLDER, &folder)).collect()
    }
}

/// Which files of a signature set an engine gets, by the endings of their names.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(
    untagged,
    expecting = "\"yara\", \"clamav\", \"hash\", or a list of endings like [\"sig\"]"
)]
pub enum Takes {
    Kind(Kind),
    #[serde(deserialize_with = "endings")]
    Endings(Vec<String>),
}

/// What engines of ours take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Yara,
    Clamav,
    Hash,
}

/// What libclamav loads by the name's ending, but YARA rules, which are the YARA engine's.
const CLAMAV: [&str; 38] = [
    "cvd", "cld", "cud", "db", "hdb", "hdu", "hsb", "hsu", "mdb", "mdu", "msb", "msu", "ndb",
    "ndu", "ldb", "ldu", "fp", "sfp", "idb", "cdb", "crb", "cat", "wdb", "pdb", "gdb", "rmd",
    "sdb", "zmd", "cbc", "ftm", "cfg", "ign", "ign2", "info", "pwdb", "imp", "ioc", "sign",
];
const YARA: [&str; 2] = ["yar", "yara"];
const HASH: [&str; 10] =
    ["txt", "md5", "sha1", "sha256", "csv", "hdb", "hsb", "fp", "sfp", "swhash"];

impl Default for Takes {
    fn default() -> Self {
        Self::Endings(Vec::new())
    }
}

impl Takes {
    /// Whether it gets nothing of a set: it has its signatures, or none, by itself.
    pub fn is_nothing(&self) -> bool {
        self.endings().is_empty()
    }

    /// The endings, in small letters where they are ours.
    pub fn endings(&self) -> Vec<&str> {
        match self {
            Self::Kind(Kind::Yara) => YARA.into(),
            Self::Kind(Kind::Clamav) => CLAMAV.into(),
            Self::Kind(Kind::Hash) => HASH.into(),
            Self::Endings(endings) => endings.iter().map(String::as_str).collect(),
        }
    }

    /// Whether a file of this name is for this engine. Small and large letters do not matter.
    pub fn takes(&self, name: &Path) -> bool {
        let Some(ending) = name.extension().and_then(|ending| ending.to_str()) else {
            return false;
        };
        self.endings().iter().any(|one| one.eq_ignore_ascii_case(ending))
    }

    /// Whether the files lie beside one another, whatever folders they came from: clamd looks into none.
    pub fn is_flat(&self) -> bool {
        matches!(self, Self::Kind(Kind::Clamav))
    }
}

fn endings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let endings = Vec::<String>::deserialize(deserializer)?;
    let is_ending = |one: &String| !one.is_empty() && !one.contains(['.', '/']);
    match endings.iter().find(|one| !is_ending(one)) {
        Some(wrong) => Err(de::Error::custom(format!(
            "`{wrong}` is no ending of a file's name: write it without the dot, like \"sig\""
        ))),
        None => Ok(endings),
    }
}

/// Where signatures come from, and what a new set must show before it takes over.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Signatures {
    /// Folders whose changes become a new set.
    pub watch: Vec<AbsolutePath>,
    /// Whether a set must find the EICAR test file.
    pub require_eicar: bool,
    /// Folders of files that a set must find.
    pub known_bad: Vec<AbsolutePath>,
    /// Folders of files in which it must find nothing.
    pub known_good: Vec<AbsolutePath>,
    #[serde(deserialize_with = "within::<_, u32, 1, 100>")]
    pub keep: u32,
    #[serde(deserialize_with = "within::<_, u32, 0, 10080>")]
    pub standby_minutes: u32,
}

impl Default for Signatures {
    fn default() -> Self {
        Self {
            watch: vec![AbsolutePath("/etc/seawall/signatures".into())],
            require_eicar: true,
            known_bad: Vec::new(),
            known_good: Vec::new(),
            keep: 5,
            standby_minutes: 10,
        }
    }
}

impl Signatures {
    /// How long the engines of the set before stay loaded.
    pub fn standby(&self) -> Duration {
        Duration::from_secs(u64::from(self.standby_minutes) * 60)
    }
}

/// How the engines work together.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScanOrder {
    pub engines: EngineOrder,
    pub early_exit: bool,
}

impl Default for ScanOrder {
    fn default() -> Self {
        Self { engines: EngineOrder::InOrder, early_exit: true }
    }
}

/// When each engine is asked.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineOrder {
    /// One after the other.
    InOrder,
    /// All at once.
    SideBySide,
}

fn engine_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = simple_name(deserializer, "an engine's name")?;
    // It is a folder's name, too.
    if name.starts_with('.') {
        return Err(de::Error::custom("an engine's name must not begin with `.`"));
    }
    Ok(name)
}

fn command<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let command = Vec::<String>::deserialize(deserializer)?;
    if command.first().is_none_or(String::is_empty) {
        return Err(de::Error::custom("the command must name a program"));
    }
    Ok(command)
}
