//! The quarantine: what is in it, giving files back, and contents that pass.

use super::Api;
use crate::events;
use crate::quarantine::{Entry, Line, QuarantineError, RestoreError, Target, parse_hash};
use crate::session::Session;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use seawall_client::text::escape;
use seawall_client::{
    Approval, Fault, Quarantine, QuarantineAttributes, QuarantineEntry, QuarantineState,
    RestoreRequest,
};
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// An answer that says why not.
struct Refused(Box<Response>);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        *self.0
    }
}

fn fault(status: StatusCode, code: &str, message: impl Into<String>) -> Refused {
    Refused(Box::new(super::fault(status, code, message)))
}

/// Runs what may wait for a disk or a guest beside the asynchronous thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refused> + Send + 'static,
) -> Result<T, Refused> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()))
    })
}

fn refused(error: QuarantineError) -> Refused {
    let (status, code) = match &error {
        QuarantineError::NoSuch(_) => (StatusCode::NOT_FOUND, "no-such-entry"),
        QuarantineError::Ambiguous(_) => (StatusCode::CONFLICT, "ambiguous"),
        QuarantineError::Store(crate::quarantine::StoreError::Damaged { .. }) => {
            (StatusCode::INTERNAL_SERVER_ERROR, "damaged")
        }
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "quarantine"),
    };
    fault(status, code, error.to_string())
}

fn state_of(word: &str) -> QuarantineState {
    match word {
        "quarantined" => QuarantineState::Quarantined,
        "stays" => QuarantineState::Stays,
        "restored" => QuarantineState::Restored,
        _ => QuarantineState::Stored,
    }
}

fn time(milliseconds: i64) -> String {
    jiff::Timestamp::from_millisecond(milliseconds).map_or_else(|_| "?".into(), events::format_time)
}

fn describe(line: Line) -> QuarantineEntry {
    QuarantineEntry {
        id: line.ticket.to_string(),
        state: state_of(&line.state),
        detail: line.detail,
        guest: line.guest,
        path: escape(&line.path),
        path_hex: std::str::from_utf8(&line.path).is_err().then(|| events::hex(&line.path)),
        detection: escape(line.detection.as_bytes()),
        engine: line.engine,
        hash: line.hash.to_string(),
        size: line.size,
        stored: time(line.stored_ms),
        attributes: None,
    }
}

fn describe_whole(entry: Entry) -> QuarantineEntry {
    let attributes = &entry.attributes;
    let whole = QuarantineAttributes {
        mode: format!("{:04o}", attributes.mode),
        uid: attributes.uid,
        gid: attributes.gid,
        modified: time(attributes.modified.0.saturating_mul(1000)),
        xattrs: attributes.xattrs.iter().map(|(name, _)| escape(name)).collect(),
        sparse: !attributes.extents.is_empty(),
        links: attributes.links,
    };
    let (state, detail) = (entry.state.word().to_owned(), entry.state.detail());
    let Entry { ticket, hash, size, guest, path, detection, engine, stored_ms, .. } = entry;
    let line =
        Line { ticket, hash, size, guest, path, detection, engine, stored_ms, state, detail };
    QuarantineEntry { attributes: Some(whole), ..describe(line) }
}

/// Which entries are wanted.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub struct ListQuery {
    /// Of this guest alone.
    guest: Option<String>,
}

/// What is in quarantine, newest first.
#[utoipa::path(get, path = "/v1/quarantine", params(ListQuery), responses((status = 200, body = Quarantine)))]
pub async fn list(State(api): State<Api>, Query(query): Query<ListQuery>) -> Response {
    let listed = blocking(move || {
        let quarantine = &api.host.quarantine;
        let lines = quarantine.list(query.guest.as_deref()).map_err(refused)?;
        let (used_bytes, most_bytes) = quarantine.usage();
        let entries = lines.into_iter().map(describe).collect();
        Ok(Json(Quarantine { entries, used_bytes, most_bytes }))
    });
    listed.await.into_response()
}

