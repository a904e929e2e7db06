/* Threads of the programs under `daxemu run`, by their ids in this pid namespace. */
#ifndef DAXEMU_THREADS_H
#define DAXEMU_THREADS_H

#include <linux/seccomp.h>
#include <stdint.h>
#include <sys/types.h>

int daxemu_open_proc(void);
int daxemu_device_of(int proc, int tid, int fd, uint32_t *major, uint32_t *minor);
int daxemu_process_of(int proc, int tid);
ssize_t daxemu_send_call(int socket, struct seccomp_notif *call);

#endif
