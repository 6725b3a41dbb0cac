/* What aarch64 adds to ../kvm_abi.h. Names are the kernel's (arch/arm64/include/uapi/asm/kvm.h). */

struct kvm_vcpu_init {
    uint32_t target;
    uint32_t features[7];
};
