"""ACPI tables, the language they describe the machine in, and nothing that runs."""
