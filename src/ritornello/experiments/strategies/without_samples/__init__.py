"""Strategies that need no stored samples."""
