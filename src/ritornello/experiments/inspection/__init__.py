"""Saved buffers, looked into: what they hold, their images, and what shall be forgotten."""
