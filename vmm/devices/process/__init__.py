"""Devices in processes of their own: `--disk FILE,process`.

The process (`back_end`) runs the device as it is, with its rings, on memory that is another
process's (`remote_memory`): every access is a message, and pyvmm (`front_end`) carries it out, with
the checks of guest memory, or refuses it. A disk's data go from fd to fd there: they never come
here. `spawner` starts the processes, also when pyvmm itself may not fork any more.

Three ways to split a disk were tried before this one, in C-like Python on two processors of which a
polling guest has one; speed by that of one process, reads / writes of 1 MiB, four at a time:

- pyvmm moves, as the process says: 0.98 / 1.18 (noise: the same calls, and one message);
- a memory of 1 MiB between them, which both copy to and from: 0.46 / 0.48;
- a pipe, spliced into by the process and read from by pyvmm: 0.71 / 0.43, and 0.87 for writes that
  are spliced from guest memory, whose pages the process would hold beyond the access.
"""
