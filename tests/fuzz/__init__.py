"""Random programs, state machines and fuzz targets; each prints the seed that repeats it."""
