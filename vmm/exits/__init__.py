"""The run loop of a vCPU and one handler per exit class."""
