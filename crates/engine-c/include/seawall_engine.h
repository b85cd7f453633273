/* The security API of Seawall for engines in C. Made from the Rust source in crates/engine-c/src;
 * a test keeps the two the same. docs/write-an-engine.md is the guide, with a complete example.
 *
 * An engine fills a struct seawall_engine and calls seawall_engine_run from main.
 *
 * Everywhere:
 * - A string is bytes up to a NUL. It should be UTF-8; what is not is replaced by U+FFFD. The
 *   library copies it before the call returns. NULL counts as the empty string, except where the
 *   function says otherwise.
 * - A pointer that the library hands to a callback is valid until that callback returns, and on the
 *   thread of that callback only. What the library gives back points into it and lives as long.
 * - A function of the library that gets NULL for one of its own objects does nothing and gives the
 *   value for "nothing": 0, false, NULL, or -1 where it says so.
 * - No callback may be left by longjmp. A C++ exception that leaves one ends the process.
 */

#ifndef SEAWALL_ENGINE_H
#define SEAWALL_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Version of this interface, for seawall_engine.abi_version. Another number is another interface;
// what is only added leaves the number and makes struct seawall_engine longer.
#define SEAWALL_ENGINE_ABI 1

// A diagnostic: signatures are missing, or the engine cannot run.
#define SEAWALL_LEVEL_ERROR 0

// A diagnostic: works, but a person should know.
#define SEAWALL_LEVEL_WARNING 1

// Nothing was found in the whole content.
#define SEAWALL_CLEAN 0

// At least one detection was reported.
#define SEAWALL_INFECTED 1

// The very content is known to be good: engines after this one need not look. Return
// seawall_report_allowed(…). Counts only where the configuration lets this engine say so, else as clean.
#define SEAWALL_ALLOWED 2

// The scan could not be finished. Return seawall_report_error(…) to say why.
#define SEAWALL_ERROR 3

// The engine gave up before its time limit. What took the time may be said before, with
// seawall_report_error.
#define SEAWALL_TIMED_OUT 4

// The engine gave up since seawall_request_is_cancelled. Given up though it is wanted, the scan counts
// as failed.
#define SEAWALL_CANCELLED 5

// Unwanted, not harmful by itself.
#define SEAWALL_SEVERITY_LOW 0

// Likely harmful.
#define SEAWALL_SEVERITY_MEDIUM 1

// Harmful.
#define SEAWALL_SEVERITY_HIGH 2

// Harmful and spreading or destroying.
#define SEAWALL_SEVERITY_CRITICAL 3

// An open() is held until the verdict.
#define SEAWALL_OPERATION_OPEN 0

// An execve() is held until the verdict.
#define SEAWALL_OPERATION_EXEC 1

// Nobody is held: the file was closed after a write, or was let through unscanned before.
#define SEAWALL_OPERATION_RESCAN 2

// A person or a schedule asked.
#define SEAWALL_OPERATION_ON_DEMAND 3

// What the engine says of itself.
struct seawall_description;

// One thing that was found.
struct seawall_detection;

// The report of one scan.
struct seawall_report;

// One content to look at, and what is known of its file. That was said by a guest: it may lie.
struct seawall_request;

// The service's wishes.
struct seawall_start;

