/*
 * What an emitted program needs: a VM, a vCPU that loads and stores words, and the operations, each
 * of which gives what was seen as text. Needs no headers newer than Linux 6.1's.
 */
#ifndef KVM_REPLAY_H
#define KVM_REPLAY_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096ull
#define CODE_SLOT 32000
#define MOST_FILES 3	/* more guest_memfds are not made */
#define MOST_MEMFDS 8
#define OP __attribute__((unused)) static const char *

struct region2 {
	uint32_t slot, flags;
	uint64_t gpa, size, hva, offset;
	uint32_t fd, pad1;
	uint64_t pad2[14];
};
struct attributes { uint64_t gpa, size, attributes, flags; };
struct attributes2 { uint64_t offset, size, attributes, flags, error_offset, reserved[11]; };
struct new_gmem { uint64_t size, flags, reserved[6]; };
struct fault { uint64_t flags, gpa, size; };

#define SET_REGION2	_IOW(KVMIO, 0x49, struct region2)
#define SET_ATTRIBUTES	_IOW(KVMIO, 0xd2, struct attributes)
#define SET_ATTRIBUTES2	_IOWR(KVMIO, 0xd2, struct attributes2)
#define CREATE_GMEM	_IOWR(KVMIO, 0xd4, struct new_gmem)
#define EXIT_FAULT	39

static int vm, vcpu, memfd, scratch, files[MOST_FILES], made, failures;
static int memfds[MOST_MEMFDS], memfds_made;
static void *maps[MOST_FILES], *memfd_maps[MOST_MEMFDS];
static uint64_t alias_bit;	/* guest-physical, set before start(); 0: there is none */
static uint64_t sizes[MOST_FILES], area, hva, mapped, run_size;
static struct kvm_run *run;
static uint8_t *ram;
static char seen[256];

static int need(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(3);
	}
	return result;
}

static const char *said(long result)
{
	snprintf(seen, sizeof(seen), result < 0 ? "%s" : "ok", strerrorname_np(errno));
	return seen;
}

static const char *word(long result, uint64_t value)
{
	if (result < 0)
		return said(result);
	snprintf(seen, sizeof(seen), "0x%llx", (unsigned long long)value);
	return seen;
}

__attribute__((unused))
static void check(const char *operation, const char *found, const char *expected)
{
	bool same = !strcmp(found, expected);

	printf("%s %s -> %s\n", same ? "ok  " : "FAIL", operation, found);
	if (!same) {
		printf("     expected: %s\n", expected);
		failures++;
	}
}

/* Long mode; tables from 0x2000 on map 1 GiB one to one, and again with the alias bit. */
static void map_memory(void)
{
	uint64_t *top = (void *)(ram + 0x2000), *gigabytes = (void *)(ram + 0x3000), number;
	uint64_t *plain = (void *)(ram + 0x4000), *aliased = (void *)(ram + 0x5000);

	top[0] = 0x3000 | 3;
	gigabytes[0] = 0x4000 | 3;
	if (alias_bit)
		gigabytes[alias_bit >> 30] = 0x5000 | 3;
	for (number = 0; number < 512; number++) {
		plain[number] = number << 21 | 0x83;
		aliased[number] = alias_bit | number << 21 | 0x83;
	}
}

/* The vCPU's, where the kernel's headers say less than this one has. */
static void set_cpuid(int kvm)
{
	struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } *all;

	all = calloc(1, sizeof(*all));
	all->head.nent = 256;
	need(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, all), "KVM_GET_SUPPORTED_CPUID");
	need(ioctl(vcpu, KVM_SET_CPUID2, all), "KVM_SET_CPUID2");
	free(all);
}

