//! Sends a file's content to the service, piece by piece.

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::channel::Channel;
use indicatif::{ProgressBar, ProgressStyle};
use seawall_client::{Client, ScanReport};
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes read and sent at once.
const PIECE: usize = 256 * 1024;

/// Has the service scan `path`, or what comes through a pipe for `-`.
pub async fn scan(client: &Client, path: &Path) -> anyhow::Result<ScanReport> {
    if path == Path::new("-") {
        return send(client, "-", tokio::io::stdin(), Progress::new(None)).await;
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
    let progress = Progress::new(Some(metadata.len()));
    send(client, &path.to_string_lossy(), file, progress).await
}

/// How far it is, on the terminal where stderr is one; it leaves nothing behind.
struct Progress(ProgressBar);

impl Progress {
    /// For so many bytes, where that is known.
    fn new(len: Option<u64>) -> Self {
        // Drawn only where stderr is a terminal.
        let bar = len.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let template = match len {
            Some(_) => "{bar:30} {bytes} of {total_bytes} sent, {eta} left",
            None => "{spinner} {bytes} sent",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// Everything is sent: the engines have it now.
    fn sent(&self) {
        if let Ok(style) = ProgressStyle::with_template("{spinner} {bytes} sent, being scanned") {
            self.0.set_style(style);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

async fn send(
    client: &Client,
    name: &str,
    mut from: impl AsyncRead + Unpin + Send + 'static,
    progress: Progress,
) -> anyhow::Result<ScanReport> {
    let bar = progress.0.clone();
    let (mut to, body) = Channel::<Bytes, io::Error>::new(2);
    let reading = tokio::spawn(async move {
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            match (&mut from).take(PIECE as u64).read_to_end(&mut piece).await {
                Ok(0) => {
                    progress.sent();
                    // Cleared with the answer.
                    return Ok(progress);
                }
                Ok(len) => {
                    if to.send_data(piece.into()).await.is_err() {
                        // The service wants no more: its answer says why.
                        return Ok(progress);
                    }
                    progress.0.inc(len as u64);
                }
                Err(error) => {
                    to.abort(io::Error::from(error.kind()));
                    return Err(error);
                }
            }
        }
    });
    let answer = client.scan(name, body).await;
    bar.finish_and_clear();
    if reading.is_finished() {
        drop(reading.await?.with_context(|| format!("{name} cannot be read to its end"))?);
    } else {
        reading.abort();
    }
    Ok(answer?)
}
