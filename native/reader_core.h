/* What the parts of the read queue share: reader.c (requests), reader_op.c (reads of the file that serve
 * them), reader_file.c (the file), reader_threads.c and reader_uring.c (who reads). */
#ifndef READER_CORE_H
#define READER_CORE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "reader.h"

/* Requests that one read of the file serves at most. */
enum { EM_OP_PARTS = 32 };

/* Ops of an engine at most: in flight, and waiting to be verified. */
enum { EM_READER_OPS = 2 * EM_READER_MAX_DEPTH };

/* Threads of the reader call nothing deep; what they do not touch of a stack costs nothing. */
#define EM_READER_STACK ((size_t)128 << 10)

typedef struct em_request em_request;
typedef enum { EM_FREE, EM_WAITING, EM_STARTED, EM_DONE } em_state;

/* In the list of those that wait (or are not wholly handed out), in that of those that are done, or in none.
 */
struct em_request {
    em_request *prev, *next, *chain;
    em_read want;
    em_read_done done;
    int64_t priority;
    uint64_t serial;
    uint64_t taken; /* bytes handed out to ops */
    int open;       /* ops that hold a part of it */
    int queued;
    em_state state;
};

/* Bytes [from, from + size) of a request. */
typedef struct {
    em_request *request;
    uint64_t from, size;
} em_part;

/* One read of the file, in as many calls as it takes. */
typedef struct {
    uint64_t offset;
    size_t length;  /* to ask for */
    size_t need;    /* up to the end of the last part */
    size_t arrived; /* in memory, from offset on */
    int parts, iovs, direct, bounced, error, truncated, refused;
    unsigned reads, retries;
    uint64_t bytes, begun_ns;
    em_part part[EM_OP_PARTS];
    struct iovec span[EM_OP_PARTS]; /* where the read goes, as if nothing had arrived */
    struct iovec iov[EM_OP_PARTS];  /* what is still to come */
    void *buffer;
} em_op;

typedef struct {
    const char *name;
    int (*start)(em_reader *r); /* 0 or an errno */
    void (*wake)(em_reader *r); /* there is work, or the end; called with the lock held */
    void (*stop)(em_reader *r); /* returns when no read is in flight; frees what start made */
} em_engine;

extern const em_engine em_engine_threads, em_engine_uring;

typedef struct {
    int plain, direct; /* descriptors; direct is -1 where the file system has no O_DIRECT */
    unsigned block;    /* offsets, sizes and addresses of direct reads are multiples of this */
} em_reader_file;

/* 0 or an errno. */
int em_reader_file_open(em_reader_file *f, int fd, int direct);
void em_reader_file_close(em_reader_file *f);

struct em_reader {
    em_reader_options options;
    em_reader_file file;
    const em_engine *engine;
    void *engine_data;
    atomic_int direct;
    pthread_mutex_t lock; /* guards all that follows */
    pthread_cond_t work, done;
    int quit, closed;
    em_request *requests, *unused;
    em_request waiting, finished; /* heads of the lists */
    em_request **buckets;
    size_t bucket_mask;
    int outstanding, untouched;
    uint64_t serial;
    uint64_t allowed_ns; /* when the limit lets the next read begin */
    int in_flight;
    uint64_t busy_since_ns, busy_ns, waited_ns, verify_ns;
    em_op *ops[EM_READER_OPS]; /* the engine's: in flight, and waiting to be verified */
    int op_count;
    /* io_uring's: those not in use, and those landed and not verified, oldest first. */
    em_op *idle[EM_READER_OPS], *landed[EM_READER_OPS];
    int idle_count, landed_count, finishing;
    em_reader_stats stats;
};

uint64_t em_now_ns(void);       /* the clock of timed waits */
uint64_t em_monotonic_ns(void); /* that of Python's time.monotonic_ns: the same on Linux */
void em_list_remove(em_request *q);
void em_list_append(em_request *head, em_request *q);

/* At least `count` ops in r->ops, which live as long as the reader. 0 or ENOMEM. */
int em_ops_new(em_reader *r, int count);

/* The next read of the file: 1. Nothing to do, or as many in flight as may be: 0, and *until is when the
 * limit allows more, or 0. Lock held. */
int em_op_take(em_reader *r, em_op *op, uint64_t *until);

/* The descriptor and position to read op->iov[0 .. op->iovs) from, no more than `most` bytes. */
int em_op_aim(em_reader *r, em_op *op, size_t most, uint64_t *position);

/* What the system answered: bytes or -errno. 1: the op is over; 0: go on with em_op_aim. */
int em_op_result(em_reader *r, em_op *op, ssize_t got);

/* The op is no longer in flight: another may be. Lock held. */
void em_op_landed(em_reader *r, em_op *op);

/* Verifies what is complete and reports it. */
void em_op_finish(em_reader *r, em_op *op);

/* Finishes the oldest op of r->landed, if there is one, and puts it to r->idle; whether there was. Lock held,
 * but not while it is verified. Whoever waits helps the engine's thread: reads often land together, and one
 * processor checks them no faster than it reads memory. */
int em_op_finish_oldest(em_reader *r);

/* The tests put faults here: called before each read of at most *most bytes at a position of the file; it may
 * lower *most, take its time, or answer an errno instead of the system. */
#ifdef EM_READER_FAULTS
extern int (*em_reader_fault)(uint64_t position, size_t *most);
#define EM_FAULT(position, most) (em_reader_fault ? em_reader_fault(position, most) : 0)
#else
#define EM_FAULT(position, most) ((void)(position), (void)(most), 0)
#endif

#endif
