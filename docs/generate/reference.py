"""The reference, out of the code: Python's names, the command line, the contract, metrics."""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Modules beside `embedding_service` whose names people use.
MODULES = ("embedding_service.torchrec", "model_worker")


# Python


def api() -> str:
    """A directive of mkdocstrings for each public name."""
    import embedding_service
    from embedding_service import errors

    homes = embedding_service._HOMES
    lines = ["# Python", "", "Errors stand at the end, as one tree.", ""]
    classes = [name for name in embedding_service.__all__ if name in homes]
    for name in sorted(classes, key=lambda name: "optimizers" in homes[name]):  # those last
        lines += [f"::: {_home(homes[name], name)}", ""]
    for module in MODULES:
        lines += [f"## {module}", ""]
        lines += [f"::: {_home(module, name)}\n" for name in __import__(module, fromlist=["__all__"]).__all__]
    tree = (errors.__doc__ or "").split("\n", 1)[1].strip("\n")
    return "\n".join([*lines, "## Errors", "", "All of them are names of `embedding_service`.", "", tree, ""])


def _home(module: str, name: str) -> str:
    """Where a name of a module is defined. Only what it is, without an import of what it needs."""
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and any(each.name == name for each in node.names):
            return _home(node.module, name)
    return f"{module}.{name}"


# The command line


def commands() -> str:
    """Every command, with its options."""
    import typer

    import embedding_service.cli
    import model_worker.cli

    lines = ["# Command line", "", "`--help` of each command says the same.", ""]
    for name, app in (("embedding-service", embedding_service.cli.app), ("model-worker", model_worker.cli.app)):
        lines += _command(name, typer.main.get_command(app), 2)
    return "\n".join(lines)


def _command(name: str, command: Any, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} `{name}`", "", _paragraphs(command.help or ""), "")
    if hasattr(command, "commands"):
        for child, each in command.commands.items():
            yield from _command(f"{name} {child}", each, level + 1)
        return
    yield from ("| option | meaning |", "| --- | --- |")
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            yield f"| {_names(parameter)} | {_cell(_meaning(parameter))} |"
    yield ""


def _names(parameter: click.Parameter) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name or '').upper()}`"
    takes = "" if getattr(parameter, "is_flag", False) else f" {(parameter.metavar or parameter.name or '').upper()}"
    return ", ".join(f"`{name}{takes}`" for name in [*parameter.opts, *parameter.secondary_opts])


def _meaning(parameter: Any) -> str:
    default = parameter.default
    shown = default not in (None, False, "") and not callable(default) and default != ()
    return (parameter.help or "") + (f" Default: {default}." if shown else "")


# The contract


def protos() -> str:
    """Services, messages and enums of protos/, with their comments."""
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    folder = ROOT / "protos"
    sources = sorted(str(path.relative_to(folder)) for path in folder.glob("embedding/v1/*.proto"))
    with tempfile.NamedTemporaryFile() as found:
        options = [f"-I{folder}", "--include_source_info", f"--descriptor_set_out={found.name}"]
        assert protoc.main(["protoc", *options, *sources]) == 0
        files = descriptor_pb2.FileDescriptorSet.FromString(Path(found.name).read_bytes()).file
    lines = ["# Protocol", "", "Package `embedding.v1`. The `.proto` files themselves are all that a client needs.", ""]
    return "\n".join([*lines, *(line for file in files for line in _proto(file))])


def _proto(file: Any) -> Iterator[str]:
    comments = {tuple(each.path): each for each in file.source_code_info.location}
    before = comments[(12,)]  # what stands before `syntax`
    detached = [*before.leading_detached_comments, before.leading_comments]
    yield from (f"## {Path(file.name).name}", "", _text("\n".join(detached)), "")

    def said(*path: int) -> str:
        at = comments.get(path)
        return (at.leading_comments + at.trailing_comments) if at else ""

    for number, service in enumerate(file.service):
        yield from (f"### service {service.name}", "", _text(said(6, number)), "")
        yield from ("| method | asked | answered | what |", "| --- | --- | --- | --- |")
        for index, method in enumerate(service.method):
            asked = "stream of " * method.client_streaming + f"`{_short(method.input_type)}`"
            answered = "stream of " * method.server_streaming + f"`{_short(method.output_type)}`"
            yield f"| `{method.name}` | {asked} | {answered} | {_cell(said(6, number, 2, index))} |"
        yield ""
    for number, message in enumerate(file.message_type):
        yield from (f"### {message.name}", "", _text(said(4, number)), "")
        if message.field:
            yield from ("| number | field | type | what |", "| --- | --- | --- | --- |")
        for index, field in enumerate(message.field):
            yield f"| {field.number} | `{field.name}` | {_type(field)} | {_cell(said(4, number, 2, index))} |"
        yield ""
    for number, enum in enumerate(file.enum_type):
        yield from (f"### enum {enum.name}", "", _text(said(5, number)), "")
        yield from ("| number | name | what |", "| --- | --- | --- |")
        for index, value in enumerate(enum.value):
            yield f"| {value.number} | `{value.name}` | {_cell(said(5, number, 2, index))} |"
        yield ""


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _type(field: Any) -> str:
    kind = _short(field.type_name) if field.type_name else field.Type.Name(field.type).removeprefix("TYPE_").lower()
    return ("repeated " if field.label == field.LABEL_REPEATED else "") + f"`{kind}`"


# Metrics


def metrics() -> str:
    """Every metric that the code names, by process."""
    lines = ["# Metrics", "", "Each process has them at `/metrics` of its `--metrics-port`, for Prometheus.", ""]
    for title, folder in (
        ("A shard", "embedding_service/shard"),
        ("The controller", "embedding_service/controller"),
        ("A worker's replica", "model_worker"),
    ):
        lines += [f"## {title}", "", "| name | kind | what |", "| --- | --- | --- |"]
        found = sorted({each for path in sorted((ROOT / folder).rglob("*.py")) for each in _named(path)})
        assert found, folder
        lines += [f"| `{name}` | {kind} | {_cell(text)} |" for name, kind, text in found]
        lines.append("")
    return "\n".join(lines)


def _named(path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, kind and text of the metrics that a file makes."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            made = getattr(node.func, "id", getattr(node.func, "attr", ""))
            kind = made.removesuffix("MetricFamily").lower()
            texts = _constants(node.args[:2])
            if kind in ("counter", "gauge", "histogram") and texts:
                name, text = texts
                prefix = "embedding_" if made in ("counter", "gauge") else ""
                yield prefix + name + "_total" * (kind == "counter"), kind, text
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            kind = getattr(node.targets[0], "id", "").strip("_").lower().removesuffix("s")
            for value in node.value.values:
                texts = _constants(value.elts) if isinstance(value, ast.Tuple) else None
                if kind in ("counter", "gauge") and texts:
                    yield f"ray_{texts[0]}" + "_total" * (kind == "counter"), kind, texts[1]


def _constants(nodes: list[ast.expr]) -> tuple[str, str] | None:
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return (texts[0], texts[1]) if len(texts) == len(nodes) == 2 else None


# Text


def _paragraphs(text: str) -> str:
    return "\n".join(line.strip() for line in text.split("\n"))


def _text(comment: str) -> str:
    """A comment as it was laid out."""
    lines = [line.removeprefix(" ") for line in comment.rstrip().split("\n")]
    return "\n".join(["```text", *lines, "```"]) if comment.strip() else ""


def _cell(text: str) -> str:
    """Text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
