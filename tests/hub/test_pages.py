"""The page, in a real browser and for those who should not see it."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import pytest
from playwright.async_api import Page, async_playwright, expect

from protocol.failures import FailureReason, failure
from protocol.records import JobEstimate, JobFacts, JobStatus, LogChunk, Point, ResumeCheck, Schema
from protocol.worker import Estimate
from tests.hub.support import HubProcess, submit
from tests.support.scripted_agent import ScriptedAgent

NEEDS = Estimate(
    device="cpu", host_gb=3.5, disk_gb=1.0, free_host_gb=9.0, free_disk_gb=9.0, total_seconds=120.0
)
SEEN_WITHIN = 15_000
"""Milliseconds; a safety limit, not a measure."""


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(tmp_path_factory.mktemp("hub")) as process:
        yield process


def chromium() -> str:
    """Return the installed browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no browser: install one, for example with apt-get install chromium")
    return path


def test_the_page_is_there_and_says_how_to_begin(paged: HubProcess) -> None:
    answer = httpx.get(f"{paged.url}/", trust_env=False)
    assert answer.status_code == 200
    assert "No agent has connected yet." in answer.text
    assert "No job was submitted yet." in answer.text
    missing = httpx.get(f"{paged.url}/jobs/none", trust_env=False)
    assert "There is no job none at this hub." in missing.text


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Host": "evil.example"}, "to this machine only"),
        ({"Host": "127.0.0.1.evil.example:80"}, "to this machine only"),
        ({"Origin": "http://evil.example"}, "may not use this one"),
        ({"Origin": "null"}, "may not use this one"),
    ],
)
def test_other_names_and_other_sites_are_refused(
    paged: HubProcess, headers: dict[str, str], words: str
) -> None:
    for path in ("/", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
        answer = httpx.get(f"{paged.url}{path}", headers=headers, trust_env=False)
        assert answer.status_code == 403
        assert words in answer.text


def test_beyond_this_machine_the_page_needs_the_key(tmp_path: Path) -> None:
    with (
        HubProcess(tmp_path / "hub", "--host", "0.0.0.0") as hub,  # noqa: S104  # the case under test
        httpx.Client(base_url=hub.url, trust_env=False, follow_redirects=True) as browser,
    ):
        shown = browser.get("/")
        assert str(shown.url).endswith("/login")
        assert "Log in" in shown.text
        assert str(browser.get("/jobs/any").url).endswith("/login")
        wrong = browser.post("/login", data={"key": "wak_wrong"})
        assert wrong.status_code == 401
        assert "not a key of this hub" in wrong.text
        assert "Log in" in browser.get("/").text
        foreign = browser.post("/login", data={"key": hub.key}, headers={"Origin": "http://evil.example"})
        assert foreign.status_code == 403
        assert "No agent has connected yet." in browser.post("/login", data={"key": hub.key}).text
        assert "No agent has connected yet." in browser.get("/").text


def test_a_hub_without_a_page_loads_none_of_it() -> None:
    code = "import sys, agent.hub.__main__, agent.hub.app; sys.exit(bool({'nicegui', 'fastapi', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_is_seen_live_and_steered_from_the_page(paged: HubProcess) -> None:
    expect.set_options(timeout=SEEN_WITHIN)

    async def follow(page: Page, agent: ScriptedAgent, job_id: str) -> None:
        await page.goto(paged.url)
        await expect(page.get_by_text("Connected")).to_be_visible()
        await expect(page.get_by_text("Training")).to_be_visible()
        await page.get_by_text("Seen live").click()
        await expect(page.get_by_test_id("train_loss")).to_have_text("2")
        await expect(page.get_by_test_id("estimate")).to_have_text(
            "Needs about 3.5 GB of memory, 1.0 GB of disk, 2 min 00 s."
        )
        await expect(page.get_by_test_id("log")).to_contain_text("a line of the log")
        await expect(page.locator("canvas")).to_be_visible()
        agent.add(Point(time.time(), 1, 2, 0.5, 1, [0.125]), job_id)
        agent.add(LogChunk(time.time(), 1, 20, ["a later line"]), job_id)
        await expect(page.get_by_test_id("train_loss")).to_have_text("0.125")
        await expect(page.get_by_test_id("steps")).to_contain_text("50 % - step 2 of 4")
        await expect(page.get_by_test_id("log")).to_contain_text("a later line")
        await page.get_by_test_id("pause").click()
        await agent.until_wanted(job_id, "pause")
        await expect(page.get_by_test_id("state")).to_have_text("Training, asked to pause")
        agent.add(JobStatus(time.time(), 1, "paused", by="user"), job_id)
        await expect(page.get_by_test_id("state")).to_have_text("Paused")
        await page.get_by_test_id("resume").click()
        await agent.until_wanted(job_id, "run")
        await page.get_by_test_id("cancel").click()
        await agent.until_wanted(job_id, "cancel")
        await expect(page.get_by_test_id("accept")).to_be_hidden()
        why = failure(FailureReason.CHECKPOINT, "The data set has other rows.")
        agent.add(ResumeCheck(time.time(), 1, 5, 6, True), job_id)
        agent.add(JobStatus(time.time(), 1, "failed", failure=why), job_id)
        await expect(page.get_by_test_id("failure")).to_have_text("The data set has other rows.")
        await expect(page.get_by_test_id("resume_check")).to_have_text(
            "Steps 5 to 6 replayed: equal bit for bit."
        )
        await expect(page.get_by_test_id("retry")).to_be_visible()
        await expect(page.get_by_test_id("pause")).to_be_hidden()
        await page.get_by_test_id("accept").click()
        await agent.until(lambda: bool(agent.commands))
        assert agent.commands[0].args == {"accept_changes": 1}

    async def main() -> None:
        with paged.client() as client:
            job_id, _ = submit(client, name="Seen live")
        agent = ScriptedAgent(paged.url, paged.key)
        async with async_playwright() as playwright, agent.connected():
            await agent.until_wanted(job_id)
            agent.add(JobStatus(time.time(), 1, "running"), job_id)
            agent.add(Schema(1, ["train_loss"]), job_id)
            agent.add(JobFacts(time.time(), 1, 4, 1.0, 0, 9, 1, 1, 1, 1e-4), job_id)
            agent.add(Point(time.time(), 1, 1, 0.25, 1, [2.0]), job_id)
            agent.add(JobEstimate(time.time(), 1, NEEDS), job_id)
            agent.add(LogChunk(time.time(), 1, 0, ["a line of the log"]), job_id)
            browser = await playwright.chromium.launch(
                executable_path=chromium(),
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            )
            page = await browser.new_page()
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            try:
                await follow(page, agent, job_id)
            finally:
                await browser.close()
            # The page works without the internet: all it loads comes from the hub.
            assert [url for url in asked if not re.match(rf"({re.escape(paged.url)}|data:|ws:)", url)] == []

    anyio.run(main)
