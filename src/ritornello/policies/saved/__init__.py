"""What policies keep of a shard when it is saved, and how a saved one is dealt out anew."""
