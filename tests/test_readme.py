"""What the README says is so. `python -m tests.test_readme` writes the parts that the code can say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import typer

from agent import config
from agent.cli_jobfile import read
from agent.cli_show import EXIT_PAUSED
from agent.demo import INTERRUPTED
from agent.errors import AgentError, Exit
from protocol.jobspec import RUNNABLE
from protocol.trainingconfig import job_spec

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FIRST = ("start", "hub", "demo", "run")
EXITS = {
    Exit.OK: "done",
    Exit.INTERNAL: "a defect of the agent",
    2: "wrong usage of the command line",
    Exit.SETTINGS: "a setting that cannot be obeyed",
    Exit.REFUSED: "the backend refuses the key, or this agent",
    Exit.NOT_OURS: "not our backend, or no protocol version in common",
    Exit.ALREADY_RUNNING: "another agent holds `AGENT_HOME`",
    Exit.UNKNOWN_JOB: "no job of that id",
    Exit.NOT_POSSIBLE: "the job's state does not allow it",
    Exit.BAD_JOB: "a job that cannot be accepted",
    Exit.JOB_FAILED: "`run`, `demo`: the job failed or was cancelled",
    Exit.UNREACHABLE: "the agent or backend that was asked is not there",
    EXIT_PAUSED: "`run` was paused; the same command goes on",
    INTERRUPTED: "ended before its time by Ctrl-C or a signal",
}


def every_command() -> list[typer.models.CommandInfo]:
    """Return the commands, in the order of the help."""
    from agent.cli import app

    groups = [group.typer_instance for group in app.registered_groups]
    return [
        *app.registered_commands,
        *(one for group in groups if group is not None for one in group.registered_commands),
    ]


def command_table() -> str:
    """Return the commands, each with the first sentence of its help."""
    rows = []
    for command in every_command():
        assert command.callback is not None and command.callback.__doc__
        sentence = command.callback.__doc__.split("\n")[0]
        rows.append(f"| `{command.callback.__name__}` | {sentence} |\n")
    return "| command | what it does |\n|---|---|\n" + "".join(rows)


def exit_table() -> str:
    """Return the exit codes."""
    rows = "".join(f"| {int(code)} | {meaning} |\n" for code, meaning in sorted(EXITS.items()))
    return "| exit code | meaning |\n|---|---|\n" + rows


def tree() -> str:
    """Return the files, each with the first sentence of its docstring."""
    lines = []
    for top in ("protocol", "agent"):
        for folder in sorted({path.parent for path in (ROOT / top).rglob("*.py")}):
            files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
            about = sentence(folder / "__init__.py") if (folder / "__init__.py").exists() else ""
            lines.append(f"{str(folder.relative_to(ROOT)) + '/':<26} {about}".rstrip())
            lines += [f"  {path.name:<24} {sentence(path)}".rstrip() for path in files]
    return "```\n" + "\n".join(lines) + "\n```\n"


def sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[A-Za-z)`])[.] ", text)[0].rstrip(".")


PARTS = {"commands": command_table, "exits": exit_table, "settings": config.settings_table, "tree": tree}


def filled(text: str) -> str:
    """Return the README with every part between its marks as the code says it."""
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), name
        text = pattern.sub(lambda match, part=part: match[1] + part() + match[2], text)  # type: ignore[misc]
    return text


def test_tables_and_tree_are_as_the_code_has_them() -> None:
    text = README.read_text()
    assert filled(text) == text, "run python -m tests.test_readme"


def test_every_exit_code_is_told() -> None:
    assert set(EXITS) == {*Exit, 2, EXIT_PAUSED, INTERRUPTED}
    errors = [AgentError, *AgentError.__subclasses__()]
    assert {error.exit_code for error in errors} <= set(EXITS)


def test_the_first_screen_holds_what_it_is_and_the_two_commands() -> None:
    first = "\n".join(README.read_text().splitlines()[:48])
    assert '.venv/bin/pip install -e ".[hub]"  && .venv/bin/training-agent demo' in first
    assert '.venv/bin/pip install -e ".[test]" && .venv/bin/pytest' in first
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", first)
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")


def test_every_command_that_is_named_exists_with_its_options() -> None:
    used = re.findall(r"training-agent ((?:[a-z]+)(?: [^\n`&|#]*)?)", README.read_text())
    names = {command.callback.__name__ for command in every_command() if command.callback} | set(FIRST)
    for line in used:
        words = line.split()
        if words[0] not in names:
            continue
        for option in [word for word in words if word.startswith("--")]:
            shown = subprocess.run(
                [sys.executable, "-m", "agent", words[0], "--help"], capture_output=True, text=True, cwd=ROOT
            )
            assert option in shown.stdout, (line, option)
    assert {"demo", "start", "run", "hub", "submit"} <= {line.split()[0] for line in used}


def test_the_job_that_is_shown_is_one(tmp_path: Path) -> None:
    shown = re.search(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    assert shown is not None
    file = tmp_path / "job.yaml"
    file.write_text(shown[1])
    spec = job_spec("j", read(file).config, "train.jsonl")
    assert spec.training.learning_rate == 2e-4
    assert spec.lora is not None and spec.lora.r == 16
    assert spec.model.quantization is not None and spec.model.quantization.bits == 4


def test_the_limits_are_the_codes() -> None:
    text = README.read_text()
    assert [method.value for method in RUNNABLE] == ["sft", "cpt", "dpo"]
    assert "Methods: SFT, CPT and DPO" in text
    assert "Left out of the older agent on purpose: remote shell commands" in text


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", README.read_text()):
        assert (ROOT / target).exists(), target


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
