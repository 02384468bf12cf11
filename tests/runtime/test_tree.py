"""Signals to one very process, and what they make of it."""

import signal
from pathlib import Path

import anyio

from agent.runtime.tree import ASK_WHERE, kill, send, stopped
from protocol.worker import Metrics
from tests.support.children import DEADLINE, clean_env, start_order, supervised


def test_a_trainer_says_where_it_stands_and_goes_on(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            order = start_order(tmp_path, "step=0.01", max_steps=10_000)
            log = tmp_path / "job.log"
            identity = await watch.supervisor.start("job", order, env=clean_env(), log=log)
            await watch.heard(Metrics)
            assert not stopped(identity)
            send(identity, ASK_WHERE)
            with anyio.fail_after(DEADLINE):
                while "in main" not in log.read_text():  # noqa: ASYNC110  (nobody tells when a file grows)
                    await anyio.sleep(0.02)
            now = watch.events(Metrics)[-1].step
            await watch.heard(Metrics, lambda point: point.step > now)
            send(identity, signal.SIGSTOP)
            with anyio.fail_after(DEADLINE):
                while not stopped(identity):  # noqa: ASYNC110
                    await anyio.sleep(0.02)
            kill(identity)
            end = await watch.exited()
            assert (end.signal, end.forced) == (signal.SIGKILL, False)
            send(identity, ASK_WHERE)  # it has ended: nothing happens
            assert not stopped(identity)

    anyio.run(go)
