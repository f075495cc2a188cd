"""Processes: launchers, ranks, watching, locks, logs."""
