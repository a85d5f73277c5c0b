/* Reads of a file into memory the caller owns, queued, in order of priority, several in flight.
 *
 * A read's bytes are verified against their CRC-32C before it is reported done. Two engines, io_uring and a
 * pool of threads, deliver the same bytes; reads start in order of priority (lower first), then of
 * submission, and may end in any order. Where the file system allows it the page cache is passed by
 * (O_DIRECT).
 *
 * All functions may be called from any thread, but em_reader_free only when no other call is running. */
#ifndef READER_H
#define READER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct em_reader em_reader;

enum { EM_ENGINE_BEST, EM_ENGINE_URING, EM_ENGINE_THREADS };

/* Offsets, sizes and addresses that are multiples of this are good for O_DIRECT on every device. */
enum { EM_READER_BLOCK = 4096 };

enum { EM_READER_MAX_DEPTH = 256 };

typedef struct {
    int engine;              /* BEST: io_uring where the kernel allows it */
    int depth;               /* reads in flight, 1 to EM_READER_MAX_DEPTH */
    int capacity;            /* reads queued, in flight or not yet collected */
    int direct;              /* 0: through the page cache, and dropped from it afterwards */
    size_t chunk;            /* longest single read, bytes: a multiple of EM_READER_BLOCK */
    double bytes_per_second; /* limit on what is read; 0: none */
} em_reader_options;

/* Bytes [offset, offset + size) of the file are wanted at dest. The room - size bytes after them are the
 * reader's to write whatever it likes to: with O_DIRECT a read ends on a block of the device, and neighbours
 * in the file are read at once through the gap between them. A read whose offset or dest is not a multiple of
 * the device's block, or whose room does not reach to the next one, goes through a buffer. */
typedef struct {
    uint64_t offset, size, room;
    void *dest;
    uint64_t tag; /* the caller's; different for all that are not yet collected */
    uint32_t crc32c;
} em_read;

enum { EM_READ_OK, EM_READ_DAMAGED, EM_READ_FAILED, EM_READ_TRUNCATED };

typedef struct {
    uint64_t tag;
    int status;
    int error;   /* errno, if failed */
    uint64_t at; /* where in the file the read failed, or the file ends */
    /* When the first read of the file that served it began and the last ended, on the clock of Python's
     * time.monotonic_ns. */
    uint64_t begun_ns, ended_ns;
} em_read_done;

typedef struct {
    uint64_t bytes_read;   /* from the file, rounding and gaps included */
    uint64_t reads;        /* calls to the system that moved bytes */
    uint64_t retries;      /* reads begun again: interrupted, short, or refused O_DIRECT */
    uint64_t bytes_copied; /* through a buffer, as they were not aligned */
    uint64_t bytes_verified;
    double busy_s;       /* at least one read in flight */
    double waited_s;     /* in em_reader_wait, all callers together */
    double verify_s;     /* processor time of checksums, all threads together */
    double oldest_s;     /* for which the oldest read has now been in flight; 0: none is */
    size_t memory_bytes; /* buffers and tables of the reader itself */
    int in_flight;       /* reads of the file, not requests */
    int waiting;         /* requests of which nothing is read yet */
    int direct;          /* the page cache is passed by */
    const char *engine;  /* "uring" or "threads" */
} em_reader_stats;

enum {
    EM_READER_OK,
    EM_READER_TIMEOUT,
    EM_READER_UNKNOWN,   /* no such tag; or, waiting for any, nothing is outstanding */
    EM_READER_DUPLICATE, /* the tag is in use */
    EM_READER_FULL,      /* more than `capacity` */
    EM_READER_INVALID,   /* a size of zero, more than the room, or past the largest offset */
    EM_READER_CLOSED
};

/* The reader keeps its own descriptors of the file. 0, or an errno: EINVAL for options out of range, what the
 * kernel answered to io_uring where that was asked for, ENOMEM. */
int em_reader_new(int fd, const em_reader_options *options, em_reader **out);

/* All or none of the reads. */
int em_reader_submit(em_reader *r, const em_read *reads, size_t n, int64_t priority);

/* Take back or move a read of which nothing has been read yet: *waited = 1. One that has been begun goes on
 * as before and will be reported: *waited = 0. */
int em_reader_cancel(em_reader *r, uint64_t tag, int *waited);
int em_reader_reprioritise(em_reader *r, uint64_t tag, int64_t priority, int *waited);

/* Takes back the reads of which nothing has been read yet, `most` at most, and tells their tags and how many
 * they are. Those that have been begun are reported as ever, but what of them is not in flight is not read:
 * they have failed with ECANCELED, unless nothing is missing. */
int em_reader_cancel_all(em_reader *r, uint64_t *tags, size_t most, size_t *n);

/* The read with this tag, or with tag NULL any, is waited for and collected; 0 seconds: only if it is done.
 */
int em_reader_wait(em_reader *r, const uint64_t *tag, double seconds, em_read_done *out);

void em_reader_get_stats(em_reader *r, em_reader_stats *out);

/* Forget what waits, wait for what is in flight; afterwards nothing is written any more and every call
 * answers EM_READER_CLOSED. */
void em_reader_close(em_reader *r);
void em_reader_free(em_reader *r);

#ifdef __cplusplus
}
#endif

#endif
