//! What `load` gets: the service's wishes, and the description to fill.

use std::ffi::{c_char, c_int};

use seawall_engine::runtime::{self, LoadError};
use seawall_engine::{Diagnostic, Generation, Level};

use crate::{text, with, with_mut};

/// A diagnostic: signatures are missing, or the engine cannot run.
pub const SEAWALL_LEVEL_ERROR: c_int = 0;
/// A diagnostic: works, but a person should know.
pub const SEAWALL_LEVEL_WARNING: c_int = 1;

/// The service's wishes.
pub struct Start<'a>(pub(crate) &'a runtime::Start);

/// What the engine says of itself.
pub struct Description {
    value: seawall_engine::Description,
    generation: Option<Generation>,
}

impl Description {
    pub(crate) fn new() -> Self {
        let value = seawall_engine::Description::new("", "", Generation([0; 32]));
        Self { value, generation: None }
    }

    /// The whole description once `load` has returned; else why there is none.
    pub(crate) fn finish(
        mut self,
        returned: c_int,
    ) -> Result<seawall_engine::Description, LoadError> {
        let missing = match self.generation {
            _ if returned != 0 && self.value.has_errors() => {
                return Err(LoadError::all(self.value.diagnostics));
            }
            _ if returned != 0 => "load failed and says not why",
            _ if self.value.name.is_empty() => "load has set no name",
            None => "load has set no generation",
            Some(generation) => {
                return Ok(seawall_engine::Description { generation, ..self.value });
            }
        };
        // In front: the first one is what `status` shows as the reason.
        self.value.diagnostics.insert(0, Diagnostic::error("engine-load", missing));
        Err(LoadError::all(self.value.diagnostics))
    }
}

/// True when signatures that do not all load are to be refused as a whole, because a process with good
/// ones is running. An engine may leave it to the library, which refuses a description with an error
/// diagnostic then. False: load what can be loaded, and report the rest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_start_is_strict(start: *const Start<'_>) -> bool {
    // SAFETY: as the header says.
    unsafe { with(start, false, |start| start.0.strict) }
}

/// Worker threads that there will be; at least 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_start_threads(start: *const Start<'_>) -> u32 {
    // SAFETY: as the header says.
    unsafe { with(start, 0, |start| start.0.threads.max(1)) }
}

/// Private memory that the whole process may use, in bytes, signatures included. Beyond it malloc gives
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_start_memory(start: *const Start<'_>) -> u64 {
    // SAFETY: as the header says.
    unsafe { with(start, 0, |start| start.0.limits.memory) }
}

/// Sets the engine's name, at most 256 bytes; the rest is cut. Required.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_description_name(
    description: *mut Description,
    name: *const c_char,
) {
    // SAFETY: as the header says.
    unsafe { with_mut(description, (), |description| description.value.name = text(name)) }
}

/// Sets the engine's version, at most 256 bytes; the rest is cut.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_description_version(
    description: *mut Description,
    version: *const c_char,
) {
    // SAFETY: as the header says.
    unsafe { with_mut(description, (), |description| description.value.version = text(version)) }
}

/// Sets the generation: a digest of all that a verdict depends on besides the file, that is of the
/// signatures and of the engine's own version. The service remembers verdicts under it, so two processes
/// with the same one must give the same verdicts. digest points to 32 bytes. Required.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_description_generation(
    description: *mut Description,
    digest: *const u8,
) {
    // SAFETY: as the header says; an array of bytes has no alignment to keep.
    let digest = unsafe { digest.cast::<[u8; 32]>().as_ref() }.copied();
    // SAFETY: as the header says.
    unsafe {
        with_mut(description, (), |description| description.generation = digest.map(Generation));
    }
}

/// Sets whether a verdict depends on path or guest besides the content. Only then does a scan get them: else
/// both are empty. The verdict is remembered for that name alone, and a guest that calls a file otherwise can
/// change it. False when never called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_description_by_name(description: *mut Description, by_name: bool) {
    // SAFETY: as the header says.
    unsafe { with_mut(description, (), |description| description.value.by_name = by_name) }
}

/// Sets how many signatures are in use. For people.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_description_signatures(description: *mut Description, count: u32) {
    // SAFETY: as the header says.
    unsafe { with_mut(description, (), |description| description.value.rules = count) }
}

/// Adds what an operator should know. level is SEAWALL_LEVEL_ERROR or SEAWALL_LEVEL_WARNING; another
/// value counts as an error. code is a stable word to search for, at most 256 bytes; reason says what is
/// wrong and what to do, at most 1024 bytes. file, at most 1024 bytes, is NULL when it is about none.
/// line and column count from 1; 0 is the whole file or line.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_description_diagnostic(
    description: *mut Description,
    level: c_int,
    code: *const c_char,
    reason: *const c_char,
    file: *const c_char,
    line: u32,
    column: u32,
) {
    let level = match level {
        SEAWALL_LEVEL_WARNING => Level::Warning,
        SEAWALL_LEVEL_ERROR => Level::Error,
        _ => Level::Error,
    };
    // SAFETY: as the header says.
    unsafe {
        with_mut(description, (), |description| {
            let (file, code, reason) = (text(file), text(code), text(reason));
            let one = Diagnostic { level, file, line, column, code, reason };
            description.value.diagnostics.push(one);
        });
    }
}
