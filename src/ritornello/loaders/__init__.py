"""Between a loader and the training: mini-batches a step ahead, evenly over ranks, or composed."""
