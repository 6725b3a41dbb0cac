/* The sizes of x86_64/kvm_abi.h's structures in the kernel's ABI; compiled after bindings.c, which has the macros. */

ABI_SIZE(kvm_pit_config, 64);
ABI_SIZE(kvm_regs, 144);
ABI_SIZE(kvm_segment, 24);
ABI_SIZE(kvm_dtable, 16);
ABI_SIZE(kvm_sregs, 312);
ABI_SIZE(kvm_cpuid_entry2, 40);
ABI_SIZE(kvm_cpuid2, 8);
ABI_SIZE(kvm_msr_entry, 16);
ABI_SIZE(kvm_msrs, 8);
ABI_SIZE(kvm_debug_exit_arch, 32);
ABI_SIZE(kvm_guest_debug_arch, 64);
ABI_SIZE(kvm_guest_debug, 72);
ABI_SIZE(kvm_fpu, 416);
ABI_SIZE(kvm_msr_list, 4);
ABI_SIZE(kvm_sregs2, 320);
ABI_SIZE(kvm_lapic_state, 1024);
ABI_SIZE(kvm_mp_state, 4);
ABI_SIZE(kvm_vcpu_events, 64);
ABI_SIZE(kvm_debugregs, 128);
ABI_SIZE(kvm_xcrs, 392);
ABI_SIZE(kvm_xsave, 4096);
ABI_SIZE(kvm_irqchip, 520);
ABI_SIZE(kvm_pit_state2, 112);
ABI_SIZE(kvm_clock_data, 48);
