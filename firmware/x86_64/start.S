# Entry, order of the steps, and the two ways out. CPL 3, IOPL 3, IF = 0, 64-bit mode.
#
# Some hosts drop IOPL when they enter the guest and ask the TSS' I/O permission map instead (PVM,
# Linux 6.18): there the VMM has to supply a map that allows the ports, or the first OUT is a #GP
# and, without an IDT, a triple fault.
#
# What comes out of COM1, one line each:
#   pyvmm payload: <what the info page says>
#   ok <number> <tag>: <sentence>
#   skip <steps>: <why>
#   not ok <number> <tag>: <what>: expected <value>, saw <value>[ at GPA <address>]
#   payload: all <number> checks passed
# After "not ok" the step's number goes to the failure port and nothing more is tried.
#
# A page is touched only by the alias of the state that it is in, so every mechanism that tells
# private from shared memory, also one that faults on the wrong side, can carry this guest.
.include "defs.inc"

    .section .text.entry, "ax"
    .globl payload_entry
payload_entry:
    lea     rsp, [rip + stack_top]
    cld
    mov     rbx, rdi                    # the info page outlives the clearing of .bss
    lea     rdi, [rip + bss_start]
    lea     rcx, [rip + bss_end]
    sub     rcx, rdi
    shr     rcx, 3
    xor     eax, eax
    rep stosq

    call    read_info
    call    banner
    call    memory_write
    call    memory_check

    cmp     qword ptr [rip + doorbell_port], 0
    je      .Lno_doorbell
    call    conversion_steps
    call    memory_check
    jmp     .Ldisk
.Lno_doorbell:
    PRINT   "skip conversions: no doorbell, an ordinary VM whose memory the host sees"
    call    end_line

.Ldisk:
    test    byte ptr [rip + info_flags], INFO_FLAG_DISK
    jz      .Lno_disk
    call    disk_steps
    call    memory_check
    jmp     .Lsummary
.Lno_disk:
    PRINT   "skip disk: none at PCI 0:1.0"
    call    end_line

.Lsummary:
    PRINT   "payload: all "
    mov     eax, [rip + step_number]
    call    put_decimal
    PRINT   " checks passed"
    call    end_line
    # falls through

# Asks for power-off until somebody listens: there is nothing to return to.
    .globl power_off
power_off:
    mov     edx, [rip + poweroff_port]
    mov     eax, [rip + poweroff_value]
.Lpower_off_again:
    out     dx, ax
    pause
    jmp     .Lpower_off_again

    .text

# rbx = info page. Until it is believed, defaults give the failure a way to be heard.
read_info:
    mov     dword ptr [rip + serial_port], DEFAULT_SERIAL_PORT
    mov     dword ptr [rip + poweroff_port], DEFAULT_POWEROFF_PORT
    mov     dword ptr [rip + poweroff_value], DEFAULT_POWEROFF_VALUE
    mov     dword ptr [rip + failure_port], DEFAULT_FAILURE_PORT
    STEP    "info"
    WHAT    "magic of the info page"
    movabs  rdi, INFO_MAGIC
    mov     rsi, [rbx]
    call    expect_equal

    mov     eax, [rbx + INFO_SERIAL_PORT]
    mov     [rip + serial_port], eax
    mov     eax, [rbx + INFO_POWEROFF_PORT]
    mov     [rip + poweroff_port], eax
    mov     eax, [rbx + INFO_POWEROFF_VALUE]
    mov     [rip + poweroff_value], eax
    mov     rax, [rbx + INFO_RAM_BYTES]
    mov     [rip + ram_bytes], rax
    mov     rax, [rbx + INFO_C_BIT_MASK]
    mov     [rip + c_bit_mask], rax
    mov     rax, [rbx + INFO_PRIVATE_START]
    mov     [rip + private_start], rax
    mov     rax, [rbx + INFO_FLAGS]
    mov     [rip + info_flags], rax
    mov     rax, [rbx + INFO_DOORBELL_PORT]
    mov     [rip + doorbell_port], rax
    test    rax, rax
    jz      .Lfailure_port_known
    add     eax, BELL_FAILURE
    mov     [rip + failure_port], eax
.Lfailure_port_known:

    WHAT    "start of private memory"
    mov     edi, MIN_PRIVATE_START
    mov     rsi, [rip + private_start]
    call    expect_equal
    WHAT    "RAM in bytes, a multiple of the page size"
    mov     rsi, [rip + ram_bytes]
    mov     rdi, rsi
    and     rdi, -PAGE
    call    expect_equal
    WHAT    "RAM in bytes, at least"
    mov     rsi, [rip + ram_bytes]
    mov     edi, MIN_RAM_BYTES
    cmp     rsi, rdi
    jb      fail_values
    ret

# "pyvmm payload: RAM 512 MiB, private from 0x200000, C-bit mask 0x..., doorbell port 0x500"
banner:
    PRINT   "pyvmm payload: RAM "
    mov     rax, [rip + ram_bytes]
    shr     rax, 20
    call    put_decimal
    PRINT   " MiB, private from "
    mov     rax, [rip + private_start]
    call    put_hex
    PRINT   ", C-bit mask "
    mov     rax, [rip + c_bit_mask]
    call    put_hex
    PRINT   ", doorbell port "
    mov     rax, [rip + doorbell_port]
    call    put_hex
    call    end_line
    OK      "info page read"
    ret

    .bss
    .balign 16
    .skip 8192
stack_top:
    .globl ram_bytes, c_bit_mask, private_start, doorbell_port, info_flags
ram_bytes:      .skip 8
c_bit_mask:     .skip 8
private_start:  .skip 8
doorbell_port:  .skip 8
info_flags:     .skip 8
poweroff_port:  .skip 4
poweroff_value: .skip 4
    .globl serial_port, failure_port
serial_port:    .skip 4
failure_port:   .skip 4
