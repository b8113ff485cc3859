"""A model for which drafts can pay: LongCat-Flash-Lite's architecture with several layers, and a draft layer.

Both are trained here together, for a minute or two, on what Python ships. That is prose (its language reference), code
(modules of its library), and chats whose answers quote a passage. One text in HELD_OUT is not read. Prompts are of
those, so no draft is right because the model knows its text by heart. The demo's model has one layer, which costs no
more than a draft layer. Here that layer is trained first, and the others are grown on it. They begin by adding nothing,
and have the last steps to learn.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LongcatFlashConfig

from examples.demo.make_checkpoint import (
    CONFIG,
    END,
    LongcatFlashNgramForCausalLM,
    read_documents,
    save_checkpoint,
    train_tokenizer,
)
from model_worker.longcat_mtp import DraftLayer, published_name

# A layer has two attentions, two dense blocks and the experts.
LAYERS = 6
# Of one layer, then of all.
STEPS, LAST_STEPS = 150, 10
# A window is as long as a prompt and its answer, so that the model has seen all positions.
BATCH, LENGTH = 4, 256
# Guesses that the draft layer learns to make, one on the other.
AHEAD = 2
# One text of so many is kept for prompts.
HELD_OUT = 5
_MODULES = (asyncio.locks, asyncio.queues, asyncio.streams, asyncio.tasks, json.decoder, json.encoder, argparse)


def prose(unread: bool) -> list[str]:
    """Passages of the language reference: those that are read, or those that are kept for prompts."""
    passages = [document.split("\n\n") for document in read_documents() if len(document) > 800]
    kept = passages[::HELD_OUT]
    if unread:
        return ["\n\n".join(passage) for passage in kept]
    # Some topics share paragraphs.
    known = {paragraph for passage in kept for paragraph in passage}
    read = [passage for place, passage in enumerate(passages) if place % HELD_OUT]
    return ["\n\n".join(paragraph for paragraph in passage if paragraph not in known) for passage in read]


def code(unread: bool) -> list[str]:
    """Functions and classes, each to be written once more as it is, as an edit of a file asks for."""
    found = [inspect.getsource(each) for module in _MODULES for each in vars(module).values() if _is_own(each, module)]
    sources = [source[:500] for source in found if len(source) > 300]
    return [
        f"{source}\n# The same once more:\n{source}"
        for place, source in enumerate(sources)
        if (place % HELD_OUT == 0) == unread
    ]


def chats(unread: bool) -> list[str]:
    """A passage, a question on it, and an answer that quotes it."""
    questions = cycle(("What does it say?", "Quote the passage.", "What is the rule?"))
    return [
        f"{text[:400]}\n\nUser: {next(questions)}\nAssistant: It says: {text[60:400]}"
        for text in prose(unread)
        if len(text) > 400
    ]


def prompts() -> dict[str, list[str]]:
    """Beginnings of texts of each kind that were not read, up to where the answer begins."""
    return {
        "code": [text[: text.index("more:\n") + 80] for text in code(unread=True)],
        "chat": [text[: text.index("says: ") + 6] for text in chats(unread=True)],
        "prose": [text[:400] for text in prose(unread=True)],
    }


def make_model(out: Path, steps: int) -> Path:
    """A checkpoint in the folder `out`, trained for so many steps. One that is there is kept."""
    if (out / "config.json").exists():
        return out
    torch.manual_seed(1)
    documents = code(unread=False) + chats(unread=False) + prose(unread=False)
    tokenizer = train_tokenizer(documents)
    encoded = tokenizer.backend_tokenizer.encode_batch([text + END for text in documents])
    stream = torch.tensor([token for document in encoded for token in document.ids])
    model = LongcatFlashNgramForCausalLM(LongcatFlashConfig(**CONFIG))
    layer: Any = DraftLayer(model.config)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    layer.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight)
    _train(model, layer, stream, steps, 0.005)
    model = _grown(model)
    _train(model, layer, stream, LAST_STEPS, 0.0005)
    tensors = {published_name(name): tensor.contiguous() for name, tensor in layer.state_dict().items()}
    return save_checkpoint(model, tokenizer, out, lambda folder: _add(folder, tensors))


def _add(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put further tensors into a checkpoint."""
    save_file(tensors, folder / "draft.safetensors", {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(tensors, "draft.safetensors")
    index.write_text(json.dumps(content))


def _grown(model: Any) -> Any:
    """The same with LAYERS layers. What the new ones add to their input is 0 at first."""
    grown: Any = LongcatFlashNgramForCausalLM(LongcatFlashConfig(**CONFIG | {"num_layers": LAYERS}))
    grown.load_state_dict(model.state_dict(), strict=False)
    for name, parameter in grown.model.layers[1:].named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.zero_()
    # A zero expert would add the input, so the new layers do not choose one.
    for layer in grown.model.layers[1:]:
        layer.mlp.router.e_score_correction_bias[CONFIG["n_routed_experts"] :] = -1e3
    return grown


def _train(model: Any, layer: Any, stream: Tensor, steps: int, rate: float) -> None:
    """Train both on windows of the stream, int64 [tokens]."""
    tables = list(model.model.ngram_embeddings.embedders.parameters())
    dense = [parameter for name, parameter in model.named_parameters() if ".embedders." not in name]
    dense += layer.parameters()
    optimizers = [torch.optim.SparseAdam(tables, lr=4 * rate), torch.optim.AdamW(dense, lr=rate, betas=(0.9, 0.95))]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(each, each.defaults["lr"], total_steps=steps, cycle_momentum=False)
        for each in optimizers
    ]
    # Half of the windows begin where a document begins, as prompts do.
    ends = (stream == CONFIG["eos_token_id"]).nonzero().flatten() + 1
    last = len(stream) - LENGTH - AHEAD - 1
    beginnings = ends[ends < last]
    begun, loss = perf_counter(), torch.zeros(())
    for _ in track(range(steps), "training the model and its draft layer", console=Console(stderr=True)):
        begins = torch.randint(last, (BATCH,))
        begins[::2] = beginnings[torch.randint(len(beginnings), (BATCH // 2,))]
        loss, *_ = parts = _losses(model, layer, stream[begins[:, None] + torch.arange(LENGTH + AHEAD + 1)])
        model.zero_grad()
        layer.zero_grad()
        sum(parts).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    Console(stderr=True).print(f"{steps} steps in {perf_counter() - begun:.0f} s, the last loss {loss.item():.2f}")


def _losses(model: Any, layer: Any, batch: Tensor) -> list[Tensor]:
    """Of the next token by the model, then of those after it by the draft layer. batch: [B, LENGTH + AHEAD + 1]."""
    tokens, body = batch[:, :LENGTH], model.model
    fused = body.ngram_embeddings(tokens, body.embed_tokens(tokens))
    states = body(inputs_embeds=fused, use_cache=False).last_hidden_state
    rotary = body.rotary_emb(states, torch.arange(LENGTH)[None])
    found = []
    for ahead in range(AHEAD + 1):
        if ahead:
            states = layer(batch[:, ahead : LENGTH + ahead], states, rotary, None, None)
        wanted = batch[:, ahead + 1 : LENGTH + ahead + 1]
        found.append(cross_entropy(model.lm_head(states).flatten(0, 1), wanted.flatten()))
    return found


def _is_own(each: Any, module: Any) -> bool:
    return (inspect.isclass(each) or inspect.isfunction(each)) and each.__module__ == module.__name__


def main() -> None:
    """Make the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(make_model(given.out, given.steps))


if __name__ == "__main__":
    main()
