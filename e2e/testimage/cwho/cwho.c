// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Prints random bytes from each source that a C program has, drawn as the first
// thing that it does: the system call, the device, and what the kernel gives to
// every process that it executes.

#include <fcntl.h>
#include <stdio.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIZE = 16 };

static void print(const char *name, const unsigned char *bytes) {
	printf("%s ", name);
	for (int i = 0; i < SIZE; i++)
		printf("%02x", bytes[i]);
	printf("\n");
}

int main(void) {
	unsigned char direct[SIZE], device[SIZE];
	int fd;

	if (syscall(SYS_getrandom, direct, SIZE, 0) != SIZE)
		return 1;
	fd = open("/dev/urandom", O_RDONLY);
	if (fd < 0 || read(fd, device, SIZE) != SIZE)
		return 2;
	print("c_getrandom", direct);
	print("c_urandom", device);
	print("c_auxv", (const unsigned char *)getauxval(AT_RANDOM));
	return 0;
}
