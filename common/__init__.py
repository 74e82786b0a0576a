"""Errors, messages, files and locks: what every other package needs."""
