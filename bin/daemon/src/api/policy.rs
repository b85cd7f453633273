//! The policy of guests: whether the files are right, what is in force, and why.

use super::{Api, fault};
use crate::config::{Config, ConfigError, Found, Governed, Origin, PolicyConfig};
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use seawall_client::{
    ExplainQuery, Fault, GuestPolicy, PolicyCheck, PolicyExplanation, PolicyFinding, PolicyGroup,
    PolicyOrigin, PolicySetting, PolicyStep,
};
use seawall_proto::FailMode;

/// Reads the files of configuration and policy as they are now, and takes nothing into use.
#[utoipa::path(get, path = "/v1/policy/check", responses((status = 200, body = PolicyCheck)))]
pub async fn check(State(api): State<Api>) -> Response {
    match tokio::task::spawn_blocking(move || api.check_policy()).await {
        Ok(check) => Json(check).into_response(),
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()),
    }
}

/// A guest's policy: each setting, and where it comes from.
#[utoipa::path(
    get,
    path = "/v1/guests/{guest}/policy",
    params(("guest" = String, Path, description = "The guest's name")),
    responses((status = 200, body = GuestPolicy), (status = 404, body = Fault))
)]
pub async fn show(State(api): State<Api>, Path(guest): Path<String>) -> Response {
    with_policy(&api, &guest, |governed| {
        let settings = governed.policy.settings().into_iter().map(|(name, value)| PolicySetting {
            from: governed.origin(&name).map(origin),
            name,
            value,
        });
        GuestPolicy {
            guest: guest.clone(),
            group: group_of(governed),
            settings: settings.collect(),
        }
    })
}

/// What happens to an access to this path in this guest, and which line of which file decides it.
#[utoipa::path(
    get,
    path = "/v1/guests/{guest}/policy/explain",
    params(("guest" = String, Path, description = "The guest's name"), ExplainQuery),
    responses(
        (status = 200, body = PolicyExplanation),
        (status = 400, body = Fault),
        (status = 404, body = Fault),
    )
)]
pub async fn explain(
    State(api): State<Api>,
    Path(guest): Path<String>,
    Query(query): Query<ExplainQuery>,
) -> Response {
    if !query.path.starts_with('/') {
        let message = "the path must be absolute: as the guest's root sees it";
        return fault(StatusCode::BAD_REQUEST, "bad-path", message);
    }
    with_policy(&api, &guest, |governed| {
        let policy = governed.policy.to_proto();
        let excluded = policy.exclusion(query.path.as_bytes());
        let steps = match excluded {
            Some(number) => vec![excluded_by(governed, number)],
            None => scanned(governed, query.exec),
        };
        PolicyExplanation {
            guest: guest.clone(),
            group: group_of(governed),
            path: query.path.clone(),
            exec: query.exec,
            scanned: excluded.is_none(),
            steps,
        }
    })
}

