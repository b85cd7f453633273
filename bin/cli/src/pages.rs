//! Completions and man pages, made from the same source as the help.

use crate::command::Arguments;
use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;
use std::io::{self, Write};
use std::path::Path;

/// Prints what `shell` needs.
pub fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "seawall", &mut text);
    io::stdout().write_all(&text)?;
    Ok(io::stdout().flush()?)
}

/// Writes `seawall.1`, and `seawall-SUBCOMMAND.1` for each.
pub fn man(folder: &Path) -> anyhow::Result<()> {
    let command = Arguments::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command, folder).with_context(|| {
        format!("no man pages can be written into {}; name a folder of yours", folder.display())
    })
}
