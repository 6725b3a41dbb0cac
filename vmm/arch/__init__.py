"""What differs between processor architectures: one package for each."""
