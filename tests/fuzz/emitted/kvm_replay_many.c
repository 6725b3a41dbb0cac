/*
 * Carries out programs that it reads, one after the other:
 *
 *	program TYPE AREA PAGES
 *	CALL NUMBERS... | WHAT SHOULD BE SEEN
 *
 * Says where something else was seen, and how many programs there were. Status 1 with a difference.
 * With arguments: the number of the first program, and seconds after which no other one is begun.
 */
#include "kvm_replay.h"
#include <time.h>

#define IS(word) (!strcmp(name, word))

static const char *carry_out(const char *name, const unsigned long long *n)
{
	if (IS("create_guest_memfd"))
		return create_guest_memfd(n[0], n[1]);
	if (IS("set_slot"))
		return set_slot(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
	if (IS("set_attributes"))
		return set_attributes(n[0], n[1], n[2]);
	if (IS("convert"))
		return convert(n[0], n[1], n[2], n[3]);
	if (IS("gmem_fallocate"))
		return gmem_fallocate(n[0], n[1], n[2], n[3]);
	if (IS("gmem_map"))
		return gmem_map(n[0]);
	if (IS("gmem_pread"))
		return gmem_pread(n[0], n[1]);
	if (IS("gmem_pwrite"))
		return gmem_pwrite(n[0], n[1], n[2]);
	if (IS("gmem_load"))
		return gmem_load(n[0], n[1]);
	if (IS("gmem_store"))
		return gmem_store(n[0], n[1], n[2]);
	if (IS("gmem_resident"))
		return gmem_resident(n[0]);
	if (IS("gmem_close"))
		return gmem_close(n[0]);
	if (IS("vm_pread"))
		return vm_pread(n[0]);
	if (IS("vm_pwrite"))
		return vm_pwrite(n[0], n[1]);
	if (IS("host_read"))
		return host_read(n[0]);
	if (IS("host_write"))
		return host_write(n[0], n[1]);
	if (IS("guest_read"))
		return guest_read(n[0]);
	if (IS("guest_write"))
		return guest_write(n[0], n[1]);
	fprintf(stderr, "no such call: %s\n", name);
	exit(2);
}

int main(int argc, char **argv)
{
	static char line[512];
	int first = argc > 1 ? atoi(argv[1]) : 0, number = -1, programs = 0, steps = 0, skipping = 0;
	time_t end = time(NULL) + (argc > 2 ? atoi(argv[2]) : 1 << 30);

	while (fgets(line, sizeof(line), stdin)) {
		unsigned long long n[8] = { 0 };
		char *expected = strstr(line, " | "), *at = line, *word;
		const char *found;
		int i;

		line[strcspn(line, "\n")] = 0;
		word = strsep(&at, " ");
		for (i = 0; i < 8 && at && *at && *at != '|'; i++) {
			n[i] = strtoull(at, &at, 0);
			at += *at == ' ';
		}
		if (!strcmp(word, "program")) {
			skipping = ++number < first;
			if (skipping)
				continue;
			if (time(NULL) > end)
				break;
			if (programs++)
				finish();
			start(n[0], n[1], n[2]);
			continue;
		}
		if (skipping)
			continue;
		steps++;
		found = carry_out(word, n);
		if (!expected || strcmp(found, expected + 3)) {
			printf("program %d: %s %#llx %#llx %#llx %#llx -> %s, expected %s\n", number,
			       word, n[0], n[1], n[2], n[3], found, expected ? expected + 3 : "nothing");
			failures++;
			skipping = 1;
		}
	}
	printf("%d programs from %d on, %d operations, %d differ\n", programs, first, steps,
	       failures);
	return failures != 0;
}
