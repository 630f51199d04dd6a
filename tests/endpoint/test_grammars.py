"""Trying grammars out: every form works, what is hostile costs one refusal, and nothing is tried twice."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer

from endpoint.grammars import GrammarChecker, Vocabulary
from endpoint.protocols.structured import FORMS, read_grammar
from endpoint.validation import Fields
from engine.errors import InvalidRequest, ServiceUnavailable
from tests.harness import TINY_MODEL, Children

Json = dict[str, Any]
Work = Callable[[GrammarChecker], Awaitable[None]]


def vocabulary() -> Vocabulary:
    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    return Vocabulary(tokenizer.to_str(), 2048, [2, 0])


def with_checker(work: Work, cache_bytes: int = 1 << 20) -> None:
    async def run() -> None:
        checker = GrammarChecker(vocabulary, cache_bytes)
        try:
            await work(checker)
        finally:
            await checker.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def grammar(body: Json) -> str:
    return read_grammar(Fields(body), FORMS).text


def obj(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def nested(levels: int) -> Json:
    return functools.reduce(lambda inner, _: obj({"x": inner}), range(levels), {"type": "string"})


LIST: Json = {"$ref": "#/$defs/n", "$defs": {"n": obj({"next": {"anyOf": [{"$ref": "#/$defs/n"}, {}]}})}}
GOOD: list[Json] = [
    {"response_format": {"type": "json_object"}},
    {"guided_json": nested(30)},
    {"guided_json": LIST},
    {"guided_json": {"type": ["string", "null"]}},
    {"guided_json": obj({f"p{i}": {"type": "integer"} for i in range(500)})},
    {"guided_json": {"enum": [f"value{i}" for i in range(3000)]}},
    {"guided_json": {"type": "string", "maxLength": 5000}},
    {"guided_regex": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
    {"guided_regex": r"https?://[a-z/.]+\$"},
    {"guided_regex": "a/b\nc"},
    {"guided_regex": "(a|b)*c{1000}"},
    {"guided_regex": "((a*)*)*b"},
    {"guided_choice": [f"choice {i}" for i in range(3000)]},
    {"guided_choice": ['"', "\\", "/", "é\n", "\U0001f600", "a b"]},
    {"guided_grammar": 'start: "a" b\nb: /[0-9]+/'},
    {"guided_grammar": 'root ::= "a" b*\nb ::= [0-9] | "x"'},
]  # fmt: skip

HOSTILE: list[Json] = [
    {"guided_json": {"type": "integer", "multipleOf": 9_999_991}},
    {"guided_json": obj({f"p{i}": {} for i in range(2000)}) | {"required": []}},
    {"guided_json": {"$ref": "#"}},
    {"guided_json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    {"guided_json": {"$ref": "http://127.0.0.1:1/x"}},
    {"guided_json": {"type": "string", "pattern": "((x{100}){100}){100}"}},
    {"guided_json": {"type": "string", "pattern": "(?=a)b"}},
    {"guided_json": {"type": "array", "uniqueItems": True}},
    {"guided_regex": "(((x{100}){100}){100}){100}"},
    {"guided_regex": "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy(((x{100}){100}){100}){100}"},
    {"guided_regex": "(?x) # [ \n((x{100}){100}){100} # ]\n"},
    {"guided_regex": "a(b"},
    {"guided_regex": "a" * 20 + "(" * 5000},
    {"guided_regex": "[^\\s\\S]"},
    {"guided_regex": "a\\"},
    {"guided_grammar": "start: A{100}\nA: B{100}\nB: C{100}\nC: /x{100}/"},
    {"guided_grammar": 'start: "[" ((/x/ {100}){100}){100} "]"'},
    {"guided_grammar": "start: x"},
    {"guided_grammar": "start: start"},
    {"guided_grammar": "nonsense"},
    {"guided_grammar": "root ::= " + "(" * 5000},
    {"guided_grammar": "root ::= a\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(3500))},
    {"guided_grammar": 'start: %json {"type": "integer", "multipleOf": 9999991}'},
    {"guided_grammar": 'start: %json {"type": "string", "pattern": "y{40}((x{100}){100}){100}"}'},
    {"guided_grammar": "\n" * 30_000},
]  # fmt: skip


def test_every_good_form_can_be_followed() -> None:
    async def work(checker: GrammarChecker) -> None:
        for body in GOOD:
            await checker.check(grammar(body), "f")

    with_checker(work)


def test_A11_hostile_forms_are_refused_and_leave_the_others_alone() -> None:
    async def work(checker: GrammarChecker) -> None:
        async def refused(body: Json) -> str:
            with pytest.raises(InvalidRequest, match=r"^`guided` cannot be followed: ") as caught:
                await checker.check(grammar(body), "guided")
            return str(caught.value)

        texts = await asyncio.gather(*map(refused, HOSTILE))
        assert all("\n" not in text and len(text) < 400 for text in texts), texts
        await checker.check(grammar(GOOD[0]), "f")

    with_checker(work)


def test_A11_the_loop_keeps_turning_while_a_grammar_is_tried() -> None:
    async def work(checker: GrammarChecker) -> None:
        slow = asyncio.create_task(checker.check(grammar(HOSTILE[0]), "f"))
        turns = 0
        while not slow.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 50  # of the thousands that a free loop makes in two seconds
        with pytest.raises(InvalidRequest):
            slow.result()

    with_checker(work)


def test_equal_grammars_are_tried_once() -> None:
    async def work(checker: GrammarChecker) -> None:
        good, bad = grammar(GOOD[7]), grammar({"guided_regex": "a(b"})
        await asyncio.gather(*(checker.check(good, "f") for _ in range(20)))
        for _ in range(5):
            with pytest.raises(InvalidRequest, match=r"`g` .*unclosed group"):
                await checker.check(bad, "g")
        assert checker.num_trials == 2

    with_checker(work)


def test_A12_verdicts_beyond_the_cache_are_forgotten() -> None:
    async def work(checker: GrammarChecker) -> None:
        first = grammar({"guided_regex": "a0"})
        for i in range(10):
            await checker.check(grammar({"guided_regex": f"a{i}"}), "f")
        await checker.check(first, "f")
        assert checker.num_trials == 11

    with_checker(work, cache_bytes=1000)


def test_who_hangs_up_does_not_take_the_verdict_along() -> None:
    async def work(checker: GrammarChecker) -> None:
        text = grammar(GOOD[0])
        impatient = asyncio.create_task(checker.check(text, "f"))
        patient = asyncio.create_task(checker.check(text, "f"))
        await asyncio.sleep(0)
        impatient.cancel()
        assert await patient == text
        assert checker.num_trials == 1

    with_checker(work)


def test_what_nobody_waits_for_any_more_is_not_tried() -> None:
    async def work(checker: GrammarChecker) -> None:
        bodies = [{"guided_json": {"type": "integer", "multipleOf": 9_999_991 + i}} for i in range(40)]
        hostile = [asyncio.create_task(checker.check(grammar(body), "f")) for body in bodies]
        await asyncio.sleep(0)
        for task in hostile:
            task.cancel()
        await asyncio.wait(hostile)
        text = grammar(GOOD[0])
        assert await checker.check(text, "f") == text
        assert checker.num_trials <= 3  # at most two had begun; the others would have taken 2 s each

    with_checker(work)


def test_a_sandbox_that_cannot_start_is_no_fault_of_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(checker: GrammarChecker) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("endpoint.grammars.sys.executable", "/nonexistent")
            with pytest.raises(ServiceUnavailable):
                await checker.check(grammar(GOOD[0]), "f")
        assert await checker.check(grammar(GOOD[0]), "f") == grammar(GOOD[0])

    with_checker(work)


def test_gbnf_is_translated() -> None:
    async def work(checker: GrammarChecker) -> None:
        text = await checker.check(grammar({"guided_grammar": 'root ::= "a" | "b"'}), "f")
        assert "lark_grammar" in json.loads(text)["grammars"][0]
        assert text == await checker.check(grammar({"guided_grammar": 'root ::= "a" | "b"'}), "f")

    with_checker(work)


def test_a_sandbox_that_was_killed_is_started_again(children: Children) -> None:
    async def work(checker: GrammarChecker) -> None:
        await checker.check(grammar(GOOD[0]), "f")
        [sandbox] = children()
        sandbox.kill()
        for _ in range(1000):
            if not sandbox.is_running() or sandbox.status() == psutil.STATUS_ZOMBIE:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await checker.check(grammar(GOOD[7]), "f")
        assert checker.num_trials == 2

    with_checker(work)
    assert children() == []
