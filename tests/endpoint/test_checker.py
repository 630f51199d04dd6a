"""The verdict table of the health check, row by row, and the rounds that lead to it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from endpoint.checker import Checker, Found, Judge, WorkerLoad, utilisation_of
from endpoint.engine_client import EngineClient
from endpoint.health import Health, State
from endpoint.trial import Trials
from engine.outcome import FinishCode
from tests.endpoint.test_engine_client import Engine, run, token, until
from tests.harness import eventually

THRESHOLD = 60


class Round:
    """One round: what came of its trial, and how busy the devices were."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def __call__(self, found: Found, utilisation: float) -> State | None:
        assert self.judge.wants_trial()
        self.judge.sampled(utilisation)
        return self.judge.judge(found)


@pytest.fixture
def look() -> Round:
    return Round(Judge(THRESHOLD))


def test_a_token_is_normal(look: Round) -> None:
    assert look(Found.TOKEN, 0.0) is State.NORMAL


@pytest.mark.parametrize("utilisation", [60.0, 100.0])
def test_no_token_of_a_busy_device_is_busy_at_once(look: Round, utilisation: float) -> None:
    assert look(Found.TIMEOUT, utilisation) is State.BUSY


def test_no_token_of_an_idle_device_is_abnormal_the_second_time(look: Round) -> None:
    assert look(Found.TIMEOUT, 59.9) is None
    assert look(Found.TIMEOUT, 59.9) is State.ABNORMAL
    assert look(Found.TOKEN, 0.0) is State.NORMAL
    assert look(Found.TIMEOUT, 0.0) is None  # the first after a good result
    assert look(Found.TIMEOUT, 80.0) is State.BUSY
    assert look(Found.TIMEOUT, 0.0) is State.ABNORMAL  # busy was no good result


def test_a_trial_that_cannot_be_sent_is_abnormal_at_once(look: Round) -> None:
    assert look(Found.ERROR, 0.0) is State.ABNORMAL


def test_a_device_at_work_is_left_alone_but_for_every_18th_round() -> None:
    judge = Judge(THRESHOLD)
    trials = []
    for _ in range(40):
        trials.append(judge.wants_trial())
        if trials[-1]:
            judge.judge(Found.TOKEN)
        judge.sampled(50.0)
    assert [index for index, tried in enumerate(trials) if tried] == [0, 18, 36]
    judge.sampled(49.9)
    assert judge.wants_trial()


def test_a_busy_device_without_tokens_is_tried_again_at_once(look: Round) -> None:
    assert look(Found.TIMEOUT, 90.0) is State.BUSY
    assert look(Found.TOKEN, 90.0) is State.NORMAL
    assert not look.judge.wants_trial()


class Busy:
    """A device that is so busy for ever."""

    def __init__(self, percent: float) -> None:
        self.percent = percent

    def sample(self) -> float:
        return self.percent


def test_rounds_over_a_real_channel(tmp_path: Path) -> None:
    """An engine that answers, one that does not, and one that is lost."""

    async def work(client: EngineClient, engines: list[Engine]) -> None:
        health, device = Health(), Busy(0.0)
        health.expect([0])
        health.instance_up(0)
        health.opened()
        checker = Checker(health, Trials(client), device, THRESHOLD)
        [engine] = engines

        async def answer() -> None:
            await until(engine, lambda: len(engine.seen) == 1)
            engine.say(token(1, 0, 5, FinishCode.LENGTH))

        await asyncio.gather(checker.round(0.5), answer())
        assert health.state is State.NORMAL
        for state in (State.NORMAL, State.ABNORMAL):
            await checker.round(0.05)
            assert health.state is state
        assert "no token within 0.05 s; devices 0 % busy" in health.live().message
        device.percent = 99.0
        await checker.round(0.05)
        assert health.state is State.BUSY
        await until(engine, lambda: [request for request, _ in engine.aborted] == [2, 3, 4])
        client.close_instance(0, final=True)
        await checker.round(0.05)
        assert health.state is State.ABNORMAL

    run(tmp_path, work)


def test_one_trial_serves_all_who_ask_meanwhile(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine]) -> None:
        trials = Trials(client)
        askers = [asyncio.create_task(trials.run(20.0)) for _ in range(50)]
        [engine] = engines
        await until(engine, lambda: bool(engine.seen))
        askers.pop().cancel()  # who leaves takes nothing from the others
        await asyncio.sleep(0)
        engine.say(token(1, 0, 5, FinishCode.LENGTH))
        await asyncio.gather(*askers)
        assert list(engine.seen) == [1] and not engine.aborted
        alone = asyncio.create_task(trials.run(20.0))
        await until(engine, lambda: len(engine.seen) == 2)
        alone.cancel()  # the last one takes the trial along
        await until(engine, lambda: [request for request, _ in engine.aborted] == [2])

    run(tmp_path, work)


def test_a_token_for_anybody_is_a_sign_of_life(tmp_path: Path) -> None:
    async def work(client: EngineClient, engines: list[Engine]) -> None:
        [engine] = engines
        asker = asyncio.create_task(Trials(client).run(0.2))
        await until(engine, lambda: bool(engine.seen))
        engine.say(token(99, 0, 5))  # of a request that has just ended
        await asker

    run(tmp_path, work)


def test_the_load_is_that_of_the_other_children_of_our_parent() -> None:
    program = (
        "import os, subprocess, sys, time\n"
        "from endpoint.checker import WorkerLoad\n"
        "load = WorkerLoad()\n"
        "while True:\n"
        "    print(load.sample(), flush=True)\n"
        "    time.sleep(0.05)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        f"mine = [subprocess.Popen([sys.executable, '-c', {program!r}]), "
        "subprocess.Popen([sys.executable, '-c', 'while True: pass'])]\n"
        "sys.stdin.read()\n"
        "[(one.kill(), one.wait()) for one in mine]\n"
    )
    repo = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(repo)},
    )
    assert process.stdin and process.stdout
    try:
        eventually(lambda: float(process.stdout.readline()) > 5.0, 30.0, "a busy sibling is seen")  # type: ignore[union-attr]
        siblings = psutil.Process(process.pid).children()
        [spinning] = [one for one in siblings if "while True: pass" in one.cmdline()]
        spinning.suspend()
        eventually(lambda: float(process.stdout.readline()) == 0.0, 30.0, "a stopped one does nothing")  # type: ignore[union-attr]
        spinning.resume()
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_a_device_nobody_can_measure_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    device = utilisation_of("npu")
    assert [device.sample(), device.sample()] == [0.0, 0.0]
    [record] = caplog.records
    assert "npu" in record.getMessage() and "npuUsageThreshold=0" in record.getMessage()
    assert isinstance(utilisation_of("cpu"), WorkerLoad)
