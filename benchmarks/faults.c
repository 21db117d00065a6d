/* Fault injection by LD_PRELOAD: the N-th file operation under a folder fails, is cut short or is
   the last one. Built and driven by faults.py, in a forked process that is to be struck:
       fault_arm(N, MODE, errno, "FOLDER/", trace)   N = 0: nothing is struck, only counted
       fault_count()
   MODE: E fails once with errno; P fails from N on (but removals work, as on a full disk); S writes
   half; T writes half, then SIGKILL; K SIGKILL before; R SIGKILL after.
   Counted: create or truncate, write, pwrite, writev, fsync, fdatasync, rename, link, symlink,
   mkdir, unlink, rmdir, ftruncate. A line each goes to `trace`, if it is no negative number. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { GO, FAIL, SHORT, TORN, LAST };
static long target, count;
static int mode, number, trace = -1;
static char prefix[4096];
static size_t length;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name, ...)                                                                     \
    static type (*real)(__VA_ARGS__);                                                             \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

void fault_arm(long n, char m, int e, const char *p, int t) {
    length = 0;
    target = n, mode = m, number = e, trace = t, count = 0;
    strncpy(prefix, p, sizeof prefix - 1);
    length = strlen(prefix);
}

long fault_count(void) { return count; }

static int inside(const char *path) { return length && path && !strncmp(path, prefix, length); }

static int inside_fd(int fd, char *path) {
    char link[64];
    if (!length || fd == trace) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    if (n < 0) return 0;
    path[n] = 0;
    return inside(path);
}

static int hit(const char *what, const char *path, int writes) {
    int verdict = GO;
    pthread_mutex_lock(&mutex);
    long now = ++count;
    if (trace >= 0) {
        char line[4200];
        int n = snprintf(line, sizeof line, "%s %s\n", what, path + length);
        REAL(ssize_t, "write", int, const void *, size_t);
        if (real(trace, line, n) < 0) trace = -1;
    }
    int removes = !strcmp(what, "unlink") || !strcmp(what, "rmdir") || !strcmp(what, "ftruncate");
    if (target && mode == 'P' && now >= target && !removes) verdict = FAIL;
    if (target && now == target) {
        if (mode == 'K' || (mode == 'T' && !writes)) die();
        if (mode == 'E') verdict = FAIL;
        if (mode == 'S' && writes) verdict = SHORT;
        if (mode == 'T') verdict = TORN;
        if (mode == 'R') verdict = LAST;
    }
    pthread_mutex_unlock(&mutex);
    return verdict;
}

#define STRIKE(what, path, call)                                                                  \
    do {                                                                                          \
        int verdict = hit(what, path, 0);                                                         \
        if (verdict == FAIL) return errno = number, -1;                                           \
        int result = call;                                                                        \
        if (verdict == LAST) die();                                                               \
        return result;                                                                            \
    } while (0)

#define STRIKE_WRITE(what, path, size, whole, half)                                               \
    do {                                                                                          \
        int verdict = hit(what, path, 1);                                                         \
        if (verdict == FAIL) return errno = number, -1;                                           \
        if (verdict == SHORT && size > 1) return half;                                            \
        if (verdict == TORN) {                                                                    \
            if (half < 0) return -1;                                                              \
            die();                                                                                \
        }                                                                                         \
        ssize_t result = whole;                                                                   \
        if (verdict == LAST) die();                                                               \
        return result;                                                                            \
    } while (0)

ssize_t write(int fd, const void *b, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    char path[4096];
    if (fd > 2 && inside_fd(fd, path)) STRIKE_WRITE("write", path, n, real(fd, b, n), real(fd, b, n / 2));
    return real(fd, b, n);
}

ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    char path[4096];
    if (inside_fd(fd, path))
        STRIKE_WRITE("pwrite", path, n, real(fd, b, n, o), real(fd, b, n / 2, o));
    return real(fd, b, n, o);
}

ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { return pwrite(fd, b, n, o); }

ssize_t writev(int fd, const struct iovec *v, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    char path[4096];
    if (inside_fd(fd, path)) STRIKE("writev", path, (int)real(fd, v, n));
    return real(fd, v, n);
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    char path[4096];
    if (inside_fd(fd, path)) STRIKE("fsync", path, real(fd));
    return real(fd);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    char path[4096];
    if (inside_fd(fd, path)) STRIKE("fdatasync", path, real(fd));
    return real(fd);
}

int ftruncate(int fd, off_t n) {
    REAL(int, "ftruncate", int, off_t);
    char path[4096];
    if (inside_fd(fd, path)) STRIKE("ftruncate", path, real(fd, n));
    return real(fd, n);
}

int ftruncate64(int fd, off64_t n) { return ftruncate(fd, n); }

int rename(const char *a, const char *b) {
    REAL(int, "rename", const char *, const char *);
    if (inside(a) || inside(b)) STRIKE("rename", inside(b) ? b : a, real(a, b));
    return real(a, b);
}

int renameat(int f, const char *a, int g, const char *b) {
    REAL(int, "renameat", int, const char *, int, const char *);
    if (inside(a) || inside(b)) STRIKE("rename", inside(b) ? b : a, real(f, a, g, b));
    return real(f, a, g, b);
}

int link(const char *a, const char *b) {
    REAL(int, "link", const char *, const char *);
    if (inside(b)) STRIKE("link", b, real(a, b));
    return real(a, b);
}

int symlink(const char *a, const char *b) {
    REAL(int, "symlink", const char *, const char *);
    if (inside(b)) STRIKE("symlink", b, real(a, b));
    return real(a, b);
}

int mkdir(const char *a, mode_t m) {
    REAL(int, "mkdir", const char *, mode_t);
    if (inside(a)) STRIKE("mkdir", a, real(a, m));
    return real(a, m);
}

int unlink(const char *a) {
    REAL(int, "unlink", const char *);
    if (inside(a)) STRIKE("unlink", a, real(a));
    return real(a);
}

int rmdir(const char *a) {
    REAL(int, "rmdir", const char *);
    if (inside(a)) STRIKE("rmdir", a, real(a));
    return real(a);
}

int unlinkat(int d, const char *a, int f) {
    REAL(int, "unlinkat", int, const char *, int);
    char path[4096];
    if ((*a == '/' && inside(a)) || (*a != '/' && d >= 0 && inside_fd(d, path)))
        STRIKE(f & AT_REMOVEDIR ? "rmdir" : "unlink", *a == '/' ? a : path, real(d, a, f));
    return real(d, a, f);
}

#define OPEN(name, call)                                                                          \
    mode_t m = 0;                                                                                 \
    if (f & (O_CREAT | __O_TMPFILE)) {                                                            \
        va_list v;                                                                                \
        va_start(v, f);                                                                           \
        m = va_arg(v, mode_t);                                                                    \
        va_end(v);                                                                                \
    }                                                                                             \
    if ((f & (O_CREAT | O_TRUNC)) && inside(a)) STRIKE("create", a, call);                        \
    return call

int open(const char *a, int f, ...) {
    REAL(int, "open", const char *, int, ...);
    OPEN("open", real(a, f, m));
}

int open64(const char *a, int f, ...) {
    REAL(int, "open64", const char *, int, ...);
    OPEN("open64", real(a, f, m));
}

int openat(int d, const char *a, int f, ...) {
    REAL(int, "openat", int, const char *, int, ...);
    OPEN("openat", real(d, a, f, m));
}
