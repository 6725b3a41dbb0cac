"""The x86-64 PC that a guest sees: addresses, CPUID, registers, tables, doorbells. Data only."""
