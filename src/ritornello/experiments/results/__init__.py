"""What runs leave behind: measures, files, labels, and groups of runs that differ in the seed."""