/// One entry, named by its ticket or enough of its first digits.
#[utoipa::path(
    get,
    path = "/v1/quarantine/{id}",
    params(("id" = String, Path, description = "The ticket, or its first digits")),
    responses((status = 200, body = QuarantineEntry), (status = 404, body = Fault))
)]
pub async fn show(State(api): State<Api>, Path(id): Path<String>) -> Response {
    let found = blocking(move || {
        let entry = api.host.quarantine.find(&id).map_err(refused)?;
        Ok(Json(describe_whole(entry)))
    });
    found.await.into_response()
}

/// The content of an entry, as it was. It is malware.
#[utoipa::path(
    get,
    path = "/v1/quarantine/{id}/content",
    params(("id" = String, Path, description = "The ticket, or its first digits")),
    responses(
        (status = 200, content_type = "application/octet-stream", body = Vec<u8>),
        (status = 404, body = Fault),
    )
)]
pub async fn content(State(api): State<Api>, Path(id): Path<String>) -> Response {
    let quarantine = Arc::clone(&api.host.quarantine);
    let looked = blocking(move || {
        let entry = api.host.quarantine.find(&id).map_err(refused)?;
        // Read once to the end before a byte goes out: nobody gets what is damaged.
        api.host.quarantine.read(entry.hash, |_| Ok(())).map_err(|error| refused(error.into()))?;
        Ok(entry)
    });
    let entry = match looked.await {
        Ok(entry) => entry,
        Err(answer) => return answer.into_response(),
    };
    let (pieces, body) = mpsc::channel::<Result<Bytes, std::io::Error>>(4);
    tokio::task::spawn_blocking(move || {
        let read = quarantine.read(entry.hash, |piece| {
            let sent = pieces.blocking_send(Ok(Bytes::copy_from_slice(piece)));
            sent.map_err(|_| "the reader hung up".into())
        });
        if let Err(error) = read {
            // The caller sees that the answer breaks off.
            let _ = pieces.blocking_send(Err(std::io::Error::other(error.to_string())));
        }
    });
    let body = Body::from_stream(ReceiverStream::new(body));
    ([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response()
}

/// Gives a file back to a guest. It is not caught there again: its content is approved for that guest.
#[utoipa::path(
    post,
    path = "/v1/quarantine/{id}/restore",
    params(("id" = String, Path, description = "The ticket, or its first digits")),
    request_body = RestoreRequest,
    responses(
        (status = 200, body = QuarantineEntry),
        (status = 404, body = Fault),
        (status = 409, description = "There is a file, the guest cannot be reached, and so on", body = Fault),
    )
)]
pub async fn restore(
    State(api): State<Api>,
    Path(id): Path<String>,
    Json(wanted): Json<RestoreRequest>,
) -> Response {
    let done = blocking(move || {
        let quarantine = &api.host.quarantine;
        let entry = quarantine.find(&id).map_err(refused)?;
        let name = wanted.guest.as_deref().unwrap_or(&entry.guest);
        let conflict = |code: &str, message: String| fault(StatusCode::CONFLICT, code, message);
        let guest = api.host.guests.find(|guest| guest.name() == name).ok_or_else(|| {
            let message = format!("no guest is named `{name}`; restore to another with --to");
            conflict("no-such-guest", message)
        })?;
        // On a channel without connections a driver that has ended is only silent.
        let patience = Duration::from_millis(api.host.config().alarm.unprotected_after_ms.into());
        let answers = |session: &Arc<Session>| session.report().0 <= patience;
        let session = guest.session().filter(answers).ok_or_else(|| {
            let message =
                format!("the driver of guest {name} is not connected; try again when it is");
            conflict("guest-away", message)
        })?;
        let path = wanted.path.map_or_else(|| entry.path.clone(), String::into_bytes);
        if !path.starts_with(b"/") || path.len() > 4096 || path.contains(&0) {
            let message = "the path must be absolute, at most 4,096 bytes, without NUL";
            return Err(fault(StatusCode::BAD_REQUEST, "bad-path", message));
        }
        let target = Target { session, path, overwrite: wanted.overwrite };
        match quarantine.restore(entry, &target) {
            Ok(()) => {}
            Err(RestoreError::Quarantine(error)) => return Err(refused(error)),
            Err(error @ RestoreError::Exists) => return Err(conflict("exists", error.to_string())),
            Err(error) => return Err(conflict("not-restored", error.to_string())),
        }
        let entry = quarantine.find(&id).map_err(refused)?;
        Ok(Json(describe_whole(entry)))
    });
    done.await.into_response()
}

