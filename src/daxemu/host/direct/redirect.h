/*
 * What redirect.c and the code of an agent share: the record of a thread that forks, in the memory of its agent.
 */
#ifndef DAXEMU_REDIRECT_H
#define DAXEMU_REDIRECT_H

#include <stddef.h>
#include <stdint.h>

/* Places in the memory of an agent, in bytes: code.py has the sum. */
#define RECORDS 12288
#define NR_RECORDS 16
#define DROPS 16384
#define NR_DROPS 512
#define WILL 24576

/* Offsets in struct record as text, for assembly. */
#define OFFSET_busy 0
#define OFFSET_rip 8
#define OFFSET_rdi 16
#define OFFSET_rsi 24
#define OFFSET_rdx 32
#define OFFSET_r10 40
#define OFFSET_r8 48
#define OFFSET_r9 56
#define OFFSET_rbp 64
#define OFFSET_r12 72
#define OFFSET_r13 80
#define OFFSET_r14 88
#define OFFSET_r15 96
#define OFFSET_mask 104
#define OFFSET_socket 112
#define OFFSET_shares_files 120
#define OFFSET_drops 128
#define OFFSET_room 136
#define OFFSET_agent 144
#define TEXT_OF(number) #number
#define TEXT(number) TEXT_OF(number)
#define OF(member) TEXT(OFFSET_##member)

struct record {
	uint64_t busy; /* the thread has not left the code yet */
	uint64_t rip; /* where the thread goes on */
	uint64_t rdi, rsi, rdx, r10, r8, r9, rbp, r12, r13, r14, r15;
	uint64_t mask; /* signal mask */
	uint64_t socket; /* descriptor: the agent's socket */
	uint64_t shares_files; /* 1: parent and child have one table of descriptors (CLONE_FILES) */
	uint64_t drops; /* number of ranges at DROPS */
	uint64_t room; /* memory of the agent */
	uint64_t agent; /* low half: not 0 while the child must wait */
	uint64_t unused[13];
};

_Static_assert(offsetof(struct record, busy) == OFFSET_busy, "offset of busy");
_Static_assert(offsetof(struct record, rip) == OFFSET_rip, "offset of rip");
_Static_assert(offsetof(struct record, rdi) == OFFSET_rdi, "offset of rdi");
_Static_assert(offsetof(struct record, rsi) == OFFSET_rsi, "offset of rsi");
_Static_assert(offsetof(struct record, rdx) == OFFSET_rdx, "offset of rdx");
_Static_assert(offsetof(struct record, r10) == OFFSET_r10, "offset of r10");
_Static_assert(offsetof(struct record, r8) == OFFSET_r8, "offset of r8");
_Static_assert(offsetof(struct record, r9) == OFFSET_r9, "offset of r9");
_Static_assert(offsetof(struct record, rbp) == OFFSET_rbp, "offset of rbp");
_Static_assert(offsetof(struct record, r12) == OFFSET_r12, "offset of r12");
_Static_assert(offsetof(struct record, r13) == OFFSET_r13, "offset of r13");
_Static_assert(offsetof(struct record, r14) == OFFSET_r14, "offset of r14");
_Static_assert(offsetof(struct record, r15) == OFFSET_r15, "offset of r15");
_Static_assert(offsetof(struct record, mask) == OFFSET_mask, "offset of mask");
_Static_assert(offsetof(struct record, socket) == OFFSET_socket, "offset of socket");
_Static_assert(offsetof(struct record, shares_files) == OFFSET_shares_files, "offset of shares_files");
_Static_assert(offsetof(struct record, drops) == OFFSET_drops, "offset of drops");
_Static_assert(offsetof(struct record, room) == OFFSET_room, "offset of room");
_Static_assert(offsetof(struct record, agent) == OFFSET_agent, "offset of agent");
_Static_assert(NR_RECORDS * sizeof(struct record) == DROPS - RECORDS, "records fill a page");

#endif
