"""What the page of the cluster shows: the controller's state as JSON, rows from a shard, and what-if plans."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import numpy as np

from embedding_service.client.channels import open_channel
from embedding_service.controller import decisions
from embedding_service.controller.placing import node_of
from embedding_service.controller.planning import Planning
from embedding_service.controller.presenter import REMEDIES, status_of
from embedding_service.controller.state import ControllerState
from embedding_service.errors import (
    EmbeddingServiceError,
    InvalidRequest,
    NotFound,
    Overloaded,
    PlacementError,
    Unavailable,
)
from embedding_service.foreign import shown
from embedding_service.grpc_codes import error_of
from embedding_service.page.app import Answer
from embedding_service.placement.demand import CUDA, MOST_MEMORY, Node, PartDemand
from embedding_service.placement.packing import more_needed
from embedding_service.placement.parts import PartKey
from embedding_service.placement.routing import Model
from embedding_service.security.access import Access
from embedding_service.store.manifest import Manifest, Table
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub
from embedding_service.wire.plain import plain

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")
# Seconds that a shard, and the controller's own loop, have for an answer.
ANSWER_SECONDS = 30.0
# Cells of a table's map. Each stands for as many parts as it takes.
MOST_CELLS = 1024
# What one question may ask for.
MOST_IDS, MOST_TOKENS, MOST_NODES = 64, 64, 1000
# Values of a row that are shown.
VALUES = 64
# Shards that are asked, one after another, while none answers.
MOST_ASKED = 3
# An answer is given again for this many seconds, and for this many times as long as it took to make.
FRESH_SECONDS, FRESH_TIMES = 0.5, 20.0


class Page:
    """`page.app.Sources` of a controller. Its methods run on threads. They read the state on its own loop.

    Args:
        state: The controller's.
        store: Path or URL of the store.
        planning: Makes plans.
        loop: On which the state changes.
        ca: PEM of the authorities that vouch for shards. None: they speak plain text.
    """

    def __init__(
        self,
        state: ControllerState,
        store: str,
        planning: Planning,
        loop: asyncio.AbstractEventLoop,
        ca: Path | None = None,
    ) -> None:
        self._state, self._store, self._planning, self._loop, self._ca = state, store, planning, loop, ca
        self._overview = _Fresh(self._make_overview)
        self._parts = _Fresh(lambda: _maps(*self._on_loop(self._where_parts_are)))
        self._planner = threading.Semaphore()
        self._tokenizers: dict[str, Tokenizer | None] = {}

    def overview(self) -> Answer:
        """Shards, models, problems: all that changes from second to second."""
        return self._overview.get()

    def parts(self) -> Answer:
        """Of each table, cells with the shards that hold it."""
        return self._parts.get()

    def lookup(self, question: Mapping[str, Any], bearer: str | None) -> Answer:
        """Rows of MODEL/TABLE by their ids."""
        model, _, table = _text(question, "table").partition("/")
        ids = _numbers(question, "ids", MOST_IDS)
        request = wire.LookupRequest(model=model, table=table, ids=ids)
        answer, shard = self._ask(bearer, lambda stub: stub.Lookup(request, timeout=ANSWER_SECONDS))
        rows = np.frombuffer(answer.rows, "<f4").reshape(len(ids), answer.dim)
        return {
            "version": answer.version,
            "dim": answer.dim,
            "shard": shard,
            "rows": [{"id": number, **_row(row)} for number, row in zip(ids, rows, strict=True)],
        }

    def ngrams(self, question: Mapping[str, Any], bearer: str | None) -> Answer:
        """The rows that tokens read: for each token the ids and the values of L * H rows."""
        import torch

        from embedding_service.ngram import NgramHasher

        model, folder = self._on_loop(lambda: self._model(_text(question, "model")))
        if not model.family:
            raise InvalidRequest(f"{model.name} hashes no n-grams: its rows are asked for by id")
        tokenizer = None if "tokens" in question else self._tokenizer(folder)
        if tokenizer:
            text = _text(question, "text")
            tokens = tokenizer.encode(text, add_special_tokens=False).ids
            if not 1 <= len(tokens) <= MOST_TOKENS:
                raise InvalidRequest(f"the text is {len(tokens)} tokens: give 1 to {MOST_TOKENS}")
        else:
            tokens = _numbers(question, "tokens", MOST_TOKENS)
        hasher = NgramHasher.from_params(model.family, json.loads(model.hash_params))
        ids = hasher.row_ids(torch.tensor([tokens])).tolist()[0]
        request = wire.LookupNgramsRequest(model=model.full_name, token_ids=tokens)
        answer, shard = self._ask(bearer, lambda stub: stub.LookupNgrams(request, timeout=ANSWER_SECONDS))
        shape = (answer.length, answer.tables, answer.heads, answer.dim)
        rows = np.frombuffer(answer.rows, "<f4").reshape(shape)
        return {
            "version": answer.version,
            "dim": answer.dim,
            "shard": shard,
            "tables": [table.name for table in hasher.tables],
            "heads": answer.heads,
            "tokens": [
                {
                    "id": token,
                    "text": tokenizer.decode([token]) if tokenizer else None,
                    "rows": [
                        [{"id": row_id, **_row(row, 0)} for row_id, row in zip(*pair, strict=True)]
                        for pair in zip(ids[position], rows[position], strict=True)
                    ],
                }
                for position, token in enumerate(tokens)
            ],
        }

    def what_if(self, question: Mapping[str, Any]) -> Answer:
        """The plan with `add` shards of `memory` bytes more, and without those of `lose`."""
        parts, nodes, copies = self._on_loop(self._what_is_placed)
        lose = {name for name in question.get("lose", []) if isinstance(name, str)}
        if unknown := lose - {node.shard for node in nodes}:
            raise NotFound(f"no shard {shown(sorted(unknown)[0])} is here")
        add = _number(question, "add", 0, MOST_NODES)
        memory = _number(question, "memory", 1, MOST_MEMORY) if add else 0
        replicas = _number(question, "replicas", 1, MOST_NODES) if question.get("replicas") else copies
        device = CUDA if question.get("device") == CUDA else "cpu"
        added = [Node(f"new-{number}", memory, device=device) for number in range(add)]
        # What a shard had that is lost is loaded elsewhere, so nobody else counts as holding it.
        after = [node for node in nodes if node.shard not in lose and not node.draining] + added
        if not parts:
            raise NotFound("nothing is to be placed: no model is in the store")
        if not after:
            raise PlacementError("no shard would be left: add one")
        if not self._planner.acquire(blocking=False):
            raise Overloaded("another plan is being made: ask again in a moment")
        try:
            planned = self._planning.plan(parts, after, min(replicas, len(after)))
            placement = asyncio.run_coroutine_threadsafe(planned, self._loop).result()
        except PlacementError as error:
            raise PlacementError(f"{error}{_remedy(parts, after, replicas)}") from None
        except RuntimeError as error:
            raise Unavailable(str(error)) from None
        finally:
            self._planner.release()
        size = {part.key: part.nbytes for part in parts}
        return {
            "copies": min(replicas, len(after)),
            "wanted_copies": replicas,
            "lost": sorted(lose),
            "shards": [
                {
                    "id": node.shard,
                    "new": node in added,
                    "device": node.device,
                    "parts": len(keys := placement.parts_of.get(node.shard, set())),
                    "bytes": sum(size[key] for key in keys),
                    "moved": sum(size[key] for key in keys - node.held),
                    "limit": node.memory_limit,
                }
                for node in after
            ],
        }

    # The state

    def _on_loop(self, make: Callable[[], T]) -> T:
        async def made() -> T:
            return make()

        asking = asyncio.run_coroutine_threadsafe(made(), self._loop)
        try:
            return asking.result(ANSWER_SECONDS)
        except FutureTimeout:
            asking.cancel()
            raise Overloaded(f"the controller is busy for over {ANSWER_SECONDS:g} s: ask again in a moment") from None

    def _make_overview(self) -> Answer:
        answer, folders = self._on_loop(self._read_overview)
        for model, folder in zip(answer["models"], folders, strict=True):
            model["text"] = bool(model["model"]["family"]) and self._tokenizer(folder) is not None
        return answer

    def _read_overview(self) -> tuple[Answer, list[str]]:
        """All but whether models have a tokenizer, and for that the folder of each one's checkpoint."""
        status = status_of(self._state, self._store)
        for model in status.models:
            model.model.hash_params = ""  # which may be long
        answer = plain(status)
        connected = {name for name, shard in self._state.fleet.shards.items() if shard.connected}
        for shard in answer["shards"]:
            shard["connected"] = shard["shard_id"] in connected
        for problem, message in zip(answer["problems"], status.problems, strict=True):
            problem["remedy"] = REMEDIES.get(message.kind, "")
        answer["branches"] = _branches(status)
        answer["store"], answer["copies"] = self._store, self._state.placing.copies
        answer["secured"] = self._ca is not None
        return answer, [_checkpoint_of(manifest, self._state) for manifest in self._state.wanted]

    def _where_parts_are(
        self,
    ) -> tuple[list[Manifest], list[str], decisions.Holders, decisions.Holders, Counter[PartKey]]:
        state = self._state
        shards, holders, target = sorted(state.fleet.shards), state.fleet.holders(), state.placing.target
        return list(state.wanted), shards, holders, target, state.fleet.accesses()

    def _model(self, name: str) -> tuple[Model, str]:
        """A served model and the folder of its checkpoint. Raises NotFound, Unavailable."""
        if not self._state.routing:
            raise Unavailable("nothing is served yet: wait for the shards")
        model = self._state.routing.model(name)
        manifest = next((each for each in self._state.wanted if each.full_name == model.full_name), None)
        return model, _checkpoint_of(manifest, self._state) if manifest else ""

    def _what_is_placed(self) -> tuple[list[PartDemand], list[Node], int]:
        state = self._state
        names = {(each.model, each.version): each for each in state.wanted}
        nodes = [node_of(shard, names) for _, shard in sorted(state.fleet.shards.items())]
        return decisions.part_demands(state.wanted, state.fleet.accesses()), nodes, max(state.placing.copies, 1)

    # Others

    def _ask(self, bearer: str | None, call: Callable[[EmbeddingServiceStub], T]) -> tuple[T, str]:
        """An answer, and the shard that gave it: the first that can be reached."""
        shards = self._on_loop(lambda: [each.report for each in self._state.fleet.shards.values() if each.connected])
        access = Access(self._ca, token=(bearer or "").partition(" ")[2].strip() or None) if self._ca else None
        error: EmbeddingServiceError = Unavailable("no shard is connected: start one, or look at its log")
        for report in sorted(shards, key=lambda each: each.draining)[:MOST_ASKED]:
            try:
                with open_channel(report.address, access) as channel:
                    return call(EmbeddingServiceStub(channel)), report.shard_id
            except grpc.RpcError as failure:
                error = error_of(failure.code(), failure.details() or "")
                if not isinstance(error, Unavailable):
                    break
        raise error

    def _tokenizer(self, folder: str) -> Tokenizer | None:
        """The one beside the checkpoint that a model was imported from, if it is still there."""
        if folder not in self._tokenizers:
            self._tokenizers[folder] = _read_tokenizer(Path(folder) / "tokenizer.json") if folder else None
        return self._tokenizers[folder]


