//! Signature sets: which are kept, and changes of the one in use.
//!
//! A change goes on to its end when whoever asked for it has gone; the history tells how it ended.

use super::{Api, fault};
use crate::signatures::Busy;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use seawall_client::{
    ApplyRequest, Diagnostic, Fault, RollbackRequest, SignatureChange, SignatureSet,
};
use std::path::PathBuf;
use tokio::sync::oneshot;

/// The sets that are kept, the newest last.
#[utoipa::path(get, path = "/v1/signatures", responses((status = 200, body = Vec<SignatureSet>)))]
pub async fn list(State(api): State<Api>) -> Json<Vec<SignatureSet>> {
    Json(api.host.signatures.list())
}

/// Changes of signatures that are remembered, refused ones too, the newest last.
#[utoipa::path(get, path = "/v1/signatures/history", responses((status = 200, body = Vec<SignatureChange>)))]
pub async fn history(State(api): State<Api>) -> Json<Vec<SignatureChange>> {
    Json(api.host.signatures.history())
}

/// Has a folder become the signature set in use. It is copied, loaded beside the one in use and tried; where
/// anything is wrong that one stays, and the answer says why.
#[utoipa::path(
    post,
    path = "/v1/signatures/apply",
    request_body = ApplyRequest,
    responses(
        (status = 200, body = SignatureChange),
        (status = 400, description = "The path is not absolute", body = Fault),
        (status = 503, description = "Too many changes wait", body = Fault),
    )
)]
pub async fn apply(State(api): State<Api>, Json(wanted): Json<ApplyRequest>) -> Response {
    let folder = PathBuf::from(&wanted.folder);
    if !folder.is_absolute() {
        let message = format!("{}: the path must be absolute", wanted.folder);
        return fault(StatusCode::BAD_REQUEST, "wrong-path", message);
    }
    let (tell, told) = oneshot::channel();
    let ordered =
        api.host.signatures.apply(folder, wanted.check, move |change| drop(tell.send(change)));
    answer(ordered, told).await
}

/// Goes back to an earlier set.
#[utoipa::path(
    post,
    path = "/v1/signatures/rollback",
    request_body = RollbackRequest,
    responses(
        (status = 200, body = SignatureChange),
        (status = 503, description = "Too many changes wait", body = Fault),
    )
)]
pub async fn rollback(State(api): State<Api>, Json(wanted): Json<RollbackRequest>) -> Response {
    let (tell, told) = oneshot::channel();
    let ordered = api.host.signatures.rollback(wanted.set, move |change| drop(tell.send(change)));
    answer(ordered, told).await
}

async fn answer(ordered: Result<(), Busy>, told: oneshot::Receiver<SignatureChange>) -> Response {
    match ordered {
        Ok(()) => match told.await {
            Ok(change) => Json(change).into_response(),
            Err(error) => fault(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()),
        },
        Err(busy) => fault(StatusCode::SERVICE_UNAVAILABLE, "busy", busy.to_string()),
    }
}

/// What an engine would say.
pub fn diagnostic(reason: &str) -> Diagnostic {
    Diagnostic {
        level: "error".into(),
        file: String::new(),
        line: 0,
        column: 0,
        code: "engine-start".into(),
        reason: reason.to_owned(),
    }
}
