//! What the drivers are told to do, and what is done with what they find.

use super::exclude::{Exclusions, PathPattern};
use super::{simple_name, within};
use crate::copy::PrivateCopy;
use crate::pipeline::Tenant;
use seawall_client::{Detection, PolicyInForce};
use seawall_engine::{ArchiveLimits, Operation};
use seawall_proto::{FailMode, Mode, Policy, Running};
use serde::de::IntoDeserializer;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::HashSet;

/// What the drivers are told to do.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    pub mode: Mode,
    #[serde(deserialize_with = "within::<_, u64, 1, 65536>")]
    pub whole_file_limit_mib: u64,
    /// With whom verdicts are shared; empty for all whose policy names nobody.
    #[serde(deserialize_with = "tenant")]
    pub tenant: String,
    pub deadline: Deadline,
    pub fail_mode: FailModes,
    pub action: Actions,
    pub exclude: Exclusions,
    pub archives: Archives,
    pub quarantine: QuarantineShare,
}

fn tenant<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let name = String::deserialize(from)?;
    if name.is_empty() {
        Ok(name)
    } else {
        simple_name(name.into_deserializer(), "a tenant's name")
    }
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            mode: Mode::Smart,
            whole_file_limit_mib: 256,
            tenant: String::new(),
            deadline: Deadline::default(),
            fail_mode: FailModes::default(),
            action: Actions::default(),
            exclude: Exclusions::default(),
            archives: Archives::default(),
            quarantine: QuarantineShare::default(),
        }
    }
}

impl PolicyConfig {
    /// This policy with what a group sets of it; `part` is valid by itself.
    pub fn with(&self, part: &toml::Table) -> Result<Self, String> {
        let mut whole = toml::Table::try_from(self).map_err(|error| error.to_string())?;
        set(&mut whole, part);
        whole.try_into().map_err(|error: toml::de::Error| error.message().to_owned())
    }

    /// With whom its guests share verdicts.
    pub fn tenant(&self) -> Tenant {
        (!self.tenant.is_empty()).then(|| self.tenant.as_str().into())
    }

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
        PolicyInForce {
            infected: word(toml::Value::try_from(self.action.infected)),
            fail_mode_open: word(toml::Value::try_from(self.fail_mode.open)),
            fail_mode_exec: word(toml::Value::try_from(self.fail_mode.exec)),
            whole_file_limit_bytes: self.whole_file_limit(),
            mode: self.mode.to_string(),
            exclusions: self.exclude.count(),
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
        let fail_modes = &self.fail_mode;
        Policy {
            mode: self.mode,
            fail_open: match fail_modes.open {
                OpenFailMode::Open => FailMode::Open,
                OpenFailMode::Closed => FailMode::Closed,
            },
            fail_exec: fail_modes.exec.to_proto(),
            fail_too_large: fail_modes.too_large.to_proto(),
            fail_changing: fail_modes.changing.to_proto(),
            fail_timed_out: fail_modes.timed_out.to_proto(),
            fail_paths: fail_modes.paths.0.iter().map(FailPath::to_proto).collect(),
            open_deadline_ms: self.deadline.open_ms,
            exec_deadline_ms: self.deadline.exec_ms,
            deadline_per_64_mib_ms: self.deadline.per_64_mib_ms,
            most_deadline_ms: self.deadline.most_ms,
            whole_file_limit: self.whole_file_limit(),
            exclude: self.exclude.to_proto(),
        }
    }
}

/// Sets in `whole` what `part` has. A list takes the place of the list there.
fn set(whole: &mut toml::Table, part: &toml::Table) {
    for (key, value) in part {
        match (whole.get_mut(key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(part)) => set(below, part),
            _ => drop(whole.insert(key.clone(), value.clone())),
        }
    }
}

/// What the quarantine keeps of one guest; 0 for no limit but that of all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuarantineShare {
    #[serde(deserialize_with = "within::<_, u64, 0, 1048576>")]
    pub guest_mib: u64,
    #[serde(deserialize_with = "within::<_, u32, 0, 36500>")]
    pub keep_days: u32,
}

impl QuarantineShare {
    /// The most bytes of this guest's files, counted as if no other had the same.
    pub fn most(self) -> Option<u64> {
        (self.guest_mib > 0).then_some(self.guest_mib << 20)
    }

