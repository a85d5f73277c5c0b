/* Reads by io_uring: one thread hands them to the kernel and verifies what has come back. */
#include "reader_core.h"

#include <errno.h>
#include <stdlib.h>

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#define HAVE_URING 1
#endif
#endif

#ifdef HAVE_URING
#include <linux/io_uring.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* How long to wait before the kernel, short of resources, is asked again. */
#define BREATH_NS ((uint64_t)1000000)

typedef struct {
    int fd, event; /* the ring; what wakes its thread */
    pthread_t thread;
    void *rings;
    size_t rings_bytes, sqes_bytes;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    unsigned unsubmitted;
} em_uring;

static void lands(em_reader *r, em_op *op) {
    pthread_mutex_lock(&r->lock);
    em_op_landed(r, op);
    r->landed[r->landed_count++] = op;
    pthread_cond_broadcast(&r->done); /* whoever waits may verify it */
    pthread_mutex_unlock(&r->lock);
}

/* The next call of a read goes into the ring; it is submitted later, with others. */
static void issue(em_reader *r, em_uring *u, em_op *op) {
    for (;;) {
        uint64_t position;
        size_t most = op->length;
        int fault = EM_FAULT(op->offset + op->arrived, &most);
        const int fd = em_op_aim(r, op, most, &position);
        if (fd < 0) fault = ENOMEM;
        if (!fault) {
            const unsigned tail = *u->sq_tail, index = tail & *u->sq_mask;
            u->sqes[index] = (struct io_uring_sqe){.opcode = IORING_OP_READV,
                                                   .fd = fd,
                                                   .off = position,
                                                   .addr = (uintptr_t)op->iov,
                                                   .len = (unsigned)op->iovs,
                                                   .user_data = (uintptr_t)op};
            u->sq_array[index] = index;
            __atomic_store_n(u->sq_tail, tail + 1, __ATOMIC_RELEASE);
            u->unsubmitted++;
            return;
        }
        if (em_op_result(r, op, -fault)) {
            lands(r, op);
            return;
        }
    }
}

/* What the kernel will not take for another reason than being busy is the answer to those reads. */
static void refuse(em_reader *r, em_uring *u, int error) {
    const unsigned first = *u->sq_tail - u->unsubmitted;
    em_op *refused[EM_READER_MAX_DEPTH];
    const unsigned n = u->unsubmitted;
    for (unsigned i = 0; i < n; i++)
        refused[i] = (em_op *)(uintptr_t)u->sqes[(first + i) & *u->sq_mask].user_data;
    __atomic_store_n(u->sq_tail, first, __ATOMIC_RELEASE);
    u->unsubmitted = 0;
    for (unsigned i = 0; i < n; i++) {
        refused[i]->error = error;
        lands(r, refused[i]);
    }
}

/* 1: the kernel has taken all there is; 0: it is short of resources. */
static int submit(em_reader *r, em_uring *u) {
    while (u->unsubmitted) {
        const long taken = syscall(SYS_io_uring_enter, u->fd, u->unsubmitted, 0, 0, NULL, 0);
        if (taken > 0)
            u->unsubmitted -= (unsigned)taken;
        else if (taken == 0 || errno == EAGAIN || errno == EBUSY)
            return 0;
        else if (errno != EINTR)
            refuse(r, u, errno);
    }
    return 1;
}

static void reap(em_reader *r, em_uring *u) {
    unsigned head = *u->cq_head;
    while (head != __atomic_load_n(u->cq_tail, __ATOMIC_ACQUIRE)) {
        const struct io_uring_cqe cqe = u->cqes[head & *u->cq_mask];
        __atomic_store_n(u->cq_head, ++head, __ATOMIC_RELEASE);
        em_op *op = (em_op *)(uintptr_t)cqe.user_data;
        if (em_op_result(r, op, cqe.res))
            lands(r, op);
        else
            issue(r, u, op);
    }
}

/* New reads up to the depth; when the limit allows the next, or 0. *left: anything is in flight. 0: the end.
 */
static int fill(em_reader *r, em_uring *u, uint64_t *until, int *left) {
    *until = 0;
    for (;;) {
        pthread_mutex_lock(&r->lock);
        em_op *op = NULL;
        if (r->idle_count && em_op_take(r, r->idle[r->idle_count - 1], until)) op = r->idle[--r->idle_count];
        const int quit = r->quit;
        *left = r->in_flight;
        pthread_mutex_unlock(&r->lock);
        if (!op) return !quit;
        issue(r, u, op);
    }
}

