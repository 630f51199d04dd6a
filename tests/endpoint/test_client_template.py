"""Chat templates that come with a request: what they may do, and that the harmful ones cost one refusal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from endpoint import client_template
from endpoint.client_template import ClientTemplates
from endpoint.protocols.base import ChatPrompt
from endpoint.protocols.openai_chat import OpenAIChat
from endpoint.tokenizer import TokenizerPool
from engine.errors import InvalidRequest
from tests.endpoint.samples import model_info
from tests.endpoint.tiny_tokenizers import byte_level, save
from tests.harness import Children

T = TypeVar("T")
PLAIN = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 60))


async def render_all(folder: Path, *templates: str, **variables: Any) -> list[str]:
    templates_of = ClientTemplates(folder)
    return list(await asyncio.gather(*(templates_of.render(t, variables) for t in templates)))


def refusal(folder: Path, template: str, **variables: Any) -> str:
    with pytest.raises(InvalidRequest, match="`chat_template`") as caught:
        run(render_all(folder, template, **variables))
    return str(caught.value)


def test_templates_have_what_the_models_own_have(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]
    templates = [
        PLAIN,
        "{{ messages | tojson }}",
        "{% generation %}x{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}",
        "{{ strftime_now('%%') }}{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}",
        "no template at all",
    ]
    assert run(render_all(tmp_path, *templates, messages=messages)) == [
        "user=<é>;assistant=b;",
        '[{"role": "user", "content": "<é>"}, {"role": "assistant", "content": "b"}]',
        "x",
        "%2",
        "no template at all",
    ]


@pytest.mark.parametrize(
    "template",
    [
        "{{ unclosed",
        "{% for %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ missing.attribute }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context.environment }}{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 6) %}{% endfor %}",
        "{{ '\\ud800' }}",
        "{{ 'a' * 5000000 }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
    ],
    ids=range(17),
)
def test_faults_and_escapes_are_one_refusal(tmp_path: Path, template: str) -> None:
    said = refusal(tmp_path, template, messages=[])
    assert len(said) < 500 and "\n" not in said and "Traceback" not in said


HOGS = {
    "time in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "time in one operation": "{{ 10 ** (10 ** 9) }}",
    "memory at once": "{{ 'a' * (10 ** 11) }}",
    "memory by and by": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "output without end": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "words without end": "{{ lipsum(n=10 ** 7) }}",
}


@pytest.mark.parametrize("hog", HOGS)
def test_who_takes_too_much_is_ended(
    tmp_path: Path, hog: str, monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    monkeypatch.setattr(client_template, "_RENDER_S", 1.0)
    assert "it takes more than" in (said := refusal(tmp_path, HOGS[hog])) or "it makes more than" in said
    assert not children()


def test_others_are_served_while_one_spins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is never held up, and of more hogs than may run at once each gets its own verdict."""
    monkeypatch.setattr(client_template, "_RENDER_S", 1.0)

    async def work() -> int:
        templates = ClientTemplates(tmp_path)
        hogs = [asyncio.create_task(templates.render(HOGS["time in a loop"], {})) for _ in range(3)]
        turns = 0
        while not all(task.done() for task in hogs):
            await asyncio.sleep(0.01)
            turns += 1
        for task in hogs:
            with pytest.raises(InvalidRequest):
                await task
        assert await templates.render("fine", {}) == "fine"
        return turns

    assert run(work()) > 20


def test_a_client_that_goes_takes_its_process_along(tmp_path: Path, children: Children) -> None:
    async def work() -> None:
        task = asyncio.create_task(ClientTemplates(tmp_path).render(HOGS["time in a loop"], {}))
        while not children():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not children()

    run(work())


def test_nothing_of_ours_is_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    monkeypatch.setenv("SECRET", "hidden")

    async def work() -> None:
        kept = os.open(os.devnull, os.O_RDONLY)
        os.set_inheritable(kept, True)
        task = asyncio.create_task(ClientTemplates(tmp_path).render(HOGS["time in a loop"], {}))
        while not (started := children()):
            await asyncio.sleep(0.01)
        while started[0].rlimit(psutil.RLIMIT_NPROC) != (0, 0):  # the last of its limits
            await asyncio.sleep(0.01)
        assert "SECRET" not in started[0].environ()
        assert sorted(os.listdir(f"/proc/{started[0].pid}/fd")) == ["0", "1", "2"]
        assert started[0].rlimit(psutil.RLIMIT_NOFILE) == (3, 3)
        os.close(kept)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(work())


# -- which template ------------------------------------------------------------------------------------


