"""Several prompts in one request, and what the model thinks of prompts, on the shipped model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.harness import TINY_MODEL, Daemon, Installation, Json, eventually

MakeDaemon = Callable[..., Daemon]
PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"
PROMPTS = ["Once upon a time", "Question: What is 3 + 4?\nAnswer:", "The cat"]
PLAIN: Json = {"model": "mindie-tiny", "max_tokens": 12, "ignore_eos": True}
FP32: Json = {"BackendConfig": {"runtimeConfig": {"dtype": "float32"}}}


@pytest.fixture(scope="module")
def server(installation: Installation) -> Iterator[Daemon]:
    daemon = installation.daemon(FP32).start().wait_ready()
    yield daemon
    assert daemon.stop() == 0, daemon.stderr


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TINY_MODEL)


def complete(server: Daemon, **members: Any) -> Any:
    answer = server.post(PATH, {**PLAIN, **members})
    assert answer.status == 200, answer.body
    return answer.json()


def texts(answer: Any) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"use_beam_search": True, "n": 2},
        {"logprobs": 2},
        {"stop": "a"},
        {"echo": True},
    ],
)
def test_each_prompt_is_answered_as_if_it_were_alone(server: Daemon, members: Json) -> None:
    alone = [complete(server, prompt=prompt, **members) for prompt in PROMPTS]
    together = complete(server, prompt=PROMPTS, **members)
    assert texts(together) == [text for answer in alone for text in texts(answer)]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together["usage"][count] == sum(answer["usage"][count] for answer in alone)
    assert len(together["usage"]["batch_size"]) == together["usage"]["completion_tokens"]
    if "logprobs" in members:
        offsets = [offset for choice in together["choices"] for offset in choice["logprobs"]["text_offset"]]
        assert offsets == sorted(offsets) and offsets[0] == 0


def test_ids_are_as_good_as_texts(server: Daemon, reference: tuple[Any, Any]) -> None:
    _, tokenizer = reference
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert texts(complete(server, prompt=ids)) == texts(complete(server, prompt=PROMPTS))
    echoed = texts(complete(server, prompt=ids, echo=True))
    assert echoed == texts(complete(server, prompt=PROMPTS, echo=True))
    assert texts(complete(server, prompt=ids[0], echo=True)) == echoed[:1]


def test_special_tokens_of_echoed_ids_are_shown_when_asked_for(
    server: Daemon, reference: tuple[Any, Any]
) -> None:
    _, tokenizer = reference
    special = tokenizer.eos_token
    ids = [tokenizer.eos_token_id, *tokenizer.encode("Once")]
    for skip in (True, False):
        (text,) = texts(complete(server, prompt=ids, echo=True, max_tokens=1, skip_special_tokens=skip))
        assert text.startswith("Once" if skip else f"{special}Once")


def test_best_of_and_n_are_counted_per_prompt(server: Daemon) -> None:
    members = {"prompt": PROMPTS[:2], "temperature": 1.0, "seed": 7}
    every = complete(server, **members, n=4, logprobs=0)
    assert len(set(texts(every))) == 8
    best = complete(server, **members, n=2, best_of=4)
    scores = {c["text"]: sum(c["logprobs"]["token_logprobs"]) for c in every["choices"]}
    expected = []
    for start in (0, 4):
        expected += sorted(texts(every)[start : start + 4], key=lambda text: -scores[text])[:2]
    assert texts(best) == expected
    assert best["usage"]["completion_tokens"] == 8 * PLAIN["max_tokens"]
    # equal prompts are not answered alike, and the first one as it is alone
    same = texts(complete(server, prompt=[PROMPTS[0]] * 3, temperature=1.0, seed=7))
    assert len(set(same)) == 3
    assert same[:1] == texts(complete(server, prompt=PROMPTS[0], temperature=1.0, seed=7))


@pytest.mark.parametrize("members", [{"n": 2, "temperature": 1.0, "seed": 3}, {"echo": True}])
def test_streams_of_several_prompts(server: Daemon, members: Json) -> None:
    body = {**PLAIN, **members, "prompt": PROMPTS, "stream_options": {"include_usage": True}}
    whole = complete(server, **body)
    *payloads, done = server.frames(PATH, {**body, "stream": True})
    *frames, totals = [json.loads(payload) for payload in payloads]
    joined = [""] * len(whole["choices"])
    ends = []
    for frame in frames:
        (choice,) = frame["choices"]
        joined[choice["index"]] += choice["text"]
        ends += [choice["index"]] if choice["finish_reason"] is not None else []
    assert done == "[DONE]" and joined == texts(whole)
    assert sorted(ends) == list(range(len(joined)))
    counts = ("prompt_tokens", "completion_tokens")
    assert [totals["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]


def test_beams_of_several_prompts_stream_as_one_frame(server: Daemon) -> None:
    body = {**PLAIN, "prompt": PROMPTS, "use_beam_search": True, "n": 2}
    frame, done = server.frames(PATH, {**body, "stream": True})
    assert done == "[DONE]" and json.loads(frame)["choices"] == complete(server, **body)["choices"]


def test_more_prompts_than_the_ring_has_slots(server: Daemon) -> None:
    prompts = [f"Number {number}" for number in range(150)]
    answer = complete(server, prompt=prompts, max_tokens=2)
    assert len(answer["choices"]) == 150 and answer["usage"]["completion_tokens"] == 300


def test_one_bad_prompt_refuses_all_and_leaves_nothing_running(server: Daemon) -> None:
    too_long = list(range(100)) * 100
    answer = server.post(PATH, {**PLAIN, "prompt": [[5, 6], too_long]})
    assert answer.status == 424 and "error" in answer.json()
    assert server.post(PATH, {**PLAIN, "prompt": ["fine", ""]}).status == 422

    def idle() -> bool:
        slots = server.manage("/v2/models/mindie-tiny/getSlotCount").json()
        return bool(slots["free_slots"] == slots["total_slots"])

    eventually(idle, 5.0, "no request left")


@pytest.mark.parametrize("wanted", [0, 1, 20])
def test_prompt_logprobs_equal_transformers(server: Daemon, reference: tuple[Any, Any], wanted: int) -> None:
    model, tokenizer = reference
    answer = complete(server, prompt=PROMPTS, n=2, temperature=0.9, prompt_logprobs=wanted, max_tokens=1)
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)
        with torch.inference_mode():
            rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        first, *members = answer["choices"][2 * number]["prompt_logprobs"]
        assert answer["choices"][2 * number + 1]["prompt_logprobs"] == [first, *members]
        assert first is None and len(members) == len(ids) - 1
        for row, token, member in zip(rows, ids[1:], members, strict=False):
            order = row.argsort(descending=True).tolist()
            (own, entry), *others = member.items()
            assert own == str(token) and entry["decoded_token"] == tokenizer.decode([token])
            assert entry["rank"] == order.index(token) + 1
            assert entry["logprob"] == pytest.approx(float(row[token]), abs=2e-3)
            assert len(others) == wanted
            assert [e["rank"] for _, e in others] == [i + 1 for i, t in enumerate(order) if t != token][
                :wanted
            ]
            for other, said in others:
                assert said["logprob"] == pytest.approx(float(row[int(other)]), abs=2e-3)


def test_more_prompt_logprobs_than_an_answer_holds_are_refused(server: Daemon) -> None:
    prompts = [[5] * 2000] * 20
    answer = server.post(PATH, {**PLAIN, "prompt": prompts, "prompt_logprobs": 12})
    assert answer.status == 424 and "at most 100000" in answer.json()["error"], answer.body


def test_prompt_logprobs_of_a_long_prompt_and_of_a_chat(server: Daemon) -> None:
    """Long enough for several records on the ring, and for a product with the vocabulary in pieces."""
    prompt = " ".join(f"word {number}" for number in range(300))
    answer = complete(server, prompt=prompt, prompt_logprobs=20, max_tokens=1)
    members = answer["choices"][0]["prompt_logprobs"]
    assert len(members) == answer["usage"]["prompt_tokens"] > 700
    said = "".join(next(iter(member.values()))["decoded_token"] for member in members[1:])
    assert prompt.endswith(said) and len(said) > len(prompt) - 10

    chat = {"model": "mindie-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    answer = server.post(CHAT_PATH, {**chat, "prompt_logprobs": 2}).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert [m and len(m) for m in answer["prompt_logprobs"]] == [None] + [3] * (
        answer["usage"]["prompt_tokens"] - 1
    )
    refused = server.post(CHAT_PATH, {**chat, "prompt_logprobs": 2, "stream": True})
    assert refused.status == 422 and "prompt_logprobs" in refused.json()["error"]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_echo_with_logprobs_scores_the_prompt(
    server: Daemon, reference: tuple[Any, Any], streamed: bool
) -> None:
    """As evaluation harnesses ask for the likelihood of a text."""
    model, tokenizer = reference
    body = {**PLAIN, "prompt": PROMPTS[1], "echo": True, "logprobs": 1, "max_tokens": 1}
    if streamed:
        *frames, _ = server.frames(PATH, {**body, "stream": True})
        choices = [json.loads(frame)["choices"][0] for frame in frames]
        lists = {
            name: [value for choice in choices for value in choice["logprobs"][name]]
            for name in choices[0]["logprobs"]
        }
        text = "".join(choice["text"] for choice in choices)
    else:
        (choice,) = complete(server, **body)["choices"]
        lists, text = choice["logprobs"], choice["text"]
    ids = tokenizer.encode(PROMPTS[1])
    with torch.inference_mode():
        rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert text.startswith(PROMPTS[1]) and "".join(lists["tokens"]) == text
    assert {len(values) for values in lists.values()} == {len(ids) + 1}
    assert lists["token_logprobs"][0] is None
    expected = [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]
    assert lists["token_logprobs"][1:-1] == pytest.approx(expected, abs=2e-3)
    assert lists["text_offset"] == [sum(map(len, lists["tokens"][:i])) for i in range(len(ids) + 1)]


CHAT: Json = {
    "model": "mindie-tiny",
    "messages": [{"role": "user", "content": "Who"}, {"role": "assistant", "content": "I am"}],
    "max_tokens": 6,
    "ignore_eos": True,
}


def prompt_text(server: Daemon, **members: Any) -> str:
    """What the model was fed, special tokens included."""
    answer = server.post(CHAT_PATH, {**CHAT, "prompt_logprobs": 0, **members})
    assert answer.status == 200, answer.body
    members_of = answer.json()["prompt_logprobs"]
    return "".join(entry["decoded_token"] for member in members_of[1:] for entry in member.values())


def test_a_request_brings_its_own_template(server: Daemon) -> None:
    own = "#{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tail }}"
    kwargs = {"chat_template_kwargs": {"tail": "!"}}
    assert prompt_text(server, chat_template=own, **kwargs) == "<user>Who<assistant>I am!"
    assert prompt_text(server, chat_template="# nothing else").endswith("nothing else")
    body = {**CHAT, "chat_template": own, **kwargs, "temperature": 0}
    said = server.post(CHAT_PATH, body).json()["choices"][0]["message"]["content"]
    plain = complete(server, prompt="#<user>Who<assistant>I am!", max_tokens=6)
    assert [said] == texts(plain)


def test_hostile_templates_cost_one_refusal(server: Daemon) -> None:
    endpoint = server.child("endpoint")
    before = {child.pid for child in endpoint.children()}
    for template in (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '\\ud800' }}",
        "{{ 'a b ' * 1000000 }}",
        "../chat.jinja",
        "missing.jinja",
        "",
        7,
    ):
        refused = server.post(CHAT_PATH, {**CHAT, "chat_template": template})
        if template == "{{ 'a b ' * 1000000 }}":  # a legal text, but more than fits the context
            assert refused.status in (422, 424), refused.body
        else:
            assert refused.status == 422 and "chat_template" in refused.json()["error"], template
        assert complete(server, prompt="Once", max_tokens=1)
    assert {child.pid for child in endpoint.children()} == before
    assert server.popen.poll() is None


def test_the_final_message_is_continued(server: Daemon) -> None:
    begun = prompt_text(server, continue_final_message=True)
    assert begun.endswith("I am")
    closed = prompt_text(server, add_generation_prompt=False)
    assert closed.startswith(begun) and closed != begun
    assert prompt_text(server).startswith(closed)
    both = server.post(CHAT_PATH, {**CHAT, "continue_final_message": True, "add_generation_prompt": True})
    assert both.status == 422 and "add_generation_prompt" in both.json()["error"]
