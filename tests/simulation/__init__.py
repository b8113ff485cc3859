"""The whole service in one thread, from one seed.

Real are the controller's state, the router, the shard's duties and its checks of requests. Simulated are time, the
network, the store, and memory with rows in it.

| file | what it is |
| --- | --- |
| `world` | time, processes and the network |
| `cluster`, `store` | the service and its store |
| `clients`, `steps` | who asks it, and how the router's steps are driven |
| `schedule` | what befalls them, drawn from the seed |
| `checks` | what must hold after every event |
| `run`, `many` | one seed from its first event to its end, a failing one made short; many seeds |
| `mutants` | faults that must be found |
"""
