"""The sandbox: filters, what may be opened, the process outside."""
