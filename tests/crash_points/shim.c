// Preloaded into a process: names every call that changes something under one folder, writes each name into a log, and
// at one of them does what it is told. A name is "CALL PATH [TARGET]", with the folder cut off and this process's id
// replaced by PID and long hexadecimal numbers by #; together with its occurrence it stays the same when threads change the order of all calls.
//
// crash_arm(folder, log, name, occurrence, mode), or CRASH_FOLDER, CRASH_LOG, CRASH_NAME, CRASH_OCCURRENCE, CRASH_MODE.
// In mode reads the log also has, unchanged, "open PATH", "ask PATH" (its status), "list PATH", "walk PATH"
// (listed by a descriptor, as on the way to a removal), "drop PATH" and "move PATH<tab>TARGET".
// Modes: kill (before the call), half (of a write, then killed), stop (SIGSTOP before it), watch (SIGSTOP before every
// call), reads, enospc1 and eio1 (that call fails), enospc and eio
// (it and all later ones fail). No disk lacks the space for a removal, so enospc spares these.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define LENGTH 4096
enum { GO_ON, HALF, FAIL };
static char folder[LENGTH], wanted[3 * LENGTH], mode[16];
static int log_fd = -1, armed, failing;
static long occurrence, seen;

int crash_arm(const char *root, const char *log, const char *name, long nth, const char *what) {
    armed = failing = 0;
    seen = 0;
    if (!root || !*root) return 0;
    snprintf(folder, sizeof folder, "%s", root);
    snprintf(wanted, sizeof wanted, "%s", name ? name : "");
    snprintf(mode, sizeof mode, "%s", what ? what : "");
    occurrence = nth;
    if (log && *log) {  // a high number, so that no descriptor of the command changes
        int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900);
        syscall(SYS_close, fd);
    }
    return armed = 1;
}

__attribute__((constructor)) static void from_environment(void) {
    const char *rank = getenv("RANK"), *only = getenv("CRASH_RANK"), *nth = getenv("CRASH_OCCURRENCE");
    if (only && (!rank || strcmp(only, rank))) return;
    crash_arm(getenv("CRASH_FOLDER"), getenv("CRASH_LOG"), getenv("CRASH_NAME"), nth ? atol(nth) : 1, getenv("CRASH_MODE"));
}

static void note(const char *text) { if (log_fd >= 0) syscall(SYS_write, log_fd, text, strlen(text)); }

// The calling thread stops, and the others with it; a signal to the process may be some other thread's, and this one goes on.
static void stop(void) { syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGSTOP); }

static void die(void) { for (;;) syscall(SYS_kill, getpid(), SIGKILL); }

// The path below the folder, or NULL if it is elsewhere.
static const char *below(const char *path) {
    size_t n = strlen(folder);
    if (strncmp(path, folder, n) || (path[n] && path[n] != '/')) return NULL;
    return path[n] ? path + n + 1 : ".";
}

static void note_read(const char *how, const char *path) {
    char line[2 * LENGTH + 16];
    if (strcmp(mode, "reads") || !below(path)) return;
    snprintf(line, sizeof line, "%s %s\n", how, below(path));
    note(line);
}

static void note_move(const char *path, const char *target) {
    char line[4 * LENGTH + 16];
    const char *one = below(path), *two = below(target);
    if (strcmp(mode, "reads") || (!one && !two)) return;
    snprintf(line, sizeof line, "move %s\t%s\n", one ? one : "", two ? two : "");
    note(line);
}

static void absolute(int at, const char *path, char *out) {
    char base[LENGTH] = "", link[64];
    if (path[0] == '/') { snprintf(out, LENGTH, "%s", path); return; }
    snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
    ssize_t n = readlink(link, base, LENGTH - 1);
    base[n > 0 ? n : 0] = 0;
    snprintf(out, 2 * LENGTH, "%s/%s", base, path);
}

// With PID for this process's id and # for what is drawn anew each time: eight hexadecimal digits or more, and
// what safetensors writes under first.
static void append(char *name, const char *path) {
    char id[16], *end = name + strlen(name);
    size_t n = snprintf(id, sizeof id, "%d", getpid());
    for (*end++ = ' '; *path;) {
        size_t run = strspn(path, "0123456789abcdef"), digits = strspn(path, "0123456789");
        if (run >= 8) { *end++ = '#'; path += run; }
        else if (digits == n && !strncmp(path, id, n)) { end = stpcpy(end, "PID"); path += n; }
        else if (!strncmp(path, ".tmp", 4) && strcspn(path + 4, "/.") == 6) { end = stpcpy(end, ".tmp#"); path += 10; }
        else if (run) { end = stpncpy(end, path, run); path += run; }
        else *end++ = *path++;
    }
    *end = 0;
}

