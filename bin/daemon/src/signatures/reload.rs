//! A reload: the watched folders are looked into at once, and engines with signatures of their own load these again.

use super::{GRACE, Keeper, lock};
use crate::engines::{Running, Trust, lines};
use crate::host::Host;
use seawall_client::ReloadedEngine;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

impl Keeper {
    /// See [`Signatures::reload`].
    pub(super) fn reload(&mut self, host: &Arc<Host>) -> Vec<ReloadedEngine> {
        self.look(host, true);
        let engines = &host.first_config.engines.0;
        let mut own = Vec::new();
        for (number, wanted) in engines.iter().enumerate() {
            if wanted.signatures.is_nothing() {
                host.pipeline.engines()[number].loading.store(true, Relaxed);
                own.push((number, Running::start(host, number, wanted, None, Trust::Candidate)));
            }
        }
        let mut reloaded = Vec::new();
        for (number, started) in own {
            let slot = &host.pipeline.engines()[number];
            let taken = self.use_own(host, number, started);
            slot.loading.store(false, Relaxed);
            if let Err(why) = &taken {
                host.tell_refused(Some(&slot.name), &lines(why));
                slot.set_refused(why.clone());
            }
            let (rules, diagnostics) = match taken {
                Ok((rules, diagnostics)) => (Some(rules), diagnostics),
                Err(why) => (None, why),
            };
            let engine = slot.name.clone();
            reloaded.push((
                number,
                ReloadedEngine { engine, taken: rules.is_some(), rules, diagnostics },
            ));
        }
        let refused = lock(&host.signatures.refused).clone();
        let last = lock(&host.signatures.book).history.last().cloned();
        for (number, wanted) in engines.iter().enumerate() {
            if wanted.signatures.is_nothing() {
                continue;
            }
            let description = host.pipeline.in_use()[number].description();
            let part = last
                .iter()
                .flat_map(|change| &change.engines)
                .find(|part| part.engine == wanted.name);
            let refused = refused.is_some() && part.is_some_and(|part| part.changed);
            reloaded.push((
                number,
                ReloadedEngine {
                    engine: wanted.name.clone(),
                    taken: !refused && description.is_some(),
                    rules: description.map(|description| description.rules),
                    diagnostics: part.map(|part| part.diagnostics.clone()).unwrap_or_default(),
                },
            ));
        }
        reloaded.sort_by_key(|(number, _)| *number);
        reloaded.into_iter().map(|(_, engine)| engine).collect()
    }

    /// Uses an engine that has loaded its own signatures again.
    fn use_own(
        &mut self,
        host: &Arc<Host>,
        number: usize,
        started: std::io::Result<Arc<Running>>,
    ) -> Result<(u32, Vec<seawall_client::Diagnostic>), Vec<seawall_client::Diagnostic>> {
        let failed = |why: String| vec![crate::api::signatures::diagnostic(&why)];
        let running = started.map_err(|error| failed(error.to_string()))?;
        let patience = host.first_config.engines.0[number].load_timeout() + GRACE;
        let used = running.wait(patience).and_then(|description| {
            let old = host.use_engines(&[(number, Arc::clone(&running))]).map_err(failed)?;
            self.retired.end(old.into_iter().map(|(_, running)| running));
            Ok((description.rules, running.tell(&description.diagnostics)))
        });
        if used.is_err() {
            self.retired.end([running]);
        }
        used
    }
}
