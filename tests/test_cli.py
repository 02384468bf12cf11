"""The command line: what it prints, asks and leaves with."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agent import cli_show, demo, demo_data
from agent.cli import main
from agent.cli_jobfile import JobFile, read, stable_id
from agent.errors import AgentError, BadJob
from protocol.lifecycle import JobState, Want
from protocol.version import AGENT_VERSION
from tests.local.desk import FAILED, Api, api, job

ROOT = Path(__file__).parent.parent
CONFIG = {"model": {"name": "tiny"}, "training": {"method": "sft", "max_steps": 6, "logging_steps": 1}}
WITH_FAKE = (
    "import functools, agent.app, agent.cli;"
    "agent.app.run_job = functools.partial(agent.app.run_job, module='agent.trainer.fake');"
    "agent.cli.main()"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run every command in an empty folder, with a home of its own."""
    folder = tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGENT_HOME", str(folder))
    monkeypatch.setenv("PORT", "1")
    return folder


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code and what it said."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def agent(home: Path) -> Iterator[Api]:
    home.mkdir()
    jobs = [
        job("run", step=25, total_steps=100, values={"train_loss": 2.5}),
        job("bad", JobState.FAILED, failure=FAILED),
    ]
    with api(home, *jobs) as one:
        yield one


def test_help_names_every_command_and_each_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "--help")
    assert code == 0
    names = re.findall(r"^  ([a-z]+)  ", out[out.index("Commands:") :], re.MULTILINE)
    wanted = [
        "start",
        "hub",
        "demo",
        "run",
        "submit",
        "jobs",
        "status",
        "logs",
        "pause",
        "resume",
        "cancel",
        "stop",
        "retry",
        "check",
        "checkpoints",
        "branch",
        "schema",
        "version",
    ]
    assert sorted(names) == sorted(wanted)
    for name in names:
        code, out, _ = called(capsys, name, "-h")
        assert code == 0
        if name not in ("start",):
            assert f"Example: training-agent {name}" in " ".join(out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(capsys, "version")[1] == f"training-agent {AGENT_VERSION}, protocol 1\n"
    assert json.loads(called(capsys, "version", "--json")[1]) == {"version": AGENT_VERSION, "protocol": 1}


def test_a_bad_setting_is_one_sentence_and_code_3(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "--set", "MAX_CONCURRENT_JOBS=many", "jobs")
    assert (code, out) == (3, "")
    assert err == (
        "error: MAX_CONCURRENT_JOBS: 'many' is not allowed; it takes a whole number from 1 to 16 (command line)\n"
    )
    assert called(capsys, "--set", "NOPE=1", "jobs")[0] == 3
    code, _, err = called(capsys, "--set", "API_KEY=wak_1", "jobs")
    assert code == 3 and "wak_1" not in err


def test_start_without_a_key_is_code_3_and_makes_nothing(
    capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    code, _, err = called(capsys, "start")
    assert code == 3 and err.startswith("error: API_KEY: is not set.")
    assert not home.exists()


def test_a_slip_in_the_env_file_stops_the_program(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BACKEND_ULR=https://a.example\n")
    code, _, err = called(capsys, "start")
    assert code == 3 and "did you mean BACKEND_URL?" in err
    (tmp_path / "other.env").write_text("LOG_LEVEL=LOUD\n")
    assert "other.env" in called(capsys, "--env-file", "other.env", "start")[2]


def test_a_near_miss_in_the_environment_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_DIR", "x")
    assert "warning: MODEL_DIR in the environment" in called(capsys, "jobs")[2]


def test_no_agent_is_code_12_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(capsys, "jobs")
    assert code == 12
    assert err.startswith(
        "error: No agent answers at http://127.0.0.1:1. Start one with `training-agent start`"
    )


def test_a_defect_is_code_1_and_debug_shows_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.cli_show.table", None)
    monkeypatch.setattr("agent.cli_remote.Local.jobs", lambda self: [])
    code, _, err = called(capsys, "jobs")
    assert code == 1 and "a defect of the agent" in err and "Traceback" not in err
    with pytest.raises(TypeError):
        main(["--debug", "jobs"])


def test_jobs_and_status(capsys: pytest.CaptureFixture[str], agent: Api) -> None:
    code, out, _ = called(capsys, "jobs")
    assert code == 0
    assert out.splitlines()[1].split() == ["run", "running", "25", "%", "25/100", "2.5000", "tiny"]
    assert [one["job_id"] for one in json.loads(called(capsys, "jobs", "--json")[1])] == ["run", "bad"]
    out = called(capsys, "status", "bad")[1]
    assert "Row 57 of rows.jsonl: text is null." in out and "Mend the data set" in out
    assert json.loads(called(capsys, "status", "run", "--json")[1])["current_step"] == 25
    assert "agent_secretname" in called(capsys, "status")[1]


def test_logs_and_their_end(capsys: pytest.CaptureFixture[str], agent: Api) -> None:
    assert called(capsys, "logs", "run")[1].splitlines() == [f"line {number}" for number in range(5)]
    assert called(capsys, "logs", "run", "--limit", "2")[1].splitlines() == ["line 3", "line 4"]
    assert called(capsys, "logs", "-f", "bad")[1].splitlines()[-1] == "line 4", "a job that has ended ends it"


def test_the_users_word_branches_and_pins(capsys: pytest.CaptureFixture[str], agent: Api) -> None:
    assert called(capsys, "resume", "run", "--accept-changes")[0] == 0
    assert called(capsys, "retry", "bad", "--accept-changes")[0] == 0
    sets = ["--set", "training.learning_rate=1e-4", "--set", "training.optim=sgd"]
    words = ["branch", "run", "--checkpoint", "step-2", "--job-id", "twig", *sets]
    assert called(capsys, *words)[:2] == (0, "twig\n")
    out = called(capsys, "checkpoints", "run", "--pin", "step-2")[1]
    assert out == "step-2       epoch 0.20         0.0 MB  held out 1.5000  best latest\n"
    assert json.loads(called(capsys, "checkpoints", "run", "--json")[1])["best_checkpoint"]["step"] == 2
    assert called(capsys, "checkpoints", "bad")[1] == "No checkpoint yet.\n"
    changes = {"training": {"learning_rate": 1e-4, "optim": "sgd"}}
    assert agent.desk.asked == [
        ("want", "run", Want.RUN, "", "owner", "accept"),
        ("retry", "bad", "", "owner", "accept"),
        ("branch", "run", "step-2", changes, "twig", "", "owner"),
        ("pin", "run", "step-2", True),
    ]


def test_a_slip_in_a_branchs_settings_is_said(capsys: pytest.CaptureFixture[str], agent: Api) -> None:
    code, _, err = called(capsys, "branch", "run", "--set", "training.seed")
    assert code == 10 and "give PATH=VALUE" in err
    code, _, err = called(capsys, "branch", "run", "--set", "a=1", "--set", "a.b=2")
    assert code == 10 and "a key above it was given a value" in err
    assert called(capsys, "checkpoints", "run", "--pin", "step-2", "--unpin", "step-2")[0] == 10
    assert agent.desk.asked == []


def test_steering(capsys: pytest.CaptureFixture[str], agent: Api) -> None:
    assert called(capsys, "pause", "run")[:2] == (0, "The job is pausing.\n")
    assert called(capsys, "resume", "run", "--checkpoint", "best")[0] == 0
    assert json.loads(called(capsys, "stop", "run", "--json")[1])["success"] is True
    assert called(capsys, "cancel", "run")[0] == 0
    assert called(capsys, "retry", "bad")[0] == 0
    assert [entry[:2] for entry in agent.desk.asked] == [("want", "run")] * 4 + [("retry", "bad")]
    assert agent.desk.asked[1][3] == "best"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("pause", "none"), 8, 'There is no job "none" on this agent.'),
        (("pause", "bad"), 9, "The job is failed; it cannot be paused."),
        (("status", "../health"), 10, "is no job id"),
        (("pause",), 2, "Missing argument"),
        (("nothing",), 2, "No such command"),
    ],
)
def test_what_cannot_be_done(
    capsys: pytest.CaptureFixture[str], agent: Api, words: tuple[str, ...], code: int, said: str
) -> None:
    found, _, err = called(capsys, *words)
    assert found == code and said in err


