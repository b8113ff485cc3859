"""What models import: `EmbeddingClient` and `RemoteEmbedding`.

The way of a lookup, file by file: `client` is the public face, and `wants` says which rows. `router` decides what is
asked next, `owners` whom. `steps` drives that on threads and asyncio. `transport` and `trips` send `calls`. `kept` has
rows of earlier lookups. `breaker` and `patience` know which shards fail or are slow.
"""
