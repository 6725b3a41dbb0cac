/* What a process gives up for good: seccomp(2), Landlock (landlock(7)), prctl(2). No code from the kernel; its
   numbers and structures are those of include/uapi/linux/{seccomp,landlock,filter,audit}.h. */

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/resource.h>

#if defined(__x86_64__)
#define PYVMM_AUDIT_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define PYVMM_AUDIT_ARCH AUDIT_ARCH_AARCH64
#else
#define PYVMM_AUDIT_ARCH 0
#endif

/* Every call that a filter may name; the number is this machine's. */
#define PYVMM_CALL(name) {#name, __NR_##name}
static const struct { const char *name; int number; } pyvmm_calls[] = {
    PYVMM_CALL(accept4), PYVMM_CALL(brk), PYVMM_CALL(clock_getres), PYVMM_CALL(clock_gettime),
    PYVMM_CALL(clock_nanosleep), PYVMM_CALL(clone), PYVMM_CALL(clone3), PYVMM_CALL(close),
    PYVMM_CALL(close_range), PYVMM_CALL(connect), PYVMM_CALL(copy_file_range), PYVMM_CALL(dup3),
    PYVMM_CALL(epoll_create1), PYVMM_CALL(epoll_ctl), PYVMM_CALL(epoll_pwait), PYVMM_CALL(eventfd2),
    PYVMM_CALL(exit), PYVMM_CALL(exit_group), PYVMM_CALL(faccessat), PYVMM_CALL(faccessat2),
    PYVMM_CALL(fadvise64), PYVMM_CALL(fallocate), PYVMM_CALL(fcntl), PYVMM_CALL(fdatasync),
    PYVMM_CALL(flock), PYVMM_CALL(fstat), PYVMM_CALL(fstatfs), PYVMM_CALL(fsync),
    PYVMM_CALL(ftruncate), PYVMM_CALL(futex), PYVMM_CALL(getcwd), PYVMM_CALL(getdents64),
    PYVMM_CALL(getegid), PYVMM_CALL(geteuid), PYVMM_CALL(getgid), PYVMM_CALL(getpeername), PYVMM_CALL(getpgid),
    PYVMM_CALL(getpid), PYVMM_CALL(getppid), PYVMM_CALL(getrandom), PYVMM_CALL(getrusage),
    PYVMM_CALL(getsockname), PYVMM_CALL(getsockopt), PYVMM_CALL(gettid), PYVMM_CALL(gettimeofday),
    PYVMM_CALL(getuid), PYVMM_CALL(ioctl), PYVMM_CALL(kill), PYVMM_CALL(linkat), PYVMM_CALL(lseek),
    PYVMM_CALL(madvise), PYVMM_CALL(membarrier), PYVMM_CALL(mincore), PYVMM_CALL(mkdirat),
    PYVMM_CALL(mmap), PYVMM_CALL(mprotect), PYVMM_CALL(mremap), PYVMM_CALL(munmap),
    PYVMM_CALL(nanosleep), PYVMM_CALL(newfstatat), PYVMM_CALL(openat), PYVMM_CALL(pipe2),
    PYVMM_CALL(ppoll), PYVMM_CALL(prctl), PYVMM_CALL(pread64), PYVMM_CALL(preadv),
    PYVMM_CALL(preadv2), PYVMM_CALL(prlimit64), PYVMM_CALL(process_vm_readv),
    PYVMM_CALL(process_vm_writev), PYVMM_CALL(pselect6), PYVMM_CALL(pwrite64), PYVMM_CALL(pwritev),
    PYVMM_CALL(pwritev2), PYVMM_CALL(read), PYVMM_CALL(readlinkat), PYVMM_CALL(readv),
    PYVMM_CALL(recvfrom), PYVMM_CALL(recvmsg), PYVMM_CALL(renameat2), PYVMM_CALL(restart_syscall),
    PYVMM_CALL(rseq), PYVMM_CALL(rt_sigaction), PYVMM_CALL(rt_sigprocmask),
    PYVMM_CALL(rt_sigreturn), PYVMM_CALL(rt_sigtimedwait), PYVMM_CALL(sched_getaffinity),
    PYVMM_CALL(sched_yield), PYVMM_CALL(sendfile), PYVMM_CALL(sendmsg), PYVMM_CALL(sendto),
    PYVMM_CALL(seccomp), PYVMM_CALL(set_robust_list), PYVMM_CALL(setsockopt), PYVMM_CALL(shutdown),
    PYVMM_CALL(sigaltstack), PYVMM_CALL(socket), PYVMM_CALL(splice), PYVMM_CALL(statx),
    PYVMM_CALL(sync_file_range), PYVMM_CALL(sysinfo), PYVMM_CALL(tee), PYVMM_CALL(tgkill),
    PYVMM_CALL(timerfd_create), PYVMM_CALL(timerfd_settime), PYVMM_CALL(umask), PYVMM_CALL(uname),
    PYVMM_CALL(unlinkat), PYVMM_CALL(wait4), PYVMM_CALL(waitid), PYVMM_CALL(write),
    PYVMM_CALL(writev),
#ifdef __x86_64__ /* the older words for the same, which arm64 never had */
    PYVMM_CALL(access), PYVMM_CALL(alarm), PYVMM_CALL(arch_prctl), PYVMM_CALL(dup2),
    PYVMM_CALL(epoll_wait), PYVMM_CALL(getdents), PYVMM_CALL(getpgrp), PYVMM_CALL(link), PYVMM_CALL(lstat),
    PYVMM_CALL(mkdir), PYVMM_CALL(open), PYVMM_CALL(pipe), PYVMM_CALL(poll), PYVMM_CALL(readlink),
    PYVMM_CALL(rename), PYVMM_CALL(renameat), PYVMM_CALL(select), PYVMM_CALL(stat),
    PYVMM_CALL(time), PYVMM_CALL(unlink),
#endif
    {"cachestat", 451},
};

