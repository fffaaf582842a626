"""What policies know of classes: who their members are, what each may hold, what was saved."""
