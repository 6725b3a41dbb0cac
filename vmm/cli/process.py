"""Whether the process is the command's own, so that it may give up its rights for good."""

is_ours = False
"""Set by the command's entry point; a program that calls `main` keeps its rights."""
