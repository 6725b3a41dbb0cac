/* The sizes of aarch64/kvm_abi.h's structures in the kernel's ABI; compiled after bindings.c, which has the macros. */

ABI_SIZE(kvm_vcpu_init, 32);
ABI_OFFSET(kvm_vcpu_init, features, 4);
ABI_SIZE(kvm_debug_exit_arch, 16);
ABI_SIZE(kvm_guest_debug_arch, 512);
ABI_SIZE(kvm_guest_debug, 520);
