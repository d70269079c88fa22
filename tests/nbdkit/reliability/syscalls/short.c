/* Lies before the C library, and has each read and write of a file do a part of what it is
   asked for: half of it, or all but its last byte, as SHORT says. That it did so is told
   by the file SHORT_SEEN. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static size_t part (size_t length)
{
    const char *how = getenv ("SHORT");
    const char *seen = getenv ("SHORT_SEEN");
    static int has_told;

    if (length < 2 || !how)
        return length;
    if (!has_told && seen) {
        has_told = 1;
        close (open (seen, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    }
    return strcmp (how, "half") == 0 ? length / 2 : length - 1;
}

ssize_t pread64 (int fd, void *bytes, size_t length, off64_t at)
{
    return syscall (SYS_pread64, fd, bytes, part (length), at);
}

ssize_t pwrite64 (int fd, const void *bytes, size_t length, off64_t at)
{
    return syscall (SYS_pwrite64, fd, bytes, part (length), at);
}

/* The filter passes one slice. */
ssize_t pwritev2 (int fd, const struct iovec *slices, int count, off_t at, int flags)
{
    struct iovec slice = { slices->iov_base, part (slices->iov_len) };
    return syscall (SYS_pwritev2, fd, &slice, count, at, 0L, flags);
}
