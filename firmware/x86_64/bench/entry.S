# The three entries, the way to user mode, and page tables for it.
#
# The first instructions of those for loaders put one byte on the serial line: who measures start-up stops the clock there.
# Then everything happens at CPL 3, which hosts that interpret kernel mode run natively. Port I/O at
# CPL 3 goes by IOPL 3, or by the TSS' permission map where the host drops IOPL (PVM, Linux 6.18).
.include "bench.inc"

.equ CODE64, 0x10
.equ USER_DATA, 0x20 | 3
.equ USER_CODE64, 0x28 | 3
.equ TSS, 0x38
.equ USER_FLAGS, 0x3002                     # IOPL 3, interrupts off

# XEN_ELFNOTE_PHYS32_ENTRY: where a PVH loader enters, in 32-bit mode with EBX = hvm_start_info.
    .section .note.pvh, "a", @note
    .balign 4
    .long   4, 4, 18
    .asciz  "Xen"
    .long   entry32

# The image's first byte: in user mode already, on page tables that know private memory.
# RDI = info page (firmware/x86_64/defs.inc), RSI = command line.
    .section .text.entry, "ax"
    .code64
    .globl entry_user
entry_user:
    mov     rsp, offset stack_top
    mov     eax, [rdi + INFO_DOORBELL_PORT]
    mov     [rip + doorbell_port], eax
    mov     rax, [rdi + INFO_C_BIT_MASK]
    mov     [rip + c_bit_mask], rax
    mov     rdi, rsi
    call    main                            # never returns

    .text
    .code32
entry32:
    mov     dx, SERIAL_PORT
    mov     al, '>'
    out     dx, al
    add     dx, SERIAL_LSR                  # as drivers do: a monitor may have kept it back
    in      al, dx
    mov     edi, [ebx + 24]                 # hvm_start_info.cmdline_paddr
    lgdt    [gdt_pointer]
    mov     eax, 1 << 5                     # PAE
    mov     cr4, eax
    mov     eax, offset pml4
    mov     cr3, eax
    mov     ecx, 0xc0000080                 # EFER
    rdmsr
    or      eax, 1 << 8                     # LME
    wrmsr
    mov     eax, 0x80000011                 # PG, ET, PE
    mov     cr0, eax
    ljmp    CODE64, offset long_mode

    .code64
# The Linux 64-bit boot protocol: RSI = boot_params.
    .globl entry64
entry64:
    mov     dx, SERIAL_PORT
    mov     al, '>'
    out     dx, al
    add     dx, SERIAL_LSR                  # as drivers do: a monitor may have kept it back
    in      al, dx
    mov     edi, [rsi + 0x228]              # cmd_line_ptr
    mov     eax, offset pml4
    mov     cr3, rax
    lgdt    [gdt_pointer]

# edi = command line.
long_mode:
    mov     edi, edi                        # what a change of mode leaves above is undefined
    mov     rsp, offset stack_top
    mov     eax, offset tss
    mov     [tss_descriptor + 2], ax
    shr     eax, 16
    mov     [tss_descriptor + 4], al
    mov     [tss_descriptor + 7], ah
    mov     ax, TSS
    ltr     ax
    push    USER_DATA
    push    offset stack_top
    push    USER_FLAGS
    push    USER_CODE64
    mov     rax, offset main
    push    rax
    iretq

    .data
    .balign 4096
# The first GiB, where RAM is, and the last below 4 GiB, where devices are; 2 MiB pages.
pml4:
    .quad   pdpt + 7
    .fill   511, 8, 0
pdpt:
    .quad   ram_pages + 7, 0, 0, device_pages + 7
    .fill   508, 8, 0
ram_pages:
    .set    page, 0
    .rept   512
    .quad   page + 0xe7                     # dirty, accessed, large; user, writable, present
    .set    page, page + 0x200000
    .endr
device_pages:
    .set    page, 0xc0000000
    .rept   512
    .quad   page + 0xff                     # uncached too
    .set    page, page + 0x200000
    .endr

    .balign 8
gdt:
    .quad   0, 0
    .quad   0x00af9b000000ffff              # 0x10: kernel code, 64 bits
    .quad   0x00cf93000000ffff              # 0x18: kernel data
    .quad   0x00cff3000000ffff              # 0x20: user data
    .quad   0x00affb000000ffff              # 0x28: user code, 64 bits
    .quad   0
tss_descriptor:
    .quad   0x0000890000000000 + tss_end - tss - 1, 0
gdt_end:
gdt_pointer:
    .word   gdt_end - gdt - 1
    .quad   gdt

tss:
    .fill   102, 1, 0
    .word   104                             # where the permission map is: every port allowed
    .fill   8192, 1, 0
    .byte   0xff
tss_end:

    .bss
    .globl c_bit_mask, doorbell_port
    .balign 16
    .skip   4096
stack_top:
c_bit_mask:     .skip 8
doorbell_port:  .skip 4                     # 0: no private memory
