"""The tree itself: linters and type checker."""
