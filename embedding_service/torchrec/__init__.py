"""TorchRec's embedding modules with their tables in the service. Swap the module, and leave the model as it is.

They are used as `torchrec.EmbeddingCollection` and `torchrec.EmbeddingBagCollection` are. The client and the model's
name come before the configs. A batch asks for the rows of all its tables at once, and for each row once. This room
needs torchrec. The rest of the client side does not.
"""

from embedding_service.torchrec.bags import RemoteEmbeddingBagCollection
from embedding_service.torchrec.collection import RemoteEmbeddingCollection

__all__ = ["RemoteEmbeddingBagCollection", "RemoteEmbeddingCollection"]
