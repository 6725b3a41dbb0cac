"""A trace's requests put to other policies; no guest runs."""
