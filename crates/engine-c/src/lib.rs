//! The security API for engines that are not written in Rust: `libseawall_engine` and its header
//! `include/seawall_engine.h`, made from the comments here.
//!
//! An engine fills an [`Engine`] and calls [`seawall_engine_run`]; the rest is
//! `seawall_engine::runtime`, the same as for an engine in Rust. [`describe`](mod@describe) holds
//! what `load` gets, [`request`] and [`report`] what `scan` gets. C sees those as opaque pointers:
//! what is behind them may change without a new ABI.
//!
//! Nothing unwinds into C: each exported function catches a panic and gives its value for "nothing".
//! Nor out of it: callbacks are `C-unwind`, so an exception meets the runtime's `catch_unwind` and
//! ends the process in order.
//!
//! The crate is all pointers from C, so all of it may hold unsafe code. Each exported function states
//! in its documentation, and so in the header, what the caller must keep to; that is what its SAFETY
//! comments rest on.
#![allow(unsafe_code)]
// C has no sections in its comments: what the caller must keep to stands in the text, and once for
// all functions in the head of the header.
#![allow(clippy::missing_safety_doc)]

mod describe;
mod report;
mod request;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use seawall_engine::runtime::{self, LoadError, ScanError, Scanner};
use seawall_engine::{Diagnostic, Outcome};

use crate::describe::{Description, Start};
use crate::report::Report;
use crate::request::Request;

/// Version of this interface, for seawall_engine.abi_version. Another number is another interface;
/// what is only added leaves the number and makes struct seawall_engine longer.
pub const SEAWALL_ENGINE_ABI: u32 = 1;

/// Longest table that is looked at, in bytes.
const LONGEST_TABLE: usize = 4096;

/// An engine: its data and its callbacks. Set what you do not use to zero.
///
/// load runs first, alone, before the sandbox: it may read files. Then, on each worker thread,
/// scanner_new and one scan of empty content: the system call filter is still to come, but no file can
/// be opened any more (Landlock). From then on every callback runs in the whole sandbox.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Engine {
    /// sizeof(struct seawall_engine). A longer table than the library knows is accepted when the rest
    /// of it is zero.
    pub struct_size: u32,
    /// SEAWALL_ENGINE_ABI.
    pub abi_version: u32,
    /// The engine's own data, handed to each callback; may be NULL. Worker threads use it at the same
    /// time: after load it must not change, or only under a lock.
    pub context: *mut c_void,
    /// Loads the signatures and describes them: a name and a generation at least. Returns 0, or
    /// anything else when the engine cannot run; then it says why with
    /// seawall_description_diagnostic. Runs once, before the sandbox. Must not be NULL.
    pub load: Option<
        unsafe extern "C-unwind" fn(
            context: *mut c_void,
            start: *const Start<'_>,
            description: *mut Description,
        ) -> c_int,
    >,
    /// Builds what one worker thread scans with, on that thread. NULL returned refuses the engine.
    /// May be NULL itself: then scan gets NULL as its scanner. Here is the last chance to start threads.
    pub scanner_new: Option<unsafe extern "C-unwind" fn(context: *mut c_void) -> *mut c_void>,
    /// Frees a scanner, on its thread. May be NULL. Most processes are ended by a kill, which calls
    /// nothing.
    pub scanner_free:
        Option<unsafe extern "C-unwind" fn(context: *mut c_void, scanner: *mut c_void)>,
    /// Looks at one content and returns one of the results SEAWALL_CLEAN to SEAWALL_CANCELLED. Called
    /// by several threads at a time, each with a scanner of its own. Must not be NULL.
    ///
    /// The first call for each scanner gets empty content, no path and no guest; its result means
    /// nothing. Whatever a library does only once, late, it should do there or in scanner_new.
    pub scan: Option<
        unsafe extern "C-unwind" fn(
            context: *mut c_void,
            scanner: *mut c_void,
            request: *const Request<'_>,
            report: *mut Report,
        ) -> c_int,
    >,
}

/// Runs the engine until the service closes the socket. Returns the status for main to return: 0, or
/// 1 when the engine could not run; the service then knows why, and standard error too.
///
/// Call it once, from main, before any thread is started. The table must be a whole struct
/// seawall_engine as long as its struct_size says; it is copied. A table that is NULL, of another ABI,
/// too short, or without load or scan is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_engine_run(engine: *const Engine) -> c_int {
    static CALLED: AtomicBool = AtomicBool::new(false);
    if CALLED.swap(true, Ordering::Relaxed) {
        // The socket is the first call's: what now has its number is somebody else's.
        eprintln!("seawall_engine_run was called a second time");
        return 1;
    }
    // SAFETY: the caller gives NULL or a table of the length that its struct_size says.
    let table = unsafe { Table::read(engine) };
    let load = |start: &runtime::Start| Loaded::load(table.map_err(LoadError::from)?, start);
    match catch_unwind(AssertUnwindSafe(|| runtime::run(load))) {
        Ok(code) if code == ExitCode::SUCCESS => 0,
        _ => 1,
    }
}