    /// How long its entries are kept, in milliseconds.
    pub fn keep_ms(self) -> Option<i64> {
        (self.keep_days > 0).then_some(i64::from(self.keep_days) * 24 * 3600 * 1000)
    }
}

/// When and how far engines that know nothing of archives are shown what lies in them.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Archives {
    pub on_access: bool,
    pub on_demand: bool,
    #[serde(deserialize_with = "within::<_, u32, 1, 32>")]
    pub depth: u32,
    #[serde(deserialize_with = "within::<_, u32, 1, 1000000>")]
    pub members: u32,
    #[serde(deserialize_with = "within::<_, u64, 1, 2047>")]
    pub member_mib: u64,
    #[serde(deserialize_with = "within::<_, u64, 1, 65536>")]
    pub unpacked_mib: u64,
}

impl Default for Archives {
    fn default() -> Self {
        Self {
            on_access: false,
            on_demand: true,
            depth: 6,
            members: 100_000,
            member_mib: 128,
            unpacked_mib: 1024,
        }
    }
}

impl Archives {
    /// Whether archives are looked into.
    pub fn opens(&self, operation: Operation) -> bool {
        match operation {
            Operation::OnDemand => self.on_demand,
            Operation::Open | Operation::Exec | Operation::Rescan => self.on_access,
        }
    }

    /// How far to look into this content; `None` where that is not wanted, or it is no archive.
    /// What is looked at after it was written counts as an access: it is to end with a verdict.
    pub fn limits(&self, operation: Operation, copy: &PrivateCopy) -> Option<ArchiveLimits> {
        (self.opens(operation) && copy.is_archive()).then_some(ArchiveLimits {
            depth: self.depth,
            members: self.members,
            member: self.member_mib << 20,
            unpacked: self.unpacked_mib << 20,
        })
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
    pub too_large: ReasonFailMode,
    pub changing: ReasonFailMode,
    pub timed_out: ReasonFailMode,
    pub paths: FailPaths,
}

impl Default for FailModes {
    fn default() -> Self {
        Self {
            open: OpenFailMode::Open,
            exec: ExecFailMode::ClosedIfUserWritable,
            too_large: ReasonFailMode::Open,
            changing: ReasonFailMode::ByOperation,
            timed_out: ReasonFailMode::ByOperation,
            paths: FailPaths::default(),
        }
    }
}

/// Fail modes of files with certain paths; the first that holds counts.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct FailPaths(pub Vec<FailPath>);

impl FailPaths {
    /// Each is compared with the path of every file that is scanned on access.
    const MOST: usize = 100;
}

impl<'de> Deserialize<'de> for FailPaths {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = Vec::<FailPath>::deserialize(deserializer)?;
        if all.len() > Self::MOST {
            let most = format!("{} paths, at most {} are possible", all.len(), Self::MOST);
            return Err(serde::de::Error::custom(most));
        }
        Ok(Self(all))
    }
}

/// A fail mode of files with certain paths.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FailPath {
    pub path: PathPattern,
    pub mode: ExecFailMode,
}

impl FailPath {
    fn to_proto(&self) -> seawall_proto::FailPath {
        seawall_proto::FailPath {
            path: self.path.0.clone().into_bytes().into(),
            mode: self.mode.to_proto(),
        }
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

impl ExecFailMode {
    fn to_proto(self) -> FailMode {
        match self {
            Self::Open => FailMode::Open,
            Self::Closed => FailMode::Closed,
            Self::ClosedIfUserWritable => FailMode::ClosedIfUserWritable,
        }
    }
}

/// For one reason why there is no verdict.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReasonFailMode {
    Open,
    Closed,
    /// As for any other reason.
    ByOperation,
}

impl ReasonFailMode {
    pub fn to_proto(self) -> Option<FailMode> {
        match self {
            Self::Open => Some(FailMode::Open),
            Self::Closed => Some(FailMode::Closed),
            Self::ByOperation => None,
        }
    }
}

/// What is done when something is found.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Actions {
    pub infected: Action,
    pub low: ActionBy,
    pub medium: ActionBy,
    pub high: ActionBy,
    pub critical: ActionBy,
    #[serde(deserialize_with = "within::<_, usize, 0, 16>")]
    pub agreeing_engines: usize,
    pub agreed: ActionBy,
    pub running: ActionOnRunning,
}

