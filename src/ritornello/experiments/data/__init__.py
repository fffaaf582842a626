"""What there is to learn: labelled images, how they become a stream of tasks, its mini-batches."""
