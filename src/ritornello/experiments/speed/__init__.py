"""What the buffer costs: measured on this machine, and simulated on thousands of ranks."""