static void sleep_until(em_uring *u, uint64_t until) {
    struct pollfd both[] = {{.fd = u->fd, .events = POLLIN}, {.fd = u->event, .events = POLLIN}};
    struct timespec rest, *timeout = NULL;
    if (until) {
        const uint64_t now = em_now_ns(), ns = until > now ? until - now : 0;
        rest = (struct timespec){(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
        timeout = &rest;
    }
    uint64_t count;
    if (ppoll(both, 2, timeout, NULL) > 0 && both[1].revents && read(u->event, &count, sizeof count) < 0)
        return; /* nobody called after all: the caller looks for work anyway */
}

static void *uring_main(void *raw) {
    em_reader *r = raw;
    em_uring *u = r->engine_data;
    for (;;) {
        uint64_t until;
        int in_flight;
        reap(r, u);
        const int go_on = fill(r, u, &until, &in_flight);
        const int taken = submit(r, u);
        /* One at a time: the device shall not wait for work while checksums are computed. */
        pthread_mutex_lock(&r->lock);
        const int finished = em_op_finish_oldest(r);
        pthread_mutex_unlock(&r->lock);
        if (finished) continue;
        if (!go_on && !in_flight) return NULL;
        if (!taken) until = em_now_ns() + BREATH_NS;
        sleep_until(u, until);
    }
}

static void uring_wake(em_reader *r) {
    const em_uring *u = r->engine_data;
    const uint64_t one = 1;
    /* It fails only where the counter is full: then the thread is awake. */
    if (write(u->event, &one, sizeof one) < 0) return;
}

static void uring_free(em_reader *r) {
    em_uring *u = r->engine_data;
    if (u->sqes) munmap(u->sqes, u->sqes_bytes);
    if (u->rings) munmap(u->rings, u->rings_bytes);
    if (u->fd >= 0) close(u->fd);
    if (u->event >= 0) close(u->event);
    free(u);
    r->engine_data = NULL;
}

static void uring_stop(em_reader *r) {
    em_uring *u = r->engine_data;
    pthread_join(u->thread, NULL);
    uring_free(r);
}

static void *map(const em_uring *u, size_t bytes, off_t what) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->fd, what);
    return at == MAP_FAILED ? NULL : at;
}

static int open_ring(em_uring *u, int depth) {
    struct io_uring_params p;
    memset(&p, 0, sizeof p);
    u->fd = (int)syscall(SYS_io_uring_setup, depth, &p);
    if (u->fd < 0) return errno;
    /* Kernels that lack one of these (before 5.5) read with threads: one way through the code for all others.
     */
    const unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE;
    if ((p.features & needed) != needed) return ENOSYS;
    const size_t sq = p.sq_off.array + p.sq_entries * sizeof(unsigned);
    const size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    u->rings_bytes = sq > cq ? sq : cq;
    u->sqes_bytes = p.sq_entries * sizeof(struct io_uring_sqe);
    if (!(u->rings = map(u, u->rings_bytes, IORING_OFF_SQ_RING))) return errno;
    if (!(u->sqes = map(u, u->sqes_bytes, IORING_OFF_SQES))) return errno;
    char *at = u->rings;
    u->sq_tail = (unsigned *)(at + p.sq_off.tail);
    u->sq_mask = (unsigned *)(at + p.sq_off.ring_mask);
    u->sq_array = (unsigned *)(at + p.sq_off.array);
    u->cq_head = (unsigned *)(at + p.cq_off.head);
    u->cq_tail = (unsigned *)(at + p.cq_off.tail);
    u->cq_mask = (unsigned *)(at + p.cq_off.ring_mask);
    u->cqes = (struct io_uring_cqe *)(at + p.cq_off.cqes);
    return 0;
}

static int uring_start(em_reader *r) {
    const int depth = r->options.depth, ops = 2 * depth; /* in flight, and waiting to be verified */
    em_uring *u = calloc(1, sizeof *u);
    if (!u) return ENOMEM;
    r->engine_data = u;
    u->fd = -1;
    u->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int error = u->event < 0 ? errno : open_ring(u, depth);
    if (!error) error = em_ops_new(r, ops);
    if (!error) {
        for (; r->idle_count < ops; r->idle_count++) r->idle[r->idle_count] = r->ops[r->idle_count];
        pthread_attr_t small;
        pthread_attr_init(&small);
        pthread_attr_setstacksize(&small, EM_READER_STACK);
        error = pthread_create(&u->thread, &small, uring_main, r);
        pthread_attr_destroy(&small);
    }
    if (error) uring_free(r);
    return error;
}

#else

static int uring_start(em_reader *r) {
    (void)r;
    return ENOSYS;
}
static void uring_wake(em_reader *r) { (void)r; }
static void uring_stop(em_reader *r) { (void)r; }

#endif

const em_engine em_engine_uring = {"uring", uring_start, uring_wake, uring_stop};
