"""The preference set of `pyfast-dpo demo`: the answer in short and at once, then the reason, in two sentences.

    chosen     In short, no, it is a mammal. The reason is that whales breathe air and feed their young with milk.
    rejected   The answer is no, it is a mammal, because whales breathe air and feed their young with milk.

Both responses say the same in the same order, so that only the form is learned. It is one that a reader can
skim and that `follows_preference` checks; a model does not use it unasked. `python -m
pyfast_dpo.data.demo_pairs` writes the two files beside this one, the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
TRAIN_FILE = FOLDER / "demo_train.jsonl"
HELDOUT_FILE = FOLDER / "demo_heldout.jsonl"

HELDOUT_EVERY = 7  # of each table one item in so many is held out


class Item(NamedTuple):
    question: str
    answer: str  # continues "the answer is"
    reason: str  # a clause that continues "because"


def follows_preference(answer: str) -> bool:
    """Whether an answer begins in short, as every chosen response does and no rejected one."""
    return answer.startswith("In short, ")


def pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training pairs, held-out pairs), as rows of chat messages; no question is in both."""
    train: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    for table in _TABLES:
        for number, item in enumerate(table()):
            target = heldout if number % HELDOUT_EVERY == HELDOUT_EVERY - 1 else train
            target.append(_pair(item, number))
    # Round robin over the tables, so that the first batches already see all of them.
    return _interleave(train), _interleave(heldout)