static int meet(const char *call, const char *path, const char *target, int is_write, int is_removal) {
    const char *one = below(path), *two = target ? below(target) : NULL;
    if (!one && !two) return GO_ON;
    char name[3 * LENGTH], line[3 * LENGTH + 16];
    snprintf(name, sizeof name, "%s", call);
    append(name, one ? one : "elsewhere");
    if (target) append(name, two ? two : "elsewhere");
    snprintf(line, sizeof line, "%s\n", name);
    note(line);
    if (!strcmp(mode, "watch")) stop();
    int here = !strcmp(name, wanted) && __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) == occurrence;
    if (here) note("!\n");
    int is_full = !strncmp(mode, "enospc", 6), is_broken = !strncmp(mode, "eio", 3);
    if (is_full || is_broken) {
        if (here && !strchr(mode, '1')) failing = 1;
        if (!(here || failing) || (is_full && is_removal)) return GO_ON;
        errno = is_full ? ENOSPC : EIO;
        return FAIL;
    }
    if (!here) return GO_ON;
    if (!strcmp(mode, "kill")) die();
    if (!strcmp(mode, "stop")) stop();
    return !strcmp(mode, "half") && is_write ? HALF : GO_ON;
}

static int at_path(const char *call, int at, const char *path, int is_removal) {
    char full[2 * LENGTH];
    if (!armed) return GO_ON;
    absolute(at, path, full);
    if (is_removal) note_read("drop", full);
    return meet(call, full, NULL, 0, is_removal);
}
static int at_two(const char *call, int at, const char *path, int to_at, const char *target) {
    char one[2 * LENGTH], two[2 * LENGTH];
    if (!armed) return GO_ON;
    absolute(at, path, one);
    absolute(to_at, target, two);
    note_move(one, two);
    return meet(call, one, two, 0, 0);
}
static int at_fd(const char *call, int fd, int is_write) {
    char full[LENGTH], link[64];
    if (!armed || fd == log_fd) return GO_ON;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, full, LENGTH - 1);
    if (n <= 0) return GO_ON;
    full[n] = 0;
    return meet(call, full, NULL, is_write, 0);
}
static int at_open(int at, const char *path, int flags) {
    char full[2 * LENGTH];
    if (!armed) return GO_ON;
    absolute(at, path, full);
    note_read(flags & O_TRUNC ? "drop" : "open", full);
    if (!(flags & (O_CREAT | O_TRUNC))) return GO_ON;
    if (!(flags & O_TRUNC) && !syscall(SYS_faccessat, AT_FDCWD, full, F_OK)) return GO_ON;
    return meet("create", full, NULL, 0, 0);
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define RIGHTS mode_t rights = 0; if (flags & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); rights = va_arg(list, mode_t); va_end(list); }
#define OPEN(name) int name(const char *path, int flags, ...) { RIGHTS REAL(int, #name, const char *, int, ...); \
    return at_open(AT_FDCWD, path, flags) == FAIL ? -1 : real(path, flags, rights); }
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { RIGHTS REAL(int, #name, int, const char *, int, ...); \
    return at_open(at, path, flags) == FAIL ? -1 : real(at, path, flags, rights); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)
#define FOPEN(name) FILE *name(const char *path, const char *how) { REAL(FILE *, #name, const char *, const char *); \
    int flags = strchr(how, 'w') ? O_CREAT | O_TRUNC : strchr(how, 'a') ? O_CREAT : 0; \
    return at_open(AT_FDCWD, path, flags) == FAIL ? NULL : real(path, how); }
FOPEN(fopen) FOPEN(fopen64)

// A write: all of it, half of it and death, or an error.
#define WRITING(fd, whole, half) switch (at_fd("write", fd, 1)) { case FAIL: return -1; case HALF: (void)!(half); die(); } return whole
ssize_t write(int fd, const void *data, size_t n) { REAL(ssize_t, "write", int, const void *, size_t); WRITING(fd, real(fd, data, n), real(fd, data, n / 2)); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(ssize_t, "writev", int, const struct iovec *, int); WRITING(fd, real(fd, v, n), real(fd, v, (n + 1) / 2)); }
#define PWRITE(name) ssize_t name(int fd, const void *data, size_t n, off_t at) { REAL(ssize_t, #name, int, const void *, size_t, off_t); \
    WRITING(fd, real(fd, data, n, at), real(fd, data, n / 2, at)); }
