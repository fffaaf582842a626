"""What is done between two rounds: filling, rewriting, measuring."""
