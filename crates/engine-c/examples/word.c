/* An engine that finds one word: word FILE, whose first line is the word. */
#include <stdio.h>
#include <string.h>

#include "seawall_engine.h"

static char word[256];
static size_t word_length;

static int refuse(struct seawall_description *description, const char *file, const char *why)
{
    seawall_description_diagnostic(description, SEAWALL_LEVEL_ERROR, "word-file", why, file, 0, 0);
    return 1;
}

/* Before the sandbox, once. What is read here is the signature set. */
static int load(void *context, const struct seawall_start *start,
                struct seawall_description *description)
{
    const char *path = context;
    uint8_t digest[32];
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    (void)start;
    if (path == NULL)
        return refuse(description, NULL, "give the file with the word as argument");
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return refuse(description, path, "cannot open it");
    if (fgets(word, sizeof word, file) != NULL)
        word_length = strcspn(word, "\r\n");
    fclose(file);
    if (word_length == 0)
        return refuse(description, path, "its first line is empty");
    /* The generation: a digest of all that verdicts depend on. A real engine takes SHA-256. */
    for (size_t i = 0; i < sizeof digest; i++) {
        for (size_t j = 0; j < word_length; j++)
            hash = (hash ^ (unsigned char)word[j]) * 1099511628211u;
        digest[i] = (uint8_t)(hash >> 56);
    }
    seawall_description_name(description, "word");
    seawall_description_version(description, "1");
    seawall_description_generation(description, digest);
    seawall_description_signatures(description, 1);
    return 0;
}

/* In the sandbox, on a worker thread. */
static int scan(void *context, void *scanner, const struct seawall_request *request,
                struct seawall_report *report)
{
    size_t length;
    const uint8_t *bytes = seawall_request_bytes(request, &length);
    (void)context, (void)scanner;
    if (bytes == NULL)
        return seawall_report_error(report, NULL); /* The library knows why. */
    for (size_t at = 0; at + word_length <= length; at++) {
        if (at % 65536 == 0 && seawall_request_is_cancelled(request))
            return SEAWALL_CANCELLED;
        if (memcmp(bytes + at, word, word_length) == 0) {
            seawall_detection_offset(seawall_report_detection(report, "Word"), at);
            return SEAWALL_INFECTED;
        }
    }
    return SEAWALL_CLEAN;
}

int main(int count, char **arguments)
{
    struct seawall_engine engine = {
        .struct_size = sizeof engine,
        .abi_version = SEAWALL_ENGINE_ABI,
        .context = count > 1 ? arguments[1] : NULL,
        .load = load,
        .scan = scan,
    };
    return seawall_engine_run(&engine);
}
