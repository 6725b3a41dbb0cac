"""pyvmm as a library: what `import vmm` offers a program. All else may change at any time."""
