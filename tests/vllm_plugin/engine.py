"""One vLLM engine in this process, as a command: ENGINE.json says what it runs, RESULT.json what came out."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import interpreted
import torch


def resident_anonymous() -> int:
    """RssAnon of this process in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def parameter_bytes(model: Any) -> int:
    """Of a model's weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def register(model_class: str) -> None:
    """Have vLLM use `module:class` of this process for its architecture, over what the plugin registers."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    interpreted.without_torchvision()
    module, _, name = model_class.partition(":")
    architecture = "LongcatFlashNgramForCausalLM" if name == "NgramLlama" else name
    ModelRegistry.register_model(architecture, getattr(import_module(module), name))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily.

    job: `model` is a checkpoint. `class` is for `register`, or "" for the plugin's. `options` are those of vllm.LLM.
    `rounds` are lists of prompts [tokens] that run together, and `max_tokens` is that of each answer.
    Returns `rounds` with each answer's `tokens`, the `logprobs` of its best ones and the `cached` tokens of its prompt.
    Returns bytes that were `loaded`, by the process's anonymous memory, and those of the model's `parameters`.
    Returns the tokens that were `drafted`, and those of them that were `accepted`.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not torch.cuda.is_available():
        interpreted.prepare()
    from vllm import LLM, SamplingParams

    if job["class"]:
        register(job["class"])
    before = resident_anonymous()
    llm = LLM(
        job["model"],
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=8,
        disable_log_stats=False,
        **job["options"],
    )
    loaded = resident_anonymous() - before
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=3, detokenize=False
    )
    rounds = []
    for prompts in job["rounds"]:
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        rounds.append(
            [
                {
                    "tokens": list(answer.outputs[0].token_ids),
                    "logprobs": [
                        {token: each.logprob for token, each in step.items()} for step in answer.outputs[0].logprobs
                    ],
                    "cached": answer.num_cached_tokens,
                }
                for answer in answers
            ]
        )
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    told = {name: counters.get(f"vllm:spec_decode_num_{name}_tokens", 0) for name in ("draft", "accepted")}
    return {
        "rounds": rounds,
        "loaded": loaded,
        "parameters": llm.apply_model(parameter_bytes)[0],
        "drafted": told["draft"],
        "accepted": told["accepted"],
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
