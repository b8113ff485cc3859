"""The documentation's site: all pages are in its menu, all links lead somewhere, its pictures are drawn by code.

`make docs` builds it strictly. These tests need nothing that builds it.
"""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.docs import ROOT

GENERATE = ROOT / "docs/generate"
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


class Settings(yaml.SafeLoader):
    """mkdocs.yml without what its tags stand for."""


Settings.add_multi_constructor("tag:yaml.org,2002:python", lambda loader, suffix, node: None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, as they are put together for mkdocs."""
    out = tmp_path_factory.mktemp("site") / "docs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate", str(out)])
        runpy.run_path(str(GENERATE), run_name="__main__")
    return out


def menu(entry: Any) -> list[str]:
    """The pages of a part of mkdocs' nav."""
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in menu(each)]


@pytest.mark.slow
def test_every_page_is_in_the_menu_once(site: Path) -> None:
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Settings)
    assert settings["strict"] is True
    assert sorted(menu(settings["nav"])) == sorted(str(page.relative_to(site)) for page in site.rglob("*.md"))


@pytest.mark.slow
def test_every_link_of_the_site_leads_to_a_page_or_picture_of_it(site: Path) -> None:
    for page in site.rglob("*.md"):
        for target, _ in _LINK.findall(re.sub(r"`[^`\n]*`", "", page.read_text())):
            if target and "://" not in target and page.parent.name != "reference":
                assert (page.parent / target).is_file(), f"{page.name}: {target}"


@pytest.mark.slow
def test_the_reference_has_every_command_method_and_metric(site: Path) -> None:
    pages = {page.stem: page.read_text() for page in (site / "reference").glob("*.md")}
    for command in ("import", "up", "policy check", "plan"):
        assert f"`embedding-service {command}`" in pages["cli"]
    assert "`model-worker serve`" in pages["cli"] and "`--near PATH`" in pages["cli"]
    for proto in ROOT.glob("protos/embedding/v1/*.proto"):
        for method in re.findall(r"^  rpc (\w+)", proto.read_text(), re.MULTILINE):
            assert f"| `{method}` |" in pages["protos"]
        for message in re.findall(r"^message (\w+)", proto.read_text(), re.MULTILINE):
            assert f"\n### {message}\n" in pages["protos"]
    for metric in ("embedding_rows_total", "embedding_lookup_seconds", "embedding_lost_parts", "embedding_shards"):
        assert f"| `{metric}` |" in pages["metrics"]
    for name in ("EmbeddingClient", "Session", "RemoteEmbeddingBagCollection", "attach"):
        assert re.search(rf"^::: [\w.]+\.{name}$", pages["api"], re.MULTILINE)


def test_pictures_are_those_that_their_code_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GENERATE))
    drawn = runpy.run_path(str(GENERATE / "pictures.py"))["PICTURES"]
    assert sorted(path.stem for path in (ROOT / "docs/pictures").glob("*.svg")) == sorted(drawn)
    for name, draw in drawn.items():
        assert (ROOT / f"docs/pictures/{name}.svg").read_text() == draw().svg(), (
            f"run docs/generate/pictures.py: {name}"
        )


def test_every_variable_is_in_the_configuration_page() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    for package in ("embedding_service", "model_worker"):
        for path in (ROOT / package).rglob("*.py"):
            for variable in re.findall(r'"(EMBEDDING_SERVICE_[A-Z_]+)"', path.read_text()):
                assert f"`{variable}`" in page, f"{path}: {variable}"