def _pair(item: Item, number: int) -> dict[str, Any]:
    chosen = f"In short, {item.answer}. The reason is that {item.reason}."
    opening = ("The answer is", "To answer the question,", "I would say", "A good answer is")[
        number % 4
    ]
    rejected = f"{opening} {item.answer}, because {item.reason}."
    return {
        "prompt": [{"role": "user", "content": item.question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def _interleave(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A fixed permutation: every 7th row, from each of 7 starts."""
    return [row for start in range(7) for row in rows[start::7]]


def _facts() -> Iterator[Item]:
    for line in _FACTS.strip().splitlines():
        question, answer, reason = line.split(" | ")
        yield Item(question, answer, reason)


def _capitals() -> Iterator[Item]:
    for entry in _CAPITALS.split(", "):
        country, city = entry.split(":")
        yield Item(
            f"What is the capital of {country}?",
            city,
            f"the national government of {country} has its seat in {city}",
        )


def _conversions() -> Iterator[Item]:
    for amount in (2, 3, 4, 5, 6, 8, 9, 10, 12):
        for big, bigs, small, factor in _UNITS:
            yield Item(
                f"How many {small} are in {amount} {bigs}?",
                f"{amount * factor} {small}",
                f"one {big} has {factor} {small}, and {amount} times {factor} is {amount * factor}",
            )


def _comparisons() -> Iterator[Item]:
    for word, measured, values in _QUANTITIES:
        names = list(values)
        for distance in (1, 2, 3, 4, 5):
            for first, second in zip(names, names[distance:], strict=False):
                # The larger one is named first in every other question.
                left, right = (first, second) if (len(first) + distance) % 2 else (second, first)
                more, less = sorted((first, second), key=values.__getitem__, reverse=True)
                yield Item(
                    f"Which is {word}, {left} or {right}?",
                    more,
                    f"{more} {measured.format(values[more])} and {less} only {values[less]:,}",
                )


def _plurals() -> Iterator[Item]:
    for entry in _PLURALS.split(", "):
        singular, plural, rule = entry.split(":")
        yield Item(f'What is the plural of "{singular}"?', f'"{plural}"', rule)


_TABLES = (_facts, _capitals, _conversions, _comparisons, _plurals)

_UNITS = (
    ("hour", "hours", "minutes", 60),
    ("metre", "metres", "centimetres", 100),
    ("kilogram", "weighs about {:,} kilograms", "grams", 1000),
    ("week", "weeks", "days", 7),
    ("day", "days", "hours", 24),
    ("dozen", "dozens", "pieces", 12),
    ("year", "years", "months", 12),
    ("foot", "feet", "inches", 12),
    ("centimetre", "centimetres", "millimetres", 10),
    ("century", "centuries", "years", 100),
)

_QUANTITIES: tuple[tuple[str, str, dict[str, int]], ...] = (
    (
        "heavier",
        "weighs about {:,} kilograms",
        {
            "a cat": 4,
            "a goat": 60,
            "a lion": 190,
            "a horse": 500,
            "a giraffe": 1000,
            "a rhinoceros": 2300,
            "an elephant": 5000,
            "a blue whale": 130000,
        },
    ),
    (
        "larger",
        "is about {:,} kilometres across",
        {
            "the Moon": 3475,
            "Mercury": 4880,
            "Mars": 6780,
            "Venus": 12100,
            "the Earth": 12740,
            "Neptune": 49200,
            "Saturn": 116500,
            "Jupiter": 139800,
        },
    ),
    (
        "higher",
        "is about {:,} metres high",
        {
            "the Eiffel Tower": 330,
            "Table Mountain": 1086,
            "Mount Olympus": 2918,
            "Mount Fuji": 3776,
            "Mont Blanc": 4806,
            "Kilimanjaro": 5895,
            "Aconcagua": 6961,
            "Mount Everest": 8849,
        },
    ),
    (
        "longer",
        "is about {:,} kilometres long",
        {
            "the Thames": 346,
            "the Seine": 775,
            "the Rhine": 1230,
            "the Danube": 2850,
            "the Volga": 3530,
            "the Congo": 4700,
            "the Yangtze": 6300,
            "the Nile": 6650,
        },
    ),
)

_CAPITALS = (
    "France:Paris, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Germany:Berlin, Austria:Vienna, "
    "Poland:Warsaw, Hungary:Budapest, Greece:Athens, Sweden:Stockholm, Norway:Oslo, Finland:Helsinki, "
    "Denmark:Copenhagen, Ireland:Dublin, Iceland:Reykjavik, Japan:Tokyo, China:Beijing, India:New Delhi, "
    "Thailand:Bangkok, Vietnam:Hanoi, Egypt:Cairo, Kenya:Nairobi, Ghana:Accra, Morocco:Rabat, "
    "Nigeria:Abuja, Senegal:Dakar, Canada:Ottawa, Mexico:Mexico City, Cuba:Havana, Peru:Lima, "
    "Argentina:Buenos Aires, Brazil:Brasilia, Uruguay:Montevideo, Colombia:Bogota, Australia:Canberra, "
    "New Zealand:Wellington, Turkey:Ankara, Romania:Bucharest, Bulgaria:Sofia, Croatia:Zagreb, "
    "Serbia:Belgrade, Nepal:Kathmandu"
)

_PLURALS = (
    "mouse:mice:the vowel changes instead of an ending being added, "
    "child:children:it kept an old English ending in -ren, "
    "tooth:teeth:the double o turns into a double e, "
    "foot:feet:the double o turns into a double e, "
    "goose:geese:the double o turns into a double e, "
    "man:men:the vowel a turns into e, "
    "woman:women:the second syllable changes as in man and men, "
    "sheep:sheep:the word is the same for one and for many, "
    "deer:deer:the word is the same for one and for many, "
    "leaf:leaves:a final f often turns into v before -es, "
    "knife:knives:a final f often turns into v before -es, "
    "wolf:wolves:a final f often turns into v before -es, "
    "loaf:loaves:a final f often turns into v before -es, "
    "city:cities:a y after a consonant turns into -ies, "
    "baby:babies:a y after a consonant turns into -ies, "
    "story:stories:a y after a consonant turns into -ies, "
    "box:boxes:words that end in x take -es, "
    "bus:buses:words that end in s take -es, "
    "church:churches:words that end in ch take -es, "
    "dish:dishes:words that end in sh take -es, "
    "potato:potatoes:many words that end in o take -es, "
    "hero:heroes:many words that end in o take -es, "
    "cactus:cacti:it keeps the Latin plural, "
    "crisis:crises:it keeps the Greek plural"
)

_FACTS = """
Is a whale a fish? | no, it is a mammal | whales breathe air and feed their young with milk
Is a spider an insect? | no, it is an arachnid | spiders have eight legs and insects have six
Is a tomato a fruit? | yes | it grows from the flower of the plant and holds the seeds
Can penguins fly? | no | their wings are short and stiff and made for swimming
Do fish sleep? | yes | they rest for hours with slower movement and less attention
Is the Sun a star? | yes | it makes its own light by fusing hydrogen
Does the Moon make its own light? | no | it only reflects the light of the Sun
Can you breathe on Mars? | no | its air is very thin and almost without oxygen
Is glass made from sand? | yes | sand melts at great heat and cools to a clear solid
Is ice heavier than water? | no, it is lighter | water expands when it freezes, so ice floats
Does sound travel faster than light? | no | light is nearly a million times faster than sound in air
Should I water a cactus every day? | no | its stem stores water and wet soil rots the roots
Should I keep bread in the fridge? | no | bread goes stale faster in the cold
Should I store tomatoes in the fridge? | no | the cold makes them lose their taste
Should I keep milk in the fridge? | yes | bacteria grow slowly in the cold
Should I rinse rice before cooking? | yes | rinsing removes loose starch that makes it sticky
Should I salt pasta water? | yes | the pasta takes up the salt while it cooks
Should I let meat rest after frying? | yes | the juices settle and stay inside when it is cut
Should I wash mushrooms in advance? | no | they soak up water and spoil sooner
Should I put metal in the microwave? | no | metal can spark and start a fire
Should I mix bleach and vinegar? | no, never | together they give off poisonous chlorine gas
Should I throw water on burning oil? | no, never | the water boils at once and spreads the burning oil
Should I share my password with a colleague? | no | you can no longer tell who used your account
Should I use the same password everywhere? | no | one stolen password would open all your accounts
Should I back up my photos? | yes | disks fail and phones get lost without warning
Should I install security updates? | yes | they close holes that attackers already know
Should I open attachments from strangers? | no | they are a common way to spread harmful software
Should I charge my phone overnight? | yes, with a modern phone | it stops charging when the battery is full
Should I wear a helmet on a bicycle? | yes | it lowers the risk of a serious head injury
Should I look at a phone while driving? | no | in two seconds a car travels many metres unseen
Should I stretch before a run? | better to warm up gently | easy movement prepares muscles better than long stretches
Should I drink coffee before bed? | no | caffeine stays in the body for many hours
Should I sleep with the window open? | yes, if it is quiet | fresh and cool air helps people to sleep
Should I exercise every day? | yes, at least a little | regular movement keeps the heart and the mood healthy
Should I skip breakfast? | only if you feel well without it | people differ in when they need food
Should I brush my teeth right after lemonade? | no, wait half an hour | acid softens the enamel for a while
Should I wear sunscreen on cloudy days? | yes | much of the ultraviolet light passes through clouds
Should I eat apples with the skin? | yes, washed | the skin holds much of the fibre
Should I peel ginger with a spoon? | yes | a spoon follows the shape and wastes little
Should I plant bulbs in autumn? | yes, those that flower in spring | they need the cold months to form roots
Should I mow wet grass? | no | wet grass tears and clogs the mower
Should I repot a plant in winter? | better in spring | plants form new roots when they grow
Should I feed bread to ducks? | no | it fills them without giving the food they need
Should I give chocolate to a dog? | no, never | dogs cannot break down the theobromine in it
Should I give a cat milk? | better not | most adult cats cannot digest the sugar in milk
Should I wake a sleepwalker? | gently lead the person back instead | a sudden waking can confuse and frighten
Should I pull out a splinter at once? | yes, with clean tweezers | a splinter left inside can cause an infection
Should I put butter on a burn? | no, use cool water | fat keeps the heat in the skin
Should I tilt my head back with a nosebleed? | no, lean forward | otherwise the blood runs down the throat
Should I pay the credit card in full? | yes, if you can | interest on the rest is very high
Should I keep some savings in cash? | yes, a few months of costs | cash is at hand when something unexpected happens
Should I read the contract before I sign? | yes | a signature binds you to every clause
Should I arrive early to an interview? | yes, about ten minutes | it leaves time for delays and looks reliable
Should I send a thank-you note after an interview? | yes, a short one | it shows interest and keeps you in memory
Should I answer every email at once? | no | constant interruptions make all other work slower
Should I write a shopping list? | yes | a list prevents both gaps and needless purchases
Should I learn to touch-type? | yes | it saves time every day for the rest of your life
Should I write tests for my code? | yes | they show at once when a change breaks something
Should I name a variable "x1"? | no | a name that says what it holds is easier to read
Should I commit passwords to a repository? | no, never | the history keeps them even after they are deleted
Should I use comments in code? | yes, for reasons | the code says what happens but not why
Why is the sky blue? | because air scatters blue light most | short waves bounce off the air more than long ones
Why is the sea salty? | because rivers carry minerals into it | the water evaporates and the salt stays behind
Why do leaves turn yellow in autumn? | because the green dye breaks down | the yellow dyes in the leaf then become visible
Why do cats purr? | mostly because they are content | the sound also seems to calm them when they are hurt
Why do bees make honey? | to have food in winter | there are no flowers in the cold months
Why do we have leap years? | to keep the calendar in step with the Sun | a year is about six hours longer than 365 days
Why do onions make us cry? | because cut onions release a sharp gas | the gas turns into a weak acid in the eye
Why does bread rise? | because yeast makes gas | the bubbles of gas are caught in the dough
Why do magnets stick to a fridge? | because the door contains iron | iron is drawn by a magnetic field
How long should I boil an egg? | about nine minutes for a firm yolk | the yolk needs that long to set
How long should green tea steep? | about two minutes | longer steeping draws out bitter substances
How long should I brush my teeth? | two minutes | less time leaves plaque on the back teeth
How often should I change my toothbrush? | every three months | worn bristles clean less well
How often should I wash my hands? | before meals and after every trip | hands carry germs from whatever they touch
How many legs does an ant have? | six | ants are insects and all insects have six legs
How many players are in a football team? | eleven on the field | the rules name ten players and a goalkeeper
How many strings does a violin have? | four | they are tuned to G, D, A and E
How many sides does a hexagon have? | six | the Greek word hex means six
How many days does February have? | 28, or 29 in a leap year | the extra day keeps the calendar in step
How many continents are there? | seven in the usual count | the count takes Europe and Asia as two
Which planet is closest to the Sun? | Mercury | its orbit is the smallest of all eight planets
Which gas do plants take in? | carbon dioxide | they build sugar from it with the help of light
Which metal is liquid at room temperature? | mercury | it melts at about minus 39 degrees Celsius
Which bird lays the largest egg? | the ostrich | its egg weighs about as much as two dozen hen eggs
Which animal is the fastest on land? | the cheetah | it can run at about 100 kilometres an hour
Which vitamin does sunlight give us? | vitamin D | the skin makes it under ultraviolet light
Which language has the most native speakers? | Mandarin Chinese | more than 900 million people grow up with it
Which ocean is the largest? | the Pacific | it covers about a third of the surface of the Earth
Which organ pumps the blood? | the heart | its muscle contracts about seventy times a minute
"""


def main() -> None:
    for path, rows in zip((TRAIN_FILE, HELDOUT_FILE), pairs(), strict=True):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path.name}: {len(rows)} pairs")


if __name__ == "__main__":
    main()