def test_a_wrong_token_is_told(capsys: pytest.CaptureFixture[str], agent: Api, home: Path) -> None:
    (home / "local_token").write_text("stale")
    code, _, err = called(capsys, "jobs")
    assert code == 4 and "local_token" in err


def test_schema_is_printed_and_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert json.loads(called(capsys, "schema")[1])["$defs"]["Hello"]
    assert json.loads(called(capsys, "schema", "--asyncapi")[1])["asyncapi"] == "3.0.0"
    code, out, _ = called(capsys, "schema", "--write", str(tmp_path))
    assert code == 0 and [Path(line).name for line in out.splitlines()] == ["schema.json", "asyncapi.json"]


@contextlib.contextmanager
def running_hub(folder: Path) -> Iterator[tuple[str, str]]:
    """Run the real hub; yield its URL and a key."""
    command = [
        sys.executable,
        "-m",
        "agent",
        "hub",
        "--port",
        "0",
        "--data-dir",
        str(folder),
        "--no-page",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            said = json.loads(child.stdout.readline())
            yield said["url"], said["api_key"]
        finally:
            child.terminate()
            child.wait(30)


def test_submit_and_steer_by_a_hub(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "job.json").write_text(json.dumps(CONFIG))
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    with running_hub(tmp_path / "hub") as (url, key):
        asked = ("--hub", url, "--api-key", key)
        monkeypatch.setenv("BACKEND_URL", url)
        monkeypatch.setenv("API_KEY", key)
        code, out, err = called(capsys, "submit", "job.json", "--data", "rows.jsonl", "--job-id", "j1")
        assert (code, out, err) == (0, "j1\n", "")
        assert json.loads(called(capsys, "submit", "job.json", "--json")[1])["job_id"]
        assert {
            one.get("job_id") or one["id"] for one in json.loads(called(capsys, "jobs", "--json", *asked)[1])
        } >= {"j1"}
        assert "j1" in called(capsys, "jobs", *asked)[1]
        assert "j1" in called(capsys, "status", "j1", *asked)[1]
        assert called(capsys, "status", *asked)[1].startswith("No agent has dialled")
        assert called(capsys, "cancel", "j1", *asked)[0] == 0
        assert called(capsys, "logs", "-f", "j1", *asked)[0] == 0
        assert json.loads(called(capsys, "status", "j1", "--json", *asked)[1])["status"] == "cancelled"
        assert called(capsys, "status", "none", *asked)[0] == 8
        code, _, err = called(capsys, "jobs", "--hub", url, "--api-key", "wak_wrong")
        assert code == 4 and err.startswith("error: ")
    assert called(capsys, "jobs", *asked)[0] == 12


def ran(folder: Path, *words: str) -> "subprocess.Popen[str]":
    environ = {
        **os.environ,
        "AGENT_HOME": str(folder / "home"),
        "BACKEND_URL": "none",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", WITH_FAKE, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environ,
    )


def write_job(folder: Path, name: str = "", **training: Any) -> None:
    (folder / "rows.jsonl").write_text('{"text": "one"}\n')
    (folder / "home" / "models" / "tiny").mkdir(parents=True)
    (folder / "home" / "models" / "tiny" / "config.json").write_text("{}")
    config = {**CONFIG, "name": name, "training": {**CONFIG["training"], **training}}
    (folder / "job.json").write_text(json.dumps(config))


def test_run_prints_every_metric_and_state_and_the_result_last(tmp_path: Path) -> None:
    write_job(tmp_path)
    out, err = ran(tmp_path, "run", "job.json", "--data", "rows.jsonl", "--json").communicate(timeout=60)
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines, err
    assert [line["step"] for line in lines if line["type"] == "metric"] == [1, 2, 3, 4, 5, 6]
    states = [line["state"] for line in lines if line["type"] == "state"]
    assert states[0] in ("queued", "preparing") and states[-1] == "completed"
    told = [line for line in lines if line["type"] == "state"]
    keys = [(line["state"], line["phase"], line["detail"], line["attempt"]) for line in told]
    assert all(one != after for one, after in pairwise(keys)), "each state is told once"
    assert lines[-1]["type"] == "result" and lines[-1]["status"] == "completed"
    assert Path(lines[-1]["model_path"]).is_dir()


def test_run_is_paused_by_ctrl_c_and_the_same_command_goes_on(tmp_path: Path) -> None:
    write_job(tmp_path, "fake step=0.05", max_steps=60)
    command = ("run", "job.json", "--data", "rows.jsonl", "--json")
    first = ran(tmp_path, *command)
    assert first.stdout is not None
    steps = []
    for line in first.stdout:
        said = json.loads(line)
        if said["type"] == "metric":
            steps.append(said["step"])
            if said["step"] == 3:
                first.send_signal(signal.SIGINT)
        last = said
    first.communicate(timeout=60)
    assert (first.returncode, last["status"]) == (75, "paused")
    out, err = (second := ran(tmp_path, *command)).communicate(timeout=60)
    lines = [json.loads(line) for line in out.splitlines()]
    assert second.returncode == 0, err
    steps += [line["step"] for line in lines if line["type"] == "metric"]
    assert steps == list(range(1, 61))
    assert lines[-1]["job_id"] == last["job_id"]


def test_a_run_that_fails_says_why_and_leaves_with_11(tmp_path: Path) -> None:
    write_job(tmp_path, "fake fail_at=2")
    child = ran(tmp_path, "run", "job.json", "--data", "rows.jsonl")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 11
    assert out == "" and "failed" in err and "Traceback" not in err


def test_a_job_file_that_cannot_be_read_is_code_10(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, text, said in [
        ("gone.json", None, "cannot read gone.json"),
        ("bad.json", "{", "bad.json is not JSON: "),
        ("bad.yaml", "a: [", "bad.yaml is not YAML: "),
        ("list.json", "[]", "found list"),
        ("deep.json", "[" * 200_000, "nested too deeply"),
        ("bytes.json", b"\xff\x00", "cannot read bytes.json"),
    ]:
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        code, _, err = called(capsys, "run", name)
        assert code == 10 and said in err, err


def test_job_files_in_the_shapes_that_users_export(tmp_path: Path) -> None:
    def wrote(name: str, text: str) -> JobFile:
        (tmp_path / name).write_text(text)
        return read(tmp_path / name)

    assert wrote("raw.json", json.dumps(CONFIG)).config == CONFIG
    whole = wrote(
        "whole.json", json.dumps({"job_id": "j", "name": "N", "config": CONFIG, "dataset_path": "d"})
    )
    assert (whole.job_id, whole.name, whole.dataset_path, whole.config) == ("j", "N", "d", CONFIG)
    assert wrote("row.json", json.dumps({"id": "c1", "config_json": CONFIG})).job_id == ""
    text = "training: {learning_rate: 2e-4, evaluation_strategy: no, packing: true, a: .5e3, b: 1_0, c: e5}"
    assert wrote("job.yml", text).config["training"] == {
        "learning_rate": 2e-4,
        "evaluation_strategy": "no",
        "packing": True,
        "a": 500.0,
        "b": 10,
        "c": "e5",
    }


def test_an_id_follows_the_content_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "My Job!.json"
    one = stable_id(path, JobFile(config=CONFIG), "")
    assert re.fullmatch(r"my-job-[0-9a-f]{12}", one)
    assert stable_id(path, JobFile(config=dict(CONFIG)), "") == one
    assert stable_id(path, JobFile(config={**CONFIG, "seed": 1}), "") != one
    assert stable_id(path, JobFile(config=CONFIG), "other.jsonl") != one
    assert stable_id(tmp_path / "other" / path.name, JobFile(config=CONFIG), "") != one


def test_output_that_is_no_terminal_gets_a_line_for_each_tenth() -> None:
    tenths = cli_show.Tenths()
    lines = [tenths.line("running", step, 100, "loss 1") for step in range(101)]
    assert [line for line in lines if line][:2] == ["running  0/100  loss 1", "running  10/100  loss 1"]
    assert len([line for line in lines if line]) == 11
    assert tenths.line("paused", 100, None, "") == "paused"


def test_the_demos_own_data_keeps_its_last_row_back(tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    chats = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(3)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in chats))
    found = demo_data.bring_data(str(source), tmp_path / "datasets")
    assert (found["rows"], found["prompt"], found["answer"]) == (2, "q2", "a2")
    assert len(Path(found["data"]).read_text().splitlines()) == 2
    source.write_text('{"instruction": "i", "output": "o"}\n{"text": "t"}\n')
    assert demo_data.bring_data(str(source), tmp_path / "datasets")["prompt"] == ""
    (tmp_path / "rows.csv").write_text("text\na\n")
    assert demo_data.bring_data(str(tmp_path / "rows.csv"), tmp_path / "datasets")["rows"] is None
    assert demo_data.bring_data("owner/set", tmp_path / "datasets")["data"] == "owner/set"
    with pytest.raises(BadJob, match="is no file here"):
        demo_data.bring_data("./gone.jsonl", tmp_path)


def test_the_demos_own_model_is_brought_by_links(tmp_path: Path) -> None:
    source = tmp_path / "mine"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "sub" / "x").write_text("x")
    target = Path(demo_data.bring_model(str(source), tmp_path / "models")["model"])
    assert target == tmp_path / "models" / "mine" and (target / "sub" / "x").read_text() == "x"
    assert demo_data.bring_model("owner/model", tmp_path)["model"] == "owner/model"
    with pytest.raises(BadJob, match="is no folder here"):
        demo_data.bring_model("gone", tmp_path)
    with pytest.raises(BadJob, match="holds no config"):
        demo_data.bring_model(str(tmp_path / "models"), tmp_path)


