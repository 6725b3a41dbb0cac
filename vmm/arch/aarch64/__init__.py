"""The arm64 machine that a guest sees: addresses, device tree, board, exits."""
