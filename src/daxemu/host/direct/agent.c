/*
 * The code of an agent, as position-independent bytes between two symbols, and the layouts of uapi/linux/userfaultfd.h.
 *
 * Entered at its first byte by a thread of the program, held by the tracer (host/tracer/agent_maker.py), which sets:
 *   rax etc.  clone(CLONE_VM | CLONE_VFORK), with a full signal mask
 *   r12       memory of the agent, MEMORY bytes, readable and writable
 *   r13       the agent's socket, a descriptor of the program
 * The thread leaves at the exit of clone(2), where the tracer sets all registers. Its child, the first process, becomes
 * independent of the program and makes the agent, which thus has no parent in the program. No instruction touches a
 * stack, thread-local memory, or a vector register.
 *
 * Entered at daxemu_agent_fork by a thread that forks (redirect.c), with all signals blocked, and r12 = struct record.
 * The thread forks. Its child sends a packet, makes an agent, and waits until the agent clears a word of the record, in its
 * first batch: by then the supervisor knows the child. Parent and child go on behind the program's fork(2), with all
 * registers but the three that every system call may change.
 *
 * Memory: +0 pid of the agent or -errno (out); +8 zeros for setrlimit(2); +64 struct msghdr; +128 struct iovec;
 * +192 control message; +4096 a batch: 7 words a system call (number, six arguments), and its results, one word each;
 * RECORDS struct record of threads that fork; DROPS addresses and lengths whose pages the child does not get;
 * WILL start and length of each mapping outside the zone, then zeros (in; host/direct/agent.py).
 * host/direct/agent.py sends a packet for each batch, with the agent's descriptors in the first one. The upper half of a
 * number is 1 for a guard: if a guard fails, the calls behind it are not made, and their results are -ECANCELED.
 */
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include "redirect.h"

