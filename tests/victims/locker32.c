/*
 * locker32: a 32-bit program without a C library that brings pages of a mapped file in by system calls.
 *
 *     locker32 FILE OFFSET LENGTH CALL shared|private      (OFFSET and LENGTH in pages)
 *
 * CALL is populate, locked, mlock, mlock2 or mlockall. Says "o" on stdout once it has opened the file (and mapped it,
 * to lock it), and goes on after a read of stdin. Exit status: the errno of the call (0: it succeeded).
 * tests/mount/test_populate_32.py drives it.
 */
#define NR_EXIT 1
#define NR_READ 3
#define NR_WRITE 4
#define NR_OPEN 5
#define NR_MLOCK 150
#define NR_MLOCKALL 152
#define NR_MMAP2 192
#define NR_MLOCK2 376
#define PAGE 4096
#define O_RDWR 2
#define MAP_LOCKED 0x2000
#define MAP_POPULATE 0x8000

static long call(long nr, long a, long b, long c, long d, long e, long f)
{
	long ret;
	/* The sixth argument is in %ebp, which gcc does not let asm name. */
	__asm__ volatile("pushl %%ebp\n\tpushl %[f]\n\tpopl %%ebp\n\tint $0x80\n\tpopl %%ebp"
			 : "=a"(ret)
			 : "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e), [f] "m"(*(long[]){f})
			 : "memory");
	return ret;
}

static long number(const char *text)
{
	long n = 0;
	while (*text)
		n = n * 10 + *text++ - '0';
	return n;
}

static void meet(void)
{
	char byte = 'o';
	call(NR_WRITE, 1, (long)&byte, 1, 0, 0, 0);
	call(NR_READ, 0, (long)&byte, 1, 0, 0, 0);
}

__attribute__((used)) static void begin(char **argv)
{
	long at, offset = number(argv[2]), length = number(argv[3]) * PAGE, ret = 0;
	const char *verb = argv[4];
	long fd = call(NR_OPEN, (long)argv[1], O_RDWR, 0, 0, 0, 0);
	long flags = argv[5][0] == 's' ? 1 : 2;
	if (verb[0] == 'p')
		flags |= MAP_POPULATE;
	if (verb[0] == 'l')
		flags |= MAP_LOCKED;
	if (verb[0] != 'm')
		meet();
	at = call(NR_MMAP2, 0, length, 3, flags, fd, offset);
	if (verb[0] == 'm')
		meet();
	if (at < 0 && at > -4096)
		ret = at;
	else if (verb[0] == 'm' && verb[5] == '2')
		ret = call(NR_MLOCK2, at, length, 0, 0, 0, 0);
	else if (verb[0] == 'm' && verb[5] == 'a')
		ret = call(NR_MLOCKALL, 1, 0, 0, 0, 0, 0);
	else if (verb[0] == 'm')
		ret = call(NR_MLOCK, at, length, 0, 0, 0, 0);
	call(NR_EXIT, -ret, 0, 0, 0, 0, 0);
	__builtin_unreachable();
}

__asm__(".globl _start\n_start:\n\tleal 4(%esp), %eax\n\tpushl %eax\n\tcall begin\n");
