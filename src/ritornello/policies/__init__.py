"""Policies: who is kept, and who is drawn; pure functions of counts, labels and a random stream."""
