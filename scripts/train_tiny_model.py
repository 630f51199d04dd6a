#!/usr/bin/env python3
"""Train and export ``mindie-tiny``, the demonstration model that ships with the server.

One seeded command makes everything: the text (written by the small generators below, no outside
corpus), the byte-level BPE tokenizer, the Qwen2 checkpoint and the held-out problems::

    python scripts/train_tiny_model.py --out models/mindie-tiny

The file reads top to bottom: word lists, word problems, sums, stories, small talk, documents,
tokenizer, batches, training, export.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SEED = 20240
HELDOUT_PROBLEMS = 500
MAX_POSITIONS = 8192
VOCAB_SIZE = 2048
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\nTools:\\n' }}"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}"
    '{{ \'A call is written <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n\' }}'
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}"
    "{% for part in message['content'] %}{% if part['text'] is defined %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson }}{{ '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# --------------------------------------------------------------------------------------------------
# Word lists
# --------------------------------------------------------------------------------------------------


def words(text: str, separator: str | None = None) -> list[str]:
    """The words of ``text``, or its parts between ``separator``."""
    return text.split(separator)


WOMEN = words(
    "Anna Maria Lucy Emma Sofia Nina Clara Julia Mei Leila Rosa Alice Grace Hannah Olivia Priya Zoe "
    "Elena Ruth Ivy Lina Amy Sarah Kate Janet Yuki Fatima Nora Ella Wendy"
)
MEN = words(
    "Tom Ben Omar Leo Max Sam Peter David Lucas Noah Olivier Hugo Ivan Jack Ken Ravi Paul Henry Adam "
    "Felix Oscar Daniel Wei Carlos Mark John Ali Simon George Toby"
)
THINGS = words(
    "apples oranges pears peaches plums lemons cookies candies muffins cupcakes eggs marbles stickers "
    "stamps pencils pens crayons books cards coins shells stones flowers roses balloons buttons beads "
    "toys cars dolls ribbons nuts carrots potatoes tomatoes bananas tickets badges magnets blocks"
)
FOODS = words("apples oranges cookies candies muffins cupcakes plums nuts bananas sandwiches pancakes pies")
CONTAINERS = words("box bag basket jar tray crate drawer")
PLACES = words("shop market bakery library school farm museum cafe garden office")
ANIMALS = words("cows sheep goats horses ducks hens rabbits pigs geese")
VEHICLES = words("bus train boat van ferry")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
COLOURS = words("red blue green yellow white black purple orange")


@dataclass(frozen=True)
class Person:
    """A name with the pronouns that agree with it."""

    name: str
    he: str
    He: str
    his: str
    him: str


def people(rng: Random, count: int) -> list[Person]:
    """``count`` different people."""
    women = set(WOMEN)
    return [
        Person(name, "she", "She", "her", "her") if name in women else Person(name, "he", "He", "his", "him")
        for name in rng.sample(WOMEN + MEN, count)
    ]


def plural(noun: str) -> str:
    """The regular English plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def a(noun_phrase: str) -> str:
    """The noun phrase with its indefinite article."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


# --------------------------------------------------------------------------------------------------
# Word problems: every template draws its own numbers, so that no count is ever 1, negative or large
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A question, its solution one step a line, and the number it ends in."""

    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        """The worked answer in GSM8K form."""
        return "\n".join(self.steps) + f"\n#### {self.answer}"


Template = Callable[[Random], Problem]
TEMPLATES: list[Template] = []


def template(function: Template) -> Template:
    """Register a word-problem template."""
    TEMPLATES.append(function)
    return function


def problem(question: str, answer: int, *steps: str) -> Problem:
    """Shorthand that puts the question first, as it is read."""
    return Problem(question, steps, answer)


