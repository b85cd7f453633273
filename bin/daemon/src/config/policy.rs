//! What the drivers are told to do, and what is done with what they find.

use super::{some_within, within};
use seawall_client::PolicyInForce;
use seawall_client::text::escape;
use seawall_proto::{FailMode, Policy};
use serde::{Deserialize, Deserializer, Serialize, de};

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

    /// Each setting by its name, like `deadline.open_ms`, in the words of the file.
    pub fn settings(&self) -> Vec<(String, serde_json::Value)> {
        let mut all = Vec::new();
        let whole = serde_json::to_value(self).unwrap_or_default();
        let tables = whole.as_object().into_iter().flatten();
        for (name, value) in tables {
            match value.as_object() {
                Some(below) => {
                    all.extend(below.iter().map(|(key, v)| (format!("{name}.{key}"), v.clone())));
                }
                None => all.push((name.clone(), value.clone())),
            }
        }
        all
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

/// What a group says of its guests' policy: what is absent is as `[policy]` has it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyPart {
    pub exclude_paths: Option<Vec<ExcludePath>>,
    #[serde(deserialize_with = "some_within::<_, u64, 1, 65536>")]
    pub whole_file_limit_mib: Option<u64>,
    pub deadline: DeadlinePart,
    pub fail_mode: FailModesPart,
    pub action: ActionsPart,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeadlinePart {
    #[serde(deserialize_with = "some_within::<_, u32, 10, 600000>")]
    pub open_ms: Option<u32>,
    #[serde(deserialize_with = "some_within::<_, u32, 10, 600000>")]
    pub exec_ms: Option<u32>,
    #[serde(deserialize_with = "some_within::<_, u32, 0, 600000>")]
    pub per_64_mib_ms: Option<u32>,
    #[serde(deserialize_with = "some_within::<_, u32, 10, 600000>")]
    pub most_ms: Option<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FailModesPart {
    pub open: Option<OpenFailMode>,
    pub exec: Option<ExecFailMode>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActionsPart {
    pub infected: Option<Action>,
}

impl PolicyPart {
    /// The whole policy of a group's guests.
    pub fn over(self, base: &PolicyConfig) -> PolicyConfig {
        let Self { exclude_paths, whole_file_limit_mib, deadline, fail_mode, action } = self;
        PolicyConfig {
            exclude_paths: exclude_paths.unwrap_or_else(|| base.exclude_paths.clone()),
            whole_file_limit_mib: whole_file_limit_mib.unwrap_or(base.whole_file_limit_mib),
            deadline: Deadline {
                open_ms: deadline.open_ms.unwrap_or(base.deadline.open_ms),
                exec_ms: deadline.exec_ms.unwrap_or(base.deadline.exec_ms),
                per_64_mib_ms: deadline.per_64_mib_ms.unwrap_or(base.deadline.per_64_mib_ms),
                most_ms: deadline.most_ms.unwrap_or(base.deadline.most_ms),
            },
            fail_mode: FailModes {
                open: fail_mode.open.unwrap_or(base.fail_mode.open),
                exec: fail_mode.exec.unwrap_or(base.fail_mode.exec),
            },
            action: Actions { infected: action.infected.unwrap_or(base.action.infected) },
        }
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
