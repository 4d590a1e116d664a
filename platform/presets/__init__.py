"""Whole runs by name."""
