/* The file of a reader: descriptors of its own, and whether reads can pass the page cache by. */
#include "reader_core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* A new description of an open file, so that flags and hints on it are ours alone; it may be unlinked. */
static int again(int fd, int flags) {
    char name[32];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    return open(name, O_RDONLY | O_CLOEXEC | flags);
}

#ifdef O_DIRECT
/* 0 if the file system says that it has no direct reads, or wants more alignment than stores have. */
static int find_alignment(em_reader_file *f, int fd) {
    f->block = EM_READER_BLOCK;
#ifdef STATX_DIOALIGN
    struct statx s;
    if (!statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &s) && s.stx_mask & STATX_DIOALIGN) {
        const unsigned file = s.stx_dio_offset_align, memory = s.stx_dio_mem_align;
        f->block = file > memory ? file : memory;
        if (!file || EM_READER_BLOCK % f->block) return 0;
    }
#else
    (void)fd;
#endif
    return 1;
}
#endif

int em_reader_file_open(em_reader_file *f, int fd, int direct) {
    f->direct = -1;
    f->block = 1;
    f->plain = again(fd, 0);
#ifdef POSIX_FADV_RANDOM
    /* Read-ahead would fill the page cache with what nobody asked for. */
    if (f->plain >= 0) posix_fadvise(f->plain, 0, 0, POSIX_FADV_RANDOM);
#endif
    if (f->plain < 0) f->plain = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (f->plain < 0) return errno;
#ifdef O_DIRECT
    if (direct) {
        f->direct = again(fd, O_DIRECT);
        if (f->direct >= 0 && !find_alignment(f, f->direct)) {
            close(f->direct);
            f->direct = -1;
        }
    }
#else
    (void)direct;
#endif
    return 0;
}

void em_reader_file_close(em_reader_file *f) {
    if (f->plain >= 0) close(f->plain);
    if (f->direct >= 0) close(f->direct);
    f->plain = f->direct = -1;
}
