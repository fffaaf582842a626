"""Rounds: one step's work on the buffer, the trainer's side of it and the worker's."""