static int pyvmm_syscall_number(const char *name)
{
    for (size_t at = 0; at < sizeof(pyvmm_calls) / sizeof(pyvmm_calls[0]); at++)
        if (!strcmp(pyvmm_calls[at].name, name))
            return pyvmm_calls[at].number;
    return -ENOSYS;
}

static uint32_t pyvmm_audit_arch(void)
{
    return PYVMM_AUDIT_ARCH;
}

static int pyvmm_no_new_privileges(void)
{
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ? -errno : 0;
}

/* `filter` is `count` struct sock_filter. `all_threads`: of this process; else this one and those that it starts. */
static int pyvmm_seccomp(const void *filter, uint32_t count, int all_threads)
{
    struct sock_fprog program = {.len = (unsigned short)count, .filter = (struct sock_filter *)filter};
    long result = syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, all_threads ? SECCOMP_FILTER_FLAG_TSYNC : 0, &program);
    if (result > 0)
        return -ESRCH; /* the thread of that number could not follow */
    return result < 0 ? -errno : 0;
}

/* Landlock's calls have had these numbers on every architecture since Linux 5.13; C libraries don't wrap them. */
static int pyvmm_landlock_abi(void)
{
    long abi = syscall(444, NULL, 0, 1);
    return abi < 0 ? -errno : (int)abi;
}

/* A ruleset's fd. What an older kernel has no word for has to be 0. */
static int pyvmm_landlock_ruleset(uint64_t files, uint64_t network, uint64_t scoped)
{
    struct { uint64_t files, network, scoped; } rules = {files, network, scoped};
    size_t size = scoped ? 24 : network ? 16 : 8;
    long fd = syscall(444, &rules, size, 0);
    return fd < 0 ? -errno : (int)fd;
}

static int pyvmm_landlock_allow(int ruleset, uint64_t files, int parent)
{
    struct { uint64_t allowed; int32_t parent; } __attribute__((packed)) rule = {files, parent};
    return syscall(445, ruleset, 1, &rule, 0) < 0 ? -errno : 0;
}

/* RLIMIT_CORE, for good: what raises it again is setrlimit(2) by a process that may. */
static int pyvmm_no_core_files(void)
{
    struct rlimit none = {0, 0};
    return setrlimit(RLIMIT_CORE, &none) < 0 ? -errno : 0;
}

static int pyvmm_landlock_restrict(int ruleset)
{
    return syscall(446, ruleset, 0) < 0 ? -errno : 0;
}
