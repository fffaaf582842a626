"""Complete, named experiments: what a recipe can say, and those that there are."""
