//! What `scan` says.

use std::ffi::{c_char, c_int};
use std::ptr;

use seawall_engine::report::MAX_DETECTIONS;
use seawall_engine::runtime::ScanError;
use seawall_engine::{Cleaning, Outcome, Severity};

use crate::{text, with_mut};

/// Nothing was found in the whole content.
pub const SEAWALL_CLEAN: c_int = 0;
/// At least one detection was reported.
pub const SEAWALL_INFECTED: c_int = 1;
/// The very content is known to be good: engines after this one need not look. Return
/// seawall_report_allowed(…). Counts only where the configuration lets this engine say so, else as clean.
pub const SEAWALL_ALLOWED: c_int = 2;
/// The scan could not be finished. Return seawall_report_error(…) to say why.
pub const SEAWALL_ERROR: c_int = 3;
/// The engine gave up before its time limit. What took the time may be said before, with
/// seawall_report_error.
pub const SEAWALL_TIMED_OUT: c_int = 4;
/// The engine gave up since seawall_request_is_cancelled. Given up though it is wanted, the scan counts
/// as failed.
pub const SEAWALL_CANCELLED: c_int = 5;

/// Unwanted, not harmful by itself.
pub const SEAWALL_SEVERITY_LOW: c_int = 0;
/// Likely harmful.
pub const SEAWALL_SEVERITY_MEDIUM: c_int = 1;
/// Harmful.
pub const SEAWALL_SEVERITY_HIGH: c_int = 2;
/// Harmful and spreading or destroying.
pub const SEAWALL_SEVERITY_CRITICAL: c_int = 3;

/// The report of one scan.
#[derive(Default)]
pub struct Report {
    /// Never longer than [`MAX_DETECTIONS`]. Its room is made at the first one, so that it does not move:
    /// C holds pointers into it.
    detections: Vec<Detection>,
    allowed: Option<String>,
    reason: Option<String>,
}

/// One thing that was found.
pub struct Detection(seawall_engine::Detection);

impl Report {
    /// What the scan came to. A result that contradicts the report is an error: it must not count as
    /// clean. `why` is why content could not be read.
    pub(crate) fn finish(self, returned: c_int, why: Option<String>) -> Result<Outcome, ScanError> {
        let failed = |reason: String| Err(ScanError::Failed { reason });
        let nothing_found = self.detections.is_empty();
        match returned {
            SEAWALL_TIMED_OUT => Err(match self.reason {
                Some(what) => ScanError::TimedOutIn { what },
                None => ScanError::TimedOut,
            }),
            SEAWALL_CANCELLED => Err(ScanError::Cancelled),
            SEAWALL_ERROR => {
                failed(self.reason.or(why).unwrap_or_else(|| "it gives no reason".into()))
            }
            SEAWALL_INFECTED if nothing_found => {
                failed("it says infected and names no detection".into())
            }
            SEAWALL_INFECTED => {
                Ok(Outcome::Infected(self.detections.into_iter().map(|one| one.0).collect()))
            }
            SEAWALL_CLEAN | SEAWALL_ALLOWED if !nothing_found => {
                failed("it names a detection and does not say infected".into())
            }
            SEAWALL_CLEAN => Ok(Outcome::Clean),
            SEAWALL_ALLOWED => match self.allowed {
                Some(name) => Ok(Outcome::Allowed { name }),
                None => failed("it says allowed and names no entry of a list".into()),
            },
            other => failed(format!("scan returned {other}, which is no result")),
        }
    }
}

/// Reports a detection, at most 256 bytes of its name, of high severity and with nothing else known. What
/// it gives is for the functions below; they may all be left out. A report has room for 64 detections:
/// NULL for further ones, which the functions below ignore. scan then returns SEAWALL_INFECTED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_report_detection(
    report: *mut Report,
    name: *const c_char,
) -> *mut Detection {
    // SAFETY: as the header says.
    unsafe {
        with_mut(report, ptr::null_mut(), |report| {
            let detections = &mut report.detections;
            let next = detections.len();
            if next >= MAX_DETECTIONS {
                return ptr::null_mut();
            }
            if next == 0 {
                detections.reserve_exact(MAX_DETECTIONS);
            }
            detections.push(Detection(seawall_engine::Detection::new(text(name))));
            // Not a reference to the last one: the next push must leave this pointer good.
            detections.as_mut_ptr().add(next)
        })
    }
}

/// Sets how bad it is, one of SEAWALL_SEVERITY_LOW to SEAWALL_SEVERITY_CRITICAL; another value counts as
/// high.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_detection_severity(detection: *mut Detection, severity: c_int) {
    let severity = match severity {
        SEAWALL_SEVERITY_LOW => Severity::Low,
        SEAWALL_SEVERITY_MEDIUM => Severity::Medium,
        SEAWALL_SEVERITY_CRITICAL => Severity::Critical,
        SEAWALL_SEVERITY_HIGH => Severity::High,
        _ => Severity::High,
    };
    // SAFETY: as the header says.
    unsafe { with_mut(detection, (), |detection| detection.0.severity = severity) }
}

/// Sets the malware family, at most 256 bytes; NULL for none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_detection_family(
    detection: *mut Detection,
    family: *const c_char,
) {
    // SAFETY: as the header says.
    unsafe {
        with_mut(detection, (), |detection| {
            detection.0.family = (!family.is_null()).then(|| text(family));
        });
    }
}

/// Sets where in the content its first match begins, in bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_detection_offset(detection: *mut Detection, offset: u64) {
    // SAFETY: as the header says.
    unsafe { with_mut(detection, (), |detection| detection.0.offset = Some(offset)) }
}

/// Says that nothing in the file is worth keeping. A hint: policy decides.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_detection_cleaned_by_delete(detection: *mut Detection) {
    // SAFETY: as the header says.
    unsafe { with_mut(detection, (), |detection| detection.0.cleaning = Some(Cleaning::Delete)) }
}

/// Says that length bytes at offset are the harmful part, and the file without them is as it was. A hint:
/// policy decides.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_detection_cleaned_by_cut(
    detection: *mut Detection,
    offset: u64,
    length: u64,
) {
    let cut = Cleaning::Cut { offset, length };
    // SAFETY: as the header says.
    unsafe { with_mut(detection, (), |detection| detection.0.cleaning = Some(cut)) }
}

/// Says which entry of a list knows the content to be good, at most 256 bytes. Gives SEAWALL_ALLOWED,
/// for scan to return.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_report_allowed(
    report: *mut Report,
    entry: *const c_char,
) -> c_int {
    // SAFETY: as the header says.
    unsafe { with_mut(report, (), |report| report.allowed = Some(text(entry))) };
    SEAWALL_ALLOWED
}

/// Says why the scan could not be finished, at most 1024 bytes. Gives SEAWALL_ERROR, for scan to return.
/// NULL: the reason is why the content could not be read, where that was it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn seawall_report_error(report: *mut Report, reason: *const c_char) -> c_int {
    // SAFETY: as the header says.
    unsafe {
        with_mut(report, (), |report| report.reason = (!reason.is_null()).then(|| text(reason)));
    }
    SEAWALL_ERROR
}