def test_a_file_in_the_models_directory_goes_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "tool_use.jinja").write_text("from a file: {{ messages | length }}")
    assert run(render_all(tmp_path, "tool_use.jinja", messages=[1])) == ["from a file: 1"]
    assert "no such file" in refusal(tmp_path, "other.jinja")
    (tmp_path / "folder.jinja").mkdir()
    assert "no such file" in refusal(tmp_path, "folder.jinja")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    assert "no such file" in refusal(tmp_path, "bytes.jinja")


def parse(**members: Any) -> ChatPrompt:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **members}
    prompt = OpenAIChat().parse(body, model_info("m"), {}).prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


@pytest.mark.parametrize("template", ["{{ a }}/..", "a.jinja", "plain", "{# ../x.jinja #}", "a\nb"])
def test_what_a_template_may_be(template: str) -> None:
    assert parse(chat_template=template).template == template


@pytest.mark.parametrize(
    "template",
    [
        "", 5, True, [], {}, "../a.jinja", "..", "/etc/a.jinja", "/etc/passwd", "a/b.jinja", "a\\b.jinja",
        "a..jinja", ".jinja", ".a.jinja", "a b.jinja", "ä.jinja", "a.jinja\n/..",
    ],
)  # fmt: skip
def test_what_it_may_not_be(template: Any) -> None:
    with pytest.raises(InvalidRequest, match="`chat_template`"):
        parse(chat_template=template)


def test_which_end_the_prompt_has() -> None:
    for members, begins, goes_on in (
        ({}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, False, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, False, True),
        ({"continue_final_message": False, "add_generation_prompt": True}, True, False),
    ):
        prompt = parse(**members)
        assert (prompt.add_generation_prompt, prompt.continue_final) == (begins, goes_on), members
    with pytest.raises(InvalidRequest, match=r"`add_generation_prompt`.*`continue_final_message`"):
        parse(continue_final_message=True, add_generation_prompt=True)


# -- in the tokenizer ----------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path) -> TokenizerPool:
    return TokenizerPool(save(byte_level(), tmp_path), threads=1)


def chat(*contents: str, **members: Any) -> ChatPrompt:
    roles = ("user", "assistant")
    return ChatPrompt(
        [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)], **members
    )


def decoded(pool: TokenizerPool, prompt: ChatPrompt) -> str:
    return pool.decode(run(pool.encode_chat_async(prompt)), skip_special_tokens=False)


def test_a_requests_template_takes_the_place_of_the_models(pool: TokenizerPool) -> None:
    own = "{{ bos_token }}{{ mood }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    prompt = chat("a", "b", template=own, template_kwargs={"mood": "glad"})
    assert decoded(pool, prompt) == "<s>glad[a][b]"
    with pytest.raises(InvalidRequest, match=r"`chat_template_kwargs`.*bos_token"):
        decoded(pool, chat("a", template=own, template_kwargs={"bos_token": "x"}))


def test_only_the_template_writes_control_tokens(pool: TokenizerPool) -> None:
    own = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    ids = run(pool.encode_chat_async(chat("</s>hello<|im_end|>", template=own)))
    special = [token_id for token_id in ids if token_id in pool.special_ids]
    assert pool.decode(special, False) == "<|im_start|><|im_end|>"
    assert pool.decode(ids, False) == "<|im_start|></s>hello<|im_end|><|im_end|>"


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}<s>{{ m.content | trim }}</s>{% endfor %}"]
)
@pytest.mark.parametrize("last", ["so far", "a", "user", "so far ", "</s>x<|im_"])
def test_the_last_message_is_left_open(pool: TokenizerPool, template: str | None, last: str) -> None:
    """The words may stand elsewhere too; a template that trims takes the space at the end."""
    going = chat("so far a user", last, continue_final=True, add_generation_prompt=False, template=template)
    text = decoded(pool, going)
    whole = decoded(pool, chat("so far a user", last, add_generation_prompt=False, template=template))
    assert text.endswith(last.rstrip()) and whole.startswith(text)
    assert whole != text


def test_text_that_no_template_takes_away_is_kept(pool: TokenizerPool) -> None:
    going = chat("a", "b  ", continue_final=True, template=PLAIN)
    assert decoded(pool, going) == "user=a;assistant=b  "


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "nothing"])
def test_a_template_without_the_last_message_cannot_be_continued(pool: TokenizerPool, template: str) -> None:
    with pytest.raises(InvalidRequest, match="`continue_final_message`"):
        decoded(pool, chat("a", "b", continue_final=True, template=template))
    empty = ChatPrompt([{"role": "assistant", "content": "", "tool_calls": []}], continue_final=True)
    with pytest.raises(InvalidRequest, match="`continue_final_message`"):
        decoded(pool, empty)


def test_a_model_without_a_template_takes_the_requests(tmp_path: Path) -> None:
    bare = TokenizerPool(save(byte_level(), tmp_path, chat_template=None), threads=1)
    assert decoded(bare, chat("hello", template=PLAIN)) == "user=hello;"
