/*
 * The part of the KVM user ABI that pyvmm uses and every architecture has, declared here so that the build needs no kernel headers
 * (the newest of these structures are younger than most distributions' headers). Read twice: by cffi as its cdef, and by the C compiler
 * inside bindings.c, which asserts every size and offset. Names are the kernel's (include/uapi/linux/kvm.h). A kvm_abi.h in each
 * architecture's folder adds its own. Only what both readers understand may stand here: no preprocessor, no attributes.
 * User-space addresses inside structures are void * where we fill them in, which is the kernel's __u64 on 64-bit machines.
 */

struct kvm_userspace_memory_region {
    uint32_t slot;
    uint32_t flags;
    uint64_t guest_phys_addr;
    uint64_t memory_size;
    uint64_t userspace_addr;
};

struct kvm_userspace_memory_region2 {
    uint32_t slot;
    uint32_t flags;
    uint64_t guest_phys_addr;
    uint64_t memory_size;
    uint64_t userspace_addr;
    uint64_t guest_memfd_offset;
    uint32_t guest_memfd;
    uint32_t pad1;
    uint64_t pad2[14];
};

struct kvm_create_guest_memfd {
    uint64_t size;
    uint64_t flags;
    uint64_t reserved[6];
};

struct kvm_memory_attributes {
    uint64_t address;
    uint64_t size;
    uint64_t attributes;
    uint64_t flags;
};

struct kvm_memory_attributes2 {
    uint64_t offset;
    uint64_t size;
    uint64_t attributes;
    uint64_t flags;
    uint64_t error_offset;
    uint64_t reserved[11];
};

struct kvm_pre_fault_memory {
    uint64_t gpa;
    uint64_t size;
    uint64_t flags;
    uint64_t padding[5];
};

struct kvm_enable_cap {
    uint32_t cap;
    uint32_t flags;
    uint64_t args[4];
    uint8_t pad[64];
};

struct kvm_irqfd {
    uint32_t fd;
    uint32_t gsi;
    uint32_t flags;
    uint32_t resamplefd;
    uint8_t pad[16];
};

struct kvm_irq_routing_irqchip {
    uint32_t irqchip;
    uint32_t pin;
};

struct kvm_irq_routing_msi {
    uint32_t address_lo;
    uint32_t address_hi;
    uint32_t data;
    uint32_t devid;
};

struct kvm_irq_routing_entry {
    uint32_t gsi;
    uint32_t type;
    uint32_t flags;
    uint32_t pad;
    union {
        struct kvm_irq_routing_irqchip irqchip;
        struct kvm_irq_routing_msi msi;
        uint32_t pad[8];
    } u;
};

struct kvm_irq_routing {
    uint32_t nr;
    uint32_t flags;
    struct kvm_irq_routing_entry entries[];
};

struct kvm_ioeventfd {
    uint64_t datamatch;
    uint64_t addr;
    uint32_t len;
    int32_t fd;
    uint32_t flags;
    uint8_t pad[36];
};

struct kvm_coalesced_mmio_zone {
    uint64_t addr;
    uint32_t size;
    uint32_t pio;
};

struct kvm_coalesced_mmio {
    uint64_t phys_addr;
    uint32_t len;
    uint32_t pio;
    uint8_t data[8];
};

struct kvm_coalesced_mmio_ring {
    uint32_t first, last;
    struct kvm_coalesced_mmio coalesced_mmio[];
};

/* addr: the register's value, as many bytes as the size bits of its id say. */
struct kvm_one_reg {
    uint64_t id;
    void *addr;
};

struct kvm_create_device {
    uint32_t type;
    uint32_t fd;
    uint32_t flags;
};

struct kvm_device_attr {
    uint32_t flags;
    uint32_t group;
    uint64_t attr;
    void *addr;
};

struct kvm_run_io {
    uint8_t direction;
    uint8_t size;
    uint16_t port;
    uint32_t count;
    uint64_t data_offset;
};

struct kvm_run_mmio {
    uint64_t phys_addr;
    uint8_t data[8];
    uint32_t len;
    uint8_t is_write;
};

struct kvm_run_hypercall {
    uint64_t nr;
    uint64_t args[6];
    uint64_t ret;
    uint64_t flags;
};

struct kvm_run_fail_entry {
    uint64_t hardware_entry_failure_reason;
    uint32_t cpu;
};

struct kvm_run_internal {
    uint32_t suberror;
    uint32_t ndata;
    uint64_t data[16];
};

struct kvm_run_emulation_failure {
    uint32_t suberror;
    uint32_t ndata;
    uint64_t flags;
    uint8_t insn_size;
    uint8_t insn_bytes[15];
};

struct kvm_run_system_event {
    uint32_t type;
    uint32_t ndata;
    uint64_t data[16];
};

struct kvm_run_arm_nisv {
    uint64_t esr_iss;
    uint64_t fault_ipa;
};

struct kvm_run_msr {
    uint8_t error;
    uint8_t pad[7];
    uint32_t reason;
    uint32_t index;
    uint64_t data;
};

struct kvm_run_memory_fault {
    uint64_t flags;
    uint64_t gpa;
    uint64_t size;
};

/* The kernel's exit structures are anonymous members of one union; the names above are ours. */
struct kvm_run {
    uint8_t request_interrupt_window;
    uint8_t immediate_exit;
    uint8_t padding1[6];
    uint32_t exit_reason;
    uint8_t ready_for_interrupt_injection;
    uint8_t if_flag;
    uint16_t flags;
    uint64_t cr8;
    uint64_t apic_base;
    union {
        struct kvm_run_io io;
        struct kvm_run_mmio mmio;
        struct kvm_run_hypercall hypercall;
        struct kvm_run_fail_entry fail_entry;
        struct kvm_run_internal internal;
        struct kvm_run_emulation_failure emulation_failure;
        struct kvm_run_system_event system_event;
        struct kvm_run_arm_nisv arm_nisv;
        struct kvm_run_msr msr;
        struct kvm_run_memory_fault memory_fault;
        uint64_t hardware_exit_reason;
        char exit_padding[256];
    };
    uint64_t kvm_valid_regs;
    uint64_t kvm_dirty_regs;
    char sync_regs_padding[2048];
};
