/*
 * The first program of a guest whose initramfs pyvmm makes: it loads the modules that are beside
 * it, mounts the root disk, and starts that disk's init, or one command whose streams go through
 * the ports of a virtio console to pyvmm (--exec).
 *
 * Freestanding: no C library, so that the file is small and runs on any Linux of its architecture.
 *
 * What it does is on the kernel's command line: root=, rootfstype=, rootflags=, ro, rw and init=
 * as the kernel itself has them; pyvmm.exec and pyvmm.share for a command. It speaks with pyvmm
 * through the port "pyvmm.command" (vmm/machine/execution.py has the other side):
 *
 *   from pyvmm   "run LENGTH\n" and the command; "signal NUMBER\n"; "taken\n" at the end
 *   to pyvmm     "ended STATUS OUTPUT ERROR SHARE\n": the command's status, and how many bytes
 *                went into each of the other ports; "failed TEXT\n"
 */

/* firmware/build.py --check looks for it. */
static const char source_digest[] __attribute__((used)) = SOURCE_DIGEST;

typedef unsigned long ulong;
typedef long word;

enum {
	O_RDWR = 2, O_WRONLY = 1, O_NONBLOCK = 04000, O_CLOEXEC = 02000000,
	AT_FDCWD = -100,
	MS_RDONLY = 1, MS_NOSUID = 2, MS_NODEV = 4, MS_REMOUNT = 32, MS_MOVE = 8192,
	SIGKILL = 9, SIGCHLD = 17, WNOHANG = 1,
	POLLIN = 1, POLLOUT = 4, POLLERR = 8, POLLHUP = 16,
	ENOENT = 2, EINTR = 4, EAGAIN = 11, EEXIST = 17,
	S_IFCHR = 0020000,
};
#define RB_AUTOBOOT 0x01234567
#define RB_POWER_OFF 0x4321fedc
#define REBOOT_MAGIC1 0xfee1dead
#define REBOOT_MAGIC2 672274793

#if defined(__x86_64__)
enum {
	NR_read = 0, NR_write = 1, NR_close = 3, NR_ppoll = 271, NR_getpid = 39, NR_clone = 56,
	NR_execve = 59, NR_exit = 60, NR_wait4 = 61, NR_kill = 62, NR_chdir = 80, NR_setsid = 112,
	NR_chroot = 161, NR_sync = 162, NR_mount = 165, NR_reboot = 169, NR_getdents64 = 217,
	NR_nanosleep = 35, NR_openat = 257, NR_mkdirat = 258, NR_unlinkat = 263, NR_faccessat = 269,
	NR_symlinkat = 266, NR_dup3 = 292, NR_pipe2 = 293, NR_finit_module = 313, NR_fcntl = 72, NR_ioctl = 16,
	NR_socket = 41,
};

