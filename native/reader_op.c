/* From requests to reads of the file and back: neighbours become one read, large ones several. */
#include "reader_core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "edgemoe.h"

/* A reader under a limit that was late, or had nothing to do, may catch up on this much time. */
#define LIMIT_CREDIT_NS ((uint64_t)20000000)

/* Times that the system may ask for patience (EAGAIN) with one read. */
enum { MAX_REFUSED = 100 };

static uint64_t down(uint64_t n, uint64_t unit) { return n - n % unit; }
static uint64_t up(uint64_t n, uint64_t unit) { return down(n + unit - 1, unit); }
static uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

int em_ops_new(em_reader *r, int count) {
    for (; r->op_count < count; r->op_count++)
        if (!(r->ops[r->op_count] = calloc(1, sizeof(em_op)))) return ENOMEM;
    return 0;
}

/* Whether a direct read can put the request where it is wanted. */
static int fits(const em_reader *r, const em_read *w) {
    const unsigned block = r->file.block;
    return w->offset % block == 0 && (uintptr_t)w->dest % block == 0 && w->room >= up(w->size, block);
}

/* Whether `next` can be read on with `w`: close behind it in the file, the gap has a place to go, and the
 * read does not get longer than `end`. */
static int neighbours(const em_reader *r, const em_op *op, const em_read *w, const em_read *next,
                      uint64_t end) {
    const uint64_t here = w->offset + w->size;
    if (next->offset < here || next->offset + next->size > end) return 0;
    const uint64_t gap = next->offset - here;
    if (gap >= EM_READER_BLOCK) return 0;
    if (op->bounced) return !fits(r, next);
    return gap <= w->room - w->size && (!op->direct || fits(r, next));
}

/* The first bytes of the request that nobody has taken, as many as one read may have. Pieces of a large one
 * are of equal size, and begin and end on blocks of the file where the request does. */
static uint64_t piece(const em_reader *r, const em_request *q, uint64_t end) {
    const uint64_t left = q->want.size - q->taken, at = q->want.offset + q->taken;
    if (at + left <= end) return left;
    const uint64_t even = at + ceil_div(left, ceil_div(left, r->options.chunk));
    const uint64_t stop = up(even, EM_READER_BLOCK);
    return (stop < end ? stop : end) - at;
}

static void take_part(em_reader *r, em_op *op, em_request *q, uint64_t size) {
    op->part[op->parts++] = (em_part){q, q->taken, size};
    if (q->state == EM_WAITING) {
        q->state = EM_STARTED;
        q->done.begun_ns = em_monotonic_ns();
        r->untouched--;
    }
    q->taken += size;
    q->open++;
    if (q->taken < q->want.size) return;
    em_list_remove(q);
    q->queued = 0;
}

static uint64_t part_offset(const em_part *p) { return p->request->want.offset + p->from; }

static void lay_out(const em_reader *r, em_op *op) {
    const em_part *last = &op->part[op->parts - 1];
    const uint64_t end = part_offset(last) + last->size;
    op->need = (size_t)(end - op->offset);
    op->length = (size_t)(op->direct ? up(end, r->file.block) - op->offset : op->need);
    if (op->bounced) return;
    for (int i = 0; i < op->parts; i++) {
        const em_part *p = &op->part[i];
        const uint64_t begin = part_offset(p);
        const uint64_t stop = i + 1 < op->parts ? part_offset(p + 1) : op->offset + op->length;
        op->span[i] = (struct iovec){(char *)p->request->want.dest + p->from, (size_t)(stop - begin)};
    }
}

static int limited(em_reader *r, uint64_t now, uint64_t *until) {
    *until = 0;
    if (r->options.bytes_per_second <= 0 || now >= r->allowed_ns) return 0;
    *until = r->allowed_ns;
    return 1;
}

static void charge(em_reader *r, uint64_t now, size_t bytes) {
    const double rate = r->options.bytes_per_second;
    if (rate <= 0) return;
    if (now > LIMIT_CREDIT_NS && r->allowed_ns < now - LIMIT_CREDIT_NS) r->allowed_ns = now - LIMIT_CREDIT_NS;
    r->allowed_ns += (uint64_t)((double)bytes / rate * 1e9);
}