// An engine: its data and its callbacks. Set what you do not use to zero.
//
// load runs first, alone, before the sandbox: it may read files. Then, on each worker thread,
// scanner_new and one scan of empty content: the system call filter is still to come, but no file can
// be opened any more (Landlock). From then on every callback runs in the whole sandbox.
struct seawall_engine {
    // sizeof(struct seawall_engine). A longer table than the library knows is accepted when the rest
    // of it is zero.
    uint32_t struct_size;
    // SEAWALL_ENGINE_ABI.
    uint32_t abi_version;
    // The engine's own data, handed to each callback; may be NULL. Worker threads use it at the same
    // time: after load it must not change, or only under a lock.
    void *context;
    // Loads the signatures and describes them: a name and a generation at least. Returns 0, or
    // anything else when the engine cannot run; then it says why with
    // seawall_description_diagnostic. Runs once, before the sandbox. Must not be NULL.
    int (*load)(void *context,
                const struct seawall_start *start,
                struct seawall_description *description);
    // Builds what one worker thread scans with, on that thread. NULL returned refuses the engine.
    // May be NULL itself: then scan gets NULL as its scanner. Here is the last chance to start threads.
    void *(*scanner_new)(void *context);
    // Frees a scanner, on its thread. May be NULL. Most processes are ended by a kill, which calls
    // nothing.
    void (*scanner_free)(void *context, void *scanner);
    // Looks at one content and returns one of the results SEAWALL_CLEAN to SEAWALL_CANCELLED. Called
    // by several threads at a time, each with a scanner of its own. Must not be NULL.
    //
    // The first call for each scanner gets empty content, no path and no guest; its result means
    // nothing. Whatever a library does only once, late, it should do there or in scanner_new.
    int (*scan)(void *context,
                void *scanner,
                const struct seawall_request *request,
                struct seawall_report *report);
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Runs the engine until the service closes the socket. Returns the status for main to return: 0, or
// 1 when the engine could not run; the service then knows why, and standard error too.
//
// Call it once, from main, before any thread is started. The table must be a whole struct
// seawall_engine as long as its struct_size says; it is copied. A table that is NULL, of another ABI,
// too short, or without load or scan is refused.
int seawall_engine_run(const struct seawall_engine *engine);

// True when signatures that do not all load are to be refused as a whole, because a process with good
// ones is running. An engine may leave it to the library, which refuses a description with an error
// diagnostic then. False: load what can be loaded, and report the rest.
bool seawall_start_is_strict(const struct seawall_start *start);

// Worker threads that there will be; at least 1.
uint32_t seawall_start_threads(const struct seawall_start *start);

// Private memory that the whole process may use, in bytes, signatures included. Beyond it malloc gives
// NULL.
uint64_t seawall_start_memory(const struct seawall_start *start);

// Sets the engine's name, at most 256 bytes; the rest is cut. Required.
void seawall_description_name(struct seawall_description *description, const char *name);

// Sets the engine's version, at most 256 bytes; the rest is cut.
void seawall_description_version(struct seawall_description *description, const char *version);

// Sets the generation: a digest of all that a verdict depends on besides the file, that is of the
// signatures and of the engine's own version. The service remembers verdicts under it, so two processes
// with the same one must give the same verdicts. digest points to 32 bytes. Required.
void seawall_description_generation(struct seawall_description *description,
                                    const uint8_t *digest);

// Sets whether a verdict depends on path or guest besides the content. Only then does a scan get them: else
// both are empty. The verdict is remembered for that name alone, and a guest that calls a file otherwise can
// change it. False when never called.
void seawall_description_by_name(struct seawall_description *description,
                                 bool by_name);

// Sets how many signatures are in use. For people.
void seawall_description_signatures(struct seawall_description *description, uint32_t count);

// Adds what an operator should know. level is SEAWALL_LEVEL_ERROR or SEAWALL_LEVEL_WARNING; another
// value counts as an error. code is a stable word to search for, at most 256 bytes; reason says what is
// wrong and what to do, at most 1024 bytes. file, at most 1024 bytes, is NULL when it is about none.
// line and column count from 1; 0 is the whole file or line.
void seawall_description_diagnostic(struct seawall_description *description,
                                    int level,
                                    const char *code,
                                    const char *reason,
                                    const char *file,
                                    uint32_t line,
                                    uint32_t column);

// Reports a detection, at most 256 bytes of its name, of high severity and with nothing else known. What
// it gives is for the functions below; they may all be left out. A report has room for 64 detections:
// NULL for further ones, which the functions below ignore. scan then returns SEAWALL_INFECTED.
struct seawall_detection *seawall_report_detection(struct seawall_report *report,
                                                   const char *name);

// Sets how bad it is, one of SEAWALL_SEVERITY_LOW to SEAWALL_SEVERITY_CRITICAL; another value counts as
// high.
void seawall_detection_severity(struct seawall_detection *detection,
                                int severity);

// Sets the malware family, at most 256 bytes; NULL for none.
void seawall_detection_family(struct seawall_detection *detection, const char *family);

// Sets where in the content its first match begins, in bytes.
void seawall_detection_offset(struct seawall_detection *detection, uint64_t offset);

// Says that nothing in the file is worth keeping. A hint: policy decides.
void seawall_detection_cleaned_by_delete(struct seawall_detection *detection);

// Says that length bytes at offset are the harmful part, and the file without them is as it was. A hint:
// policy decides.
void seawall_detection_cleaned_by_cut(struct seawall_detection *detection,
                                      uint64_t offset,
                                      uint64_t length);

// Says which entry of a list knows the content to be good, at most 256 bytes. Gives SEAWALL_ALLOWED,
// for scan to return.
int seawall_report_allowed(struct seawall_report *report,
                           const char *entry);

// Says why the scan could not be finished, at most 1024 bytes. Gives SEAWALL_ERROR, for scan to return.
// NULL: the reason is why the content could not be read, where that was it.
int seawall_report_error(struct seawall_report *report,
                         const char *reason);

// Bytes of content.
uint64_t seawall_request_length(const struct seawall_request *request);

// The whole content in place, and its length in *length; length may be NULL. The bytes cannot change,
// and must not be written. NULL when they cannot be had: then the scan ends with SEAWALL_ERROR, or goes
// on with seawall_request_read where only the memory for a copy is missing. Never NULL for empty
// content.
const uint8_t *seawall_request_bytes(const struct seawall_request *request,
                                     size_t *length);

// Copies length bytes of the content from offset into buffer, fewer only at the end of the content.
// Returns how many, or -1 when they cannot be read; a scan that has met -1 here is never clean. buffer
// has room for length bytes; it may be NULL when length is 0.
int64_t seawall_request_read(const struct seawall_request *request,
                             uint64_t offset,
                             void *buffer,
                             size_t length);

// The path as the guest named it, and its length in *length; length may be NULL. Any bytes, without a
// NUL at the end; at most 4096, of a longer one the end. Length 0 when the access has no true path, and
// always unless the engine has said seawall_description_by_name.
const uint8_t *seawall_request_path(const struct seawall_request *request,
                                    size_t *length);

// Name of the guest in the service's configuration, a string; empty unless the engine has said
// seawall_description_by_name.
const char *seawall_request_guest(const struct seawall_request *request);

// Why the content is looked at: one of SEAWALL_OPERATION_OPEN to SEAWALL_OPERATION_ON_DEMAND. Later
// versions may have more. -1 for NULL.
int seawall_request_operation(const struct seawall_request *request);

// Size of the file in the guest, in bytes; the content may be shorter.
uint64_t seawall_request_file_size(const struct seawall_request *request);

// How long this scan may take from its start, in milliseconds.
uint64_t seawall_request_limit_ms(const struct seawall_request *request);

// How long it may still take, in milliseconds. At 0 the process is killed, and all scans in it must be
// done again: return SEAWALL_TIMED_OUT before that.
uint64_t seawall_request_left_ms(const struct seawall_request *request);

// Whether nobody wants the report any more. Costs one read of memory: ask as often as you like, and
// return SEAWALL_CANCELLED when it is true.
bool seawall_request_is_cancelled(const struct seawall_request *request);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* SEAWALL_ENGINE_H */