impl Default for Actions {
    fn default() -> Self {
        let as_infected = ActionBy::AsInfected;
        Self {
            infected: Action::Deny,
            low: as_infected,
            medium: as_infected,
            high: as_infected,
            critical: as_infected,
            agreeing_engines: 0,
            agreed: as_infected,
            running: ActionOnRunning::Report,
        }
    }
}

impl Actions {
    /// What is done about these detections, and the setting that says so.
    pub fn about(&self, found: &[Detection]) -> (Action, &'static str) {
        let engines: HashSet<_> = found.iter().map(|one| one.engine.as_str()).collect();
        let has = |severity: &str| found.iter().any(|one| one.severity == severity);
        let agree = self.agreeing_engines > 0 && engines.len() >= self.agreeing_engines;
        // The gravest counts.
        let severities = [
            ("critical", self.critical, "action.critical"),
            ("high", self.high, "action.high"),
            ("medium", self.medium, "action.medium"),
            ("low", self.low, "action.low"),
        ];
        let by_severity = severities.into_iter().find(|(severity, ..)| has(severity));
        let agreed = (self.agreed, "action.agreed");
        let by_severity = by_severity.map(|(_, action, setting)| (action, setting));
        [agree.then_some(agreed), by_severity]
            .into_iter()
            .flatten()
            .find_map(|(action, setting)| Some((action.action()?, setting)))
            .unwrap_or((self.infected, "action.infected"))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The access goes on; it is reported.
    Allow,
    /// The access is denied and the file stays.
    Deny,
    /// The access is denied and the file goes to quarantine.
    Quarantine,
    /// The same, and the quarantine forgets it once it is gone from its guest.
    Delete,
}

/// What is done with processes that have a denied file mapped as program or library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionOnRunning {
    /// Nobody looks for them.
    Leave,
    /// An event names each.
    Report,
    /// The same, and they are stopped.
    Stop,
    /// The same, and they are killed.
    Kill,
}

impl From<ActionOnRunning> for Running {
    fn from(action: ActionOnRunning) -> Self {
        match action {
            ActionOnRunning::Leave => Self::Leave,
            ActionOnRunning::Report => Self::Report,
            ActionOnRunning::Stop => Self::Stop,
            ActionOnRunning::Kill => Self::Kill,
        }
    }
}

/// What is done in one case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionBy {
    /// As in every other case.
    AsInfected,
    Allow,
    Deny,
    Quarantine,
    Delete,
}

impl ActionBy {
    fn action(self) -> Option<Action> {
        match self {
            Self::AsInfected => None,
            Self::Allow => Some(Action::Allow),
            Self::Deny => Some(Action::Deny),
            Self::Quarantine => Some(Action::Quarantine),
            Self::Delete => Some(Action::Delete),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(severity: &str, engine: &str) -> Detection {
        Detection {
            name: "x".into(),
            severity: severity.into(),
            family: None,
            cleaning: None,
            member: None,
            engine: engine.into(),
        }
    }

    #[test]
    fn engines_that_agree_count_before_the_gravest_severity() {
        let actions = Actions {
            infected: Action::Deny,
            low: ActionBy::Allow,
            critical: ActionBy::Quarantine,
            agreeing_engines: 2,
            agreed: ActionBy::Quarantine,
            ..Actions::default()
        };
        let cases = [
            (vec![found("low", "a")], (Action::Allow, "action.low")),
            (vec![found("medium", "a")], (Action::Deny, "action.infected")),
            (vec![found("low", "a"), found("medium", "a")], (Action::Deny, "action.infected")),
            (
                vec![found("low", "a"), found("critical", "a")],
                (Action::Quarantine, "action.critical"),
            ),
            (vec![found("low", "a"), found("low", "a")], (Action::Allow, "action.low")),
            (vec![found("low", "a"), found("low", "b")], (Action::Quarantine, "action.agreed")),
            (vec![], (Action::Deny, "action.infected")),
        ];
        for (found, expected) in cases {
            assert_eq!(actions.about(&found), expected, "{found:?}");
        }
    }
}
