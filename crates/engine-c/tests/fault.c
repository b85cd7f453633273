/* An engine for the tests: does to the library, and to itself, what the content says.
 *
 * fault [LOAD]: LOAD says what is wrong with the table or with load; see main and load. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "seawall_engine.h"

static const char *mode = "";
static pid_t host; /* The process that has started this one. */
static int built_here; /* Its address is each scanner. */

static int load(void *context, const struct seawall_start *start,
                struct seawall_description *description)
{
    uint8_t digest[32];
    memset(digest, 7, sizeof digest);
    host = getppid();
    if (context != &mode)
        return 1;
    if (strcmp(mode, "refuses") == 0) {
        seawall_description_diagnostic(description, SEAWALL_LEVEL_WARNING, "w", "odd", NULL, 0, 0);
        seawall_description_diagnostic(description, SEAWALL_LEVEL_ERROR, "e", "no licen\xffse",
                                       "/etc/licence", 3, 1);
        return 1;
    }
    if (strcmp(mode, "refuses-silently") == 0)
        return 1;
    if (strcmp(mode, "half") == 0)
        seawall_description_diagnostic(description, 99, "half", "one is broken", NULL, 0, 0);
    if (strcmp(mode, "nameless") != 0)
        seawall_description_name(description, "fault\xff");
    seawall_description_version(description, NULL);
    if (strcmp(mode, "no-generation") != 0)
        seawall_description_generation(description, digest);
    else
        seawall_description_generation(description, NULL);
    seawall_description_by_name(description, true);
    seawall_description_signatures(
        description, seawall_start_threads(start) * 1000 + seawall_start_is_strict(start) * 100 +
                         (uint32_t)(seawall_start_memory(start) >> 20) % 100);
    return 0;
}

static void *scanner_new(void *context)
{
    (void)context;
    return strcmp(mode, "scannerless") == 0 ? NULL : &built_here;
}

static void scanner_free(void *context, void *scanner)
{
    (void)context;
    fprintf(stderr, "scanner freed: %d\n", scanner == &built_here);
}

static int tell(struct seawall_report *report, const char *name, const char *family)
{
    seawall_detection_family(seawall_report_detection(report, name), family);
    return SEAWALL_INFECTED;
}

static int metadata(const struct seawall_request *request, struct seawall_report *report)
{
    char text[256];
    size_t length;
    const uint8_t *path = seawall_request_path(request, &length);
    snprintf(text, sizeof text, "%.*s|%zu|%s|%d|%" PRIu64 "|%" PRIu64 "|%" PRIu64, (int)length,
             (const char *)path, length, seawall_request_guest(request),
             seawall_request_operation(request), seawall_request_file_size(request),
             seawall_request_length(request), seawall_request_limit_ms(request));
    return tell(report, "metadata", text);
}

static int details(struct seawall_report *report)
{
    struct seawall_detection *first = seawall_report_detection(report, "first\xff");
    struct seawall_detection *second = seawall_report_detection(report, NULL);
    struct seawall_detection *third = seawall_report_detection(report, "third");
    for (int more = 0; more < 100; more++)
        seawall_detection_family(seawall_report_detection(report, "more"), "m");
    /* The first ones are good still. */
    seawall_detection_family(first, "family");
    seawall_detection_severity(first, SEAWALL_SEVERITY_CRITICAL);
    seawall_detection_offset(first, UINT64_MAX);
    seawall_detection_cleaned_by_cut(first, 4, 5);
    seawall_detection_severity(second, -7);
    seawall_detection_cleaned_by_delete(second);
    seawall_detection_severity(third, SEAWALL_SEVERITY_LOW);
    return SEAWALL_INFECTED;
}

/* Each call with its errno; what works has the name of 0. Most functions here are called for the first
 * time, so the lazily bound ones are looked up now. */
static int escape(struct seawall_report *report)
{
    char text[512], byte;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct iovec here = {&byte, 1}, there = {page, 1};
    int used = 0;
    if (page == MAP_FAILED)
        return seawall_report_error(report, "no memory");
#define TRY(name, call) \
    used += snprintf(text + used, sizeof text - used, "%s %s, ", name, \
                     strerrorname_np((call) == -1 ? errno : 0))
    TRY("open", open("/etc/passwd", O_RDONLY));
    TRY("socket", socket(AF_INET, SOCK_STREAM, 0));
    TRY("fork", fork());
    TRY("kill", kill(host, 0));
    TRY("ptrace", ptrace(PTRACE_SEIZE, host, NULL, NULL));
    TRY("process_vm_readv", process_vm_readv(host, &here, 1, &there, 1, 0));
    TRY("process_vm_writev", process_vm_writev(host, &here, 1, &there, 1, 0));
    TRY("pidfd_open", syscall(SYS_pidfd_open, host, 0));
    TRY("mmap", mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) ==
                    MAP_FAILED ? -1 : 0);
    TRY("mprotect", mprotect(page, 4096, PROT_READ | PROT_EXEC));
    snprintf(text + used, sizeof text - used, "dlopen %s",
             dlopen("libresolv.so.2", RTLD_NOW) == NULL ? "NULL" : "works");
    return tell(report, "escape", text);
}