#if defined(__x86_64__)
__asm__(
	".pushsection .rodata\n"
	".balign 16\n"
	".globl daxemu_agent_start, daxemu_agent_end\n"
	".hidden daxemu_agent_start, daxemu_agent_end\n"
	"daxemu_agent_start:\n"
	"	syscall\n" /* the tracer makes other calls with this instruction, too */
	"	test %rax, %rax\n"
	"	jz 1f\n"
	"	hlt\n" /* the tracer has set the registers: not reached */
	"1:	xor %r14d, %r14d\n"
	"	mov $0x100, %r15d\n" /* CLONE_VM */

	"first:\n" /* r14, r15: a word, and flags of clone(2) */
	"	mov $112, %eax\n" /* setsid: no signals of the program's terminal or process group */
	"	syscall\n"
	"	mov $80, %eax\n" /* chdir("/"): keeps no mount busy */
	"	lea root(%rip), %rdi\n"
	"	syscall\n"
	"	mov $160, %eax\n" /* setrlimit(RLIMIT_CORE, 0): its core would be the program's memory */
	"	mov $4, %edi\n"
	"	lea 8(%r12), %rsi\n"
	"	syscall\n"
	"	mov $157, %eax\n" /* prctl(PR_SET_NAME) */
	"	mov $15, %edi\n"
	"	lea name(%rip), %rsi\n"
	"	syscall\n"
	"	mov $33, %eax\n" /* dup2(socket, 0) */
	"	mov %r13, %rdi\n"
	"	xor %esi, %esi\n"
	"	syscall\n"
	"	test %rax, %rax\n"
	"	js failed\n"
	"	mov $436, %eax\n" /* close_range(1, ~0, 0): keeps no file and no pipe of the program open */
	"	mov $1, %edi\n"
	"	mov $-1, %esi\n"
	"	xor %edx, %edx\n"
	"	syscall\n"
	"	test %rax, %rax\n"
	"	js failed\n"
	"	mov $56, %eax\n" /* clone, no exit signal */
	"	mov %r15, %rdi\n"
	"	lea 4096(%r12), %rsi\n"
	"	mov %r14, %rdx\n"
	"	mov %r14, %r10\n"
	"	xor %r8d, %r8d\n"
	"	syscall\n"
	"	test %rax, %rax\n"
	"	jz next\n"
	"failed:\n"
	"	mov %rax, (%r12)\n"
	"leave:\n"
	"	mov $231, %eax\n" /* exit_group */
	"	xor %edi, %edi\n"
	"	syscall\n"
	"	hlt\n"

	"next:\n"
	"	lea 4096(%r12), %r13\n"
	"	movq $0, 64(%r12)\n" /* struct msghdr: name, namelen, iov, iovlen, control, controllen, flags */
	"	movq $0, 72(%r12)\n"
	"	lea 128(%r12), %rax\n"
	"	mov %rax, 80(%r12)\n"
	"	movq $1, 88(%r12)\n"
	"	lea 192(%r12), %rax\n"
	"	mov %rax, 96(%r12)\n"
	"	movq $64, 104(%r12)\n"
	"	movq $0, 112(%r12)\n"
	"	mov %r13, 128(%r12)\n" /* struct iovec */
	"	movq $7168, 136(%r12)\n"
	"	mov $47, %eax\n" /* recvmsg(0, ...): 0 once the supervisor has ended or has closed its end */
	"	xor %edi, %edi\n"
	"	lea 64(%r12), %rsi\n"
	"	xor %edx, %edx\n"
	"	syscall\n"
	"	cmp $-4, %rax\n" /* EINTR */
	"	je next\n"
	"	cmp $56, %rax\n"
	"	jl will\n"
	"	xor %edx, %edx\n"
	"	mov $56, %ecx\n"
	"	div %rcx\n"
	"	mov %rax, %r14\n" /* calls that are left */
	"	mov %r13, %r15\n" /* the next call */
	"	mov %r13, %rbx\n" /* place of its result, never beyond the call itself */
	"call:\n"
	"	mov 0(%r15), %eax\n"
	"	mov 4(%r15), %ebp\n" /* 1: a guard */
	"	mov 8(%r15), %rdi\n"
	"	mov 16(%r15), %rsi\n"
	"	mov 24(%r15), %rdx\n"
	"	mov 32(%r15), %r10\n"
	"	mov 40(%r15), %r8\n"
	"	mov 48(%r15), %r9\n"
	"	syscall\n"
	"	mov %rax, (%rbx)\n"
	"	add $56, %r15\n"
	"	add $8, %rbx\n"
	"	dec %r14\n"
	"	jz send\n"
	"	test %ebp, %ebp\n"
	"	jz call\n"
	"	test %rax, %rax\n"
	"	jns call\n"
	"cancel:\n"
	"	movq $-125, (%rbx)\n" /* -ECANCELED */
	"	add $8, %rbx\n"
	"	dec %r14\n"
	"	jnz cancel\n"
	"send:\n"
	"	mov $44, %eax\n" /* sendto(0, results, length, MSG_NOSIGNAL) */
	"	xor %edi, %edi\n"
	"	mov %r13, %rsi\n"
	"	mov %rbx, %rdx\n"
	"	sub %r13, %rdx\n"
	"	mov $0x4000, %r10d\n"
	"	xor %r8d, %r8d\n"
	"	xor %r9d, %r9d\n"
	"	syscall\n"
	"	cmp $-4, %rax\n"
	"	je send\n"
	"	test %rax, %rax\n"
	"	js leave\n"
	"	jmp next\n"
	"will:\n" /* without the supervisor: map the void over all direct mappings, so that every access is SIGBUS */
	"	mov $436, %eax\n" /* close_range(3, ~0, 0): an unmap would wait for a reader of the userfaultfd */
	"	mov $3, %edi\n"
	"	mov $-1, %esi\n"
	"	xor %edx, %edx\n"
	"	syscall\n"
	"	movabs $0x2f0000001000, %rax\n" /* zone.ARENAS.start, and a page of code */
	"	mov %r12, %rdi\n"
	"	sub %rax, %rdi\n"
	"	shr $20, %rdi\n" /* ARENA_SIZE: the number of the slice */
	"	shl $40, %rdi\n" /* SLICE_SIZE */
	"	movabs $0x200000000000, %rax\n" /* zone.START */
	"	add %rax, %rdi\n"
	"	movabs $0x10000000000, %rsi\n"
	"	mov $3, %edx\n"
	"	mov $0x4011, %r10d\n" /* MAP_SHARED | MAP_FIXED | MAP_NORESERVE */
	"	movabs $0x6461786500000002, %r8\n" /* VOID_FD, and zone.MAGIC above */
	"	xor %r9d, %r9d\n"
	"	lea " TEXT(WILL) "(%r12), %r13\n"
	"void:\n"
	"	mov $9, %eax\n" /* mmap: of the slice, then of each mapping outside the zone */
	"	syscall\n"
	"	mov 0(%r13), %rdi\n"
	"	mov 8(%r13), %rsi\n"
	"	add $16, %r13\n"
	"	test %rsi, %rsi\n"
	"	jnz void\n"
	"	jmp leave\n"
	".globl daxemu_agent_fork\n"
	".hidden daxemu_agent_fork\n"
	"daxemu_agent_fork:\n"
	"	syscall\n" /* clone(2) as the program called it; r9 is the mark of an agent's call */
	"	test %rax, %rax\n"
	"	jz child\n"
	"	mov %rax, %r14\n"
	"	js 1f\n"
	"	testb $1, " OF(shares_files) "(%r12)\n" /* then the child closes for both */
	"	jnz back\n"
	"1:	mov $3, %eax\n" /* close */
	"	mov " OF(socket) "(%r12), %rdi\n"
	"	syscall\n"
	"back:\n"
	"	mov $14, %eax\n" /* rt_sigprocmask(SIG_SETMASK): a handler may run here */
	"	mov $2, %edi\n"
	"	lea " OF(mask) "(%r12), %rsi\n"
	"	xor %edx, %edx\n"
	"	mov $8, %r10d\n"
	"	syscall\n"
	"	mov %r14, %rax\n"
	"	mov " OF(rdi) "(%r12), %rdi\n"
	"	mov " OF(rsi) "(%r12), %rsi\n"
	"	mov " OF(rdx) "(%r12), %rdx\n"
	"	mov " OF(r10) "(%r12), %r10\n"
	"	mov " OF(r8) "(%r12), %r8\n"
	"	mov " OF(r9) "(%r12), %r9\n"
	"	mov " OF(rbp) "(%r12), %rbp\n"
	"	mov " OF(r13) "(%r12), %r13\n"
	"	mov " OF(r14) "(%r12), %r14\n"
	"	mov " OF(r15) "(%r12), %r15\n"
	"	mov " OF(rip) "(%r12), %rcx\n" /* as after every system call */
	"	mov " OF(r12) "(%r12), %r11\n"
	"	movq $0, " OF(busy) "(%r12)\n"
	"	mov %r11, %r12\n"
	"	jmp *%rcx\n"

	"child:\n"
	"	mov $44, %eax\n" /* sendto(socket, record, 8, MSG_NOSIGNAL): by its credentials the supervisor knows the child */
	"	mov " OF(socket) "(%r12), %rdi\n"
	"	mov %r12, %rsi\n"
	"	mov $8, %edx\n"
	"	mov $0x4000, %r10d\n"
	"	xor %r8d, %r8d\n"
	"	xor %r9d, %r9d\n"
	"	syscall\n"
	"	mov %r12, %rbp\n"
	"	mov " OF(room) "(%rbp), %r12\n"
	"	mov " OF(socket) "(%rbp), %r13\n"
	"	mov " OF(drops) "(%rbp), %r10\n"
	"	lea " TEXT(DROPS) "(%r12), %r8\n"
	"	movabs $0x6461786500000000, %r9\n" /* zone.MAGIC above */
	"1:	test %r10, %r10\n"
	"	jz 2f\n"
	"	mov $28, %eax\n" /* madvise(MADV_DONTNEED) */
	"	mov 0(%r8), %rdi\n"
	"	mov 8(%r8), %rsi\n"
	"	mov $4, %edx\n"
	"	syscall\n"
	"	add $16, %r8\n"
	"	dec %r10\n"
	"	jmp 1b\n"
	"2:	movq $-3, (%r12)\n" /* -ESRCH, of a first process that is killed */
	"	lea " OF(agent) "(%rbp), %r14\n"
	"	mov $0x300100, %r15d\n" /* CLONE_VM | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID */
	"	mov $56, %eax\n" /* clone(CLONE_VM | CLONE_VFORK), no exit signal */
	"	mov $0x4100, %edi\n"
	"	lea 4096(%r12), %rsi\n"
	"	xor %edx, %edx\n"
	"	xor %r10d, %r10d\n"
	"	xor %r8d, %r8d\n"
	"	syscall\n"
	"	test %rax, %rax\n"
	"	jz first\n"
	"	js 4f\n"
	"	mov %rax, %rdi\n"
	"	mov $61, %eax\n" /* wait4(first, NULL, __WALL) */
	"	xor %esi, %esi\n"
	"	mov $0x40000000, %edx\n"
	"	xor %r10d, %r10d\n"
	"	syscall\n"
	"	cmpq $0, (%r12)\n"
	"	jl 4f\n"
	"3:	mov (%r14), %edx\n" /* 0: the supervisor knows the child, or the agent has ended */
	"	test %edx, %edx\n"
	"	jz 5f\n"
	"	mov $202, %eax\n" /* futex(FUTEX_WAIT) */
	"	mov %r14, %rdi\n"
	"	xor %esi, %esi\n"
	"	xor %r10d, %r10d\n"
	"	syscall\n"
	"	jmp 3b\n"
	"4:	mov $39, %eax\n" /* kill(getpid(), SIGKILL): no child lives without an agent */
	"	syscall\n"
	"	mov %rax, %rdi\n"
	"	mov $62, %eax\n"
	"	mov $9, %esi\n"
	"	syscall\n"
	"	jmp 4b\n"
	"5:	mov $3, %eax\n" /* close */
	"	mov %r13, %rdi\n"
	"	syscall\n"
	"	mov %rbp, %r12\n"
	"	xor %r14d, %r14d\n"
	"	jmp back\n"
	"root:	.asciz \"/\"\n"
	"name:	.asciz \"daxemu-agent\"\n"
	"daxemu_agent_end:\n"
	".popsection\n");

