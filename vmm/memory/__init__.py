"""Guest memory: the objects behind it, who may touch which page, and every byte's way in and out.

The host moves guest bytes by GPA with system calls on fds, never through a mapping.
"""