int em_op_take(em_reader *r, em_op *op, uint64_t *until) {
    em_request *q = r->waiting.next;
    const uint64_t now = em_now_ns();
    *until = 0;
    if (r->quit || q == &r->waiting || r->in_flight == r->options.depth || limited(r, now, until)) return 0;
    void *buffer = op->buffer;
    memset(op, 0, offsetof(em_op, part));
    op->buffer = buffer;
    op->direct = atomic_load(&r->direct);
    op->bounced = op->direct && !fits(r, &q->want);
    const uint64_t first = q->want.offset + q->taken;
    op->offset = op->bounced ? down(first, r->file.block) : first;
    const uint64_t end = op->offset + r->options.chunk;
    take_part(r, op, q, piece(r, q, end));
    while (!q->queued && op->parts < EM_OP_PARTS) {
        em_request *next = r->waiting.next;
        if (next == &r->waiting || next->priority != q->priority) break;
        if (!neighbours(r, op, &q->want, &next->want, end)) break;
        q = next;
        take_part(r, op, q, q->want.size);
    }
    lay_out(r, op);
    charge(r, now, op->length);
    op->begun_ns = now;
    if (!r->in_flight++) r->busy_since_ns = now;
    return 1;
}

/* The buffer of an op that cannot read to where its bytes are wanted. */
static int make_buffer(em_reader *r, em_op *op) {
    if (op->buffer) return 1;
    const size_t bytes = r->options.chunk;
    if (posix_memalign(&op->buffer, EM_READER_BLOCK, bytes)) {
        op->buffer = NULL;
        return 0;
    }
    pthread_mutex_lock(&r->lock);
    r->stats.memory_bytes += bytes;
    pthread_mutex_unlock(&r->lock);
    return 1;
}

int em_op_aim(em_reader *r, em_op *op, size_t most, uint64_t *position) {
    if (op->bounced) {
        if (!make_buffer(r, op)) return -1;
        op->span[0] = (struct iovec){op->buffer, op->length};
    }
    const int spans = op->bounced ? 1 : op->parts;
    size_t skip = op->arrived;
    *position = op->offset + skip;
    op->iovs = 0;
    for (int i = 0; i < spans && most; i++) {
        struct iovec v = op->span[i];
        if (skip >= v.iov_len) {
            skip -= v.iov_len;
            continue;
        }
        v.iov_base = (char *)v.iov_base + skip;
        v.iov_len -= skip;
        skip = 0;
        if (v.iov_len > most) v.iov_len = most;
        most -= v.iov_len;
        op->iov[op->iovs++] = v;
    }
    return op->direct ? r->file.direct : r->file.plain;
}

/* Whether the file, as long as it is now, has nothing at this position. */
static int past_the_end(const em_reader *r, uint64_t position) {
    struct stat s;
    return fstat(r->file.plain, &s) == 0 && (uint64_t)s.st_size <= position;
}

int em_op_result(em_reader *r, em_op *op, ssize_t got) {
    if (got < 0) {
        const int error = (int)-got;
        op->retries++;
        if (error == EINTR || (error == EAGAIN && ++op->refused < MAX_REFUSED)) return 0;
        if (error == EINVAL && op->direct) {
            /* Some file systems take the flag and then refuse the reads, or to go on within a block. */
            atomic_store(&r->direct, 0);
            op->direct = 0;
            return 0;
        }
        op->error = error;
        return 1;
    }
    op->reads++;
    op->bytes += (uint64_t)got;
    op->arrived += (size_t)got;
    if (op->arrived >= op->need) return 1;
    op->retries++;
    if (!got || past_the_end(r, op->offset + op->arrived)) {
        op->truncated = 1;
        return 1;
    }
    return 0;
}

void em_op_landed(em_reader *r, em_op *op) {
    const uint64_t now = em_monotonic_ns();
    for (int i = 0; i < op->parts; i++) op->part[i].request->done.ended_ns = now;
    op->begun_ns = 0;
    if (!--r->in_flight) r->busy_ns += em_now_ns() - r->busy_since_ns;
    if (r->waiting.next != &r->waiting) pthread_cond_signal(&r->work);
    r->stats.bytes_read += op->bytes;
    r->stats.reads += op->reads;
    r->stats.retries += op->retries;
}

