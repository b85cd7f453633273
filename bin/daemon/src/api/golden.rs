//! Golden images: what is known of templates.

use super::{Api, fault};
use crate::golden::{GoldenError, Learned, check_name};
use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use seawall_client::{
    Fault, GoldenFile, GoldenFiles, GoldenLearnRequest, GoldenList, GoldenReport, GuestScan,
};
use seawall_proto::ContentHash;
use seawall_proto::golden::Origin;

/// The most bytes that the files of a tree may be, in JSON: room for a million.
pub const BODY_MAX: usize = 512 << 20;

/// All golden images, and guests that are not believed.
#[utoipa::path(get, path = "/v1/golden", responses((status = 200, body = GoldenReport)))]
pub async fn list(State(api): State<Api>) -> Json<GoldenReport> {
    Json(api.host.golden.report())
}

/// Has a guest scanned, and its clean files learned under this name, in place of what was learned before.
#[utoipa::path(
    post,
    path = "/v1/golden/{name}",
    params(("name" = String, Path, description = "The golden image's name")),
    request_body = GoldenLearnRequest,
    responses(
        (status = 200, body = GuestScan),
        (status = 400, body = Fault),
        (status = 404, body = Fault),
        (status = 503, body = Fault),
    )
)]
pub async fn learn(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(wanted): Json<GoldenLearnRequest>,
) -> Response {
    if let Err(error) = check_name(&name) {
        return refuse(&error);
    }
    if api.host.config().guest(&wanted.guest).is_none() {
        let message = format!("no guest is named `{}`; `seawall guests` shows all", wanted.guest);
        return fault(StatusCode::NOT_FOUND, "no-such-guest", message);
    }
    let scans = api.host.scans.add(vec![(wanted.guest, Vec::new())], false, Some(&name));
    match scans.map(|mut scans| scans.pop()) {
        Ok(Some(scan)) => Json(scan).into_response(),
        Ok(None) => fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", "nothing was begun"),
        Err(error) => fault(StatusCode::SERVICE_UNAVAILABLE, "too-many", error.to_string()),
    }
}

/// Takes the files of a tree as a golden image, in place of what was learned before.
#[utoipa::path(
    put,
    path = "/v1/golden/{name}",
    params(("name" = String, Path, description = "The golden image's name")),
    request_body = GoldenFiles,
    responses(
        (status = 200, body = GoldenList),
        (status = 400, body = Fault),
        (status = 507, description = "It cannot be written", body = Fault),
    )
)]
pub async fn put(State(api): State<Api>, Path(name): Path<String>, body: Bytes) -> Response {
    if let Err(error) = check_name(&name) {
        return refuse(&error);
    }
    let host = std::sync::Arc::clone(&api.host);
    // There may be a million of them.
    let put = tokio::task::spawn_blocking(move || {
        let learned = read(name, &body)?;
        drop(body);
        let list = host.golden.put(learned);
        host.tell_golden();
        list
    });
    match put.await {
        Ok(Ok(list)) => Json(list).into_response(),
        Ok(Err(error)) => refuse(&error),
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()),
    }
}

fn read(name: String, body: &[u8]) -> Result<Learned, GoldenError> {
    let wanted: GoldenFiles = serde_json::from_slice(body)?;
    let mut files = Vec::with_capacity(wanted.files.len());
    for file in &wanted.files {
        let hash = blake3::Hash::from_hex(&file.hash)
            .map_err(|_| GoldenError::Hash(file.hash.escape_debug().to_string()))?;
        let GoldenFile { fs_type, fs_id, inode, size, modified, changed, born, .. } = *file;
        let origin = Origin { fs_type, fs_id, inode, size, modified, changed, born };
        files.extend(origin.fingerprint().map(|own| (own, ContentHash(*hash.as_bytes()))));
    }
    let tree = seawall_client::text::escape_short(wanted.tree.as_bytes(), 1024);
    // Whoever has a tenant gets verdicts from what that tenant has; so a tree's content is sent once for each of them.
    Ok(Learned { name, source: format!("tree {tree}"), tenant: None, for_all: true, files })
}

/// Forgets a golden image: what its clones have is asked for by content again.
#[utoipa::path(
    delete,
    path = "/v1/golden/{name}",
    params(("name" = String, Path, description = "The golden image's name")),
    responses((status = 200, body = GoldenReport), (status = 404, body = Fault))
)]
pub async fn forget(State(api): State<Api>, Path(name): Path<String>) -> Response {
    changed(&api, move |golden| golden.forget(&name)).await
}

/// Uses golden images for a guest again that did not agree with one.
#[utoipa::path(
    post,
    path = "/v1/guests/{guest}/golden",
    params(("guest" = String, Path, description = "The guest's name")),
    responses((status = 200, body = GoldenReport), (status = 404, body = Fault))
)]
pub async fn trust(State(api): State<Api>, Path(guest): Path<String>) -> Response {
    changed(&api, move |golden| golden.trust(&guest)).await
}

async fn changed(
    api: &Api,
    change: impl FnOnce(&crate::golden::Golden) -> Result<(), GoldenError> + Send + 'static,
) -> Response {
    let host = std::sync::Arc::clone(&api.host);
    let done = tokio::task::spawn_blocking(move || {
        let done = change(&host.golden);
        host.tell_golden();
        done.map(|()| host.golden.report())
    });
    match done.await {
        Ok(Ok(report)) => Json(report).into_response(),
        Ok(Err(error)) => refuse(&error),
        Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()),
    }
}

fn refuse(error: &GoldenError) -> Response {
    let (status, code) = match error {
        GoldenError::Name => (StatusCode::BAD_REQUEST, "bad-name"),
        GoldenError::Unknown(_) => (StatusCode::NOT_FOUND, "no-such-image"),
        GoldenError::Trusted(_) => (StatusCode::NOT_FOUND, "not-distrusted"),
        GoldenError::TooManyFiles(_) | GoldenError::TooManyLists => {
            (StatusCode::BAD_REQUEST, "too-many")
        }
        GoldenError::Nothing => (StatusCode::BAD_REQUEST, "nothing-to-learn"),
        GoldenError::Hash(_) => (StatusCode::BAD_REQUEST, "bad-hash"),
        GoldenError::Files(_) => (StatusCode::BAD_REQUEST, "bad-body"),
        GoldenError::Moved => (StatusCode::CONFLICT, "moved"),
        GoldenError::Write(_) => (StatusCode::INSUFFICIENT_STORAGE, "no-room"),
    };
    fault(status, code, error.to_string())
}