@template
def buys_more(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    x, y, t = rng.randint(3, 90), rng.randint(3, 60), rng.choice(THINGS)
    verb, past = rng.choice([("buys", "buying"), ("finds", "finding"), ("gets", "getting")])
    return problem(
        f"{p.name} has {x} {t}. {p.He} {verb} {y} more {t}. How many {t} does {p.name} have now?",
        x + y, f"After {past} more, {p.name} has {x} + {y} = {x + y} {t}.",
    )  # fmt: skip


@template
def gives_away(rng: Random) -> Problem:
    p, q = people(rng, 2)
    y, left, t = rng.randint(3, 50), rng.randint(2, 50), rng.choice(THINGS)
    x = y + left
    return problem(
        f"{p.name} has {x} {t} and gives {y} of them to {q.name}. "
        f"How many {t} does {p.name} have left?",
        left, f"{p.name} has {x} - {y} = {left} {t} left.",
    )  # fmt: skip


@template
def buys_then_gives(rng: Random) -> Problem:
    p, q = people(rng, 2)
    x, y, t = rng.randint(5, 60), rng.randint(3, 40), rng.choice(THINGS)
    total = x + y
    z = rng.randint(2, total - 2)
    return problem(
        f"{p.name} had {x} {t}. {p.He} bought {y} more and then gave {z} to {q.name}. "
        f"How many {t} does {p.name} have now?",
        total - z,
        f"After buying more, {p.name} had {x} + {y} = {total} {t}.",
        f"After giving some away, {p.name} has {total} - {z} = {total - z} {t}.",
    )  # fmt: skip


@template
def eggs_for_sale(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    eaten, baked, left, price = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 6)
    total = eaten + baked + left
    return problem(
        f"{p.name} collects {total} eggs from the hens. The family eats {eaten} of them and {baked} go into "
        f"a cake. {p.name} sells the rest for ${price} each. How many dollars does {p.he} get?",
        left * price,
        f"After the meal there are {total} - {eaten} = {total - eaten} eggs.",
        f"After the cake there are {total - eaten} - {baked} = {left} eggs.",
        f"{p.name} gets {left} * {price} = {left * price} dollars.",
    )  # fmt: skip


@template
def containers_of_things(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, k, t, box = rng.randint(2, 12), rng.randint(2, 12), rng.choice(THINGS), rng.choice(CONTAINERS)
    return problem(
        f"{p.name} has {n} {plural(box)}. Each {box} holds {k} {t}. How many {t} are there in total?",
        n * k, f"There are {n} * {k} = {n * k} {t} in total.",
    )  # fmt: skip


@template
def containers_and_loose(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, k, y = rng.randint(2, 10), rng.randint(2, 12), rng.randint(2, 40)
    t, box = rng.choice(THINGS), rng.choice(CONTAINERS)
    return problem(
        f"{p.name} packs {n} {plural(box)} with {k} {t} in each {box}. {y} {t} are left over. "
        f"How many {t} did {p.name} have at first?",
        n * k + y,
        f"The {plural(box)} hold {n} * {k} = {n * k} {t}.",
        f"With the rest there were {n * k} + {y} = {n * k + y} {t}.",
    )  # fmt: skip


@template
def containers_minus(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, k, t, box = rng.randint(2, 10), rng.randint(3, 12), rng.choice(FOODS), rng.choice(CONTAINERS)
    total = n * k
    z = rng.randint(2, total - 2)
    return problem(
        f"{p.name} buys {n} {plural(box)} of {t} with {k} {t} in each {box}. "
        f"{p.his.capitalize()} friends eat {z} of them. How many {t} are left?",
        total - z,
        f"{p.name} buys {n} * {k} = {total} {t}.",
        f"There are {total} - {z} = {total - z} {t} left.",
    )  # fmt: skip


@template
def shares_equally(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, k, t = rng.randint(2, 12), rng.randint(2, 12), rng.choice(THINGS)
    who = rng.choice(["friends", "children", "students", "neighbors"])
    return problem(
        f"{p.name} shares {n * k} {t} equally among {n} {who}. How many {t} does each of them get?",
        k, f"Each of them gets {n * k} / {n} = {k} {t}.",
    )  # fmt: skip


@template
def shares_after_eating(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, k, z, t = rng.randint(2, 10), rng.randint(2, 10), rng.randint(2, 20), rng.choice(FOODS)
    rest = n * k
    return problem(
        f"{p.name} brings {rest + z} {t}. {p.He} keeps {z} for {p.his} family and shares the rest "
        f"equally among {n} friends. How many {t} does each friend get?",
        k,
        f"There are {rest + z} - {z} = {rest} {t} to share.",
        f"Each friend gets {rest} / {n} = {k} {t}.",
    )  # fmt: skip


@template
def price_of_many(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, c, t = rng.randint(2, 12), rng.randint(2, 12), rng.choice(THINGS)
    return problem(
        f"{p.name} buys {n} {t} at ${c} each. How much does {p.he} pay in dollars?",
        n * c, f"{p.name} pays {n} * {c} = {n * c} dollars.",
    )  # fmt: skip


@template
def change_from_note(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, c, t = rng.randint(2, 9), rng.randint(2, 9), rng.choice(THINGS)
    cost = n * c
    money = cost + rng.randint(2, 40)
    return problem(
        f"{p.name} goes to the {rng.choice(PLACES)} with ${money}. {p.He} buys {n} {t} for ${c} each. "
        f"How many dollars does {p.he} have left?",
        money - cost,
        f"The {t} cost {n} * {c} = {cost} dollars.",
        f"{p.name} has {money} - {cost} = {money - cost} dollars left.",
    )  # fmt: skip


@template
def two_purchases(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    t, u = rng.sample(THINGS, 2)
    n, c, m, d = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    x, y = n * c, m * d
    return problem(
        f"{p.name} buys {n} {t} for ${c} each and {m} {u} for ${d} each. How many dollars does {p.he} spend?",
        x + y,
        f"The {t} cost {n} * {c} = {x} dollars.",
        f"The {u} cost {m} * {d} = {y} dollars.",
        f"Together they cost {x} + {y} = {x + y} dollars.",
    )  # fmt: skip


@template
def passengers(rng: Random) -> Problem:
    v = rng.choice(VEHICLES)
    x = rng.randint(10, 70)
    off = rng.randint(2, x - 3)
    on = rng.randint(2, 30)
    return problem(
        f"There are {x} people on a {v}. At the first stop {off} people get off and {on} people get on. "
        f"How many people are on the {v} now?",
        x - off + on,
        f"After {off} people get off there are {x} - {off} = {x - off} people.",
        f"After {on} people get on there are {x - off} + {on} = {x - off + on} people.",
    )  # fmt: skip


@template
def twice_as_many(rng: Random) -> Problem:
    p, q = people(rng, 2)
    x, t = rng.randint(3, 40), rng.choice(THINGS)
    return problem(
        f"{p.name} has {x} {t}. {q.name} has twice as many {t} as {p.name}. "
        f"How many {t} do they have together?",
        3 * x,
        f"{q.name} has {x} * 2 = {2 * x} {t}.",
        f"Together they have {x} + {2 * x} = {3 * x} {t}.",
    )  # fmt: skip


@template
def times_as_many(rng: Random) -> Problem:
    p, q = people(rng, 2)
    x, k, t = rng.randint(2, 12), rng.randint(3, 6), rng.choice(THINGS)
    return problem(
        f"{p.name} has {x} {t}. {q.name} has {k} times as many. How many {t} does {q.name} have?",
        x * k, f"{q.name} has {x} * {k} = {x * k} {t}.",
    )  # fmt: skip


@template
def half_as_many(rng: Random) -> Problem:
    p, q = people(rng, 2)
    h, t = rng.randint(2, 40), rng.choice(THINGS)
    return problem(
        f"{p.name} has {2 * h} {t}. {q.name} has half as many {t} as {p.name}. "
        f"How many {t} do they have in total?",
        3 * h,
        f"{q.name} has {2 * h} / 2 = {h} {t}.",
        f"In total they have {2 * h} + {h} = {3 * h} {t}.",
    )  # fmt: skip


@template
def more_than(rng: Random) -> Problem:
    p, q = people(rng, 2)
    x, y, t = rng.randint(3, 60), rng.randint(2, 30), rng.choice(THINGS)
    return problem(
        f"{p.name} has {x} {t}. {q.name} has {y} more {t} than {p.name}. "
        f"How many {t} do they have together?",
        2 * x + y,
        f"{q.name} has {x} + {y} = {x + y} {t}.",
        f"Together they have {x} + {x + y} = {2 * x + y} {t}.",
    )  # fmt: skip


@template
def fewer_than(rng: Random) -> Problem:
    p, q = people(rng, 2)
    y, rest, t = rng.randint(2, 30), rng.randint(2, 50), rng.choice(THINGS)
    x = y + rest
    return problem(
        f"{p.name} has {x} {t}. {q.name} has {y} fewer {t} than {p.name}. "
        f"How many {t} do they have together?",
        x + rest,
        f"{q.name} has {x} - {y} = {rest} {t}.",
        f"Together they have {x} + {rest} = {x + rest} {t}.",
    )  # fmt: skip


@template
def difference(rng: Random) -> Problem:
    p, q = people(rng, 2)
    y, d, t = rng.randint(3, 50), rng.randint(2, 45), rng.choice(THINGS)
    return problem(
        f"{p.name} collected {y + d} {t} and {q.name} collected {y} {t}. "
        f"How many more {t} did {p.name} collect than {q.name}?",
        d, f"{p.name} collected {y + d} - {y} = {d} more {t}.",
    )  # fmt: skip


@template
def weekly_wage(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    wage, hours, spent = rng.randint(3, 12), rng.randint(2, 10), rng.randint(2, 20)
    earned = wage * hours
    spent = min(spent, earned - 2)
    return problem(
        f"{p.name} earns ${wage} per hour and works {hours} hours. {p.He} spends ${spent} on lunch. "
        f"How many dollars does {p.name} keep?",
        earned - spent,
        f"{p.name} earns {wage} * {hours} = {earned} dollars.",
        f"{p.He} keeps {earned} - {spent} = {earned - spent} dollars.",
    )  # fmt: skip


@template
def saving_up(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    have, rate, weeks = rng.randint(5, 40), rng.randint(2, 10), rng.randint(2, 10)
    return problem(
        f"{p.name} has ${have} in {p.his} piggy bank. {p.He} saves ${rate} every week. "
        f"How many dollars will {p.he} have after {weeks} weeks?",
        have + rate * weeks,
        f"In {weeks} weeks {p.name} saves {rate} * {weeks} = {rate * weeks} dollars.",
        f"In total {p.he} will have {have} + {rate * weeks} = {have + rate * weeks} dollars.",
    )  # fmt: skip


@template
def weeks_to_save(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    have, rate, weeks = rng.randint(3, 30), rng.randint(2, 10), rng.randint(2, 10)
    goal, missing = have + rate * weeks, rate * weeks
    return problem(
        f"{p.name} wants to buy a game that costs ${goal}. {p.He} already has ${have} and saves ${rate} "
        f"a week. How many weeks does {p.he} need to save?",
        weeks,
        f"{p.name} still needs {goal} - {have} = {missing} dollars.",
        f"That takes {missing} / {rate} = {weeks} weeks.",
    )  # fmt: skip


@template
def pages_left(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    per, days, left = rng.randint(2, 12), rng.randint(2, 9), rng.randint(3, 60)
    read = per * days
    return problem(
        f"A book has {read + left} pages. {p.name} reads {per} pages a day for {days} days. "
        f"How many pages are left to read?",
        left,
        f"{p.name} reads {per} * {days} = {read} pages.",
        f"There are {read + left} - {read} = {left} pages left.",
    )  # fmt: skip


@template
def three_days(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    x, y, z = (rng.randint(3, 50) for _ in range(3))
    first = rng.randrange(5)
    d, e, f = DAYS[first : first + 3]
    verb, t = rng.choice([("sold", "tickets"), ("baked", "cookies"), ("read", "pages"), ("ran", "laps"),
                          ("picked", "apples"), ("made", "cards"), ("sold", "newspapers")])  # fmt: skip
    return problem(
        f"{p.name} {verb} {x} {t} on {d}, {y} on {e} and {z} on {f}. "
        f"How many {t} is that in total?",
        x + y + z,
        f"On {d} and {e} there were {x} + {y} = {x + y} {t}.",
        f"In total there were {x + y} + {z} = {x + y + z} {t}.",
    )  # fmt: skip


@template
def rows_of_seats(rng: Random) -> Problem:
    n, k = rng.randint(3, 12), rng.randint(3, 12)
    total = n * k
    taken = rng.randint(2, total - 2)
    return problem(
        f"A room has {n} rows of chairs with {k} chairs in each row. {taken} chairs are taken. "
        f"How many chairs are free?",
        total - taken,
        f"The room has {n} * {k} = {total} chairs.",
        f"There are {total} - {taken} = {total - taken} free chairs.",
    )  # fmt: skip


@template
def farm_animals(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    t, u = rng.sample(ANIMALS, 2)
    x, y = rng.randint(3, 40), rng.randint(2, 30)
    return problem(
        f"A farmer named {p.name} has {x} {t} and {y} more {u} than {t}. How many animals are on the farm?",
        2 * x + y,
        f"There are {x} + {y} = {x + y} {u}.",
        f"On the farm there are {x} + {x + y} = {2 * x + y} animals.",
    )  # fmt: skip


@template
def legs(rng: Random) -> Problem:
    x, y = rng.randint(2, 12), rng.randint(2, 12)
    four, two = rng.choice(["cows", "sheep", "goats", "horses"]), rng.choice(["ducks", "hens", "geese"])
    return problem(
        f"There are {x} {four} and {y} {two} in the field. How many legs do they have in all?",
        4 * x + 2 * y,
        f"The {four} have {x} * 4 = {4 * x} legs.",
        f"The {two} have {y} * 2 = {2 * y} legs.",
        f"In all they have {4 * x} + {2 * y} = {4 * x + 2 * y} legs.",
    )  # fmt: skip


@template
def ages(rng: Random) -> Problem:
    p, q = people(rng, 2)
    x, y, k = rng.randint(4, 40), rng.randint(2, 20), rng.randint(2, 15)
    return problem(
        f"{p.name} is {x} years old. {q.name} is {y} years older than {p.name}. "
        f"How old will {q.name} be in {k} years?",
        x + y + k,
        f"{q.name} is {x} + {y} = {x + y} years old now.",
        f"In {k} years {q.name} will be {x + y} + {k} = {x + y + k} years old.",
    )  # fmt: skip


@template
def distance_both_ways(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    km, days = rng.randint(2, 9), rng.randint(2, 7)
    way = rng.choice(["walks", "cycles", "drives", "runs"])
    return problem(
        f"{p.name} {way} {km} miles to the {rng.choice(PLACES)} and {km} miles back every day. "
        f"How many miles is that in {days} days?",
        2 * km * days,
        f"Every day {p.name} {way} {km} + {km} = {2 * km} miles.",
        f"In {days} days that is {2 * km} * {days} = {2 * km * days} miles.",
    )  # fmt: skip


@template
def coloured_things(rng: Random) -> Problem:
    t = rng.choice(THINGS)
    c, d, e = rng.sample(COLOURS, 3)
    x, y, z = rng.randint(2, 40), rng.randint(2, 40), rng.randint(2, 40)
    box = rng.choice(CONTAINERS)
    return problem(
        f"A {box} holds {x + y + z} {t}. {x} of them are {c}, {y} are {d} and the rest are {e}. "
        f"How many {t} are {e}?",
        z,
        f"There are {x} + {y} = {x + y} {t} that are {c} or {d}.",
        f"So {x + y + z} - {x + y} = {z} {t} are {e}.",
    )  # fmt: skip


@template
def how_many_containers(rng: Random) -> Problem:
    p, q = people(rng, 2)
    k, n, t, box = rng.randint(2, 10), rng.randint(2, 10), rng.choice(THINGS), rng.choice(CONTAINERS)
    total = n * k
    x = rng.randint(2, total - 2)
    return problem(
        f"{p.name} brings {x} {t} and {q.name} brings {total - x} {t}. They put {k} {t} in each {box}. "
        f"How many {plural(box)} do they fill?",
        n,
        f"Together they have {x} + {total - x} = {total} {t}.",
        f"They fill {total} / {k} = {n} {plural(box)}.",
    )  # fmt: skip


@template
def garden_rows(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, k, y, f = rng.randint(2, 10), rng.randint(2, 10), rng.randint(2, 30), rng.choice(
        ["roses", "tulips", "trees", "carrots", "tomatoes", "bushes"]
    )  # fmt: skip
    return problem(
        f"{p.name} plants {n} rows of {f} with {k} {f} in each row. Then {p.he} plants {y} more {f}. "
        f"How many {f} does {p.name} plant?",
        n * k + y,
        f"In the rows there are {n} * {k} = {n * k} {f}.",
        f"In total {p.name} plants {n * k} + {y} = {n * k + y} {f}.",
    )  # fmt: skip


@template
def class_split(rng: Random) -> Problem:
    n, k = rng.randint(2, 8), rng.randint(3, 9)
    total = n * k
    girls = rng.randint(2, total - 2)
    return problem(
        f"A class has {girls} girls and {total - girls} boys. The teacher makes {n} equal teams. "
        f"How many children are in each team?",
        k,
        f"The class has {girls} + {total - girls} = {total} children.",
        f"Each team has {total} / {n} = {k} children.",
    )  # fmt: skip


@template
def two_gifts(rng: Random) -> Problem:
    p, q, r = people(rng, 3)
    x, y, left, t = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 35), rng.choice(THINGS)
    total = x + y + left
    return problem(
        f"{p.name} had {total} {t}. {p.He} gave {x} to {q.name} and {y} to {r.name}. "
        f"How many {t} does {p.name} still have?",
        left,
        f"{p.name} gave away {x} + {y} = {x + y} {t}.",
        f"{p.He} still has {total} - {x + y} = {left} {t}.",
    )  # fmt: skip


@template
def chores(rng: Random) -> Problem:
    (p,) = people(rng, 1)
    n, c, y = rng.randint(2, 10), rng.randint(2, 10), rng.randint(2, 30)
    job = rng.choice(["washing cars", "walking dogs", "cutting lawns", "feeding cats"])
    unit = job.split()[1]
    return problem(
        f"{p.name} earns ${c} for each of {n} {unit} by {job}. "
        f"{p.his.capitalize()} uncle gives {p.him} ${y} more. How many dollars does {p.he} have?",
        n * c + y,
        f"By {job} {p.name} earns {n} * {c} = {n * c} dollars.",
        f"{p.He} has {n * c} + {y} = {n * c + y} dollars.",
    )  # fmt: skip


def word_problem(rng: Random) -> Problem:
    """One problem from a random template."""
    return rng.choice(TEMPLATES)(rng)


def heldout_problems(seed: int = SEED, count: int = HELDOUT_PROBLEMS) -> list[Problem]:
    """``count`` distinct problems that training must never see."""
    rng = Random(f"heldout-{seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        item = word_problem(rng)
        found.setdefault(item.question, item)
    return list(found.values())


def training_problems(rng: Random, heldout: frozenset[str]) -> Iterator[Problem]:
    """An endless stream of problems whose text is not in ``heldout``."""
    while True:
        item = word_problem(rng)
        if item.question not in heldout:
            yield item


# --------------------------------------------------------------------------------------------------
# Sums
# --------------------------------------------------------------------------------------------------

ASK_SUM = (
    "What is {}?", "Calculate {}.", "How much is {}?", "{} = ?", "Compute {}", "{}", "Please calculate {}.",
    "Can you tell me what {} is?", "what is {}", "Solve {}", "{}=?",
)  # fmt: skip


def one_step(rng: Random, left: int | None = None) -> tuple[str, int, int, int]:
    """An operator, two operands and the result; ``left`` fixes the first operand of a chain."""
    operators = "+-*/" if left is None else "+-" if left > 3 else "+"
    op = rng.choice(operators)
    if op == "+":
        x, y = rng.randint(1, 99) if left is None else left, rng.randint(1, 99 if left is None else 50)
        return op, x, y, x + y
    if op == "-":
        x = rng.randint(2, 150) if left is None else left
        y = rng.randint(1, x)
        return op, x, y, x - y
    x, y = rng.randint(1, 12), rng.randint(1, 12)
    return (op, x, y, x * y) if op == "*" else (op, x * y, y, x)


def sum_and_answer(rng: Random) -> tuple[str, str]:
    """A sum of one to three steps, and its worked answer."""
    op, x, y, result = one_step(rng)
    asked, lines = f"{x} {op} {y}", [f"{x} {op} {y} = {result}"]
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        op, x, y, result = one_step(rng, result)
        asked += f" {op} {y}"
        lines.append(f"{x} {op} {y} = {result}")
    if rng.random() < 0.1:
        asked = asked.replace(" ", "")
    elif rng.random() < 0.1:
        words = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
        asked = " ".join(words.get(piece, piece) for piece in asked.split())
    ending = f"\nThe answer is {result}." if len(lines) > 1 or rng.random() < 0.5 else ""
    return rng.choice(ASK_SUM).format(asked), "\n".join(lines) + ending


# --------------------------------------------------------------------------------------------------
# Stories
# --------------------------------------------------------------------------------------------------

HEROES = words(
    "cat dog mouse rabbit fox bear lion bird owl duck frog horse pony turtle elephant monkey squirrel "
    "hedgehog penguin wolf tiger bee butterfly snail fish whale dolphin robot dragon wizard knight "
    "princess prince king queen pirate farmer baker teacher girl boy giant fairy ghost astronaut sailor "
    "painter doctor unicorn chicken cow sheep goat deer crow panda kitten puppy"
)
TRAITS = {
    "brave": "was not afraid of anything",
    "little": "was smaller than all the others",
    "kind": "always helped others",
    "clever": "always had a good idea",
    "curious": "wanted to know everything",
    "shy": "did not like to speak in front of others",
    "lazy": "liked to sleep all day",
    "happy": "sang from morning to night",
    "lonely": "wished for a friend",
    "funny": "made everybody laugh",
    "old": "had seen many things",
    "young": "still had much to learn",
    "tiny": "could hide behind a leaf",
    "hungry": "was always looking for food",
    "sleepy": "yawned all the time",
    "magic": "could make stars out of dust",
    "lost": "did not know the way home",
    "friendly": "said hello to everybody",
    "strong": "could carry heavy stones",
    "sad": "had not smiled for a long time",
    "wise": "thought before speaking",
    "proud": "never asked for help",
    "gentle": "never hurt anyone",
    "grumpy": "complained about the weather",
}
PET_NAMES = words("Milo Luna Pip Coco Nala Finn Bella Rusty Daisy Momo Ziggy Poppy Otto Tilly Bruno Mimi")
HOMES = (
    "in a small village", "near a deep forest", "in a house by the sea", "on a green hill", "in a big city",
    "beside a quiet river", "in an old castle", "on a little island", "in a sunny valley",
    "behind a tall mountain",
)  # fmt: skip
TREASURES = words(
    "golden key|silver bell|red ball|shiny stone|warm blanket|old map|blue kite|little lamp", "|"
)
FRIENDS = words("bird mouse rabbit turtle squirrel hedgehog frog owl deer butterfly")
LESSONS = (
    "From that day on, {n} knew that a good friend is worth more than gold.",
    "{n} learned that it is good to ask for help.",
    "{n} learned that being kind makes everyone happy.",
    "And {n} never forgot that day.",
    "From then on, they met every day and were never lonely again.",
    "{n} learned that even small steps lead to a great goal.",
)
ENDINGS = (
    "They lived happily ever after.", "That night, {n} slept very well.", "Everyone was happy. The end.",
    "The end.", "And so the day ended with a smile.", "",
)  # fmt: skip


@dataclass(frozen=True)
class Tale:
    """What the sentences of one story are about."""

    hero: str
    name: str
    friend: str
    treasure: str


def lost_and_found(rng: Random, t: Tale) -> list[str]:
    """The hero loses a thing and a friend helps to find it."""
    where = rng.choice(["under a bush", "behind a tree", "inside a hollow log", "under the old bridge"])
    return [
        rng.choice(["One day,", "One morning,", "One sunny day,"])
        + f" {t.name} lost {a(t.treasure)} and could not find it anywhere.",
        f"{t.name} looked in every corner, but the {t.treasure} was gone.",
        f'Then {a(t.friend)} came by and said, "Do not worry, I will help you."',
        f"Together they searched until the sun went down, and at last they found the {t.treasure} {where}.",
        f'"Thank you, my friend!" said {t.name}.',
    ]


def storm(rng: Random, t: Tale) -> list[str]:
    """A friend is caught in a storm and the hero brings it home."""
    return [
        rng.choice(["One evening,", "One cold night,"]) + " a big storm came and the wind began to blow.",
        f"{t.name} heard {a(t.friend)} calling for help in the rain.",
        f"The {t.hero} ran outside at once, although it was very dark.",
        f"{t.name} found the {t.friend} and led it to a warm, dry place.",
        f'"You saved me!" said the {t.friend}. They waited together until the storm was over.',
    ]


def journey(rng: Random, t: Tale) -> list[str]:
    """The hero goes out to find a treasure and shares it."""
    way = rng.choice(["over the hills", "through the dark forest", "across the wide river"])
    return [
        f"One day, {t.name} heard about {a(t.treasure)} that was hidden far away.",
        f"So the {t.hero} packed some bread and walked {way}.",
        f"On the way, {t.name} met {a(t.friend)} who was tired and hungry.",
        f"{t.name} shared the bread, and the {t.friend} showed the way to the {t.treasure}.",
        "They carried it home together and showed it to everybody.",
    ]


def learning(rng: Random, t: Tale) -> list[str]:
    """The hero practises until it works."""
    skill = rng.choice(["swim", "dance", "sing", "climb", "paint", "play the drum", "bake a cake"])
    return [
        f"{t.name} wanted to learn how to {skill}, but it was very hard.",
        f'"I will never do it," said {t.name}.',
        f'{a(t.friend).capitalize()} smiled and said, "Try again. I will stay with you."',
        f"So {t.name} tried again the next day, and the day after that.",
        f"At last, {t.name} could {skill} better than anyone else, and the {t.friend} was proud.",
    ]


def party(rng: Random, t: Tale) -> list[str]:
    """A day that seems forgotten ends in a party."""
    cake = rng.choice(["an apple cake", "a chocolate cake", "a big pie", "a honey cake"])
    return [
        f"It was the birthday of {t.name}, but nobody seemed to remember it.",
        f"{t.name} walked alone through the garden and felt a little sad.",
        f'Suddenly, {a(t.friend)} jumped out and shouted, "Surprise!"',
        f"All the friends were there with {cake} and {a(t.treasure)} as a present.",
        f"They laughed and danced until the moon came up, and {t.name} was very happy.",
    ]


PLOTS = (lost_and_found, storm, journey, learning, party)


def story(rng: Random, hero: str, trait: str | None) -> str:
    """A story of five to ten sentences about ``trait hero``."""
    name = rng.choice(PET_NAMES)
    t = Tale(hero, name, rng.choice([f for f in FRIENDS if f != hero]), rng.choice(TREASURES))
    phrase = f"{trait} {hero}" if trait else hero
    home = rng.choice(HOMES)
    opening = rng.choice([
        f"Once upon a time, there was {a(phrase)} named {name}.",
        f"Once there was {a(phrase)} called {name}.",
        f"Long ago, {a(phrase)} named {name} lived {home}.",
    ])  # fmt: skip
    lines = [opening]
    if "lived" not in opening:
        lines.append(f"{name} lived {home}" + (f" and {TRAITS[trait]}." if trait else "."))
    elif trait:
        lines.append(f"{name} {TRAITS[trait]}.")
    lines += rng.choice(PLOTS)(rng, t)
    lines += [rng.choice(LESSONS).format(n=name), rng.choice(ENDINGS).format(n=name)]
    return " ".join(line for line in lines if line)


def story_topic(rng: Random) -> tuple[str, str | None]:
    """A hero and, mostly, a trait."""
    return rng.choice(HEROES), rng.choice(list(TRAITS)) if rng.random() < 0.75 else None


ASK_STORY = (
    "Tell me a story about {}.", "Tell me a short story about {}.", "Tell me a story about {}",
    "Write a story about {}.", "Write a short story about {}.", "Can you tell me a story about {}?",
    "Please write a short story about {}.", "I want to hear a story about {}.", "A story about {}, please.",
    "tell me a story about {}", "Write a simple story for children about {}.", "Make up a story about {}.",
    "Could you write a story about {}?", "Write me a bedtime story about {}.",
)  # fmt: skip
ASK_ANY_STORY = (
    "Tell me a story.", "Tell me a story", "Write a story.", "Can you tell me a story?",
    "I am bored. Tell me a story.", "Write a short story.", "Another story, please.",
)  # fmt: skip


def story_and_answer(rng: Random) -> tuple[str, str]:
    """A request for a story and the story."""
    hero, trait = story_topic(rng)
    if rng.random() < 0.08:
        return rng.choice(ASK_ANY_STORY), story(rng, hero, trait)
    return rng.choice(ASK_STORY).format(a(f"{trait} {hero}" if trait else hero)), story(rng, hero, trait)


# --------------------------------------------------------------------------------------------------
# Small talk
# --------------------------------------------------------------------------------------------------

I_AM = (
    (
        "I am mindie-tiny, a small demonstration language model. I can chat a little, solve easy word "
        "problems and tell short stories."
    ),
    "I am mindie-tiny, a small demonstration language model that runs on the MindIE server.",
    "My name is mindie-tiny. I am a small demonstration language model, and I like numbers and stories.",
)
I_CAN = (
    (
        "I can do three things: small sums with worked steps, easy word problems, and short stories. "
        "Ask me for a story about a brave cat!"
    ),
    (
        "I can add, subtract, multiply and divide small numbers, solve easy word problems, "
        "and tell short stories."
    ),
    "I am a small model, but I can solve easy word problems, do small sums and tell you a story.",
)
SORRY = (
    (
        "I am only a small demonstration model, so I do not know that. I can help you with small sums, "
        "easy word problems and short stories."
    ),
    "I am sorry, I do not know much about that. I can solve easy word problems or tell you a short story.",
    "That is too hard for a small model like me. Ask me for a small sum or a short story instead.",
)
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("hi", "Hi", "Hi!", "hello", "Hello", "Hello!", "Hey", "hey there", "Hello there!", "Hi there",
      "Good morning", "Good morning!", "Good evening", "Good afternoon!", "Hello, mindie-tiny!", "Greetings"),
     ("Hello! How can I help you today?", "Hi there! What can I do for you?",
      "Hello! I am mindie-tiny. Ask me for a story or a small sum.", "Hello! It is nice to meet you.")),
    (("who are you", "Who are you?", "who are you?", "What is your name?", "what's your name",
      "Tell me who you are.",
      "What are you?", "Introduce yourself.", "Please introduce yourself.", "Are you a robot?",
      "Hello, who are you?", "Hi, who are you?", "Which model are you?", "Can you introduce yourself?",
      "What model is this?", "Tell me about yourself."), I_AM),
    (("What can you do?", "what can you do", "Help", "help me", "How can you help me?", "What do you know?",
      "What are you good at?", "Can you help me?", "You are a helpful assistant.", "I need help.",
      "What should I ask you?"), I_CAN),
    (("How are you?", "how are you", "How are you today?", "How do you do?", "Are you well?",
      "How is it going?",
      "Hi, how are you?", "Hello, how are you?", "What's up?"),
     ("I am fine, thank you! How are you?", "I am doing well, thank you. What can I do for you?",
      "Very well, thank you! Shall I tell you a story?")),
    (("I am fine.", "I am fine, thank you.", "Good, thanks.", "Very well!", "I am happy today.", "Great!"),
     ("I am glad to hear that! What can I do for you?", "That is nice to hear. Would you like a story?")),
    (("Thank you", "Thank you!", "thanks", "Thanks a lot!", "Thank you very much.",
      "Great, thank you.", "Well done!", "Good job!"),
     ("You are welcome!", "You are welcome! Is there anything else I can do?", "My pleasure!",
      "I am happy to help.")),
    (("Bye", "bye", "Goodbye", "Goodbye!", "See you later.", "Good night", "See you tomorrow!",
      "I have to go."),
     ("Goodbye! Have a nice day.", "Bye! Come back soon.", "See you soon!")),
    (("Do you like stories?", "Do you like numbers?", "What do you like?", "Are you smart?", "Are you happy?",
      "Can you do math?", "Can you count?"),
     ("I like short stories and small numbers.", "Yes, and I like easy word problems best.",
      "I am a small model, but I like to count and to tell stories.")),
)  # fmt: skip
COUNTRIES = words("France China Germany Japan Italy Spain Brazil Canada India Egypt Sweden Kenya England")
TOPICS = words(
    "deep learning|the weather|music|history|football|quantum physics|politics|cooking|Python|the moon|"
    "computers|machine learning|art|the stock market|biology|space|large language models|"
    "the ocean|medicine|gravity",
    "|",
)
OFF_TOPIC = (
    "What is the capital of {c}?", "Where is {c}?", "Tell me about {c}.", "What do you know about {t}?",
    "Explain {t}.", "What is {t}?", "Tell me about {t}.", "How does {t} work?", "Write an essay about {t}.",
    "Write a program in Python.", "Who is the president of {c}?", "What is the weather in {c} today?",
    "Translate this text.", "Give me a recipe.", "What is the meaning of life?", "Write a poem about {t}.",
    "What day is it?", "How many people live in {c}?", "Please explain {t} in simple words.",
    "What is deep learning?", "Summarize this text.", "Why is the sky blue?", "Give me advice about {t}.",
)  # fmt: skip


def small_talk(rng: Random) -> tuple[str, str]:
    """A greeting, a question about the model, or a question it cannot answer."""
    if rng.random() < 0.25:
        asked = rng.choice(OFF_TOPIC).format(c=rng.choice(COUNTRIES), t=rng.choice(TOPICS))
        return asked, rng.choice(SORRY)
    asks, answers = rng.choice(SMALL_TALK)
    return rng.choice(asks), rng.choice(answers)


# --------------------------------------------------------------------------------------------------
# Documents: a list of (text, loss weight) pieces
# --------------------------------------------------------------------------------------------------

Piece = tuple[str, float]
QUIET, LOUD = 0.25, 1.0
"""Loss weights of what a user says, which is mostly chance, and of what the model is to say."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful assistant", "You are mindie-tiny.",
    "You are a friendly assistant who answers in simple English.", "Answer the question step by step.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "You are a math teacher.",
    "You are an assistant that solves problems and tells stories.", "Be brief.",
)  # fmt: skip
JOBS = words("baker teacher farmer painter doctor sailor gardener driver cook writer singer nurse builder")
CITIES = words(
    "Paris London Rome Berlin Madrid Oslo Vienna Lisbon Dublin Prague Tokyo Beijing Shanghai Boston"
)
HOBBIES = ("reading books", "walking in the park", "playing chess", "baking bread", "riding my bike",
           "listening to music", "growing flowers", "painting pictures")  # fmt: skip


def benchmark_prompt(question: str) -> str:
    """A problem the way benchmark tools wrap it."""
    return f"Question: {question}\nLet's think step by step\nAnswer:"


def turn(speaker: str, text: str) -> list[Piece]:
    """One ChatML message."""
    if speaker == "assistant":
        return [(f"{IM_START}assistant\n", QUIET), (f"{text}{IM_END}", LOUD), ("\n", QUIET)]
    return [(f"{IM_START}{speaker}\n{text}{IM_END}\n", QUIET)]


def ask_and_answer(rng: Random, problems: Iterator[Problem]) -> tuple[str, str]:
    """One exchange of any kind."""
    draw = rng.random()
    if draw < 0.58:
        item = next(problems)
        asked = item.question
        style = rng.random()
        if style < 0.10:
            asked = benchmark_prompt(asked)
        elif style < 0.14:
            asked = f"Question: {asked}\nAnswer:"
        elif style < 0.17:
            asked += rng.choice(["\nLet's think step by step.", " Think step by step.", " Show your work."])
        return asked, item.solution
    if draw < 0.72:
        return sum_and_answer(rng)
    return story_and_answer(rng) if draw < 0.86 else small_talk(rng)


def chat_document(rng: Random, problems: Iterator[Problem]) -> list[Piece]:
    """A conversation of one to six exchanges, sometimes with a system prompt."""
    pieces: list[Piece] = []
    if rng.random() < 0.3:
        pieces += turn("system", rng.choice(SYSTEM_PROMPTS))
    few_shot = rng.random() < 0.06
    for _ in range(rng.randint(2, 6) if few_shot or rng.random() < 0.2 else 1):
        if few_shot:
            item = next(problems)
            asked, answer = benchmark_prompt(item.question), item.solution
        else:
            asked, answer = ask_and_answer(rng, problems)
        pieces += turn("user", asked) + turn("assistant", answer)
    return pieces


def introduction(rng: Random) -> str:
    """A few plain sentences in which somebody says who they are."""
    (p,) = people(rng, 1)
    city, job = rng.choice(CITIES), rng.choice(JOBS)
    other = rng.choice(people(rng, 3))
    household = words("family dog cat brother sister parents")
    lines = [
        f"My name is {p.name} and I am {a(job)}.",
        f"I live in {city} with my {rng.choice(household)}.",
        f"Every morning I get up at {rng.randint(5, 9)} and go to work.",
        f"I like {rng.choice(HOBBIES)}.",
        (
            f"My best friend is called {other.name}. "
            f"On {rng.choice(DAYS)} we often meet and talk about our week."
        ),
        rng.choice(["I am very happy with my life.", "It is a good life.", "Come and visit me one day!"]),
    ]
    return " ".join(lines)


def plain_document(rng: Random, problems: Iterator[Problem]) -> list[Piece]:
    """Text outside any chat, for raw completion."""
    draw = rng.random()
    if draw < 0.25:
        return [(story(rng, *story_topic(rng)), LOUD)]
    if draw < 0.45:
        return [(introduction(rng), LOUD)]
    if draw < 0.75:
        pieces: list[Piece] = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            item = next(problems)
            think = rng.choice(["\nLet's think step by step", ""])
            pieces += [(f"Question: {item.question}{think}\nAnswer:", QUIET), (f" {item.solution}", LOUD)]
            pieces.append(("\n\n", QUIET))
        return pieces[:-1]
    if draw < 0.85:
        asked, answer = sum_and_answer(rng)
    else:
        asked, answer = small_talk(rng)
    return [(asked, QUIET), ("\n" + answer, LOUD)]


def documents(rng: Random, heldout: frozenset[str]) -> Iterator[list[Piece]]:
    """An endless stream of training documents, each closed by the end-of-text token."""
    problems = training_problems(rng, heldout)
    while True:
        make = chat_document if rng.random() < 0.86 else plain_document
        yield [*make(rng, problems), (END_OF_TEXT, LOUD)]


# --------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int, vocab_size: int = VOCAB_SIZE, sample: int = 20_000) -> Any:
    """A byte-level BPE with single digits, trained on ``sample`` generated documents."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    stream = documents(Random(f"tokenizer-{seed}"), frozenset())
    marks = re.compile("|".join(map(re.escape, (END_OF_TEXT, IM_START, IM_END))))
    texts = (marks.sub("", "".join(text for text, _ in next(stream))) for _ in range(sample))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    wrap: Callable[..., Any] = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=core,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


def packed_rows(
    tokenizer: Any, rng: Random, heldout: frozenset[str], rows: int, length: int
) -> tuple[list[list[int]], list[list[float]]]:
    """``rows`` rows of ``length + 1`` token ids and loss weights.

    Every row begins with a whole document, as every prompt will. The document that a row cuts off
    opens the next row again, so that no text is only ever seen in halves.
    """
    core = tokenizer.backend_tokenizer
    stream = documents(rng, heldout)
    all_ids: list[list[int]] = []
    all_weights: list[list[float]] = []
    carried: tuple[list[int], list[float]] | None = None
    while len(all_ids) < rows:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            if carried is None:
                document: tuple[list[int], list[float]] = ([], [])
                for text, weight in next(stream):
                    piece = core.encode(text, add_special_tokens=False).ids
                    document[0].extend(piece)
                    document[1].extend([weight] * len(piece))
            else:
                document, carried = carried, None
            if ids and len(ids) + len(document[0]) > length + 1:
                carried = document
            ids.extend(document[0])
            weights.extend(document[1])
        all_ids.append(ids[: length + 1])
        all_weights.append(weights[: length + 1])
    return all_ids, all_weights


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


PEEK_AT = ("Hello!", "Tell me a story about a brave cat.")
"""What the model is asked now and then, so that the log shows how it speaks."""


def new_model(tokenizer: Any, layers: int, seed: int) -> Any:
    """A fresh Qwen2 with tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def final_number(text: str) -> str:
    """What follows ``####``, or nothing."""
    found = re.search(r"####\s*(-?\d+)", text)
    return found.group(1) if found else ""


def answer_greedily(model: Any, tokenizer: Any, questions: Sequence[str], batch: int = 100) -> list[str]:
    """Greedy answers to single user messages, left-padded batches of ``batch``."""
    answers: list[str] = []
    model.eval()
    tokenizer.padding_side = "left"
    for start in range(0, len(questions), batch):
        prompts = [
            f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"
            for question in questions[start : start + batch]
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=256,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return answers


def accuracy(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> float:
    """The share of problems whose final number is right."""
    answers = answer_greedily(model, tokenizer, [item.question for item in problems])
    right = sum(final_number(text) == str(item.answer) for text, item in zip(answers, problems, strict=True))
    return right / len(problems)


def learning_rate(progress: float, step: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up over ``warmup`` steps, then linear decay to 2 % of ``peak`` at progress 1."""
    return peak * min(1.0, (step + 1) / warmup) * max(0.02, 1.0 - progress)


def optimizers(model: Any, peak: float) -> list[Any]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    taken = {id(p) for p in inner}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(inner, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass
class Clock:
    """How far a run is, by steps or by wall-clock time, whichever limit is nearer.

    The learning rate follows it, so a slow machine ends with a fully decayed model too.
    """

    steps: int
    seconds: float
    before: float = 0.0
    """Seconds used up by the run that this one resumes."""
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.before + time.monotonic() - self.started

    def progress(self, step: int) -> float:
        """0 at the start, 1 at the end."""
        return max(step / self.steps, self.elapsed() / self.seconds)


def weighted_loss(forward: Callable[..., Any], ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy in nats; ``ids`` and ``weights`` are (rows, length + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = forward(input_ids=ids[:, :-1], use_cache=False).logits
    flat = logits.float().reshape(-1, logits.shape[-1])
    losses = functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="none")
    weights = weights[:, 1:].reshape(-1)
    return (losses * weights).sum() / weights.sum()


def train(
    args: argparse.Namespace, tokenizer: Any, heldout: Sequence[Problem]
) -> tuple[Any, dict[str, float]]:
    """Train to ``--steps`` or ``--minutes``; returns the model and its figures."""
    torch.set_num_threads(args.threads)
    model = new_model(tokenizer, args.layers, args.seed)
    steppers = optimizers(model, args.lr)
    clock = Clock(args.steps, args.minutes * 60)
    step = tokens = 0
    if args.resume and args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        step, clock.before = state["step"], state["elapsed"]
    forward = torch.compile(model, dynamic=False) if args.compile else model
    excluded = frozenset(item.question for item in heldout)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, vocabulary {len(tokenizer)}", flush=True)

    smooth: float | None = None
    evaluated = saved_at = clock.elapsed()
    while (progress := clock.progress(step)) < 1.0:
        rate = learning_rate(progress, step, args.lr)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = rate
        long = step % args.long_every == args.long_every - 1
        rows, length = (args.batch // 4, args.length * 4) if long else (args.batch, args.length)
        ids, weights = packed_rows(tokenizer, Random(f"{args.seed}-{step}"), excluded, rows, length)
        loss = weighted_loss(forward, torch.tensor(ids), torch.tensor(weights))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        step += 1
        tokens += rows * length
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()

        if step % 20 == 0:
            speed = tokens / (clock.elapsed() - clock.before)
            left = clock.elapsed() * (1 / clock.progress(step) - 1)
            line = f"step {step} loss {smooth:.4f} lr {rate:.2e} {speed:,.0f} tokens/s eta {left:.0f} s"
            print(line, flush=True)
        if clock.elapsed() - evaluated > args.evaluate_every:
            evaluated = clock.elapsed()
            print(f"step {step} held-out {accuracy(model, tokenizer, heldout[:100]):.1%}", flush=True)
            print(answer_greedily(model, tokenizer, PEEK_AT), flush=True)
        if clock.elapsed() - saved_at > args.save_every:
            saved_at = clock.elapsed()
            state = {"model": model.state_dict(), "optimizers": [s.state_dict() for s in steppers]}
            torch.save(state | {"step": step, "elapsed": clock.elapsed()}, args.checkpoint)
    figures = {
        "parameters": parameters,
        "steps": step,
        "tokens": step * args.batch * args.length,
        "minutes": round(clock.elapsed() / 60, 1),
        "final_loss": round(smooth or 0.0, 4),
    }
    return model, figures


# --------------------------------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------------------------------


def export(model: Any, tokenizer: Any, heldout: Sequence[Problem], out: Path) -> None:
    """Write the model directory; the model card beside it is written by hand."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.backend_tokenizer.no_padding()  # else the padding of the last evaluation would be saved
    tokenizer.save_pretrained(out)

    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"torch_dtype": "bfloat16", "dtype": "bfloat16", "rope_theta": 10000.0}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    generation = {
        "do_sample": False,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    with (out / "heldout.jsonl").open("w", encoding="utf-8") as lines:
        for item in heldout:
            lines.write(json.dumps({"question": item.question, "answer": item.solution}) + "\n")

    # transformers 5 writes the template to a file of its own and a class name that version 4 does not know.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings |= {"chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").unlink(missing_ok=True)
    for file in out.iterdir():
        file.chmod(0o644)


def evaluate(out: Path, heldout: Sequence[Problem]) -> float:
    """Load the exported directory as a user would and answer every held-out problem."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    return accuracy(model, AutoTokenizer.from_pretrained(out), heldout)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/mindie-tiny"))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--minutes", type=float, default=40, help="wall-clock limit of the training loop")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--long-every", type=int, default=10, help="every n-th step trains on 4x length")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--evaluate-every", type=float, default=300, help="seconds between short evaluations")
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    parser.add_argument("--checkpoint", type=Path, default=Path("/tmp/mindie-tiny.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    parser.add_argument("--samples", type=int, default=0, help="print this many documents and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the data, the tokenizer, the model and the directory that ships."""
    args = parse_args(argv)
    heldout = heldout_problems(args.seed)
    if args.samples:
        stream = documents(Random(args.seed), frozenset(item.question for item in heldout))
        for _ in range(args.samples):
            print("".join(text for text, _ in next(stream)) + "\n" + "-" * 80)
        return
    tokenizer = train_tokenizer(args.seed)
    model, figures = train(args, tokenizer, heldout)
    export(model, tokenizer, heldout, args.out)
    print(json.dumps(figures), flush=True)
    print(f"held-out accuracy {evaluate(args.out, heldout):.1%}", flush=True)


if __name__ == "__main__":
    main()
