"""Conversion of guest pages between private and shared: the transaction and the schemes."""
