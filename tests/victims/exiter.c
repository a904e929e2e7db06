/*
 * exiter FILE FIRST COUNT threads|leader: map pages FIRST to FIRST + COUNT of FILE, print "ready", and have threads exit.
 *
 *   threads   threads with the early policy begin, load from each page and exit, all the time, until stdin ends; the main
 *             thread has the late policy
 *   leader    a thread loads from the pages until a load fails; the main thread exits once stdin has a byte
 *
 * Prints at the end: "AO n AR n wrong n", the number of signals with each code. Wrong is a signal to a thread that is not
 * the victim, or with another address than that of its load.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096UL
#define SPAWNERS 3

static const char *pages;
static long count;
static atomic_int nr_ao, nr_ar, nr_wrong, stop;
static __thread volatile int is_victim;
static __thread const volatile char *volatile loading;
static __thread sigjmp_buf back;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	const char *at = info->si_addr;

	(void)number, (void)context;
	if (info->si_addr_lsb != 12 || at < pages || at >= pages + count * PAGE)
		nr_wrong++;
	else if (info->si_code == BUS_MCEERR_AO && is_victim)
		nr_ao++;
	else if (info->si_code == BUS_MCEERR_AR && at == loading)
		nr_ar++;
	else
		nr_wrong++;
	if (info->si_code != BUS_MCEERR_AO && loading)
		siglongjmp(back, 1);
}

/* Returns 1 if the load failed. */
static int load(long page)
{
	if (sigsetjmp(back, 1)) {
		loading = NULL;
		return 1;
	}
	loading = pages + page * PAGE;
	(void)*loading;
	loading = NULL;
	return 0;
}

static void *load_once(void *unused)
{
	is_victim = 1;
	if (prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0))
		nr_wrong++;
	for (long page = 0; page < count; page++)
		load(page);
	return unused;
}

static void *spawn(void *unused)
{
	pthread_t thread;

	while (!stop)
		if (pthread_create(&thread, NULL, load_once, NULL) || pthread_join(thread, NULL))
			nr_wrong++;
	return unused;
}

static void *load_until_it_fails(void *unused)
{
	while (!load(0))
		;
	printf("AO %d AR %d wrong %d\n", nr_ao, nr_ar, nr_wrong);
	fflush(stdout);
	_exit(0);
	return unused;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	int fd = argc == 5 ? open(argv[1], O_RDWR) : -1;
	pthread_t threads[SPAWNERS];
	char byte;

	if (fd < 0 || sigaction(SIGBUS, &action, NULL))
		return 2;
	count = atol(argv[3]);
	pages = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, atol(argv[2]) * PAGE);
	if (pages == MAP_FAILED)
		return 3;
	for (long page = 0; page < count; page++)
		load(page);
	int is_leader = !strcmp(argv[4], "leader");
	for (int at = 0; at < (is_leader ? 1 : SPAWNERS); at++)
		if (pthread_create(&threads[at], NULL, is_leader ? load_until_it_fails : spawn, NULL))
			return 4;
	is_victim = is_leader;
	if (write(1, "ready\n", 6) != 6)
		return 5;
	while (read(0, &byte, 1) < 0)
		;
	if (is_leader)
		pthread_exit(NULL);
	stop = 1;
	for (int at = 0; at < SPAWNERS; at++)
		pthread_join(threads[at], NULL);
	printf("AO %d AR %d wrong %d\n", nr_ao, nr_ar, nr_wrong);
	return 0;
}