static int nulls(struct seawall_report *report)
{
    size_t length = 9;
    int wrong = 0;
    char byte;
    wrong += seawall_request_bytes(NULL, &length) != NULL || length != 0;
    wrong += seawall_request_bytes(NULL, NULL) != NULL;
    wrong += seawall_request_path(NULL, &length) != NULL || length != 0;
    wrong += seawall_request_guest(NULL) != NULL;
    wrong += seawall_request_read(NULL, 0, &byte, 1) != -1;
    wrong += seawall_request_operation(NULL) != -1;
    wrong += seawall_request_length(NULL) + seawall_request_file_size(NULL) != 0;
    wrong += seawall_request_limit_ms(NULL) + seawall_request_left_ms(NULL) != 0;
    wrong += seawall_request_is_cancelled(NULL);
    wrong += seawall_start_is_strict(NULL) + seawall_start_threads(NULL) != 0;
    wrong += seawall_start_memory(NULL) != 0;
    wrong += seawall_report_detection(NULL, "x") != NULL;
    wrong += seawall_report_allowed(NULL, "x") != SEAWALL_ALLOWED;
    wrong += seawall_report_error(NULL, NULL) != SEAWALL_ERROR;
    wrong += seawall_engine_run(NULL) != 1;
    seawall_detection_severity(NULL, 0);
    seawall_detection_family(NULL, "x");
    seawall_detection_offset(NULL, 0);
    seawall_detection_cleaned_by_delete(NULL);
    seawall_detection_cleaned_by_cut(NULL, 0, 0);
    seawall_description_name(NULL, "x");
    seawall_description_version(NULL, "x");
    seawall_description_generation(NULL, NULL);
    seawall_description_by_name(NULL, true);
    seawall_description_signatures(NULL, 0);
    seawall_description_diagnostic(NULL, 0, NULL, NULL, NULL, 0, 0);
    return wrong == 0 ? SEAWALL_CLEAN : seawall_report_error(report, "NULL is not nothing");
}

static int reads(const struct seawall_request *request, struct seawall_report *report)
{
    char text[64], piece[4];
    int64_t inside = seawall_request_read(request, 1, piece, sizeof piece);
    int64_t end = seawall_request_read(request, seawall_request_length(request) - 2, piece + 1, 3);
    int64_t behind = seawall_request_read(request, UINT64_MAX, piece, sizeof piece);
    int64_t none = seawall_request_read(request, 0, NULL, 0);
    int64_t nowhere = seawall_request_read(request, 0, NULL, 1);
    snprintf(text, sizeof text, "%d %d %.4s %d %d %d", (int)inside, (int)end, piece, (int)behind,
             (int)none, (int)nowhere);
    return tell(report, "reads", text);
}

static int scan(void *context, void *scanner, const struct seawall_request *request,
                struct seawall_report *report)
{
    static int *volatile nowhere; /* NULL, but the compiler must not know. */
    const struct timespec moment = {.tv_nsec = 1000000};
    char order[32] = "";
    if (context != &mode || scanner != &built_here)
        return seawall_report_error(report, "a pointer is not what it was");
    seawall_request_read(request, 0, order, sizeof order - 1);
    order[strcspn(order, "\n")] = '\0';
    if (strcmp(order, "metadata") == 0)
        return metadata(request, report);
    if (strcmp(order, "details") == 0)
        return details(report);
    if (strcmp(order, "escape") == 0)
        return escape(report);
    if (strcmp(order, "nulls") == 0)
        return nulls(report);
    if (strcmp(order, "reads") == 0)
        return reads(request, report);
    if (strcmp(order, "crash") == 0)
        return *nowhere;
    if (strcmp(order, "until-cancelled") == 0) {
        while (!seawall_request_is_cancelled(request))
            nanosleep(&moment, NULL);
        return SEAWALL_CANCELLED;
    }
    if (strcmp(order, "slow") == 0) {
        seawall_report_error(report, "rule_x");
        return SEAWALL_TIMED_OUT;
    }
    if (strcmp(order, "time") == 0) {
        uint64_t before = seawall_request_left_ms(request);
        for (int times = 0; times < 20; times++)
            nanosleep(&moment, NULL);
        return seawall_request_left_ms(request) < before ? SEAWALL_TIMED_OUT : SEAWALL_CLEAN;
    }
    if (strcmp(order, "allowed") == 0)
        return seawall_report_allowed(report, "good.txt:3");
    if (strcmp(order, "allowed-bare") == 0)
        return SEAWALL_ALLOWED;
    if (strcmp(order, "error") == 0)
        return seawall_report_error(report, "asked to\xff");
    if (strcmp(order, "infected-bare") == 0)
        return SEAWALL_INFECTED;
    if (strcmp(order, "clean-but") == 0)
        return seawall_report_detection(report, "x") != NULL ? SEAWALL_CLEAN : SEAWALL_ERROR;
    if (strcmp(order, "no-result") == 0)
        return 99;
    if (strcmp(order, "unread") == 0)
        return seawall_request_bytes(request, NULL) == NULL ? SEAWALL_CLEAN : SEAWALL_TIMED_OUT;
    return SEAWALL_CLEAN;
}

int main(int count, char **arguments)
{
    struct {
        struct seawall_engine engine;
        uint64_t later;
    } longer = {{.struct_size = sizeof longer.engine,
                 .abi_version = SEAWALL_ENGINE_ABI,
                 .context = &mode,
                 .load = load,
                 .scanner_new = scanner_new,
                 .scanner_free = scanner_free,
                 .scan = scan},
                0};
    if (count > 1)
        mode = arguments[1];
    if (strcmp(mode, "abi") == 0)
        longer.engine.abi_version = 2;
    if (strcmp(mode, "short") == 0)
        longer.engine.struct_size -= 1;
    if (strcmp(mode, "huge") == 0)
        longer.engine.struct_size = UINT32_MAX;
    if (strcmp(mode, "longer") == 0)
        longer.engine.struct_size = sizeof longer;
    if (strcmp(mode, "newer") == 0) {
        longer.engine.struct_size = sizeof longer;
        longer.later = 1;
    }
    if (strcmp(mode, "scanless") == 0)
        longer.engine.scan = NULL;
    return seawall_engine_run(strcmp(mode, "null") == 0 ? NULL : &longer.engine);
}