/// The copy of an [`Engine`] that holds what this version needs.
#[derive(Clone, Copy)]
struct Table(Engine);

// SAFETY: function pointers may be called anywhere; the engine promises that its context may be used
// by several threads (see `Engine::context`).
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl Table {
    /// Copies the table and checks it. `from` is NULL or as long as its first field says.
    unsafe fn read(from: *const Engine) -> Result<Self, Diagnostic> {
        let refused = |reason: String| Err(Diagnostic::error("engine-abi", reason));
        if from.is_null() {
            return refused("seawall_engine_run got NULL instead of a table".into());
        }
        // SAFETY: not NULL, so at least these two fields are there.
        let (size, version) = unsafe { ((*from).struct_size as usize, (*from).abi_version) };
        if version != SEAWALL_ENGINE_ABI {
            return refused(format!(
                "the engine is made for version {version} of the C interface, \
                 this library has {SEAWALL_ENGINE_ABI}; build it with the library's own header"
            ));
        }
        let own = size_of::<Engine>();
        if !(own..=LONGEST_TABLE).contains(&size) {
            return refused(format!(
                "struct_size is {size}, version {version} has {own} to {LONGEST_TABLE} bytes; \
                 set it to sizeof(struct seawall_engine)"
            ));
        }
        // SAFETY: the table is `size` bytes long, and that is at least `own`.
        let (table, rest) = unsafe {
            let rest = std::slice::from_raw_parts(from.cast::<u8>().add(own), size - own);
            (*from, rest)
        };
        if rest.iter().any(|byte| *byte != 0) {
            return refused(format!(
                "the engine uses callbacks behind byte {own} that this library does not know"
            ));
        }
        if table.load.is_none() || table.scan.is_none() {
            return refused("the callbacks load and scan must not be NULL".into());
        }
        Ok(Self(table))
    }
}

/// An engine whose `load` has returned 0.
struct Loaded {
    table: Table,
    description: seawall_engine::Description,
}

impl Loaded {
    fn load(table: Table, start: &runtime::Start) -> Result<Self, LoadError> {
        let start = Start(start);
        let mut description = Description::new();
        let returned = table.0.load.map_or(1, |load| {
            // SAFETY: as the header promises: both pointers live for the call, and nobody else uses
            // them.
            unsafe { load(table.0.context, &raw const start, &raw mut description) }
        });
        Ok(Self { table, description: description.finish(returned)? })
    }
}

impl runtime::Engine for Loaded {
    fn describe(&self) -> seawall_engine::Description {
        self.description.clone()
    }

    fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError> {
        let table = self.table;
        let mut scanner = ptr::null_mut();
        if let Some(new) = table.0.scanner_new {
            // SAFETY: a callback of the engine with its own context.
            scanner = unsafe { new(table.0.context) };
            if scanner.is_null() {
                return Err(LoadError::new("engine-scanner", "scanner_new returned NULL"));
            }
        }
        Ok(Box::new(ForeignScanner { table, scanner }))
    }
}

/// What one worker scans with; `scanner` is the engine's.
struct ForeignScanner {
    table: Table,
    scanner: *mut c_void,
}

impl Scanner for ForeignScanner {
    fn scan(&mut self, request: &runtime::Request<'_>) -> Result<Outcome, ScanError> {
        let content = request.content;
        let request = Request::new(request);
        let mut report = Report::default();
        let Engine { context, scan, .. } = self.table.0;
        let returned = scan.map_or(report::SEAWALL_ERROR, |scan| {
            // SAFETY: as the header promises: both pointers live for the call, and nobody else uses
            // them; the scanner is this thread's own.
            unsafe { scan(context, self.scanner, &raw const request, &raw mut report) }
        });
        report.finish(returned, content.unseen())
    }
}

impl Drop for ForeignScanner {
    fn drop(&mut self) {
        if let (Some(free), false) = (self.table.0.scanner_free, self.scanner.is_null()) {
            // SAFETY: the scanner came from scanner_new and is given back once.
            unsafe { free(self.table.0.context, self.scanner) };
        }
    }
}

/// Uses an object that C gave back; `nothing` for NULL and after a panic.
///
/// `object` is NULL or a live object of this library that only this thread uses.
unsafe fn with<T, R>(object: *const T, nothing: R, what: impl FnOnce(&T) -> R) -> R {
    // SAFETY: as the caller says.
    match unsafe { object.as_ref() } {
        Some(object) => catch_unwind(AssertUnwindSafe(|| what(object))).unwrap_or(nothing),
        None => nothing,
    }
}

/// As [`with`], for what changes the object. No other reference to it may be alive.
unsafe fn with_mut<T, R>(object: *mut T, nothing: R, what: impl FnOnce(&mut T) -> R) -> R {
    // SAFETY: as the caller says.
    match unsafe { object.as_mut() } {
        Some(object) => catch_unwind(AssertUnwindSafe(|| what(object))).unwrap_or(nothing),
        None => nothing,
    }
}

/// A copy of a C string: empty for NULL, U+FFFD for what is not UTF-8.
///
/// `text` is NULL or points to bytes that a NUL ends.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
