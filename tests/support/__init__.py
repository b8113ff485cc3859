"""What several test folders share: checkpoints whose rows name themselves, and real clusters of processes."""