/// Deletes an entry for good.
#[utoipa::path(
    delete,
    path = "/v1/quarantine/{id}",
    params(("id" = String, Path, description = "The ticket, or its first digits")),
    responses((status = 200, body = QuarantineEntry), (status = 404, body = Fault))
)]
pub async fn delete(State(api): State<Api>, Path(id): Path<String>) -> Response {
    let gone = blocking(move || {
        let entry = api.host.quarantine.find(&id).map_err(refused)?;
        api.host.quarantine.delete(&entry).map_err(refused)?;
        Ok(Json(describe_whole(entry)))
    });
    gone.await.into_response()
}

/// All contents that pass although they are detected.
#[utoipa::path(get, path = "/v1/approvals", responses((status = 200, body = Vec<Approval>)))]
pub async fn approvals(State(api): State<Api>) -> Json<Vec<Approval>> {
    Json(api.host.quarantine.approvals())
}

fn hash_of(approval: &Approval) -> Result<seawall_proto::ContentHash, Refused> {
    parse_hash(&approval.hash.to_ascii_lowercase()).ok_or_else(|| {
        let message =
            "a hash is BLAKE3 in 64 hexadecimal digits, as `seawall quarantine show` tells it";
        fault(StatusCode::BAD_REQUEST, "bad-hash", message)
    })
}

/// Lets a content pass, in one guest or in all.
#[utoipa::path(
    post,
    path = "/v1/approvals",
    request_body = Approval,
    responses((status = 200, body = Vec<Approval>), (status = 400, body = Fault))
)]
pub async fn approve(State(api): State<Api>, Json(approval): Json<Approval>) -> Response {
    let done = blocking(move || {
        let hash = hash_of(&approval)?;
        if let Some(name) = &approval.guest
            && api.host.guests.find(|guest| guest.name() == name).is_none()
        {
            let message = format!("no guest is named `{name}`; `seawall guests` shows all");
            return Err(fault(StatusCode::NOT_FOUND, "no-such-guest", message));
        }
        api.host.quarantine.approve(hash, approval.guest.as_deref()).map_err(refused)?;
        Ok(Json(api.host.quarantine.approvals()))
    });
    done.await.into_response()
}

/// Takes an approval back: that of the guest named, or all of this content.
#[utoipa::path(
    delete,
    path = "/v1/approvals",
    request_body = Approval,
    responses(
        (status = 200, body = Vec<Approval>),
        (status = 400, body = Fault),
        (status = 404, body = Fault),
    )
)]
pub async fn revoke(State(api): State<Api>, Json(approval): Json<Approval>) -> Response {
    let done = blocking(move || {
        let hash = hash_of(&approval)?;
        let gone = api.host.quarantine.revoke(hash, approval.guest.as_deref()).map_err(refused)?;
        if gone == 0 {
            let message =
                "this content is not approved; `seawall quarantine approvals` shows those that are";
            return Err(fault(StatusCode::NOT_FOUND, "not-approved", message));
        }
        Ok(Json(api.host.quarantine.approvals()))
    });
    done.await.into_response()
}
