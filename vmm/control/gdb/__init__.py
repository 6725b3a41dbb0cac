"""`--gdb`: a debugger attached to the guest by gdb's remote serial protocol.

`packets` frames bytes, `server` has the listening end and one client, `session` answers packets,
`target` is the guest that stands still. Source: gdb's manual, appendix "Remote Protocol".
"""
