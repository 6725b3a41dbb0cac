/* Preloaded into a process: chosen calls of the C library fail with an errno, or move less than they were asked for.

   PYVMM_INJECT: rules "call,object,request,first,last,result", separated by '|'. `object` is a part of the name that
   /proc/self/fd has for the descriptor ("*": any; with a '$' behind it: its end), `request` an ioctl's number (0: any),
   `first` and `last` which of the calls that match, counted from 1. `result` is the errno; 0 is a call that is carried
   out for half of the bytes.
   PYVMM_INJECT_COUNTS: a file that is mapped, with two uint64_t for each rule: calls that matched, and were changed.
   Counted over all processes that inherit it. Behind them, in the place of one rule more, a uint64_t that another process
   may set: 1 for no rules, 2 for all of them, n + 3 for the n-th alone; 0: as this process itself has it.
   PYVMM_INJECT_WAITS: nothing is injected or counted before the process itself sets pyvmm_shim_armed: 1 for all rules,
   n + 2 for the n-th alone. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <termios.h>
#include <unistd.h>

enum { MOST_RULES = 128 };

static struct rule {
    char call[32], object[96];
    uint64_t request, first, last;
    int result;
} rules[MOST_RULES];
static unsigned count;
static uint64_t *counts;
int pyvmm_shim_armed = 1;

/* Also for a process that was forked, with another environment. */
__attribute__((constructor)) void pyvmm_shim_start(void)
{
    const char *text = getenv("PYVMM_INJECT"), *path = getenv("PYVMM_INJECT_COUNTS");
    while (text && *text) {
        if (count == MOST_RULES)
            abort();
        struct rule *rule = &rules[count];
        int used = 0;
        if (sscanf(text, "%31[^,],%95[^,],%lu,%lu,%lu,%d%n", rule->call, rule->object, &rule->request, &rule->first,
                   &rule->last, &rule->result, &used) != 6)
            abort();
        text += used + (text[used] == '|');
        count++;
    }
    if (getenv("PYVMM_INJECT_WAITS"))
        pyvmm_shim_armed = 0;
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    counts = mmap(NULL, sizeof(uint64_t) * (2 * MOST_RULES + 1), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (counts == MAP_FAILED)
        abort();
}

static int matches(const char *name, const char *object)
{
    size_t size = strlen(object), length = strlen(name);
    if (size && object[size - 1] == '$')
        return length >= size - 1 && !strncmp(name + length - (size - 1), object, size - 1);
    return strstr(name, object) != NULL;
}

/* -1: nothing; 0: short; else the errno. The object is `path`, or where there is none what `fd` leads to. */
static int injected_at(const char *call, int fd, const char *path, uint64_t request)
{
    char link[64], name[512];
    ssize_t length = -2;
    if (!count || !counts)
        return -1;
    uint64_t held = __atomic_load_n(&counts[2 * MOST_RULES], __ATOMIC_SEQ_CST);
    uint64_t armed = held ? held - 1 : pyvmm_shim_armed; /* 0: none, 1: all, n + 2: the n-th alone */
    for (unsigned i = 0; armed && i < count; i++) {
        struct rule *rule = &rules[i];
        if (armed > 1 && armed - 2 != i)
            continue;
        if (strcmp(rule->call, call) || (rule->request && rule->request != (request & 0xffffffff)))
            continue;
        if (strcmp(rule->object, "*")) {
            if (length == -2 && path) {
                snprintf(name, sizeof name, "%s", path);
                length = 0;
            } else if (length == -2) {
                int error = errno;
                snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
                length = readlink(link, name, sizeof name - 1);
                name[length < 0 ? 0 : length] = 0;
                errno = error;
            }
            if (!matches(name, rule->object))
                continue;
        }
        uint64_t number = __atomic_add_fetch(&counts[2 * i], 1, __ATOMIC_SEQ_CST);
        if (number < rule->first || number > rule->last)
            continue;
        __atomic_add_fetch(&counts[2 * i + 1], 1, __ATOMIC_SEQ_CST);
        return rule->result;
    }
    return -1;
}

static int injected(const char *call, int fd, uint64_t request)
{
    return injected_at(call, fd, NULL, request);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define FAIL_OR(label, fd, shorten) \
    do { \
        int how = injected(label, fd, 0); \
        if (how > 0) { \
            errno = how; \
            return -1; \
        } \
        if (how == 0) { \
            shorten; \
        } \
    } while (0)

#define FAIL_AS_IOCTL(fd, request) \
    do { \
        int how = injected("ioctl", fd, request); \
        if (how > 0) { \
            errno = how; \
            return -1; \
        } \
    } while (0)

#define HALF(size) size = size > 1 ? size / 2 : size

#define MOVES(name, label, BUFFER, OFFSET) \
    ssize_t name(int fd, BUFFER *data, size_t size, OFFSET offset) \
    { \
        REAL(name); \
        FAIL_OR(label, fd, HALF(size)); \
        return real(fd, data, size, offset); \
    }

MOVES(pread, "pread64", void, off_t)
MOVES(pread64, "pread64", void, off64_t)
MOVES(pwrite, "pwrite64", const void, off_t)
MOVES(pwrite64, "pwrite64", const void, off64_t)
MOVES(recv, "recvfrom", void, int)
MOVES(send, "sendto", const void, int)

ssize_t read(int fd, void *data, size_t size)
{
    REAL(read);
    FAIL_OR("read", fd, HALF(size));
    return real(fd, data, size);
}

ssize_t write(int fd, const void *data, size_t size)
{
    REAL(write);
    FAIL_OR("write", fd, HALF(size));
    return real(fd, data, size);
}

/* Of a process' own memory: `fd` is none, and every rule for the call is meant. */
#define COPIES(name) \
    ssize_t name(pid_t pid, const struct iovec *local, unsigned long locals, const struct iovec *remote, \
                 unsigned long remotes, unsigned long flags) \
    { \
        REAL(name); \
        struct iovec one = locals ? local[0] : (struct iovec){0}; \
        FAIL_OR(#name, -1, HALF(one.iov_len); local = &one; locals = 1); \
        return real(pid, local, locals, remote, remotes, flags); \
    }

COPIES(process_vm_readv)
COPIES(process_vm_writev)

int socketpair(int family, int kind, int protocol, int ends[2])
{
    REAL(socketpair);
    FAIL_OR("socketpair", -1, );
    return real(family, kind, protocol, ends);
}

int bind(int fd, const struct sockaddr *address, socklen_t size)
{
    REAL(bind);
    FAIL_OR("bind", fd, );
    return real(fd, address, size);
}

int listen(int fd, int most)
{
    REAL(listen);
    FAIL_OR("listen", fd, );
    return real(fd, most);
}

int getsockopt(int fd, int level, int option, void *value, socklen_t *size)
{
    REAL(getsockopt);
    FAIL_OR("getsockopt", fd, );
    return real(fd, level, option, value, size);
}

int socket(int family, int kind, int protocol)
{
    REAL(socket);
    FAIL_OR("socket", -1, );
    return real(family, kind, protocol);
}

int connect(int fd, const struct sockaddr *address, socklen_t size)
{
    REAL(connect);
    FAIL_OR("connect", fd, );
    return real(fd, address, size);
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags)
{
    REAL(accept4);
    FAIL_OR("accept4", fd, );
    return real(fd, address, size, flags);
}

/* Half of the first buffer. */
ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    REAL(recvmsg);
    struct iovec one = message->msg_iovlen ? message->msg_iov[0] : (struct iovec){0};
    FAIL_OR("recvmsg", fd, HALF(one.iov_len); message->msg_iov = &one; message->msg_iovlen = 1);
    return real(fd, message, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    REAL(sendmsg);
    struct msghdr shorter = *message;
    struct iovec one = message->msg_iovlen ? message->msg_iov[0] : (struct iovec){0};
    FAIL_OR("sendmsg", fd, HALF(one.iov_len); shorter.msg_iov = &one; shorter.msg_iovlen = 1);
    return real(fd, &shorter, flags);
}

/* Calls without a descriptor, or about one that isn't there yet. */
int memfd_create(const char *name, unsigned flags)
{
    REAL(memfd_create);
    FAIL_OR("memfd_create", -1, );
    return real(name, flags);
}

int epoll_create1(int flags)
{
    REAL(epoll_create1);
    FAIL_OR("epoll_create1", -1, );
    return real(flags);
}

int eventfd(unsigned count, int flags)
{
    REAL(eventfd);
    FAIL_OR("eventfd2", -1, );
    return real(count, flags);
}

int pipe2(int ends[2], int flags)
{
    REAL(pipe2);
    FAIL_OR("pipe2", -1, );
    return real(ends, flags);
}

int fchmod(int fd, mode_t mode)
{
    REAL(fchmod);
    FAIL_OR("fchmod", fd, );
    return real(fd, mode);
}

int prctl(int option, ...)
{
    static int (*real)(int, long, long, long, long);
    if (!real)
        real = (int (*)(int, long, long, long, long))dlsym(RTLD_NEXT, "prctl");
    long arguments[4];
    va_list more;
    va_start(more, option);
    for (unsigned i = 0; i < 4; i++)
        arguments[i] = va_arg(more, long);
    va_end(more);
    FAIL_OR("prctl", -1, );
    return real(option, arguments[0], arguments[1], arguments[2], arguments[3]);
}

enum { SYS_cachestat_ = 451 }; /* newer than some C libraries */

/* As the ioctls that they are. */
int tcgetattr(int fd, struct termios *found)
{
    REAL(tcgetattr);
    FAIL_AS_IOCTL(fd, TCGETS);
    return real(fd, found);
}

int tcsetattr(int fd, int when, const struct termios *wanted)
{
    REAL(tcsetattr);
    FAIL_AS_IOCTL(fd, TCSETS + when);
    return real(fd, when, wanted);
}

static const char *name_of(long number)
{
    switch (number) {
    case SYS_landlock_create_ruleset: return "landlock_create_ruleset";
    case SYS_landlock_add_rule: return "landlock_add_rule";
    case SYS_landlock_restrict_self: return "landlock_restrict_self";
    case SYS_seccomp: return "seccomp";
    case SYS_cachestat_: return "cachestat";
    case SYS_pidfd_open: return "pidfd_open";
    default: return "";
    }
}

long syscall(long number, ...)
{
    static long (*real)(long, long, long, long, long, long, long);
    if (!real)
        real = (long (*)(long, long, long, long, long, long, long))dlsym(RTLD_NEXT, "syscall");
    long arguments[6];
    va_list more;
    va_start(more, number);
    for (unsigned i = 0; i < 6; i++)
        arguments[i] = va_arg(more, long);
    va_end(more);
    FAIL_OR(name_of(number), -1, );
    return real(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}

#define FAIL_AT(label, path, failed) \
    do { \
        int how = injected_at(label, -1, path, 0); \
        if (how > 0) { \
            errno = how; \
            return failed; \
        } \
    } while (0)

/* Calls that take a path; strace's names for them. */
#define OPENS(name) \
    int name(const char *path, int flags, ...) \
    { \
        static int (*real)(const char *, int, mode_t); \
        if (!real) \
            real = (int (*)(const char *, int, mode_t))dlsym(RTLD_NEXT, #name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        FAIL_AT("openat", path, -1); \
        return real(path, flags, mode); \
    }

#define OPENS_AT(name) \
    int name(int folder, const char *path, int flags, ...) \
    { \
        static int (*real)(int, const char *, int, mode_t); \
        if (!real) \
            real = (int (*)(int, const char *, int, mode_t))dlsym(RTLD_NEXT, #name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        FAIL_AT("openat", path, -1); \
        return real(folder, path, flags, mode); \
    }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

#define WITH_PATH(name, PARAMETERS, path, ...) \
    int name PARAMETERS \
    { \
        REAL(name); \
        FAIL_AT(#name, path, -1); \
        return real(__VA_ARGS__); \
    }

WITH_PATH(mkdir, (const char *path, mode_t mode), path, path, mode)
WITH_PATH(mkdirat, (int folder, const char *path, mode_t mode), path, folder, path, mode)
WITH_PATH(rmdir, (const char *path), path, path)
WITH_PATH(link, (const char *old, const char *new), new, old, new)
WITH_PATH(rename, (const char *old, const char *new), new, old, new)
WITH_PATH(renameat, (int from, const char *old, int to, const char *new), new, from, old, to, new)
WITH_PATH(unlink, (const char *path), path, path)
WITH_PATH(unlinkat, (int folder, const char *path, int flags), path, folder, path, flags)
WITH_PATH(umount2, (const char *path, int flags), path, path, flags)
WITH_PATH(mount,
          (const char *source, const char *path, const char *kind, unsigned long flags, const void *data), path,
          source, path, kind, flags, data)

DIR *opendir(const char *path)
{
    REAL(opendir);
    FAIL_AT("openat", path, NULL);
    return real(path);
}

struct dirent64 *readdir64(DIR *folder)
{
    REAL(readdir64);
    int how = injected("getdents64", dirfd(folder), 0);
    if (how > 0) {
        errno = how;
        return NULL;
    }
    return real(folder);
}

#define STATS(name, LOOKED_AT) \
    int name(const char *path, LOOKED_AT *found) \
    { \
        REAL(name); \
        FAIL_AT("newfstatat", path, -1); \
        return real(path, found); \
    }

STATS(stat64, struct stat64)
STATS(lstat64, struct stat64)

int fstat64(int fd, struct stat64 *found)
{
    REAL(fstat64);
    FAIL_OR("newfstatat", fd, );
    return real(fd, found);
}

int flock(int fd, int operation)
{
    REAL(flock);
    FAIL_OR("flock", fd, );
    return real(fd, operation);
}

int posix_fadvise64(int fd, off64_t offset, off64_t size, int advice)
{
    REAL(posix_fadvise64);
    int how = injected("fadvise64", fd, 0);
    return how > 0 ? how : real(fd, offset, size, advice);
}

int fcntl64(int fd, int command, ...)
{
    static int (*real)(int, int, void *);
    if (!real)
        real = (int (*)(int, int, void *))dlsym(RTLD_NEXT, "fcntl64");
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    FAIL_OR("fcntl", fd, );
    return real(fd, command, argument);
}

/* Of a file: anonymous memory is the C library's. */
#define MAPS(name, OFFSET) \
    void *name(void *address, size_t size, int protection, int flags, int fd, OFFSET offset) \
    { \
        REAL(name); \
        int how = fd < 0 ? -1 : injected("mmap", fd, 0); \
        if (how > 0) { \
            errno = how; \
            return MAP_FAILED; \
        } \
        return real(address, size, protection, flags, fd, offset); \
    }

MAPS(mmap, off_t)
MAPS(mmap64, off64_t)

/* Its advice is its request. */
int madvise(void *address, size_t size, int advice)
{
    REAL(madvise);
    int how = injected("madvise", -1, advice);
    if (how > 0) {
        errno = how;
        return -1;
    }
    return real(address, size, advice);
}

pid_t fork(void)
{
    REAL(fork);
    FAIL_OR("clone", -1, );
    return real();
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    REAL(pthread_create);
    int how = injected("clone3", -1, 0);
    return how > 0 ? how : real(thread, attributes, run, argument);
}

int fsync(int fd)
{
    REAL(fsync);
    FAIL_OR("fsync", fd, );
    return real(fd);
}

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    REAL(epoll_ctl);
    FAIL_OR("epoll_ctl", fd, );
    return real(epoll, operation, fd, event);
}

/* Half of the bytes: of a single vector; else the first half of the vectors. */
#define VECTORS(name, label, OFFSET) \
    ssize_t name(int fd, const struct iovec *vectors, int number, OFFSET offset) \
    { \
        REAL(name); \
        struct iovec one = number ? vectors[0] : (struct iovec){0}; \
        FAIL_OR(label, fd, if (number == 1) { HALF(one.iov_len); vectors = &one; } else number = (number + 1) / 2); \
        return real(fd, vectors, number, offset); \
    }

VECTORS(preadv, "preadv", off_t)
VECTORS(preadv64, "preadv", off64_t)
VECTORS(pwritev, "pwritev", off_t)
VECTORS(pwritev64, "pwritev", off64_t)

#define VECTORS_THERE(name) \
    ssize_t name(int fd, const struct iovec *vectors, int number) \
    { \
        REAL(name); \
        struct iovec one = number ? vectors[0] : (struct iovec){0}; \
        FAIL_OR(#name, fd, if (number == 1) { HALF(one.iov_len); vectors = &one; } else number = (number + 1) / 2); \
        return real(fd, vectors, number); \
    }

VECTORS_THERE(readv)
VECTORS_THERE(writev)

#define VECTORS2(name, label, OFFSET) \
    ssize_t name(int fd, const struct iovec *vectors, int number, OFFSET offset, int flags) \
    { \
        REAL(name); \
        struct iovec one = number ? vectors[0] : (struct iovec){0}; \
        FAIL_OR(label, fd, if (number == 1) { HALF(one.iov_len); vectors = &one; } else number = (number + 1) / 2); \
        return real(fd, vectors, number, offset, flags); \
    }

VECTORS2(preadv2, "preadv", off_t)
VECTORS2(preadv64v2, "preadv", off64_t)
VECTORS2(pwritev2, "pwritev", off_t)
VECTORS2(pwritev64v2, "pwritev", off64_t)

ssize_t splice(int from, off64_t *source, int to, off64_t *target, size_t size, unsigned flags)
{
    REAL(splice);
    char *pipe = source ? "splice-in" : "splice-out"; /* named after the file, not the pipe */
    FAIL_OR(pipe, source ? from : to, HALF(size));
    return real(from, source, to, target, size, flags);
}

#define FALLOCATE(name, OFFSET) \
    int name(int fd, int mode, OFFSET offset, OFFSET size) \
    { \
        REAL(name); \
        FAIL_OR("fallocate", fd, ); \
        return real(fd, mode, offset, size); \
    }

FALLOCATE(fallocate, off_t)
FALLOCATE(fallocate64, off64_t)

off64_t lseek64(int fd, off64_t offset, int whence)
{
    REAL(lseek64);
    FAIL_OR("lseek", fd, );
    return real(fd, offset, whence);
}

#define TRUNCATES(name, OFFSET) \
    int name(int fd, OFFSET size) \
    { \
        REAL(name); \
        FAIL_OR("ftruncate", fd, ); \
        return real(fd, size); \
    }

TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)

int fdatasync(int fd)
{
    REAL(fdatasync);
    FAIL_OR("fdatasync", fd, );
    return real(fd);
}

int ioctl(int fd, unsigned long request, ...)
{
    static int (*real)(int, unsigned long, void *);
    if (!real)
        real = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    FAIL_AS_IOCTL(fd, request);
    return real(fd, request, argument);
}
