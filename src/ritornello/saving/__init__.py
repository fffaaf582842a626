"""Saving: a buffer on disk or in a ``state_dict``, and back; and forgetting what was saved."""
