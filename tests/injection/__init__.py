"""What becomes of a run when the host's calls fail: each call, with each errno that it can give."""
