"""Which shards hold which parts: `planner` decides it (TorchRec), `routing` is what clients see of it."""
