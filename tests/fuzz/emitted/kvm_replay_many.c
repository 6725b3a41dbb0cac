/*
 * Carries out programs that it reads, one after the other:
 *
 *	program TYPE AREA PAGES
 *	CALL NUMBERS... | WHAT SHOULD BE SEEN
 *
 * Says where something else was seen, and how many programs there were. Status 1 with a difference.
 */
#include "kvm_replay.h"

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

int main(void)
{
	static char line[512];
	int programs = 0, steps = 0, skipping = 0;

	while (fgets(line, sizeof(line), stdin)) {
		unsigned long long n[8] = { 0 };
		char *expected = strstr(line, " | "), *end = line, *word;
		const char *found;
		int i;

		line[strcspn(line, "\n")] = 0;
		word = strsep(&end, " ");
		for (i = 0; i < 8 && end && *end && *end != '|'; i++)
			n[i] = strtoull(end, &end, 0), end += *end == ' ';
		if (!strcmp(word, "program")) {
			if (programs++)
				finish();
			start(n[0], n[1], n[2]);
			skipping = 0;
			continue;
		}
		if (skipping)
			continue;
		steps++;
		found = carry_out(word, n);
		if (!expected || strcmp(found, expected + 3)) {
			printf("program %d: %s %#llx %#llx %#llx %#llx -> %s, expected %s\n", programs - 1,
			       word, n[0], n[1], n[2], n[3], found, expected ? expected + 3 : "nothing");
			failures++;
			skipping = 1;
		}
	}
	printf("%d programs, %d operations, %d differ\n", programs, steps, failures);
	return failures != 0;
}
