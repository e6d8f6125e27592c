"""The own tasks: their parts do not overlap, right responses score 1, and lists of candidates are not answers."""

from __future__ import annotations

import json
import math

import pytest

from pyfast_dpo.rewards import TASKS, RewardFunctions, task_of

NUMBERS = ", ".join(map(str, range(101)))


def right_response(name: str, answer: str) -> str:
    if name == "json":
        return answer
    if name == "bullets":
        count, members = answer.split(" of ")
        return "\n".join(f"- {member.title()}" for member in members.split(", ")[: int(count)])
    return f"The capital is {answer}." if name == "sentence" else f"Let me see.\nAnswer: {answer}"


def question_of(row) -> str:
    (message,) = row["prompt"]
    assert message["role"] == "user"
    return message["content"]


@pytest.fixture(params=list(TASKS))
def task(request):
    return TASKS[request.param]


def test_rows_are_questions_with_answers_each_once(task) -> None:
    rows = task.rows(20)
    assert len({question_of(row) for row in rows}) == 20
    assert all(row["task"] == task.name and isinstance(row["answer"], str) for row in rows)
    assert task.rows(20) == rows and task.rows(20, seed=1) != rows


def test_no_question_is_both_trained_on_and_held_out(task) -> None:
    train = [question_of(row) for seed in range(5) for row in task.rows(20, seed=seed)]
    heldout = [question_of(row) for row in task.rows(5, split="heldout", seed=7)]
    assert len(heldout) == 5 and not set(train) & set(heldout)


def test_a_right_response_scores_one_as_text_and_as_messages(task) -> None:
    rows = task.rows(20)
    texts = [right_response(task.name, row["answer"]) for row in rows]
    answers = [row["answer"] for row in rows]
    assert task(completions=texts, answer=answers, prompts=None) == [1.0] * 20
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert task(completions=messages, answer=answers) == [1.0] * 20


CAPITALS = "Paris, Berlin, Rome, Madrid, Lisbon, London and Oslo"
PLANETS = "mercury, venus, earth, mars"
LEMON = json.dumps({"name": "lemon", "color": "yellow"})
LISTED = [
    ("sums", "12", f"Answer: {NUMBERS}", 0),
    ("sums", "12", "Answer: 11 or 12", 0),
    ("sums", "12", "\n".join(f"Answer: {i}" for i in range(100)), 0),
    ("sums", "12", f"12 {NUMBERS}", 0),
    ("letters", "2", "Answer: 0, 1, 2, 3", 0),
    ("letters", "2", "Answer: 2\nAnswer: 3", 0),
    ("sorting", "1, 2, 3", "Answer: 1, 2, 3, 1, 3, 2, 2, 1, 3", 0),
    ("sorting", "1, 2, 3", "Answer: 3, 2, 1", 1 / 3),  # one place of three
    ("sorting", "1, 2, 3", "Answer: 1, 1, 3", 0),
    ("json", LEMON, '{"name": "lemon", "color": "yellow red green"}', 0.5),
    ("json", LEMON, '{"name": "lemon", "color": "red", "color": "yellow"}', 0),
    ("json", LEMON, '{"name": "lemon", "color": ["red", "yellow"]}', 0),
    ("json", LEMON, '[["name", "lemon"], ["color", "yellow"]]', 0),  # no object
    ("json", LEMON, LEMON + LEMON, 0),
    ("json", LEMON, "[" * 100_000, 0),
    ("bullets", f"2 of {PLANETS}", "- venus\n- earth\n- mars\n- mercury", 0),
    ("bullets", f"2 of {PLANETS}", "- venus, earth\n- mars, mercury", 0.25),
    ("bullets", f"2 of {PLANETS}", "- Mars\n- Mars.", 0.625),  # one of two
    ("sentence", "Rome", f"It is {CAPITALS}.", 0.5),
    ("sentence", "Rome", "It is one of Rome, Paris.", 0.5),
    ("sentence", "Rome", "The capital is Rome. The capital is Paris.", 0),
]


@pytest.mark.parametrize("name, answer, text, score", LISTED)
def test_a_list_of_candidates_is_no_answer(name, answer, text, score) -> None:
    assert TASKS[name].score(text, answer) == pytest.approx(score)


def test_no_single_response_does_well_at_a_task(task) -> None:
    """What a policy could write whatever the question."""
    rows = task.rows(24)
    responses = [
        *(right_response(task.name, row["answer"]) for row in rows),
        *(text for name, _, text, _ in LISTED if name == task.name),
        *("", "Answer:", "Answer: None of them.", "\x00", "- \n- \n-"),
    ]
    means = [sum(task.score(text, row["answer"]) for row in rows) / len(rows) for text in responses]
    assert all(0 <= mean <= 0.55 for mean in means), max(means)


def test_tasks_can_be_mixed_each_judges_its_own_rows() -> None:
    rows = [TASKS["sums"].rows(1)[0], TASKS["sentence"].rows(1)[0]]
    texts = [right_response(row["task"], row["answer"]) for row in rows]
    rewards = RewardFunctions([TASKS["sums"], TASKS["sentence"]])
    columns = {name: [row[name] for row in rows] for name in ("answer", "task")}
    table = rewards.score([row["prompt"] for row in rows], texts, [[1]] * 2, columns)
    assert rewards.names == ["sums", "sentence"]
    assert table[0, 0] == table[1, 1] == 1
    assert math.isnan(table[0, 1]) and math.isnan(table[1, 0])


def test_more_questions_than_there_are_and_a_wrong_split_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sentence.rows: count must be at most .*, got 100"):
        TASKS["sentence"].rows(100)
    with pytest.raises(ValueError, match=r"split must be one of .*'train', 'heldout'.*'test'"):
        TASKS["sums"].rows(1, split="test")


class Procedural:
    """A data set of the shape of reasoning_gym's: something for every answer, a share for containing the right one."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index):
        return {"question": f"Twice {index}?", "answer": str(2 * index), "metadata": {"i": index}}

    def score_answer(self, answer, entry) -> float:
        if answer is None:
            return 0.0
        if answer == entry["answer"]:
            return 1.0
        return len(entry["answer"]) / len(answer) if entry["answer"] in answer else 0.01


def test_a_procedural_data_set_is_a_task_and_lists_score_nothing() -> None:
    task = task_of(Procedural())
    rows = task.rows(10)
    assert task.name == "Procedural" and "Answer:" in question_of(rows[0])
    answers = [row["answer"] for row in rows]
    right = [f"Answer: {2 * int(answer)}" for answer in answers]
    assert task(completions=right, answer=answers) == [1.0] * 10
    assert task(completions=[f"Answer: {NUMBERS}"] * 10, answer=answers) == [0.0] * 10
    graded = task_of(Procedural(), "twice", exact=False)
    assert graded.name == "twice" and 0 < graded.score("Answer: 1, 2", "1") < 1
    assert graded.score("2", "1") == 0.0
