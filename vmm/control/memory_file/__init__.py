"""`--memory-file`: guest memory as a file for other programs, with the page states enforced.

`guest_file` is what reads, writes and seeks mean; `mount` the FUSE file system in which it lies.
"""
