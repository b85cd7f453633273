//! Sends a file's content to the service, piece by piece.

use crate::progress::Progress;
use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::channel::Channel;
use seawall_client::{Client, ScanReport};
use std::io;
use std::path::Path;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes read and sent at once.
const PIECE: usize = 256 * 1024;

/// Has the service scan `path`, or what comes through a pipe for `-`.
pub async fn scan(client: &Client, path: &Path) -> anyhow::Result<ScanReport> {
    if path == Path::new("-") {
        return send(client, "-", tokio::io::stdin(), Progress::of_bytes(None, "sent")).await;
    }
    let open = || async {
        let file = File::open(path).await?;
        Ok::<_, io::Error>((file.metadata().await?, file))
    };
    let (metadata, file) =
        open().await.with_context(|| format!("{} cannot be read", path.display()))?;
    if metadata.is_dir() {
        bail!("{} is a folder; name a file, or `tar c FOLDER | seawall scan -`", path.display());
    }
    let progress = Progress::of_bytes(Some(metadata.len()), "sent");
    send(client, &path.to_string_lossy(), file, progress).await
}

/// The same for an open file, of which nothing is shown.
pub async fn scan_quietly(
    client: &Client,
    path: &Path,
    file: &std::fs::File,
) -> anyhow::Result<ScanReport> {
    let file = File::from_std(file.try_clone()?);
    send(client, &path.to_string_lossy(), file, Progress::hidden()).await
}

async fn send(
    client: &Client,
    name: &str,
    mut from: impl AsyncRead + Unpin + Send + 'static,
    progress: Progress,
) -> anyhow::Result<ScanReport> {
    let shown = progress.clone();
    let (mut to, body) = Channel::<Bytes, io::Error>::new(2);
    let reading = tokio::spawn(async move {
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            match (&mut from).take(PIECE as u64).read_to_end(&mut piece).await {
                Ok(0) => {
                    // The engines have it now.
                    progress.say("{spinner} {bytes} sent, being scanned");
                    return Ok(());
                }
                Ok(len) => {
                    if to.send_data(piece.into()).await.is_err() {
                        // The service wants no more: its answer says why.
                        return Ok(());
                    }
                    progress.add(len);
                }
                Err(error) => {
                    to.abort(io::Error::from(error.kind()));
                    return Err(error);
                }
            }
        }
    });
    let answer = client.scan(name, body).await;
    shown.clear();
    if reading.is_finished() {
        reading.await?.with_context(|| format!("{name} cannot be read to its end"))?;
    } else {
        reading.abort();
    }
    Ok(answer?)
}