/* At 0x1000 a load of [rdi], at 0x1100 a store, at 0x1200 rep stosq, at 0x1300 repe scasq. */
static void start(unsigned long type, uint64_t area_gpa, uint64_t pages)
{
	static const uint8_t load[] = { 0x48, 0x8b, 0x07, 0xe6, 0x10 };
	static const uint8_t store[] = { 0x48, 0x89, 0x07, 0xe6, 0x10 };
	static const uint8_t fill[] = { 0xf3, 0x48, 0xab, 0xe6, 0x10 };
	static const uint8_t scan[] = { 0xf3, 0x48, 0xaf, 0xe6, 0x10 };
	struct kvm_userspace_memory_region code = { CODE_SLOT, 0, 0, area_gpa, 0 };
	struct kvm_segment flat = { .limit = ~0u, .selector = 8, .type = 11, .present = 1,
				    .l = 1, .s = 1, .g = 1 };
	struct kvm_sregs sregs;
	int kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");

	area = area_gpa;
	vm = need(ioctl(kvm, KVM_CREATE_VM, type), "KVM_CREATE_VM");
	ram = mmap(NULL, area_gpa, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memcpy(ram + 0x1000, load, sizeof(load));
	memcpy(ram + 0x1100, store, sizeof(store));
	memcpy(ram + 0x1200, fill, sizeof(fill));
	memcpy(ram + 0x1300, scan, sizeof(scan));
	map_memory();
	code.userspace_addr = (uintptr_t)ram;
	need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &code), "the code's memslot");
	vcpu = need(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	run_size = need(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "kvm_run");
	run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	set_cpuid(kvm);
	close(kvm);
	need(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cr3 = 0x2000;
	sregs.cr4 |= 1 << 5;		/* PAE */
	sregs.efer |= 1 << 8 | 1 << 10;	/* LME, LMA */
	sregs.cr0 |= 1ul << 31 | 1;
	sregs.cs = flat;
	flat.type = 3;
	flat.selector = 16;
	flat.l = 0;
	flat.db = 1;
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat;
	need(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");

	memfd = need(memfd_create("memory", MFD_CLOEXEC), "memfd_create");
	scratch = need(memfd_create("scratch", MFD_CLOEXEC), "memfd_create");
	need(ftruncate(memfd, pages * PAGE), "ftruncate");
	mapped = 2 * pages * PAGE;
	hva = (uintptr_t)mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
}

/* Lets go of all, so that another program can start. */
__attribute__((unused)) static void finish(void)
{
	int number;

	for (number = 0; number < made; number++) {
		if (maps[number])
			munmap(maps[number], sizes[number] + 8 * PAGE);
		maps[number] = NULL;
		if (files[number] >= 0)
			close(files[number]);
	}
	for (number = 0; number < memfds_made; number++)
		close(memfds[number]);
	made = memfds_made = 0;
	munmap(run, run_size);
	munmap((void *)hva, mapped);
	munmap(ram, area);
	close(vcpu);
	close(vm);
	close(memfd);
	close(scratch);
}

/* `at` is counted from the area's start, and may be an alias. */
static const char *guest(uint64_t entry, uint64_t at, uint64_t count, uint64_t *value,
			 uint64_t *flags)
{
	struct kvm_regs regs = { .rip = entry, .rflags = 2, .rdi = area + at, .rcx = count,
				 .rax = *value };
	struct fault *fault = (struct fault *)&run->hw;
	int result;

	/* An exit that is still to be completed: with immediate_exit it is, and nothing runs. */
	run->immediate_exit = 1;
	ioctl(vcpu, KVM_RUN, 0);
	run->immediate_exit = 0;
	need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	result = ioctl(vcpu, KVM_RUN, 0);
	if (result < 0 && run->exit_reason == EXIT_FAULT && errno == EFAULT) {
		snprintf(seen, sizeof(seen), "memory fault, flags=%llu, gpa=+0x%llx",
			 (unsigned long long)fault->flags, (unsigned long long)(fault->gpa - area));
		return seen;
	}
	if (result < 0)
		return said(result);
	if (run->exit_reason == KVM_EXIT_MMIO)
		return "mmio";
	if (run->exit_reason != KVM_EXIT_IO) {
		snprintf(seen, sizeof(seen), "exit %u", run->exit_reason);
		return seen;
	}
	need(ioctl(vcpu, KVM_GET_REGS, &regs), "KVM_GET_REGS");
	*value = regs.rax;
	*flags = regs.rflags;
	return NULL;
}

OP guest_load(uint64_t at)
{
	uint64_t value = 0, flags;
	const char *other = guest(0x1000, at, 0, &value, &flags);

	return other ?: word(0, value);
}

OP guest_store(uint64_t at, uint64_t value)
{
	uint64_t flags;

	return guest(0x1100, at, 0, &value, &flags) ?: "ok";
}

OP guest_read(uint64_t page)
{
	return guest_load(page * PAGE);
}

OP guest_write(uint64_t page, uint64_t value)
{
	return guest_store(page * PAGE, value);
}

OP guest_fill(uint64_t at, uint64_t size, uint64_t value)
{
	uint64_t flags;

	return guest(0x1200, at, size / 8, &value, &flags) ?: "ok";
}

/* Whether every word is that one. */
OP guest_holds(uint64_t at, uint64_t size, uint64_t value)
{
	uint64_t flags = 0;

	return guest(0x1300, at, size / 8, &value, &flags) ?: flags & 1 << 6 ? "yes" : "no";
}

OP create_guest_memfd(uint64_t size, uint64_t flags)
{
	struct new_gmem wanted = { size, flags };
	int fd;

	if (made == MOST_FILES)
		return "ok";
	fd = ioctl(vm, CREATE_GMEM, &wanted);

	if (fd >= 0) {
		sizes[made] = size;
		files[made++] = fd;
	}
	return said(fd);
}

static int file(int number)
{
	return number >= 0 && number < made ? files[number] : -1;
}

OP set_slot(uint32_t slot, uint64_t gpa, uint64_t size, uint64_t at,
			    uint32_t flags, int gmem, uint64_t offset, bool old)
{
	struct region2 wanted = { slot, flags, area + gpa, size, hva + at, offset,
				  gmem < 0 ? memfd : file(gmem) };

	if (old)
		return said(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &wanted));
	return said(ioctl(vm, SET_REGION2, &wanted));
}

OP set_attributes(uint64_t gpa, uint64_t size, uint64_t value)
{
	struct attributes wanted = { area + gpa, size, value };

	return said(ioctl(vm, SET_ATTRIBUTES, &wanted));
}

#define OPEN(number) do { if (file(number) < 0) return "not there"; } while (0)

OP convert(int number, uint64_t offset, uint64_t size, uint64_t value)
{
	struct attributes2 wanted = { offset, size, value };

	OPEN(number);
	return said(ioctl(file(number), SET_ATTRIBUTES2, &wanted));
}

OP gmem_fallocate(int number, int mode, uint64_t offset, uint64_t size)
{
	OPEN(number);
	return said(syscall(SYS_fallocate, file(number), mode, offset, size));
}

OP gmem_map(int number)
{
	OPEN(number);
	if (!maps[number]) {
		void *at = mmap(NULL, sizes[number] + 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
				file(number), 0);

		if (at == MAP_FAILED)
			return said(-1);
		maps[number] = at;
	}
	return "ok";
}

OP read_or_write(int fd, uint64_t offset, bool write, uint64_t value)
{
	long moved = write ? pwrite(fd, &value, 8, offset) : pread(fd, &value, 8, offset);

	if (write)
		return said(moved);
	return word(moved, moved ? value : 0);
}

OP gmem_pread(int number, uint64_t offset)
{
	OPEN(number);
	return read_or_write(file(number), offset, false, 0);
}

OP gmem_pwrite(int number, uint64_t offset, uint64_t value)
{
	OPEN(number);
	return read_or_write(file(number), offset, true, value);
}

/* By system calls into the mapping: what were a SIGBUS is EFAULT. */
OP gmem_load(int number, uint64_t offset)
{
	const char *unmapped = gmem_map(number);
	uint64_t value = 0;
	long moved;

	if (strcmp(unmapped, "ok"))
		return unmapped;
	moved = pwrite(scratch, (char *)maps[number] + offset, 8, 0);
	if (moved > 0)
		need(pread(scratch, &value, 8, 0), "scratch");
	return word(moved, value);
}

OP gmem_store(int number, uint64_t offset, uint64_t value)
{
	const char *unmapped = gmem_map(number);

	if (strcmp(unmapped, "ok"))
		return unmapped;
	need(pwrite(scratch, &value, 8, 0), "scratch");
	return said(pread(scratch, (char *)maps[number] + offset, 8, 0));
}

/* The pages in the page cache, by cachestat(2), which has its number from Linux 6.5 on. */
OP gmem_resident(int number)
{
	uint64_t all[2] = { 0, 0 }, found[5] = { 0 };

	OPEN(number);
	if (syscall(451, file(number), all, found, 0) < 0)
		return said(-1);
	snprintf(seen, sizeof(seen), "%llu", (unsigned long long)found[0]);
	return seen;
}

OP gmem_close(int number)
{
	OPEN(number);
	if (maps[number])
		munmap(maps[number], sizes[number] + 8 * PAGE);
	maps[number] = NULL;
	close(files[number]);
	files[number] = -1;
	return "ok";
}

OP host_read(uint64_t page)
{
	return read_or_write(memfd, page * PAGE, false, 0);
}

OP host_write(uint64_t page, uint64_t value)
{
	return read_or_write(memfd, page * PAGE, true, value);
}

OP vm_pread(uint64_t page)
{
	return read_or_write(vm, area + page * PAGE, false, 0);
}

OP vm_pwrite(uint64_t page, uint64_t value)
{
	return read_or_write(vm, area + page * PAGE, true, value);
}
/* A memory is a memfd's number, or 100 and a guest_memfd's. */
static int memory_fd(int memory)
{
	return memory >= 100 ? file(memory - 100) : memory >= 0 ? memfds[memory] : -1;
}

static void *memory_at(int memory, uint64_t offset)
{
	if (memory < 0)
		return NULL;
	if (memory >= 100) {
		gmem_map(memory - 100);
		return (char *)maps[memory - 100] + offset;
	}
	return (char *)memfd_maps[memory] + offset;
}

OP new_memfd(uint64_t size)
{
	int fd = need(memfd_create("memory", MFD_CLOEXEC), "memfd_create");

	if (memfds_made == MOST_MEMFDS)
		exit(3);
	need(ftruncate(fd, size), "ftruncate");
	memfd_maps[memfds_made] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	memfds[memfds_made++] = fd;
	return "ok";
}

/* A memslot on a memory, with a guest_memfd or (-1) none. */
OP memslot(uint32_t slot, uint64_t at, uint64_t size, int memory, uint64_t offset,
	   uint32_t flags, int gmem, uint64_t gmem_offset)
{
	struct region2 wanted = { slot, flags, area + at, size,
				  (uintptr_t)memory_at(memory, offset), gmem_offset, file(gmem) };

	if (gmem < 0)
		return said(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &wanted));
	return said(ioctl(vm, SET_REGION2, &wanted));
}

OP hole(int memory, uint64_t offset, uint64_t size)
{
	return said(fallocate(memory_fd(memory), FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
			      offset, size));
}

/* By a copy of the system's into or out of the mapping: no access of ours can be a SIGBUS. */
OP host_store(int memory, uint64_t offset, uint64_t size, uint64_t value)
{
	uint64_t at;

	for (at = 0; at < size; at += 8) {
		need(pwrite(scratch, &value, 8, 0), "scratch");
		if (pread(scratch, memory_at(memory, offset + at), 8, 0) < 0)
			return said(-1);
	}
	return "ok";
}

/* The word that all of it consists of. */
OP host_load(int memory, uint64_t offset, uint64_t size)
{
	uint64_t at, value = 0, first = 0;

	for (at = 0; at < size; at += 8) {
		if (pwrite(scratch, memory_at(memory, offset + at), 8, 0) < 0)
			return said(-1);
		need(pread(scratch, &value, 8, 0), "scratch");
		if (!at)
			first = value;
		if (value != first)
			return "mixed";
	}
	return word(0, first);
}
#endif
