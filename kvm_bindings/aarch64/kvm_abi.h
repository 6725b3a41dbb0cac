/* What aarch64 adds to ../kvm_abi.h. Names are the kernel's (arch/arm64/include/uapi/asm/kvm.h). */

struct kvm_vcpu_init {
    uint32_t target;
    uint32_t features[7];
};

/* KVM_EXIT_DEBUG's part of kvm_run (debug.arch there), at the place of the exit union. */
struct kvm_debug_exit_arch {
    uint32_t hsr;
    uint32_t hsr_high;
    uint64_t far;
};

struct kvm_guest_debug_arch {
    uint64_t dbg_bcr[16];
    uint64_t dbg_bvr[16];
    uint64_t dbg_wcr[16];
    uint64_t dbg_wvr[16];
};

struct kvm_guest_debug {
    uint32_t control;
    uint32_t pad;
    struct kvm_guest_debug_arch arch;
};