/* Bytes of a part that have arrived, copied to where they are wanted; how many. */
static uint64_t copy_out(const em_op *op, const em_part *p) {
    const uint64_t begin = part_offset(p) - op->offset;
    if (op->arrived <= begin) return 0;
    const uint64_t arrived = op->arrived - begin, size = arrived < p->size ? arrived : p->size;
    memcpy((char *)p->request->want.dest + p->from, (char *)op->buffer + begin, (size_t)size);
    return size;
}

/* What a part that did not arrive whole says of its request; the first failure in the file counts. */
static void fail(const em_op *op, const em_part *p) {
    em_read_done *done = &p->request->done;
    const uint64_t end = op->offset + op->arrived, begin = part_offset(p);
    const uint64_t at = end > begin ? end : begin;
    if (done->status != EM_READ_OK && done->at <= at) return;
    done->status = op->truncated ? EM_READ_TRUNCATED : EM_READ_FAILED;
    done->error = op->error;
    done->at = op->truncated ? end : at;
}

static uint64_t verify(em_request *q) {
    if (em_crc32c(0, q->want.dest, (size_t)q->want.size) == q->want.crc32c) return q->want.size;
    q->done.status = EM_READ_DAMAGED;
    q->done.at = q->want.offset;
    return q->want.size;
}

/* Of this thread: what verifying costs, whoever else wants the processor meanwhile. */
static uint64_t processor_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void drop_from_cache(const em_reader *r, const em_op *op) {
#ifdef POSIX_FADV_DONTNEED
    const uint64_t first = down(op->offset, EM_READER_BLOCK);
    const uint64_t end = up(op->offset + op->length, EM_READER_BLOCK);
    if (!op->direct) posix_fadvise(r->file.plain, (off_t)first, (off_t)(end - first), POSIX_FADV_DONTNEED);
#else
    (void)r, (void)op;
#endif
}

void em_op_finish(em_reader *r, em_op *op) {
    em_request *complete[EM_OP_PARTS];
    int count = 0;
    uint64_t copied = 0, verified = 0;
    for (int i = 0; op->bounced && i < op->parts; i++) copied += copy_out(op, &op->part[i]);
    drop_from_cache(r, op);
    pthread_mutex_lock(&r->lock);
    r->stats.bytes_copied += copied;
    for (int i = 0; i < op->parts; i++) {
        const em_part *p = &op->part[i];
        em_request *q = p->request;
        if (part_offset(p) + p->size > op->offset + op->arrived) {
            fail(op, p);
            if (q->queued) { /* the rest is of no use */
                em_list_remove(q);
                q->queued = 0;
            }
        }
        /* Nothing more will be written to it: it is this op's alone until it is reported. */
        if (!--q->open && !q->queued) complete[count++] = q;
    }
    pthread_mutex_unlock(&r->lock);
    const uint64_t begun = processor_ns();
    for (int i = 0; i < count; i++)
        if (complete[i]->done.status == EM_READ_OK) verified += verify(complete[i]);
    const uint64_t took = processor_ns() - begun;
    pthread_mutex_lock(&r->lock);
    r->verify_ns += took;
    r->stats.bytes_verified += verified;
    for (int i = 0; i < count; i++) {
        complete[i]->state = EM_DONE;
        em_list_append(&r->finished, complete[i]);
    }
    if (count) pthread_cond_broadcast(&r->done);
    pthread_mutex_unlock(&r->lock);
}

int em_op_finish_oldest(em_reader *r) {
    if (!r->landed_count) return 0;
    em_op *op = r->landed[0];
    memmove(r->landed, r->landed + 1, (size_t)--r->landed_count * sizeof *r->landed);
    r->finishing++;
    pthread_mutex_unlock(&r->lock);
    em_op_finish(r, op);
    pthread_mutex_lock(&r->lock);
    r->idle[r->idle_count++] = op;
    if (!--r->finishing && r->quit) pthread_cond_broadcast(&r->done);
    return 1;
}
