"""What models import: `EmbeddingClient` and `RemoteEmbedding`.

`router` decides what to ask whom, `transport` asks, `client` is the public face.
"""
