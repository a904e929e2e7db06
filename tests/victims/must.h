/* Checks of programs whose steps print "ok", or the line and the expression that did not hold, with errno. */
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PAGE 4096UL
#define must(condition)                                                                                               \
	do {                                                                                                          \
		if (!(condition)) {                                                                                   \
			printf("line %d: %s: %s\n", __LINE__, #condition, strerror(errno));                           \
			fflush(stdout);                                                                               \
			_exit(1);                                                                                     \
		}                                                                                                     \
	} while (0)

static int open_file(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	must(fd >= 0);
	return fd;
}