static word call6(word number, word a, word b, word c, word d, word e, word f)
{
	register word r10 __asm__("r10") = d;
	register word r8 __asm__("r8") = e;
	register word r9 __asm__("r9") = f;
	word result;

	__asm__ volatile("syscall" : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall start\n");
#elif defined(__aarch64__)
enum {
	NR_read = 63, NR_write = 64, NR_close = 57, NR_ppoll = 73, NR_getpid = 172, NR_clone = 220,
	NR_execve = 221, NR_exit = 93, NR_wait4 = 260, NR_kill = 129, NR_chdir = 49, NR_setsid = 157,
	NR_chroot = 51, NR_sync = 81, NR_mount = 40, NR_reboot = 142, NR_getdents64 = 61,
	NR_nanosleep = 101, NR_openat = 56, NR_mkdirat = 34, NR_unlinkat = 35, NR_faccessat = 48,
	NR_symlinkat = 36, NR_dup3 = 24, NR_pipe2 = 59, NR_finit_module = 273, NR_fcntl = 25, NR_ioctl = 29,
	NR_socket = 198,
};

static word call6(word number, word a, word b, word c, word d, word e, word f)
{
	register word x8 __asm__("x8") = number;
	register word x0 __asm__("x0") = a;
	register word x1 __asm__("x1") = b;
	register word x2 __asm__("x2") = c;
	register word x3 __asm__("x3") = d;
	register word x4 __asm__("x4") = e;
	register word x5 __asm__("x5") = f;

	__asm__ volatile("svc #0" : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return x0;
}

__asm__(".globl _start\n_start:\n\tmov x29, #0\n\tbl start\n");
#endif

#define call(number, a, b, c, d, e) \
	call6(number, (word)(a), (word)(b), (word)(c), (word)(d), (word)(e), 0)

struct pollfd { int fd; short events, revents; };
struct timespec { word seconds, nanoseconds; };

/* The compiler makes calls of these by itself. */
void *memset(void *into, int byte, ulong size)
{
	for (char *at = into; size--; )
		*at++ = (char)byte;
	return into;
}

void *memcpy(void *into, const void *from, ulong size)
{
	const char *source = from;

	for (char *at = into; size--; )
		*at++ = *source++;
	return into;
}

static ulong length(const char *text)
{
	ulong n = 0;

	while (text[n])
		n++;
	return n;
}

static int begins(const char *text, const char *with)
{
	while (*with)
		if (*text++ != *with++)
			return 0;
	return 1;
}

static int same(const char *a, const char *b)
{
	return begins(a, b) && length(a) == length(b);
}

/* -- text that is put together ---------------------------------------------------------------- */

struct text { char data[512]; ulong size; };

static void add(struct text *text, const char *more)
{
	while (*more && text->size < sizeof text->data - 1)
		text->data[text->size++] = *more++;
	text->data[text->size] = 0;
}

static void add_number(struct text *text, ulong number)
{
	char digits[24];
	int at = sizeof digits - 1;

	digits[at] = 0;
	do {
		digits[--at] = (char)('0' + number % 10);
		number /= 10;
	} while (number);
	add(text, digits + at);
}

static ulong number_at(const char *text)
{
	ulong number = 0;

	while (*text >= '0' && *text <= '9')
		number = number * 10 + (ulong)(*text++ - '0');
	return number;
}

/* -- small wrappers --------------------------------------------------------------------------- */

static int open_file(const char *path, int flags)
{
	return (int)call(NR_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0, 0);
}

static void close_file(int fd)
{
	call(NR_close, fd, 0, 0, 0, 0);
}

static word read_some(int fd, void *into, ulong size)
{
	word got;

	do
		got = call(NR_read, fd, into, size, 0, 0);
	while (got == -EINTR);
	return got;
}

static int write_all(int fd, const char *data, ulong size)
{
	while (size) {
		word written = call(NR_write, fd, data, size, 0, 0);

		if (written == -EINTR)
			continue;
		if (written <= 0)
			return -1;
		data += written;
		size -= (ulong)written;
	}
	return 0;
}

static void doze(void)
{
	struct timespec time = { 0, 5000000 };

	call(NR_nanosleep, &time, 0, 0, 0, 0);
}

static int mkdir_at(const char *path)
{
	return (int)call(NR_mkdirat, AT_FDCWD, path, 0755, 0, 0);
}

static int mount_at(const char *what, const char *where, const char *type, ulong flags,
		    const char *options)
{
	return (int)call(NR_mount, what, where, type, flags, options);
}

static int exists(const char *path)
{
	return call(NR_faccessat, AT_FDCWD, path, 0, 0, 0) == 0;
}

/* The whole of a small file, NUL-terminated; its size, or a negative error. */
static word read_file(const char *path, char *into, ulong room)
{
	int fd = open_file(path, 0);
	ulong size = 0;
	word got;

	if (fd < 0)
		return fd;
	while (size < room - 1 && (got = read_some(fd, into + size, room - 1 - size)) > 0)
		size += (ulong)got;
	into[size] = 0;
	close_file(fd);
	return (word)size;
}

static void __attribute__((noreturn)) end(ulong how)
{
	call(NR_sync, 0, 0, 0, 0, 0);
	call(NR_reboot, REBOOT_MAGIC1, REBOOT_MAGIC2, how, 0, 0);
	for (;;)
		doze();
}

/* pyvmm looks for this line at the end of the console's output (vmm/machine/machine.py). */
static void __attribute__((noreturn)) fail(const char *what, const char *more, word error)
{
	struct text line = { .size = 0 };

	add(&line, "pyvmm-init: failed: ");
	add(&line, what);
	add(&line, more);
	if (error) {
		add(&line, ", errno ");
		add_number(&line, (ulong)-error);
	}
	add(&line, "\n");
	write_all(2, line.data, line.size);
	end(RB_AUTOBOOT);
}

/* -- the kernel's command line ---------------------------------------------------------------- */

static char words[4096];
static ulong words_size;

static void read_words(void)
{
	word size = read_file("/proc/cmdline", words, sizeof words);
	int quoted = 0;

	words_size = size > 0 ? (ulong)size : 0;
	for (ulong i = 0; i < words_size; i++) {
		if (words[i] == '"')
			quoted = !quoted;
		else if (!quoted && (words[i] == ' ' || words[i] == '\n'))
			words[i] = 0;
	}
}

/* The value of the last word NAME=VALUE, "" for a word NAME, or 0. */
static const char *value_of(const char *name)
{
	const char *found = 0;
	ulong size = length(name);

	for (ulong i = 0; i < words_size; i += length(words + i) + 1) {
		const char *at = words + i;

		if (begins(at, name) && (at[size] == 0 || at[size] == '='))
			found = at[size] ? at + size + 1 : at + size;
	}
	return found;
}

/* Whether the last of the words ro and rw is ro. */
static int is_read_only(void)
{
	const char *ro = value_of("ro"), *rw = value_of("rw");

	return ro && (!rw || ro > rw);
}

/* -- modules and mounts ----------------------------------------------------------------------- */

static char buffer[1 << 16];

static void load_modules(void)
{
	char path[128] = "/modules/";
	ulong start = length(path), at = 0;
	word size = read_file("/modules/order", buffer, sizeof buffer);

	while (size > 0 && at < (ulong)size) {
		ulong end_of_path = start;
		int fd;
		word error;

		while (buffer[at] && buffer[at] != '\n' && end_of_path < sizeof path - 1)
			path[end_of_path++] = buffer[at++];
		path[end_of_path] = 0;
		at++;
		fd = open_file(path, 0);
		error = fd < 0 ? fd : call(NR_finit_module, fd, "", 0, 0, 0);
		if (error && error != -EEXIST)
			fail("loading the module ", path + start, error);
		close_file(fd);
		/* The initramfs stays in memory: a file system's module can have megabytes. */
		call(NR_unlinkat, AT_FDCWD, path, 0, 0, 0);
	}
}

/* A file system's name may be missing: those that the kernel knows are tried. */
static word mount_root(const char *device, const char *type, ulong flags, const char *options)
{
	word error = -ENOENT;
	ulong at = 0;
	word size;

	if (type)
		return mount_at(device, "/root", type, flags, options);
	size = read_file("/proc/filesystems", buffer, sizeof buffer);
	while (size > 0 && at < (ulong)size) {
		char *line = buffer + at;

		while (buffer[at] && buffer[at] != '\n')
			at++;
		buffer[at++] = 0;
		if (begins(line, "nodev"))
			continue;
		error = mount_at(device, "/root", line[0] == '\t' ? line + 1 : line, flags, options);
		if (!error)
			return 0;
	}
	return error;
}

static void switch_to(const char *device)
{
	static const char *const kept[] = { "/dev", "/proc", "/sys" };
	ulong flags = is_read_only() ? MS_RDONLY : 0;
	word error = 0;

	for (int tries = 2000; !exists(device); tries--) {
		if (!tries)
			fail("there is no ", device, 0);
		doze();
	}
	mkdir_at("/root");
	error = mount_root(device, value_of("rootfstype"), flags, value_of("rootflags"));
	if (error)
		fail("mounting the root disk ", device, error);
	for (ulong i = 0; i < sizeof kept / sizeof *kept; i++) {
		struct text place = { .size = 0 };

		add(&place, "/root");
		add(&place, kept[i]);
		error = mount_at(kept[i], place.data, 0, MS_MOVE, 0);
		if (error)
			fail("the root disk has no directory ", kept[i], error);
	}
	call(NR_chdir, "/root", 0, 0, 0, 0);
	mount_at(".", "/", 0, MS_MOVE, 0);
	call(NR_chroot, ".", 0, 0, 0, 0);
	call(NR_chdir, "/", 0, 0, 0, 0);
}

static const char *const environment[] = {
	"HOME=/root", "TERM=dumb", "LANG=C.UTF-8", "SHELL=/bin/sh", "USER=root",
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 0,
};

static void __attribute__((noreturn)) start_init(void)
{
	static const char *const usual[] = { "/sbin/init", "/etc/init", "/bin/init", 0 };
	static const char *const its_environment[] = { "HOME=/", "TERM=linux", 0 };
	const char *given = value_of("init");
	const char *const only[] = { given, 0 };
	word error = -ENOENT;

	for (const char *const *name = given ? only : usual; *name; name++) {
		const char *const arguments[] = { *name, 0 };

		error = call(NR_execve, *name, arguments, its_environment, 0, 0);
		if (given)
			break;
	}
	fail("the root disk has no ", given ? given : "/sbin/init that can be run", error);
}

/* -- a command, through ports ----------------------------------------------------------------- */

struct port { const char *name; char device[32]; int fd; };

/* Each goes one way, but the command's: a port whose host end has no more input takes no output. */
enum { COMMAND, INPUT, OUTPUT, ERRORS, SHARE_IN, SHARE_OUT, PORTS };
static struct port ports[PORTS] = {
	[COMMAND] = { .name = "pyvmm.command", .fd = -1 },
	[INPUT] = { .name = "pyvmm.input", .fd = -1 },
	[OUTPUT] = { .name = "pyvmm.output", .fd = -1 },
	[ERRORS] = { .name = "pyvmm.errors", .fd = -1 },
	[SHARE_IN] = { .name = "pyvmm.share-in", .fd = -1 },
	[SHARE_OUT] = { .name = "pyvmm.share-out", .fd = -1 },
};

/* Opens the port with this name if it is there by now. */
static void look_for(struct port *port)
{
	static char entries[4096];
	const char *folder = "/sys/class/virtio-ports";
	int fd = open_file(folder, 0);
	word size;

	if (fd < 0)
		return;
	while ((size = call(NR_getdents64, fd, entries, sizeof entries, 0, 0)) > 0) {
		for (word at = 0; at < size; ) {
			/* struct linux_dirent64: ino, off, reclen, type, name */
			unsigned short entry = *(unsigned short *)(entries + at + 16);
			const char *name = entries + at + 19;
			struct text path = { .size = 0 };
			char content[80];
			word got;

			at += entry;
			if (name[0] == '.')
				continue;
			add(&path, folder);
			add(&path, "/");
			add(&path, name);
			add(&path, "/name");
			got = read_file(path.data, content, sizeof content);
			if (got > 0 && content[got - 1] == '\n')
				content[got - 1] = 0;
			if (got <= 0 || !same(content, port->name))
				continue;
			path.size = 0;
			add(&path, "/dev/");
			add(&path, name);
			port->fd = open_file(path.data, O_RDWR);
		}
	}
	close_file(fd);
}

static void open_port(int which)
{
	struct port *port = &ports[which];

	for (int tries = 2000; port->fd < 0; tries--) {
		look_for(port);
		if (port->fd >= 0)
			break;
		if (!tries)
			fail("there is no port ", port->name, 0);
		doze();
	}
}

static void send_line(const struct text *text)
{
	write_all(ports[COMMAND].fd, text->data, text->size);
}

static void __attribute__((noreturn)) fail_command(const char *what, word status)
{
	struct text line = { .size = 0 };

	add(&line, "failed ");
	add(&line, what);
	if (status) {
		add(&line, " ");
		add_number(&line, (ulong)status);
	}
	add(&line, "\n");
	send_line(&line);
	/* pyvmm ends the machine. */
	for (;;)
		doze();
}

static int fork_child(void)
{
	return (int)call(NR_clone, SIGCHLD, 0, 0, 0, 0);
}

static word status_of(int wait_status)
{
	return wait_status & 0x7f ? 128 + (wait_status & 0x7f) : (wait_status >> 8) & 0xff;
}

static word wait_for(int child)
{
	int status = 0;

	while (call(NR_wait4, child, &status, 0, 0, 0) == -EINTR)
		;
	return status_of(status);
}

/* Runs a program to its end with these streams; its status, 127 when it can't be started. */
static word run_program(const char *const *arguments, int input, int output, const char *folder)
{
	int child = fork_child();

	if (!child) {
		call(NR_dup3, input, 0, 0, 0, 0);
		call(NR_dup3, output, 1, 0, 0, 0);
		call(NR_chdir, folder, 0, 0, 0, 0);
		for (const char *const *path = (const char *const[]){
			     "/usr/bin/", "/bin/", "/usr/sbin/", "/sbin/", 0 }; *path; path++) {
			struct text name = { .size = 0 };

			add(&name, *path);
			add(&name, arguments[0]);
			call(NR_execve, name.data, arguments, environment, 0, 0);
		}
		call(NR_exit, 127, 0, 0, 0, 0);
	}
	return wait_for(child);
}

/* Copies what `from` has until its end; the number of bytes. */
static ulong copy(int from, int to)
{
	ulong sum = 0;
	word got;

	while ((got = read_some(from, buffer, sizeof buffer)) > 0) {
		if (write_all(to, buffer, (ulong)got) < 0)
			break;
		sum += (ulong)got;
	}
	return sum;
}

static const char share_folder[] = "/mnt";

/* tar gets a pipe: a port can be opened once, and ends when pyvmm says so. */
static void unpack_share(void)
{
	static const char *const arguments[] = { "tar", "-x", "-f", "-", 0 };
	int pipe[2], child;
	word status;

	mkdir_at(share_folder);
	if (mount_at("pyvmm", share_folder, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"))
		fail_command("--share: there is no /mnt to mount it at", 0);
	open_port(SHARE_IN);
	call(NR_pipe2, pipe, O_CLOEXEC, 0, 0, 0);
	child = fork_child();
	if (!child) {
		close_file(pipe[0]);
		copy(ports[SHARE_IN].fd, pipe[1]);
		call(NR_exit, 0, 0, 0, 0, 0);
	}
	close_file(pipe[1]);
	status = run_program(arguments, pipe[0], 2, share_folder);
	close_file(pipe[0]);
	if (status)
		fail_command("--share: the guest's tar could not unpack it, status", status);
	wait_for(child);
}

static ulong pack_share(void)
{
	static const char *const arguments[] = { "tar", "-c", "-f", "-", ".", 0 };
	int pipe[2], child;
	ulong sent;

	call(NR_pipe2, pipe, O_CLOEXEC, 0, 0, 0);
	child = fork_child();
	if (!child)
		call(NR_exit, run_program(arguments, 0, pipe[1], share_folder), 0, 0, 0, 0);
	close_file(pipe[1]);
	open_port(SHARE_OUT);
	sent = copy(pipe[0], ports[SHARE_OUT].fd);
	close_file(pipe[0]);
	if (wait_for(child))
		fail_command("--share: the guest's tar could not pack it", 0);
	return sent;
}

static char request[1 << 17];

/* The command's text, NUL-terminated. */
static const char *read_request(void)
{
	ulong have = 0, wanted = 0;
	char *text = 0;

	while (!text || have < wanted) {
		word got = read_some(ports[COMMAND].fd, request + have, sizeof request - 1 - have);

		if (got <= 0) {
			doze(); /* pyvmm isn't connected yet */
			continue;
		}
		have += (ulong)got;
		for (ulong i = 0; !text && i < have; i++) {
			if (request[i] == '\n') {
				text = request + i + 1;
				wanted = i + 1 + number_at(request + length("run "));
			}
		}
		if (wanted >= sizeof request)
			fail_command("the command is too long", 0);
	}
	request[have] = 0;
	return text;
}

struct stream { int from, to; ulong sum; };

/* Passes on what one read gives; 0 at its end, or when there is nothing now. */
static int pass_on(struct stream *stream)
{
	word got = read_some(stream->from, buffer, 1 << 15);

	if (got == -EAGAIN)
		return 0;
	if (got <= 0) {
		close_file(stream->from);
		stream->from = -1;
		return 0;
	}
	if (write_all(stream->to, buffer, (ulong)got) == 0)
		stream->sum += (ulong)got;
	return 1;
}

/* Lines "signal NUMBER" go to the command's process group; 1 for a line "taken". */
static int hear(int group)
{
	static char line[64];
	static ulong size;
	char byte;
	int taken = 0;

	/* One read call a byte: there are few of them, and what follows is for the next line. */
	if (read_some(ports[COMMAND].fd, &byte, 1) == 1) {
		if (byte != '\n') {
			if (size < sizeof line - 1)
				line[size++] = byte;
			return 0;
		}
		line[size] = 0;
		size = 0;
		if (begins(line, "signal ") && group > 0)
			call(NR_kill, -group, number_at(line + 7), 0, 0, 0);
		taken = same(line, "taken");
	}
	return taken;
}

static void make_private_folders(void)
{
	mkdir_at("/dev/pts");
	mount_at("devpts", "/dev/pts", "devpts", 0, 0);
	/* What udev or an init would make. */
	call(NR_symlinkat, "/proc/self/fd", AT_FDCWD, "/dev/fd", 0, 0);
	call(NR_symlinkat, "fd/0", AT_FDCWD, "/dev/stdin", 0, 0);
	call(NR_symlinkat, "fd/1", AT_FDCWD, "/dev/stdout", 0, 0);
	call(NR_symlinkat, "fd/2", AT_FDCWD, "/dev/stderr", 0, 0);
	mkdir_at("/dev/shm");
	mount_at("tmpfs", "/dev/shm", "tmpfs", 0, 0);
	if (is_read_only())
		mount_at("tmpfs", "/tmp", "tmpfs", 0, "mode=1777");
	mkdir_at("/tmp");
	mkdir_at("/run");
	mount_at("tmpfs", "/run", "tmpfs", 0, "mode=755");
}

/* The loopback interface is up, as programs expect. */
static void raise_loopback(void)
{
	/* struct ifreq of <linux/if.h>, with SIOCSIFFLAGS: IFF_UP */
	struct { char name[16]; short flags; char rest[22]; } request_of = { "lo", 1, { 0 } };
	int fd = (int)call(NR_socket, 2, 2, 0, 0, 0);

	if (fd >= 0) {
		call(NR_ioctl, fd, 0x8914, &request_of, 0, 0);
		close_file(fd);
	}
}

static void __attribute__((noreturn)) run_command(int shares)
{
	int input[2], output[2], errors[2], child, status = 0, ended = 0, group;
	struct stream out, err;
	struct text line = { .size = 0 };
	ulong waiting = 0, passed = 0, shared = 0;
	int has_input = 1;
	const char *text;

	make_private_folders();
	raise_loopback();
	/* The last port to be introduced: when it speaks, the others are connected as well. */
	open_port(COMMAND);
	text = read_request();
	open_port(INPUT);
	open_port(OUTPUT);
	open_port(ERRORS);
	if (shares)
		unpack_share();
	call(NR_pipe2, input, O_CLOEXEC, 0, 0, 0);
	call(NR_pipe2, output, O_CLOEXEC, 0, 0, 0);
	call(NR_pipe2, errors, O_CLOEXEC, 0, 0, 0);
	child = fork_child();
	if (!child) {
		const char *const arguments[] = { "sh", "-c", text, 0 };

		call(NR_setsid, 0, 0, 0, 0, 0);
		call(NR_dup3, input[0], 0, 0, 0, 0);
		call(NR_dup3, output[1], 1, 0, 0, 0);
		call(NR_dup3, errors[1], 2, 0, 0, 0);
		call(NR_chdir, shares ? share_folder : "/", 0, 0, 0, 0);
		call(NR_execve, "/bin/sh", arguments, environment, 0, 0);
		call(NR_exit, 127, 0, 0, 0, 0);
	}
	group = child;
	if (!exists("/bin/sh"))
		fail_command("the guest has no /bin/sh to run the command", 0);
	close_file(input[0]);
	close_file(output[1]);
	close_file(errors[1]);
	call(NR_fcntl, input[1], 4 /* F_SETFL */, O_NONBLOCK, 0, 0);
	call(NR_fcntl, output[0], 4, O_NONBLOCK, 0, 0);
	call(NR_fcntl, errors[0], 4, O_NONBLOCK, 0, 0);
	out = (struct stream){ output[0], ports[OUTPUT].fd, 0 };
	err = (struct stream){ errors[0], ports[ERRORS].fd, 0 };
	/* Input waits in a place of its own: the command may write before it reads. */
	static char held[1 << 15];
	while (!ended) {
		struct pollfd fds[] = {
			{ out.from, POLLIN, 0 },
			{ err.from, POLLIN, 0 },
			{ ports[COMMAND].fd, POLLIN, 0 },
			{ has_input && !waiting ? ports[INPUT].fd : -1, POLLIN, 0 },
			{ waiting ? input[1] : -1, POLLOUT, 0 },
		};
		/* A child that ended is found soon, also when it has left its streams to others. */
		struct timespec time = { 0, 50000000 };
		int someone;

		call(NR_ppoll, fds, sizeof fds / sizeof *fds, &time, 0, 0);
		if (fds[0].revents)
			pass_on(&out);
		if (fds[1].revents)
			pass_on(&err);
		if (fds[2].revents & POLLIN)
			hear(group);
		if (fds[3].revents) {
			word got = read_some(ports[INPUT].fd, held, sizeof held);

			if (got > 0) {
				waiting = (ulong)got;
				passed = 0;
			} else if (got != -EAGAIN) {
				has_input = 0;
				close_file(input[1]);
			}
		}
		if (fds[4].revents) {
			word got = call(NR_write, input[1], held + passed, waiting, 0, 0);

			if (got > 0) {
				passed += (ulong)got;
				waiting -= (ulong)got;
			} else if (got != -EAGAIN) {
				waiting = 0; /* the command has closed its input */
				has_input = 0;
				close_file(input[1]);
			}
		}
		while ((someone = (int)call(NR_wait4, -1, &status, WNOHANG, 0, 0)) > 0) {
			if (someone == child) {
				ended = 1;
				break;
			}
		}
	}
	while (out.from >= 0 && pass_on(&out))
		;
	while (err.from >= 0 && pass_on(&err))
		;
	if (shares)
		shared = pack_share();
	add(&line, "ended ");
	add_number(&line, (ulong)status_of(status));
	add(&line, " ");
	add_number(&line, out.sum);
	add(&line, " ");
	add_number(&line, err.sum);
	add(&line, " ");
	add_number(&line, shared);
	add(&line, "\n");
	send_line(&line);
	/* Powering off before pyvmm has taken it all would lose it. */
	for (;;) {
		struct pollfd fd = { ports[COMMAND].fd, POLLIN, 0 };

		call(NR_ppoll, &fd, 1, 0, 0, 0);
		if (fd.revents & POLLIN && hear(0))
			break;
	}
	call(NR_kill, -1, SIGKILL, 0, 0, 0);
	call(NR_sync, 0, 0, 0, 0, 0);
	mount_at(0, "/", 0, MS_REMOUNT | MS_RDONLY, 0);
	end(RB_POWER_OFF);
}

void start(void)
{
	const char *root;
	int console;

	if (call(NR_getpid, 0, 0, 0, 0, 0) != 1) {
		static const char text[] = "pyvmm's init runs as the first process of a guest\n";

		write_all(2, text, sizeof text - 1);
		call(NR_exit, 1, 0, 0, 0, 0);
	}
	mkdir_at("/dev");
	mkdir_at("/proc");
	mkdir_at("/sys");
	mount_at("devtmpfs", "/dev", "devtmpfs", 0, "mode=755");
	mount_at("proc", "/proc", "proc", 0, 0);
	mount_at("sysfs", "/sys", "sysfs", 0, 0);
	console = open_file("/dev/console", O_RDWR);
	for (int fd = 0; fd < 3 && console >= 0; fd++)
		call(NR_dup3, console, fd, 0, 0, 0);
	read_words();
	load_modules();
	root = value_of("root");
	if (root)
		switch_to(root);
	if (value_of("pyvmm.exec"))
		run_command(value_of("pyvmm.share") != 0);
	start_init();
}
