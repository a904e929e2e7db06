/* Boot sector: print the checksum of each record in memory for each line from the serial port (programs/qemu.py). */
#define COM1	0x3f8
#define RECORDS	0x1000000
#define COUNT	2400
#define WORDS	128

	.code16
	.globl _start
_start:
	cli
	xorw %ax, %ax
	movw %ax, %ds
	lgdtl gdt_pointer
	movl %cr0, %eax
	orl $1, %eax
	movl %eax, %cr0
	ljmpl $8, $protected

	.code32
protected:
	movw $16, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movl $0x7c00, %esp
	movl $ready, %esi
	call say
wait:
	movw $COM1 + 5, %dx
	inb %dx, %al
	testb $1, %al
	jz wait
	movw $COM1, %dx
	inb %dx, %al
	cmpb $'\n', %al
	jne wait

	xorl %ebx, %ebx
	movl $RECORDS, %edi
record:
	xorl %ebp, %ebp
	movl $WORDS, %ecx
word:
	roll $5, %ebp
	addl (%edi), %ebp
	addl $4, %edi
	loop word
	movl %ebx, %eax
	call hex
	movb $' ', %al
	call put
	movl %ebp, %eax
	call hex
	movb $'\n', %al
	call put
	incl %ebx
	cmpl $COUNT, %ebx
	jne record
	movl $end, %esi
	call say
	jmp wait

hex:				/* print %eax as eight hex digits */
	movl $8, %ecx
1:	roll $4, %eax
	pushl %eax
	andb $15, %al
	cmpb $10, %al
	jb 2f
	addb $'a' - '0' - 10, %al
2:	addb $'0', %al
	call put
	popl %eax
	loop 1b
	ret

say:				/* print the string at %esi */
	lodsb
	testb %al, %al
	jz 1f
	call put
	jmp say
1:	ret

put:				/* print the character in %al */
	pushl %eax
	movw $COM1 + 5, %dx
1:	inb %dx, %al
	testb $0x20, %al
	jz 1b
	popl %eax
	movw $COM1, %dx
	outb %al, %dx
	ret

ready:	.asciz "ready\n"
end:	.asciz "end\n"

	.balign 8
gdt:	.quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
	.word . - gdt - 1
	.long gdt

	.org 510
	.word 0xaa55
