"""Answers that are worked out again only where the question changed."""

from embedding_service.controller.last import Last, LastOfEach


def test_an_answer_is_that_of_the_question_by_its_value() -> None:
    asked: list[tuple[list[int], int]] = []

    def add(numbers: list[int], more: int) -> int:
        asked.append((numbers, more))
        return sum(numbers) + more

    last, numbers = Last(add), [1, 2]
    assert last(numbers, 3) == last([1, 2], 3) == 6
    assert asked == [(numbers, 3)]
    assert last([1, 2, 3], 3) == 9 and last(numbers, 3) == 6
    assert len(asked) == 3


def test_each_thing_has_an_answer_until_it_is_asked_about_no_more() -> None:
    asked: list[int] = []

    def double(number: int) -> int:
        asked.append(number)
        return 2 * number

    each: LastOfEach[str, int] = LastOfEach(double)
    assert each({"a": (1,), "b": (2,)}) == {"a": 2, "b": 4}
    assert each({"b": (2,), "a": (3,)}) == {"b": 4, "a": 6}
    assert asked == [1, 2, 3]
    assert each({"b": (2,)}) == {"b": 4} and asked == [1, 2, 3]
    assert each({"a": (3,)}) == {"a": 6} and asked == [1, 2, 3, 3]
