"""Lookups that run ahead: their rows, their errors, and changes to the caller's tensors."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import Up

from embedding_service import EmbeddingClient, errors
from embedding_service.client import client as client_module

pytestmark = pytest.mark.service


@pytest.fixture
def busy(service: Up, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[EmbeddingClient, threading.Event]]:
    """A client whose only thread for prefetching is held until the event is set."""
    monkeypatch.setattr(client_module, "MOST_AHEAD", 1)
    go_on = threading.Event()
    with EmbeddingClient(service.address, timeout=60) as client:
        client._ahead.submit(go_on.wait, 180)
        yield client, go_on
        go_on.set()


def test_rows_are_those_of_a_lookup(client: EmbeddingClient) -> None:
    ids, tokens = torch.arange(60).view(3, 20), torch.tensor([[4, 5, 6, 7]])
    rows = [client.prefetch("fp32/ngram", ids + shift, dtype=torch.float16) for shift in range(50)]
    for shift, each in enumerate(rows):
        assert torch.equal(each.result(), longcat_table()[ids + shift].half())
    ahead = client.prefetch_ngrams("int8", tokens[:, 2:], tokens[:, :2])
    assert torch.equal(ahead.result(), client.lookup_ngrams("int8", tokens)[:, 2:])


def test_the_caller_goes_on_and_may_change_the_ids(busy: tuple[EmbeddingClient, threading.Event]) -> None:
    client, go_on = busy
    ids, tokens, context = torch.arange(9), torch.tensor([[7, 8]]), torch.tensor([[5, 6]])
    expected = client.lookup_ngrams("fp32", tokens, context)
    rows, ngrams = client.prefetch("fp32/ngram", ids), client.prefetch_ngrams("fp32", tokens, context)
    for each in (ids, tokens, context):
        each.fill_(1)
    assert not rows.done()
    go_on.set()
    assert torch.equal(rows.result(), longcat_table()[:9])
    assert torch.equal(ngrams.result(), expected)


def test_result_raises_what_the_lookup_raised(client: EmbeddingClient) -> None:
    for table, ids, error in (
        ("fp32/ngram", torch.tensor([-1]), errors.OutOfRange),
        ("nope/ngram", torch.tensor([1]), errors.NotFound),
        ("fp32/ngram", [1], errors.InvalidRequest),
    ):
        with pytest.raises(error):
            client.prefetch(table, ids).result()  # type: ignore[arg-type]


def test_closing_ends_what_has_not_begun(busy: tuple[EmbeddingClient, threading.Event]) -> None:
    client, go_on = busy
    waiting = client.prefetch("fp32/ngram", torch.arange(3))
    closing = threading.Thread(target=client.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(180)
    go_on.set()
    closing.join(180)
    assert not closing.is_alive()
    with pytest.raises(errors.Unavailable, match="closed"):
        client.prefetch("fp32/ngram", torch.arange(3))
