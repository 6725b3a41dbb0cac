"""Random programs, state machines and fuzz targets; see README.md beside this."""
