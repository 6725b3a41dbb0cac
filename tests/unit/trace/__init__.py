"""Tests of the trace: recording, the store on disk, reading, summaries and views."""
