// Preloaded into a process: a shared disk as some are. Of the files whose path holds DISK_PATH:
//   DISK_FLOCK=NUMBER   flock fails with that error
//   DISK_READ=NUMBER    reads at a place of a file fail with that error
//   DISK_FSYNC=SECONDS  fsync takes so much longer
// and for all: DISK_CLOCK=SECONDS, by which this machine's clock differs from the disk's.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static long asked(const char *name, int fd) {
    const char *value = getenv(name), *path = getenv("DISK_PATH");
    char link[64], found[4096];
    if (!value || !path) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, found, sizeof found - 1);
    if (length < 0) return 0;
    found[length] = 0;
    return strstr(found, path) ? atol(value) : 0;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

int flock(int fd, int how) {
    long number = asked("DISK_FLOCK", fd);
    if (number) return errno = number, -1;
    return REAL(int, "flock", int, int)(fd, how);
}

int fsync(int fd) {
    sleep(asked("DISK_FSYNC", fd));
    return REAL(int, "fsync", int)(fd);
}

// os.preadv of Python, under the name that it has with 64 bits, too.
static ssize_t read_at(const char *name, int fd, const struct iovec *parts, int count, off_t place, int flags) {
    long number = asked("DISK_READ", fd);
    if (number) return errno = number, -1;
    return REAL(ssize_t, name, int, const struct iovec *, int, off_t, int)(fd, parts, count, place, flags);
}
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t place, int flags) { return read_at("preadv2", fd, parts, count, place, flags); }
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t place, int flags) { return read_at("preadv64v2", fd, parts, count, place, flags); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = REAL(int, "clock_gettime", clockid_t, struct timespec *)(clock, now);
    const char *by = getenv("DISK_CLOCK");
    if (by && clock == CLOCK_REALTIME) now->tv_sec += atol(by);
    return result;
}
