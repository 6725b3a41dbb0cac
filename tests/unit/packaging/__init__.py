"""Tests of what an installation gets: wheel, sdist, editable."""
