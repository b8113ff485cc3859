"""The client side stands beside any model stack: it loads neither FBGEMM nor TorchRec nor Ray, nor needs them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HEAVY = (
    "fbgemm_gpu",
    "torchrec",
    "ray",
    "transformers",
    "tokenizers",
    "pydantic",
    "fsspec",
    "typer",
    "rich",
    "safetensors",
    "opentelemetry",
)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_using_the_client_side_loads_nothing_heavy() -> None:
    loaded = run_python(
        "import sys, torch\n"
        "from embedding_service import EmbeddingClient, NgramHasher, RemoteEmbedding\n"
        "from embedding_service.formats import get_format\n"
        "get_format('int8').decode(torch.zeros(1, 12, dtype=torch.uint8), 8)\n"
        "RemoteEmbedding(EmbeddingClient('localhost:1'), 'a/b')\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    ).split()
    assert "torch" in loaded
    assert "grpc" in loaded
    assert not set(loaded) & set(HEAVY)


def test_naming_the_package_loads_not_even_torch() -> None:
    loaded = run_python("import sys, embedding_service; print(*sys.modules)").split()
    assert "embedding_service" in loaded
    assert "torch" not in loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("cli, commands.up, store.store, controller.server, memory", ("torch", "fbgemm_gpu", "torchrec")),
        ("cli, client.status, commands.query", ("torch", "numpy", "pydantic", "fsspec")),
        ("cli, client.thin, commands.bench", ("torch", "pydantic", "fsspec")),
        ("shard.server", ("fbgemm_gpu", "torchrec", "sympy")),
        ("store.importing, commands.store", ("fbgemm_gpu", "torchrec", "sympy")),
    ],
)
def test_each_process_loads_only_what_it_needs(modules: str, heavy: tuple[str, ...]) -> None:
    """Each package takes 0.2 to 4 s of a core to load, at every start."""
    imports = ", ".join(f"embedding_service.{module}" for module in modules.split(", "))
    loaded = run_python(f"import {imports}; import sys; print(*sys.modules)").split()
    assert "embedding_service.cli" in loaded or "embedding_service.store" in loaded
    assert not set(loaded) & set(heavy)


@pytest.mark.slow
def test_decoding_in_a_shard_and_quantizing_load_no_package_of_fbgemm() -> None:
    loaded = run_python(
        "import sys, torch\n"
        "from embedding_service.formats import get_format\n"
        "from embedding_service.rows.host import fbgemm_kernel\n"
        "stored = get_format('int8').encode(torch.ones(2, 8))\n"
        "rows = fbgemm_kernel(stored.view(-1), 8, get_format('int8').fbgemm_type, 0)(torch.tensor([1]))\n"
        "assert rows.tolist() == [[1.0] * 8], rows\n"
        "print(*sys.modules)"
    ).split()
    assert "fbgemm_gpu" not in loaded


def test_the_commands_say_what_to_install_where_only_the_client_side_is() -> None:
    for package, extra in (("embedding_service", "cpu"), ("model_worker", "worker")):
        code = f"import sys; sys.modules['typer'] = None; from {package}.__main__ import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 1
        assert f"pip install 'embedding-service[{extra}]'" in done.stderr
        assert "Traceback" not in done.stderr


def test_training_says_what_to_install_where_only_the_client_side_is() -> None:
    code = (
        "import sys; sys.modules['xxhash'] = None\n"
        "from embedding_service import SGD, EmbeddingClient, InvalidRequest\n"
        "try: EmbeddingClient('localhost:1').train('model@branch', optimizer=SGD(lr=0.1))\n"
        "except InvalidRequest as error: print(error)"
    )
    assert "pip install 'embedding-service[train]'" in run_python(code)


def test_plain_install_asks_for_nothing_heavy() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].split("=")[0] for requirement in project["dependencies"]}
    assert names == {"grpcio", "protobuf", "numpy", "torch"}


@pytest.mark.slow
def test_the_extra_worker_brings_all_that_a_worker_loads() -> None:
    """In the worker's process no package can be imported that the extra does not ask for, by itself or by others."""
    loaded = run_python(
        "import importlib.metadata as metadata, sys\n"
        "from packaging.requirements import Requirement\n"
        "asked, wanted = set(), [('embedding-service', 'worker')]\n"
        "while wanted:\n"
        "    if (pair := wanted.pop()) in asked: continue\n"
        "    asked.add(pair)\n"
        "    try: lines = metadata.requires(pair[0]) or []\n"
        "    except metadata.PackageNotFoundError: continue  # of other machines\n"
        "    for asks in map(Requirement, lines):\n"
        "        if asks.marker is None or asks.marker.evaluate({'extra': pair[1]}):\n"
        "            wanted += [(asks.name.lower().replace('_', '-'), extra) for extra in ('', *asks.extras)]\n"
        "names = {name for name, _ in asked}\n"
        "for module, packages in metadata.packages_distributions().items():\n"
        "    if names.isdisjoint(each.lower().replace('_', '-') for each in packages):\n"
        "        sys.modules.setdefault(module, None)\n"
        "import model_worker.cli, model_worker.http_app, model_worker.serving\n"
        "print(*(name for name, module in sys.modules.items() if module))"
    ).split()
    assert {"model_worker.worker", "transformers", "ray", "jwt"} <= set(loaded)