class _Fresh:
    """An answer that is made at most so often, for however many ask. Thread-safe."""

    def __init__(self, make: Callable[[], Answer]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._until = 0.0
        self._answer: Answer = {}

    def get(self) -> Answer:
        with self._lock:
            began = time.monotonic()
            if began > self._until:
                self._answer = self._make()
                ended = time.monotonic()
                self._until = ended + max(FRESH_SECONDS, FRESH_TIMES * (ended - began))
            return self._answer


def _branches(status: control.Status) -> list[Answer]:
    """Each branch once, as far as all of its shares are that somebody leads."""
    by_name: dict[str, dict[str, control.BranchStatus]] = {}
    for shard in status.shards:
        for each in shard.stats.branches:
            by_name.setdefault(each.branch, {})[each.share] = each
    return [
        {
            "name": name,
            "base": next(iter(shares.values())).base,
            "applied": min(each.applied_step for each in shares.values()),
            "durable": min(each.durable_step for each in shares.values()),
            "losses": sum(each.losses for each in shares.values()),
            "copies": min(each.in_sync for each in shares.values()),
            "led": len(shares),
            "shares": next(iter(shares.values())).shares,
        }
        for name, shares in sorted(by_name.items())
    ]


def _read_tokenizer(file: Path) -> Tokenizer | None:
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file)) if file.is_file() else None
    except Exception:  # tokenizers raises Exception for a file that is none of its own
        return None


