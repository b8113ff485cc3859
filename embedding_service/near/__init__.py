"""Rows read in place: a shard hands clients of its own machine the files that its parts lie in, and they read them."""
