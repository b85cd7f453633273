//! The policy of guests: whether the files are right, what is in force, and why.

use super::{Api, fault};
use crate::config::{
    Action, ActionOnRunning, Config, ConfigError, Found, Governed, Origin, PolicyConfig,
    ReasonFailMode,
};
use crate::quarantine::parse_hash;
use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use seawall_client::{
    Detection, ExplainQuery, Fault, GuestPolicy, PolicyCheck, PolicyExplanation, PolicyFinding,
    PolicyGroup, PolicyOrigin, PolicySetting, PolicyStep,
};
use seawall_proto::{ContentHash, Exclusion, Facts, FailMode, Mode, Rules};

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
    let hash = match query.hash.as_deref().map(|text| parse_hash(&text.to_ascii_lowercase())) {
        Some(None) => {
            let message = "the hash must be a BLAKE3 digest of 64 hexadecimal digits";
            return fault(StatusCode::BAD_REQUEST, "bad-hash", message);
        }
        hash => hash.flatten(),
    };
    with_policy(&api, &guest, |governed| {
        let excluded = not_scanned(governed, &query, hash);
        PolicyExplanation {
            guest: guest.clone(),
            group: group_of(governed),
            path: query.path.clone(),
            exec: query.exec,
            scanned: excluded.is_none(),
            steps: excluded.map_or_else(|| scanned(governed, &query), |step| vec![step]),
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

/// What keeps an access from being scanned.
fn not_scanned(
    governed: &Governed<'_>,
    query: &ExplainQuery,
    hash: Option<ContentHash>,
) -> Option<PolicyStep> {
    let (policy, by_mode) = (governed.policy, |what: &str| step(governed, "mode", what.to_owned()));
    let is_held = if query.exec { policy.mode.holds_exec() } else { policy.mode.holds_open() };
    match policy.mode {
        Mode::Off => return Some(by_mode("not scanned: policy has nothing scanned")),
        Mode::Write => {
            let what = "not held and not scanned: what was written is scanned at its last close";
            return Some(by_mode(what));
        }
        _ if !is_held => return Some(by_mode("not scanned: only what is executed is")),
        _ => (),
    }
    let facts = Facts {
        path: Some(query.path.as_bytes()),
        owner: query.owner,
        file_system: query.file_system.as_deref(),
        process: query
            .process
            .as_deref()
            .filter(|_| !query.exec)
            .map(|path| (path.as_bytes(), query.user.unwrap_or(0))),
    };
    let excluded = |list: &str, number: usize, why: &str| {
        let setting = format!("exclude.{list}[{number}]");
        Some(step(governed, &setting, format!("not scanned: {why}")))
    };
    let exclude = &policy.exclude;
    let rules = Rules::from(policy.to_proto());
    match rules.exclusion(&facts) {
        Some(Exclusion::Path(number)) => {
            let pattern = exclude.paths.get(number).map_or("", |pattern| pattern.0.as_str());
            let why = format!(
                "`{pattern}` excludes it, where the path is true (through a bind mount, an overlay or a renamed \
                 folder it is not)"
            );
            excluded("paths", number, &why)
        }
        Some(Exclusion::Extension(number)) => {
            excluded("extensions", number, "its name ends so, where its path is true")
        }
        Some(Exclusion::FileSystem(number)) => excluded(
            "file_systems",
            number,
            "its file system is of this type, if the driver's own mount namespace has it",
        ),
        Some(Exclusion::Owner(number)) => excluded("owners", number, "this user owns it"),
        Some(Exclusion::Process(number)) => {
            excluded("processes", number, "this program opens it, run by this user")
        }
        None => exclude.hash(hash?).and_then(|number| {
            excluded(
                "hashes",
                number,
                "its content is excluded; the host gets it, the engines do not",
            )
        }),
    }
}

fn found_by_one(query: &ExplainQuery, severity: String) -> Detection {
    let name = query.detection.clone().unwrap_or_default();
    Detection { name, severity, family: None, cleaning: None, engine: String::new(), member: None }
}

/// What decides about an access to a file that is scanned.
fn scanned(governed: &Governed<'_>, query: &ExplainQuery) -> Vec<PolicyStep> {
    let PolicyConfig { whole_file_limit_mib, deadline, fail_mode, exclude, .. } = governed.policy;
    let seconds = |ms: u32| format!("{} s", f64::from(ms) / 1000.0);
    let (held, mode) = if query.exec {
        (("deadline.exec_ms", deadline.exec_ms), "fail_mode.exec")
    } else {
        (("deadline.open_ms", deadline.open_ms), "fail_mode.open")
    };
    let rules = Rules::from(governed.policy.to_proto());
    let in_mode = |mode: FailMode| match mode {
        FailMode::Open => "without a verdict it goes on, and the file is scanned later",
        FailMode::Closed => "without a verdict it is denied",
        FailMode::ClosedIfUserWritable => {
            "without a verdict it is denied where another user than root may write the file; else it goes on, and \
             the file is scanned later"
        }
    };
    let fails = in_mode(if query.exec { rules.fail_exec } else { rules.fail_open });
    let by_path = rules.fail_mode(query.path.as_bytes()).map(|(number, mode)| {
        let what = format!("{}, for whatever reason: its path decides", in_mode(mode));
        step(governed, &format!("fail_mode.paths[{number}]"), what)
    });
    let in_case = |reason: ReasonFailMode| match reason {
        ReasonFailMode::Open => "it goes on, and the file is scanned later",
        ReasonFailMode::Closed => "it is denied",
        ReasonFailMode::ByOperation => "as for any other reason",
    };
    let held_by = match governed.policy.mode {
        Mode::Strict => {
            "held until it is scanned, also when it is known, where another user than root could change it"
        }
        _ => "held until it is scanned or known to be clean",
    };
    let exclusions = match exclude.count() {
        0 => "nothing is excluded".to_owned(),
        count => format!("none of {count} exclusions holds"),
    };
    let detection = query.detection.as_deref().and_then(|name| exclude.detection(name));
    let infected = match detection {
        Some(number) => {
            let setting = format!("exclude.detections[{number}]");
            step(governed, &setting, "it goes on: this detection is excluded".to_owned())
        }
        None => {
            let severity = query.severity.clone().into_iter();
            let found: Vec<_> = severity.map(|severity| found_by_one(query, severity)).collect();
            let (action, setting) = governed.policy.action.about(&found);
            let what = match action {
                Action::Quarantine => "infected, it is denied, and the file goes to quarantine",
                Action::Delete => "infected, it is denied, and the file is deleted",
                Action::Deny => "infected, it is denied, and the file stays",
                Action::Allow => "infected, it goes on, and an event tells of it",
            };
            step(governed, setting, what.to_owned())
        }
    };
    let running = match governed.policy.action.running {
        ActionOnRunning::Leave => {
            "if it is infected and denied, processes that run it are left alone"
        }
        ActionOnRunning::Report => "if it is infected and denied, processes that run it are named",
        ActionOnRunning::Stop => "if it is infected and denied, processes that run it are stopped",
        ActionOnRunning::Kill => "if it is infected and denied, processes that run it are killed",
    };
    let mut steps = vec![
        step(governed, "mode", held_by.to_owned()),
        step(governed, "exclude", exclusions),
        step(
            governed,
            "whole_file_limit_mib",
            format!("above {whole_file_limit_mib} MiB it is not scanned on access"),
        ),
        step(governed, "fail_mode.too_large", format!("then {}", in_case(fail_mode.too_large))),
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
        step(
            governed,
            "fail_mode.timed_out",
            format!("if there is no verdict by then: {}", in_case(fail_mode.timed_out)),
        ),
        step(
            governed,
            "fail_mode.changing",
            format!("if it changes each time it is read: {}", in_case(fail_mode.changing)),
        ),
        step(governed, mode, fails.to_owned()),
    ];
    if let Some(by_path) = by_path {
        steps.retain(|step| !step.setting.starts_with("fail_mode."));
        steps.push(by_path);
    }
    steps.extend([step(governed, "action.running", running.to_owned()), infected]);
    steps
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
