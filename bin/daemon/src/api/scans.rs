//! Scans of guests' files on demand.

use super::{Api, fault};
use crate::config::{Config, Schedule};
use crate::scans::{Order, ScansError};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use seawall_client::{Fault, GuestScan, ScansRequest, ScheduleReport};
use seawall_proto::frame::PAYLOAD_MAX;
use seawall_proto::walk::PLACE_MAX;
use std::collections::BTreeMap;

/// The most bytes of paths that are named for one guest.
const PATHS_MAX: usize = 32 * 1024;
const _: () = assert!(PATHS_MAX + PLACE_MAX + 256 <= PAYLOAD_MAX);

/// All scans of guests that are under way or remembered, the oldest first; without what they found by name.
#[utoipa::path(get, path = "/v1/scans", responses((status = 200, body = Vec<GuestScan>)))]
pub async fn list(State(api): State<Api>) -> Json<Vec<GuestScan>> {
    Json(api.host.scans.list())
}

/// One of them, with what it found and left out.
#[utoipa::path(
    get,
    path = "/v1/scans/{id}",
    params(("id" = u64, Path, description = "Its number")),
    responses((status = 200, body = GuestScan), (status = 404, body = Fault))
)]
pub async fn show(State(api): State<Api>, Path(id): Path<u64>) -> Response {
    answer(api.host.scans.show(id))
}

/// Has guests scanned, each by a scan of its own.
#[utoipa::path(
    post,
    path = "/v1/scans",
    request_body = ScansRequest,
    responses(
        (status = 200, body = Vec<GuestScan>),
        (status = 400, body = Fault),
        (status = 404, body = Fault),
        (status = 503, body = Fault),
    )
)]
pub async fn add(State(api): State<Api>, Json(wanted): Json<ScansRequest>) -> Response {
    let config = api.host.config();
    // None: everything.
    let mut guests: BTreeMap<String, Option<Vec<String>>> = BTreeMap::new();
    let group_of = |guest| config.governed(guest).group.map(|group| group.name.as_str());
    for group in &wanted.groups {
        if !config.groups.iter().any(|one| one.name == *group) {
            let message = format!("no group is named `{group}`");
            return fault(StatusCode::NOT_FOUND, "no-such-group", message);
        }
    }
    for guest in &config.guests {
        let of_group = |group: &String| group_of(guest) == Some(group);
        if wanted.all || wanted.groups.iter().any(of_group) {
            guests.insert(guest.name.get_ref().0.clone(), None);
        }
    }
    for target in wanted.targets {
        if config.guest(&target.guest).is_none() {
            let message =
                format!("no guest is named `{}`; `seawall guests` shows all", target.guest);
            return fault(StatusCode::NOT_FOUND, "no-such-guest", message);
        }
        let is_path =
            |path: &String| path.starts_with('/') && path.len() <= 4096 && !path.contains('\0');
        if let Some(path) = target.paths.iter().find(|path| !is_path(path)) {
            let message = format!("`{path}` is no absolute path as the guest's root sees it");
            return fault(StatusCode::BAD_REQUEST, "bad-path", message);
        }
        let own = guests.entry(target.guest).or_insert_with(|| Some(Vec::new()));
        match own {
            Some(own) if !target.paths.is_empty() => own.extend(target.paths),
            _ => *own = None,
        }
    }
    // They travel in one message, with where the walk is.
    let len = |paths: &Option<Vec<String>>| {
        paths.iter().flatten().map(|path| path.len() + 4).sum::<usize>()
    };
    if guests.values().any(|paths| len(paths) > PATHS_MAX) {
        let message = format!("the paths of one guest are more than {PATHS_MAX} bytes together");
        return fault(StatusCode::BAD_REQUEST, "too-many", message);
    }
    if guests.is_empty() {
        return fault(
            StatusCode::BAD_REQUEST,
            "no-target",
            "nothing is to be scanned: name a guest",
        );
    }
    let guests = guests.into_iter().map(|(guest, paths)| (guest, paths.unwrap_or_default()));
    answer(api.host.scans.add(guests.collect(), wanted.quick, None))
}

/// Pauses, resumes or cancels a scan.
#[utoipa::path(
    post,
    path = "/v1/scans/{id}/{order}",
    params(
        ("id" = u64, Path, description = "Its number"),
        ("order" = String, Path, description = "`pause`, `resume` or `cancel`"),
    ),
    responses(
        (status = 200, body = GuestScan),
        (status = 404, body = Fault),
        (status = 409, description = "Its state does not allow that", body = Fault),
    )
)]
pub async fn order(State(api): State<Api>, Path((id, order)): Path<(u64, String)>) -> Response {
    let order = match order.as_str() {
        "pause" => Order::Pause,
        "resume" => Order::Resume,
        "cancel" => Order::Cancel,
        other => {
            let message = format!("`{other}` is neither pause, resume nor cancel");
            return fault(StatusCode::NOT_FOUND, "no-such-order", message);
        }
    };
    answer(api.host.scans.order(id, order))
}

/// All schedules.
#[utoipa::path(get, path = "/v1/schedules", responses((status = 200, body = Vec<ScheduleReport>)))]
pub async fn schedules(State(api): State<Api>) -> Json<Vec<ScheduleReport>> {
    Json(api.host.scans.list_schedules(&api.host.config()))
}

/// Has a schedule run now.
#[utoipa::path(
    post,
    path = "/v1/schedules/{name}/run",
    params(("name" = String, Path, description = "Its name")),
    responses((status = 200, body = Vec<GuestScan>), (status = 404, body = Fault))
)]
pub async fn run(State(api): State<Api>, Path(name): Path<String>) -> Response {
    with_schedule(&api, &name, |config, schedule| api.host.scans.run_schedule(config, schedule))
}

/// Has a schedule's next time left out.
#[utoipa::path(
    post,
    path = "/v1/schedules/{name}/skip",
    params(("name" = String, Path, description = "Its name")),
    responses((status = 200, body = ScheduleReport), (status = 404, body = Fault))
)]
pub async fn skip(State(api): State<Api>, Path(name): Path<String>) -> Response {
    with_schedule(&api, &name, |config, schedule| api.host.scans.skip_schedule(config, schedule))
}

fn with_schedule<T: serde::Serialize>(
    api: &Api,
    name: &str,
    with: impl FnOnce(&Config, &Schedule) -> T,
) -> Response {
    let config = api.host.config();
    match config.schedules.iter().find(|schedule| schedule.is_named(name)) {
        Some(schedule) => Json(with(&config, schedule)).into_response(),
        None => {
            let message =
                format!("no schedule is named `{name}`; `seawall schedule list` shows all");
            fault(StatusCode::NOT_FOUND, "no-such-schedule", message)
        }
    }
}

fn answer<T: serde::Serialize>(result: Result<T, ScansError>) -> Response {
    match result {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => {
            let (status, code) = match error {
                ScansError::Unknown(_) => (StatusCode::NOT_FOUND, "no-such-scan"),
                ScansError::State { .. } => (StatusCode::CONFLICT, "wrong-state"),
                ScansError::TooMany => (StatusCode::SERVICE_UNAVAILABLE, "too-many"),
            };
            fault(status, code, error.to_string())
        }
    }
}
