"""Grafana's boards are what their generator makes."""

from k8s.boards import BOARDS, FOLDER, board


def test_the_boards_are_those_that_are_generated() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == BOARDS.keys()
    for name, panels in BOARDS.items():
        assert (FOLDER / f"{name}.json").read_text() == board(name, panels()), "run: python k8s/boards.py"
