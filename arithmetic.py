"""The offline task: seeded two-step word problems with worked answers, in GSM8K's row format."""

import random
from functools import cache

NAMES = (
    "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karim Lena Marta Nadia Omar Paula"
).split()
THINGS = (
    "apples books cards coins eggs marbles oranges pencils shells stamps stickers tickets"
).split()
SIZES = {"train": 4000, "validation": 300, "test": 300}


def arithmetic_rows(split: str) -> list[dict]:
    """The rows {"question", "answer"} of a split; no question is in two splits."""
    splits = list(SIZES)
    start = sum(SIZES[name] for name in splits[: splits.index(split)])
    problems = word_problems()[start : start + SIZES[split]]
    return [{"question": question, "answer": answer} for question, answer in problems]


@cache
def word_problems() -> list[tuple[str, str]]:
    """Question and answer of all splits, one after the other; made once a process."""
    rng = random.Random(20251019)
    answers: dict[str, str] = {}
    while len(answers) < sum(SIZES.values()):
        question, answer = word_problem(rng)
        answers[question] = answer
    return list(answers.items())


def word_problem(rng: random.Random) -> tuple[str, str]:
    """A question and its worked answer."""
    name, friend = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = rng.randint(12, 60), rng.randint(11, 40), rng.randint(2, 9)
    # each story with its two steps: left operand, operator, right operand, what the result counts;
    # a left operand of None stands for the first step's result
    stories = [
        (
            f"{name} has {a} {thing}. {friend} gives {name} {b} more, "
            f"and then {name} loses {c} of them.",
            (a, "+", b, f"{thing} after the gift"),
            (None, "-", c, "left"),
        ),
        (
            f"{name} fills {c} boxes with {b} {thing} each and already had {a} {thing}.",
            (c, "*", b, f"{thing} in the boxes"),
            (None, "+", a, "in all"),
        ),
        (
            f"{name} collects {a} {thing} every day for {c} days "
            f"and gives {b // 2} of them to {friend}.",
            (a, "*", c, f"{thing} in {c} days"),
            (None, "-", b // 2, "left"),
        ),
        (
            f"{name} has {a} {thing} and {friend} has {b} more than {name}.",
            (a, "+", b, f"{thing} for {friend}"),
            (None, "+", a, "together"),
        ),
    ]
    story, *steps = rng.choice(stories)
    lines = []
    result = 0
    for left, operator, right, unit in steps:
        left = result if left is None else left
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        expression = f"{left}{operator}{right}"
        lines.append(f"There are {expression} = <<{expression}={result}>>{result} {unit}.")
    question = f"{story} How many {thing} are there now?"
    return question, "\n".join([*lines, f"#### {result}"])
