/* Many processes at once, for benchmarks: crowd FILE COUNT victim|idle

   A victim asks for early kill, maps FILE, and touches its page 1; an idle one does nothing. Each line on stdin has
   every victim touch the page again; "ready" is printed when all have. All end with stdin. */

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096

static void ignore(int sig) { (void)sig; }

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void member(const char *file, int is_victim, int ready) {
    volatile char *page = NULL;
    sigset_t again;
    sigemptyset(&again);
    sigaddset(&again, SIGUSR1);
    sigprocmask(SIG_BLOCK, &again, NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGBUS, ignore);
    if (is_victim) {
        int fd = open(file, O_RDWR);
        void *map = fd < 0 ? MAP_FAILED : mmap(NULL, 8 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED || prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0))
            die(file);
        page = (char *)map + PAGE;
    }
    for (;;) {
        int sig;
        if (page)
            (void)*page;
        if (write(ready, "x", 1) != 1)
            exit(0);
        sigwait(&again, &sig);
    }
}

static void await(int fd, int count) {
    char byte;
    while (count--)
        if (read(fd, &byte, 1) != 1)
            die("a member died");
    puts("ready");
    fflush(stdout);
}

int main(int argc, char **argv) {
    int ready[2], count = argc == 4 ? atoi(argv[2]) : 0;
    pid_t *members = calloc(count + 1, sizeof *members);
    char line[16];
    if (!members || !count || pipe(ready))
        die("usage: crowd FILE COUNT victim|idle");
    for (int i = 0; i < count; i++) {
        members[i] = fork();
        if (members[i] < 0)
            die("fork");
        if (!members[i]) {
            close(0);
            member(argv[1], !strcmp(argv[3], "victim"), ready[1]);
        }
    }
    await(ready[0], count);
    while (fgets(line, sizeof line, stdin)) {
        for (int i = 0; i < count; i++)
            kill(members[i], SIGUSR1);
        await(ready[0], count);
    }
    for (int i = 0; i < count; i++)
        kill(members[i], SIGKILL);
    while (wait(NULL) > 0)
        ;
    return 0;
}