def test_the_demo_shows_before_and_after() -> None:
    sample = {
        "prompt": "Q?",
        "before": "x",
        "after": "A",
        "log_likelihood_before": -9.0,
        "log_likelihood_after": -2.0,
    }
    results = {"initial_eval_loss": 6.0, "final_eval_loss": 3.0}
    shown = demo.summary(
        {"job_id": "d", "current_step": 5, "results": results, "samples": [sample], "model_path": "/m"}
    )
    text = demo._told(shown)
    assert "6.0000 -> 3.0000  (50 % lower)" in text and "-9.00 -> -2.00" in text and "/m" in text


def test_the_demo_that_cannot_build_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(AgentError, match=r"could not be built; .*build\.log says why"):
        demo.run(demo.Wish(home=tmp_path / "demo"), lambda news: None)


@pytest.mark.slow
def test_the_demo_learns_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "agent",
        "demo",
        "--exit-when-done",
        "--no-browser",
        "--json",
        "--home",
        "demo",
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=600)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])["result"]
    assert result["held_out_loss_after"] < result["held_out_loss_before"] * 2 / 3
    assert result["log_likelihood_after"] > result["log_likelihood_before"]
    assert result["answer_before"] and result["answer_after"]
    assert list(Path(result["model_path"]).glob("*.safetensors"))
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _mentions(path, str(tmp_path))]
    assert left == []


def _mentions(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        return text in path.read_text(errors="replace")
    return False
