"""Strategies that can do without stored samples."""