PWRITE(pwrite) PWRITE(pwrite64)
static size_t half_of(int fd) { struct stat s; return fstat(fd, &s) ? 1 : s.st_size / 2; }
#define SENDFILE(name) ssize_t name(int to, int from, off_t *at, size_t n) { REAL(ssize_t, #name, int, int, off_t *, size_t); \
    WRITING(to, real(to, from, at, n), real(to, from, at, half_of(from))); }
SENDFILE(sendfile) SENDFILE(sendfile64)
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    WRITING(to, real(from, a, to, b, n, flags), real(from, a, to, b, half_of(from), flags)); }

// What only looks; who knows the folder by its descriptor is on the way through a tree, and asks nothing.
#define ASK(name, about) int name(const char *path, struct about *s) { char full[2 * LENGTH]; REAL(int, #name, const char *, struct about *); \
    if (armed) { absolute(AT_FDCWD, path, full); note_read("ask", full); } return real(path, s); }
ASK(stat, stat) ASK(lstat, stat) ASK(stat64, stat64) ASK(lstat64, stat64)
#define ASK_AT(name, about) int name(int at, const char *path, struct about *s, int flags) { char full[2 * LENGTH]; \
    REAL(int, #name, int, const char *, struct about *, int); \
    if (armed && at == AT_FDCWD) { absolute(at, path, full); note_read("ask", full); } return real(at, path, s, flags); }
ASK_AT(fstatat, stat) ASK_AT(fstatat64, stat64)
int access(const char *path, int how) { char full[2 * LENGTH]; REAL(int, "access", const char *, int);
    if (armed) { absolute(AT_FDCWD, path, full); note_read("ask", full); } return real(path, how); }
DIR *opendir(const char *path) { char full[2 * LENGTH]; REAL(DIR *, "opendir", const char *);
    if (armed) { absolute(AT_FDCWD, path, full); note_read("list", full); } return real(path); }
DIR *fdopendir(int fd) { char full[LENGTH], link[64]; REAL(DIR *, "fdopendir", int);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = armed ? readlink(link, full, LENGTH - 1) : 0;
    if (n > 0) { full[n] = 0; note_read("walk", full); } return real(fd); }

#define ON_FD(name, call) int name(int fd) { REAL(int, #name, int); return at_fd(call, fd, 0) == FAIL ? -1 : real(fd); }
ON_FD(fsync, "fsync") ON_FD(fdatasync, "fdatasync")
#define CUT(name) int name(int fd, off_t n) { REAL(int, #name, int, off_t); return at_fd("truncate", fd, 0) == FAIL ? -1 : real(fd, n); }
CUT(ftruncate) CUT(ftruncate64)
int truncate(const char *path, off_t n) { REAL(int, "truncate", const char *, off_t); return at_path("truncate", AT_FDCWD, path, 0) == FAIL ? -1 : real(path, n); }
#define TWO(name) int name(const char *a, const char *b) { REAL(int, #name, const char *, const char *); \
    return at_two(#name, AT_FDCWD, a, AT_FDCWD, b) == FAIL ? -1 : real(a, b); }
TWO(rename) TWO(link)
int symlink(const char *a, const char *b) { REAL(int, "symlink", const char *, const char *); return at_path("symlink", AT_FDCWD, b, 0) == FAIL ? -1 : real(a, b); }
int renameat(int f, const char *a, int g, const char *b) { REAL(int, "renameat", int, const char *, int, const char *); return at_two("rename", f, a, g, b) == FAIL ? -1 : real(f, a, g, b); }
int renameat2(int f, const char *a, int g, const char *b, unsigned flags) { REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    return at_two("renameat2", f, a, g, b) == FAIL ? -1 : real(f, a, g, b, flags); }
int linkat(int f, const char *a, int g, const char *b, int flags) { REAL(int, "linkat", int, const char *, int, const char *, int); return at_two("link", f, a, g, b) == FAIL ? -1 : real(f, a, g, b, flags); }
#define ONE(name, call) int name(const char *path) { REAL(int, #name, const char *); return at_path(call, AT_FDCWD, path, 1) == FAIL ? -1 : real(path); }
ONE(unlink, "unlink") ONE(remove, "unlink") ONE(rmdir, "rmdir")
int unlinkat(int f, const char *path, int flags) { REAL(int, "unlinkat", int, const char *, int); return at_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", f, path, 1) == FAIL ? -1 : real(f, path, flags); }
int mkdir(const char *path, mode_t rights) { REAL(int, "mkdir", const char *, mode_t); return at_path("mkdir", AT_FDCWD, path, 0) == FAIL ? -1 : real(path, rights); }
int mkdirat(int f, const char *path, mode_t rights) { REAL(int, "mkdirat", int, const char *, mode_t); return at_path("mkdir", f, path, 0) == FAIL ? -1 : real(f, path, rights); }
