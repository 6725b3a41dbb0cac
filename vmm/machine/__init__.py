"""The composition root: wires the other rooms into a machine and runs it."""
