"""Recordings to clips."""
