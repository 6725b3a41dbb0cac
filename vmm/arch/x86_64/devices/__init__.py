"""Port devices that only a PC has: clock, keyboard controller stub, ACPI power, PCI access."""
