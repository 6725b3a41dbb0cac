"""What pyvmm itself gives up before the guest's first instruction: system calls (seccomp) and files
(Landlock). vmm/docs/explanation/sandbox.md has the table."""
