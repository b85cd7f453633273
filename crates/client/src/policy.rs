//! What the service tells of the policy of guests.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Where a setting of the policy stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyOrigin {
    /// The file.
    pub file: String,
    /// Its line, from 1.
    pub line: usize,
}

/// The group that a guest belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyGroup {
    /// Its name.
    pub name: String,
    /// Where it is defined.
    pub from: PolicyOrigin,
}

/// A guest's policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestPolicy {
    /// The guest.
    pub guest: String,
    /// Its group; none where no group names it.
    pub group: Option<PolicyGroup>,
    /// Each setting.
    pub settings: Vec<PolicySetting>,
}

/// One setting of a guest's policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PolicySetting {
    /// Its name, like `deadline.open_ms`.
    pub name: String,
    /// Its value, as the files have it.
    pub value: serde_json::Value,
    /// Where it stands; none where it is the default.
    pub from: Option<PolicyOrigin>,
}

/// Which access is to be explained.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ExplainQuery {
    /// The file's absolute path, as the guest's root sees it.
    pub path: String,
    /// It is executed, not opened.
    #[serde(default)]
    pub exec: bool,
    /// The program that opens it: its absolute path.
    pub process: Option<String>,
    /// The real user id of that program's process; root's if absent.
    pub user: Option<u32>,
    /// The user id of the file's owner.
    pub owner: Option<u32>,
    /// The type of the file system that it is on.
    pub file_system: Option<String>,
    /// Its content's BLAKE3 digest.
    pub hash: Option<String>,
    /// What is found in it.
    pub detection: Option<String>,
    /// Its severity: `low`, `medium`, `high` or `critical`.
    pub severity: Option<String>,
}

/// What happens to an access, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyExplanation {
    /// The guest.
    pub guest: String,
    /// Its group; none where no group names it.
    pub group: Option<PolicyGroup>,
    /// The file's path.
    pub path: String,
    /// Whether it is executed.
    pub exec: bool,
    /// Whether the file is scanned.
    pub scanned: bool,
    /// What decides, in the order in which it does.
    pub steps: Vec<PolicyStep>,
}

/// One thing that decides about an access.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyStep {
    /// The setting, like `fail_mode.open` or `exclude.paths[0]`.
    pub setting: String,
    /// What it does, for people.
    pub what: String,
    /// Where it stands; none where it is the default.
    pub from: Option<PolicyOrigin>,
}

/// What a reload would say of the files as they are now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyCheck {
    /// Whether they would be taken.
    pub right: bool,
    /// Guests whose policy would be another.
    pub changes: Vec<String>,
    /// What is wrong or odd.
    pub findings: Vec<PolicyFinding>,
}

/// Something wrong or odd in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyFinding {
    /// `error` or `warning`.
    pub level: String,
    /// Stays the same over versions, like `E-KEY`.
    pub code: String,
    /// The file.
    pub file: String,
    /// Line and column, from 1; none where the whole file is meant.
    pub line: Option<usize>,
    /// See `line`.
    pub column: Option<usize>,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub help: String,
}