extern const char daxemu_agent_start[], daxemu_agent_end[];

const char *daxemu_agent_code(size_t *length)
{
	*length = (size_t)(daxemu_agent_end - daxemu_agent_start);
	return daxemu_agent_start;
}
#else
const char *daxemu_agent_code(size_t *length)
{
	*length = 0;
	return NULL;
}
#endif

/* Linux 6.6; the installed header may be older than the kernel */
struct daxemu_uffdio_poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};

#define OFFSET(type, member) (uint32_t) offsetof(struct type, member)

/* in the order of host/direct/structs.py; the first number is the count of the others */
const uint32_t daxemu_userfaultfd_layout[] = {
	44,
	sizeof(struct uffdio_api), OFFSET(uffdio_api, api), OFFSET(uffdio_api, features), OFFSET(uffdio_api, ioctls),
	sizeof(struct uffdio_range), OFFSET(uffdio_range, start), OFFSET(uffdio_range, len),
	sizeof(struct uffdio_register), OFFSET(uffdio_register, range.start), OFFSET(uffdio_register, range.len),
	OFFSET(uffdio_register, mode), OFFSET(uffdio_register, ioctls),
	sizeof(struct uffdio_copy), OFFSET(uffdio_copy, dst), OFFSET(uffdio_copy, src), OFFSET(uffdio_copy, len),
	OFFSET(uffdio_copy, mode), OFFSET(uffdio_copy, copy),
	sizeof(struct uffdio_writeprotect), OFFSET(uffdio_writeprotect, range.start), OFFSET(uffdio_writeprotect, range.len),
	OFFSET(uffdio_writeprotect, mode),
	sizeof(struct daxemu_uffdio_poison), OFFSET(daxemu_uffdio_poison, range.start),
	OFFSET(daxemu_uffdio_poison, range.len), OFFSET(daxemu_uffdio_poison, mode), OFFSET(daxemu_uffdio_poison, updated),
	sizeof(struct uffd_msg), OFFSET(uffd_msg, event), OFFSET(uffd_msg, arg.pagefault.flags),
	OFFSET(uffd_msg, arg.pagefault.address), OFFSET(uffd_msg, arg.pagefault.feat.ptid),
	sizeof(struct uffd_msg), OFFSET(uffd_msg, event), OFFSET(uffd_msg, arg.fork.ufd),
	sizeof(struct uffd_msg), OFFSET(uffd_msg, event), OFFSET(uffd_msg, arg.remap.from), OFFSET(uffd_msg, arg.remap.to),
	OFFSET(uffd_msg, arg.remap.len),
	sizeof(struct uffd_msg), OFFSET(uffd_msg, event), OFFSET(uffd_msg, arg.remove.start),
	OFFSET(uffd_msg, arg.remove.end),
};
_Static_assert(sizeof(daxemu_userfaultfd_layout) == 4 * (1 + 44), "the count of the layout");

const uint32_t daxemu_userfaultfd_numbers[] = {
	7,
	UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_COPY, UFFDIO_WRITEPROTECT,
	_IOWR(UFFDIO, 0x08, struct daxemu_uffdio_poison),
};
