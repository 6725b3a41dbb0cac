"""The lab: a whole machine under full emulation, for hosts whose KVM cannot do the job.

QEMU's TCG runs a stock Linux with kvm-amd on emulated SVM; `pyvmm` runs inside it with the
same arguments, the same files and the same terminal. See `vmm.lab.command` for the entry.
"""
