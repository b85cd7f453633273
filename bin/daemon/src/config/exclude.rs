//! What policy has not scanned.

use crate::quarantine::parse_hash;
use seawall_proto::{
    ContentHash, Exclude, ExcludedProcess, check_name_pattern, check_pattern, name_fits,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What is not scanned. All but the last two are the driver's to carry out.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Exclusions {
    pub paths: Vec<PathPattern>,
    pub extensions: Vec<Extension>,
    pub file_systems: Vec<FileSystem>,
    pub owners: Vec<u32>,
    pub processes: Vec<Program>,
    pub hashes: Vec<Hash>,
    pub detections: Vec<NamePattern>,
}

impl Exclusions {
    /// How many there are.
    pub fn count(&self) -> usize {
        let Self { paths, extensions, file_systems, owners, processes, hashes, detections } = self;
        paths.len()
            + extensions.len()
            + file_systems.len()
            + owners.len()
            + processes.len()
            + hashes.len()
            + detections.len()
    }

    /// As the drivers get it.
    pub fn to_proto(&self) -> Exclude {
        let bytes = |text: &String| text.clone().into_bytes().into();
        Exclude {
            paths: self.paths.iter().map(|path| bytes(&path.0)).collect(),
            extensions: self.extensions.iter().map(|it| bytes(&it.0)).collect(),
            file_systems: self.file_systems.iter().map(|it| it.0.clone()).collect(),
            owners: self.owners.clone(),
            processes: self
                .processes
                .iter()
                .map(|it| ExcludedProcess { path: bytes(&it.path.0), user: it.user })
                .collect(),
        }
    }

    /// The number in `hashes` of this content.
    pub fn hash(&self, hash: ContentHash) -> Option<usize> {
        self.hashes.iter().position(|excluded| excluded.0 == hash)
    }

    /// The number in `detections` of the first pattern that this name fits.
    pub fn detection(&self, name: &str) -> Option<usize> {
        self.detections.iter().position(|pattern| name_fits(&pattern.0, name))
    }
}

/// A pattern of paths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PathPattern(pub String);

impl<'de> Deserialize<'de> for PathPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match check_pattern(&text) {
            Ok(()) => Ok(Self(text)),
            Err(why) => Err(de::Error::custom(format!("`{text}` is no pattern of paths: {why}"))),
        }
    }
}

/// What a file's name ends with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Extension(pub String);

impl<'de> Deserialize<'de> for Extension {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() || text.len() > 255 || text.contains(['.', '/', '\0', '*', '?']) {
            return Err(de::Error::custom(format!(
                "`{text}` is no extension: it is what stands behind the last dot of a name, like \"log\""
            )));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

/// A type of file systems.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileSystem(pub String);

impl<'de> Deserialize<'de> for FileSystem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::simple_name(deserializer, "a type of file systems").map(Self)
    }
}

/// A program whose opens are not held.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    pub path: ProgramPath,
    #[serde(default)]
    pub user: u32,
}

/// The path of a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProgramPath(pub String);

impl<'de> Deserialize<'de> for ProgramPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let is_plain = check_pattern(&text).is_ok() && !text.ends_with('/');
        if !is_plain || text.contains(['*', '?']) {
            return Err(de::Error::custom(format!(
                "`{text}` is no program: it must be an absolute path without `.`, `..`, `//`, `*` or `?`"
            )));
        }
        Ok(Self(text))
    }
}

/// A content's digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hash(pub ContentHash);

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_hash(&text).map(Self).ok_or_else(|| {
            de::Error::custom(format!(
                "`{text}` is no content: it must be a BLAKE3 digest of 64 hexadecimal digits, as events and \
                 `seawall scan` show it"
            ))
        })
    }
}

/// A pattern of detections' names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NamePattern(pub String);

impl<'de> Deserialize<'de> for NamePattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match check_name_pattern(&text) {
            Ok(()) => Ok(Self(text)),
            Err(why) => {
                Err(de::Error::custom(format!("`{text}` is no pattern of detections: {why}")))
            }
        }
    }
}
