//! Where results go.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use seawall_lab::workspace;

use crate::html;
use crate::stage::SHARED_MEMORY;

/// Where somebody wants them, besides among those that are kept.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Outputs {
    /// Write the results to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write them to this file as a page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl Outputs {
    /// As the first process of new namespaces is told them, wherever it is.
    pub fn arguments(&self) -> anyhow::Result<Vec<PathBuf>> {
        let mut arguments = Vec::new();
        for (name, path) in [("--json", &self.json), ("--html", &self.html)] {
            let Some(path) = path else { continue };
            let path = std::path::absolute(path)?;
            // It lays a file system of its own over this folder.
            ensure!(!path.starts_with(SHARED_MEMORY), "{name} cannot lead into {SHARED_MEMORY}");
            // Now, and not after all was measured.
            let opened = fs::OpenOptions::new().create(true).append(true).open(&path);
            opened.with_context(|| format!("{name} {}", path.display()))?;
            arguments.extend([name.into(), path]);
        }
        Ok(arguments)
    }

    /// Writes results among those that are kept, unless they are not for figures, and where somebody wants them.
    pub fn keep(&self, text: &str, file_name: &str, quick: bool) -> anyhow::Result<()> {
        if !quick {
            let folder = workspace().join("perf/results");
            fs::create_dir_all(&folder)?;
            let path = folder.join(file_name);
            write(&path, text)?;
            println!("Raw results: {}", path.display());
        }
        self.write(text)
    }

    /// Writes them where somebody wants them.
    pub fn write(&self, text: &str) -> anyhow::Result<()> {
        if let Some(path) = &self.json {
            write(path, text)?;
        }
        if let Some(path) = &self.html {
            write(path, &html::page(&serde_json::from_str(text)?)?)?;
            println!("Page: {}", path.display());
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}
