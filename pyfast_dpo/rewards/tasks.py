"""Six small tasks whose answers a rule can check, for demonstrations, tests and comparisons of methods.

Each is a generator of questions and a score of a response. A question belongs to the training or to the held-out part
by its text alone, so that the parts never overlap, whatever the seeds and counts. Scores are in [0, 1]; a response that
lists the possible answers scores no better than one of them would.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pyfast_dpo.ops.checks import check_choice
from pyfast_dpo.rewards.texts import bullets_of, final_answer, is_sentence, same_answer, text_of

HELDOUT_EVERY = 5  # one question in so many
FRUITLESS = 2000  # draws without a new question, after which there are no more

ANSWER = 'End with a line "Answer:" and the answer.'
Score = Callable[[str, str], float]


@dataclass(frozen=True)
class Task:
    """Questions, and a reward function for them (`reward_funcs=[TASKS["sums"]]`).

    Attributes:
        name: of the task, in the column `task` and in metrics.
        make: draws (question, answer).
        score: `(completion, answer) -> float` in [0, 1].
    """

    name: str
    make: Callable[[random.Random], tuple[str, str]]
    score: Score

    @property
    def __name__(self) -> str:  # what TRL's trainers call it
        return self.name

    def rows(
        self, count: int, *, split: Literal["train", "heldout"] = "train", seed: int = 0
    ) -> list[dict[str, Any]]:
        """Rows `{"prompt": messages, "answer": str, "task": name}`, each question once.

        Raises:
            ValueError: a split of another name; more questions than there are.
        """
        check_choice(f"{self.name}.rows", "split", split, ("train", "heldout"))
        draw = random.Random(f"{self.name} {split} {seed}")
        answers: dict[str, str] = {}
        fruitless = 0
        while len(answers) < count:
            question, answer = self.make(draw)
            if question in answers or is_heldout(question) != (split == "heldout"):
                fruitless += 1
            else:
                answers[question], fruitless = answer, 0
            if fruitless == FRUITLESS:
                raise ValueError(
                    f"{self.name}.rows: count must be at most {len(answers)}, the {split} questions that there are, got "
                    f"{count}"
                )
        return [
            {"prompt": [{"role": "user", "content": question}], "answer": answer, "task": self.name}
            for question, answer in answers.items()
        ]

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[str],
        task: Sequence[str] | None = None,
        **others: Any,
    ) -> list[float | None]:
        """The score of each response; None for rows of other tasks, so that tasks can be mixed."""
        tasks = task or [self.name] * len(completions)
        return [
            self.score(text_of(completion), right) if name == self.name else None
            for completion, right, name in zip(completions, answer, tasks, strict=True)
        ]


def is_heldout(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % HELDOUT_EVERY == 0


def _sums(draw: random.Random) -> tuple[str, str]:
    first, second = draw.randint(1, 50), draw.randint(1, 50)
    if draw.random() < 0.5:
        return f"What is {first} + {second}? {ANSWER}", str(first + second)
    first, second = max(first, second), min(first, second)
    return f"What is {first} - {second}? {ANSWER}", str(first - second)


def _sorting(draw: random.Random) -> tuple[str, str]:
    numbers = draw.sample(range(100), 3)
    listed = ", ".join(map(str, numbers))
    return (
        f"Sort from smallest to largest: {listed}. {ANSWER}",
        ", ".join(map(str, sorted(numbers))),
    )


def _letters(draw: random.Random) -> tuple[str, str]:
    count = draw.randint(0, 3)  # as often as one another: no number is a good guess
    word, letter = draw.choice(
        [(w, each) for w in WORDS for each in string.ascii_lowercase if w.count(each) == count]
    )
    return f'How often is the letter "{letter}" in "{word}"? {ANSWER}', str(count)


def _one_answer(completion: str, answer: str) -> float:
    return float(same_answer(final_answer(completion), answer))


def _places(completion: str, answer: str) -> float:
    """The share of places that are right, if the answer is the given numbers in some order and nothing else."""
    found = re.findall(r"\d+", final_answer(completion) or "")
    right = answer.split(", ")
    if sorted(found) != sorted(right):
        return 0.0
    return sum(map(str.__eq__, found, right)) / len(right)


def _json(draw: random.Random) -> tuple[str, str]:
    name, colour = draw.choice(COLOURS).split(":")
    question = f'Write a JSON object with the keys "name" and "color" for: {name}. Nothing else.'
    return question, json.dumps({"name": name, "color": colour})


def _same_object(completion: str, answer: str) -> float:
    """0.5 for an object of exactly these keys, each once, and strings; 1 if the strings are right as well."""
    right = json.loads(answer)
    try:
        pairs = json.loads(completion, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(pairs, tuple) or sorted(key for key, _ in pairs) != sorted(right):
        return 0.0
    if not all(isinstance(value, str) for _, value in pairs):
        return 0.0
    return 1.0 if all(value.strip().casefold() == right[key] for key, value in pairs) else 0.5


def _bullets(draw: random.Random) -> tuple[str, str]:
    whole, members = draw.choice(list(MEMBERS.items()))
    count = draw.randint(2, 3)
    return (
        f'Name {count} of the {whole}. Write {count} lines, each "- " and a name.',
        f"{count} of {members}",
    )


def _distinct_members(completion: str, answer: str) -> float:
    """0.25 for the right number of bullets and nothing else; the rest is the share of them that are distinct members."""
    count, _, members = answer.partition(" of ")
    items = bullets_of(completion)
    if items is None or len(items) != int(count):
        return 0.0
    found = {item.strip(" .,*").casefold() for item in items} & set(members.split(", "))
    return 0.25 + 0.75 * len(found) / int(count)


def _sentence(draw: random.Random) -> tuple[str, str]:
    country, city = draw.choice(CAPITALS).split(":")
    return f"What is the capital of {country}? Answer in one short sentence.", city


def _names_in_a_sentence(completion: str, answer: str) -> float:
    """0.5 for one sentence of 4 to 12 words, 1 if it names the right capital and no other of the table."""
    if not is_sentence(completion, 4, 12):
        return 0.0
    named = [city for city in (entry.split(":")[1] for entry in CAPITALS) if city in completion]
    return 1.0 if named == [answer] else 0.5


def task_of(dataset: Any, name: str | None = None, *, exact: bool = True) -> Task:
    """A task of a procedural data set such as reasoning_gym's, whose answers take one line.

    Args:
        dataset: with a length, entries `{"question": str, "answer": str, ...}` by index, the same at every call, and
            `score_answer(answer: str | None, entry) -> float`. What it scores is the line after the last "Answer:".
        name: by default that of the class.
        exact: 1 for a full score, else 0: many such scores give something for every answer, and a share for one that
            contains the right one, which a policy finds. False: the score as it is.
    """

    def make(draw: random.Random) -> tuple[str, str]:
        index = draw.randrange(len(dataset))
        return f"{dataset[index]['question']}\n{ANSWER}", str(index)

    def score(completion: str, answer: str) -> float:
        value = float(dataset.score_answer(final_answer(completion), dataset[int(answer)]))
        return float(value >= 1) if exact else value

    return Task(name or type(dataset).__name__, make, score)


WORDS = (
    "banana pepper referee letter coffee kitten balloon mirror summer winter cabbage button bottle pencil garden window "
    "planet rocket violin guitar potato tomato carrot yellow purple orange silver castle bridge river forest desert "
    "island puzzle bubble rabbit turtle parrot monkey elephant eleven seventeen cinnamon assassin tattoo mammal sweetener"
).split()

COLOURS = (
    "banana:yellow, snow:white, coal:black, grass:green, tomato:red, carrot:orange, lemon:yellow, blood:red, milk:white, "
    "strawberry:red, crow:black, pea:green, frog:green, swan:white, pumpkin:orange, broccoli:green, butter:yellow, "
    "chocolate:brown, orange:orange, salt:white, sugar:white, spinach:green, cherry:red, flamingo:pink, gorilla:black, "
    "sky:blue, cucumber:green, rice:white, polar bear:white, sunflower:yellow, lettuce:green, raven:black, ruby:red, "
    "emerald:green, sapphire:blue, ivory:white, tar:black, mustard:yellow, chick:yellow, fire engine:red"
).split(", ")

MEMBERS = {
    "days of the week": "monday, tuesday, wednesday, thursday, friday, saturday, sunday",
    "months": "january, february, march, april, may, june, july, august, september, october, november, december",
    "seasons": "spring, summer, autumn, winter",
    "planets of the solar system": "mercury, venus, earth, mars, jupiter, saturn, uranus, neptune",
    "continents": "africa, antarctica, asia, australia, europe, north america, south america",
    "Baltic states": "estonia, latvia, lithuania",
    "colours of the rainbow": "red, orange, yellow, green, blue, indigo, violet",
    "vowels": "a, e, i, o, u",
    "five senses": "sight, hearing, smell, taste, touch",
    "suits of playing cards": "hearts, diamonds, clubs, spades",
    "points of the compass": "north, east, south, west",
    "chess pieces": "king, queen, rook, bishop, knight, pawn",
    "Beatles": "john lennon, paul mccartney, george harrison, ringo starr",
    "Great Lakes": "superior, michigan, huron, erie, ontario",
    "noble gases": "helium, neon, argon, krypton, xenon, radon",
    "first ten numbers": "one, two, three, four, five, six, seven, eight, nine, ten",
}

CAPITALS = (
    "France:Paris, Germany:Berlin, Italy:Rome, Spain:Madrid, Portugal:Lisbon, England:London, Ireland:Dublin, "
    "Norway:Oslo, Sweden:Stockholm, Finland:Helsinki, Denmark:Copenhagen, Poland:Warsaw, Austria:Vienna, Greece:Athens, "
    "Hungary:Budapest, Russia:Moscow, Ukraine:Kyiv, Turkey:Ankara, Egypt:Cairo, Kenya:Nairobi, Japan:Tokyo, "
    "China:Beijing, India:New Delhi, Thailand:Bangkok, Vietnam:Hanoi, Cuba:Havana, Peru:Lima, Chile:Santiago, "
    "Canada:Ottawa, Colombia:Bogotá, Argentina:Buenos Aires, Iran:Tehran, Iraq:Baghdad, Belgium:Brussels, Cyprus:Nicosia"
).split(", ")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sums", _sums, _one_answer),
        Task("sorting", _sorting, _places),
        Task("letters", _letters, _one_answer),
        Task("json", _json, _same_object),
        Task("bullets", _bullets, _distinct_members),
        Task("sentence", _sentence, _names_in_a_sentence),
    )
}