/// Answers with what `tell` makes of the guest's policy.
fn with_policy<T: serde::Serialize>(
    api: &Api,
    guest: &str,
    tell: impl FnOnce(&Governed<'_>) -> T,
) -> Response {
    let config = api.host.config();
    match config.guest(guest) {
        Some(own) => Json(tell(&config.governed(own))).into_response(),
        None => {
            let message = format!("no guest is named `{guest}`; `seawall guests` shows all");
            fault(StatusCode::NOT_FOUND, "no-such-guest", message)
        }
    }
}

fn group_of(governed: &Governed<'_>) -> Option<PolicyGroup> {
    governed.group.map(|group| PolicyGroup {
        name: group.name.clone(),
        from: PolicyOrigin { file: group.path.display().to_string(), line: group.line },
    })
}

fn origin(origin: Origin<'_>) -> PolicyOrigin {
    PolicyOrigin { file: origin.path.display().to_string(), line: origin.line }
}

fn step(governed: &Governed<'_>, setting: &str, what: String) -> PolicyStep {
    PolicyStep { setting: setting.to_owned(), what, from: governed.origin(setting).map(origin) }
}

fn excluded_by(governed: &Governed<'_>, number: usize) -> PolicyStep {
    let pattern = governed.policy.exclude_paths.get(number).map_or("", |path| path.0.as_str());
    let what = format!(
        "not scanned: `{pattern}` excludes it, where the path is true (through a bind mount, an overlay or a \
         renamed folder it is not)"
    );
    step(governed, &format!("exclude_paths[{number}]"), what)
}

/// What decides about an access to a file that is not excluded.
fn scanned(governed: &Governed<'_>, exec: bool) -> Vec<PolicyStep> {
    let PolicyConfig { exclude_paths, whole_file_limit_mib, deadline, .. } = governed.policy;
    let seconds = |ms: u32| format!("{} s", f64::from(ms) / 1000.0);
    let (held, mode) = if exec {
        (("deadline.exec_ms", deadline.exec_ms), "fail_mode.exec")
    } else {
        (("deadline.open_ms", deadline.open_ms), "fail_mode.open")
    };
    let proto = governed.policy.to_proto();
    let fails = match if exec { proto.fail_exec } else { proto.fail_open } {
        FailMode::Open => "without a verdict it goes on, and the file is scanned later",
        FailMode::Closed => "without a verdict it is denied",
        FailMode::ClosedIfUserWritable => {
            "without a verdict it is denied where another user than root may write the file; else it goes on, and \
             the file is scanned later"
        }
    };
    let infected = if governed.policy.action.infected == crate::config::Action::Quarantine {
        "infected, it is denied, and the file goes to quarantine"
    } else {
        "infected, it is denied, and the file stays"
    };
    let paths = match exclude_paths.len() {
        0 => "scanned: no path is excluded".to_owned(),
        count => format!("scanned: none of {count} excluded paths holds it"),
    };
    vec![
        step(governed, "exclude_paths", paths),
        step(
            governed,
            "whole_file_limit_mib",
            format!("above {whole_file_limit_mib} MiB it goes on, and the file is scanned later"),
        ),
        step(governed, held.0, format!("held for at most {}", seconds(held.1))),
        step(
            governed,
            "deadline.per_64_mib_ms",
            format!("and {} more for each 64 MiB", seconds(deadline.per_64_mib_ms)),
        ),
        step(
            governed,
            "deadline.most_ms",
            format!("but at most {}", seconds(deadline.most_ms.max(held.1))),
        ),
        step(governed, mode, fails.to_owned()),
        step(governed, "action.infected", infected.to_owned()),
    ]
}

impl Api {
    fn check_policy(&self) -> PolicyCheck {
        match Config::load(&self.config_path) {
            Ok(config) => {
                let now = self.host.config();
                let policy_in = |config: &Config, name: &str| {
                    config.guest(name).map(|guest| config.governed(guest).policy.clone())
                };
                let names = config.guests.iter().map(|guest| guest.name.get_ref().0.clone());
                let changes = names.filter(|name| {
                    now.guest(name).is_some() && policy_in(&now, name) != policy_in(&config, name)
                });
                PolicyCheck {
                    right: true,
                    changes: changes.collect(),
                    findings: config.warnings.iter().map(finding).collect(),
                }
            }
            Err(error) => PolicyCheck {
                right: false,
                changes: Vec::new(),
                findings: findings(&self.config_path, &error),
            },
        }
    }
}

fn findings(path: &std::path::Path, error: &ConfigError) -> Vec<PolicyFinding> {
    match error {
        ConfigError::Unreadable { reason, .. } => {
            vec![finding(&Found::in_file(path, "E-READ", format!("it cannot be read: {reason}")))]
        }
        ConfigError::Invalid(found) => vec![finding(found)],
        ConfigError::Groups { found } => found.iter().map(finding).collect(),
    }
}

fn finding(found: &Found) -> PolicyFinding {
    PolicyFinding {
        level: if found.is_error() { "error" } else { "warning" }.to_owned(),
        code: found.code.to_owned(),
        file: found.path.display().to_string(),
        line: found.line(),
        column: found.place.as_ref().map(|place| place.column),
        message: found.message.clone(),
        help: found.help().to_owned(),
    }
}