def _checkpoint_of(manifest: Manifest, state: ControllerState) -> str:
    """The folder that a version, or the base of one, was imported from. Empty where nobody knows."""
    if manifest.provenance:
        return manifest.provenance.checkpoint
    known = (each for versions in state.catalog.values() for each in versions)
    root = next((each for each in known if (each.model, each.version) == manifest.root), None)
    return root.provenance.checkpoint if root and root.provenance else ""


def _maps(
    wanted: Sequence[Manifest],
    shards: Sequence[str],
    holders: decisions.Holders,
    target: decisions.Holders,
    accesses: Mapping[PartKey, int],
) -> Answer:
    """Of each table its cells. A cell stands for `span` parts, the last one for what is left."""
    numbers = {name: number for number, name in enumerate(shards)}

    def cell(manifest: Manifest, table: Table, first: int, span: int) -> Answer:
        keys = [
            PartKey(manifest.model, manifest.version, table.name, part.index)
            for part in table.parts[first : first + span]
        ]
        version = manifest.model, manifest.version
        held = [set(holders.get(version, {}).get(key, ())) for key in keys]
        to_come = [set(target.get(version, {}).get(key, ())) - each for key, each in zip(keys, held, strict=True)]
        lost, moving = sum(not each for each in held), sum(bool(each) for each in to_come)
        return {
            "held": sorted(numbers[name] for name in set().union(*held)),
            "to_come": sorted(numbers[name] for name in set().union(*to_come) if name in numbers),
            "state": "lost" if lost else "moving" if moving else "held",
            "lost": lost,
            "heat": sum(accesses.get(key, 0) for key in keys),
        }

    tables = []
    for manifest in wanted:
        for table in manifest.tables:
            span = -(-len(table.parts) // MOST_CELLS)
            tables.append(
                {
                    "model": manifest.full_name,
                    "table": table.name,
                    "parts": len(table.parts),
                    "rows": table.rows,
                    "rows_per_part": table.rows_per_part,
                    "span": span,
                    "cells": [cell(manifest, table, first, span) for first in range(0, len(table.parts), span)],
                }
            )
    return {"shards": list(shards), "tables": tables}


def _row(row: Any, most: int = VALUES) -> Answer:
    """A row for people: its norm and the first values."""
    finite = np.nan_to_num(row.astype(np.float64))
    return {
        "norm": round(float(np.linalg.norm(finite)), 6),
        "values": [float(f"{value:.5g}") for value in finite[:most]],
    }


def _remedy(parts: Sequence[PartDemand], nodes: Sequence[Node], replicas: int) -> str:
    like = max(nodes, key=lambda node: node.memory_limit)
    more = more_needed(parts, nodes, replicas, like)
    return f". It would fit with {more:,} more shards like {like.shard}" if more else ""


def _text(question: Mapping[str, Any], name: str) -> str:
    value = question.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} must be a text, got {shown(value)}")
    return value


def _number(question: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = question.get(name, least)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidRequest(f"{name} must be a whole number from {least} to {most:,}, got {shown(value)}")
    return value


def _numbers(question: Mapping[str, Any], name: str, most: int) -> list[int]:
    values = question.get(name)
    if not isinstance(values, list) or not 1 <= len(values) <= most:
        raise InvalidRequest(f"{name} must be 1 to {most} whole numbers")
    bound = 1 << (63 if name == "ids" else 31)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not -bound <= value < bound:
            raise InvalidRequest(f"{name} must be whole numbers below {bound:,}, got {shown(value)}")
    return values
