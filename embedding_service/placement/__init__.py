"""Which shards hold which parts. `planner` decides it (TorchRec), and clients see it as `routing`."""
