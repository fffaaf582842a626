"""A live buffer on disk or in a ``state_dict``, and back; reading and forgetting what was saved."""
