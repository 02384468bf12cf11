"""The command line. The only file that prints.

Exit codes: 0 done; 1 a defect of the agent; 2 wrong usage; 3 a setting; 4 the backend refuses
the key or this agent; 5 not our backend, or no common version; 7 another agent holds AGENT_HOME;
8 no such job; 9 the job's state does not allow it; 10 a job that cannot be accepted; 11 the job
failed or was cancelled; 12 nothing answers; 75 `run` was paused, and the same command resumes it;
130 ended before its time by a signal.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from agent.cli_branch import branching
from agent.cli_check import checking
from agent.cli_commands import commands
from agent.cli_options import AcceptChanges, AsJson, JobPath, given, settings_of
from agent.cli_start import guarded, leaf, log_to, warn
from agent.cli_start import run as run_start
from agent.errors import AgentError, Exit

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from agent.cli_show import Tenths
    from agent.core.ports import JobView, PointView

# Imports inside the commands keep `start` quick to dial and the others quick to answer.


def _show(result: str | Iterator[str] | None, **_: Any) -> None:
    """Print what a command of `cli_commands` returned."""
    for text in [result] if isinstance(result, str) else result or ():
        print(text, flush=True)


app = typer.Typer(
    name="training-agent",
    help="Fine-tunes models on this machine for a FineTune Lab backend.\n\n"
    "Try it with no account and no GPU: `training-agent demo`",
    epilog="Settings come from the environment or a .env file; see .env.example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(result_callback=_show)
def options(
    context: typer.Context,
    env_file: Annotated[
        Path | None, typer.Option(help="Settings file in place of AGENT_HOME/.env or ./.env.")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="The setting AGENT_HOME.")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting, before environment and file."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Take what goes before the command."""
    context.obj = given(env_file, home, sets or [], warn)


@app.command()
def start(context: typer.Context) -> None:
    """Dial the backend, take its jobs and run them. First Ctrl-C: save and leave; second: leave now.

    Example: BACKEND_URL=https://app.finetunelab.ai API_KEY=wak_... training-agent start
    """
    raise typer.Exit(run_start(settings_of(context)))


@app.command()
def hub(
    context: typer.Context,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the hub keeps its state; else AGENT_HOME/hub.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Accept this key; else a new one is made and printed once.")
    ] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Serve no web page.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the reference backend: agents dial it, its page shows them. Needs the extra `hub`.

    Example: training-agent hub --port 8400 --data-dir ./hub
    """
    command = [sys.executable, "-m", "agent.hub"]
    folder = data_dir or settings_of(context).agent_home / "hub"
    wishes = {"--port": port, "--data-dir": folder, "--host": host, "--api-key": api_key}
    for name, value in wishes.items():
        command += [name, str(value)] if value is not None else []
    command += ["--no-page"] if no_page else []
    command += ["--json"] if as_json else []
    if os.name == "posix":
        # The hub takes this process's place, so that signals reach it and nothing else.
        os.execv(sys.executable, command)  # noqa: S606 - a list, no shell
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def demo(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model of yours: a folder, or a Hub name.")] = "",
    data: Annotated[str, typer.Option(help="A data set of yours: a file, or a Hub name.")] = "",
    home: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
    port: Annotated[int, typer.Option(help="The page's port; 0 takes a free one.")] = 0,
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", help="Leave when the model is done.")
    ] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a small model with no account, no GPU and no network, and watch it on a page.

    Example: training-agent demo --data my.jsonl --exit-when-done --no-browser
    """
    from agent import cli_show
    from agent import demo as demonstration

    folder = home or settings_of(context).agent_home / "demo"
    wish = demonstration.Wish(
        home=folder.resolve(),
        model=model,
        data=data,
        port=port,
        stay=not exit_when_done,
        browser=not no_browser,
    )
    tenths = cli_show.Tenths()
    with cli_show.bar(to_stderr=False, quiet=as_json) as bar:
        task = bar.add_task("demo", total=None, figures="")

        def tell(news: demonstration.News) -> None:
            if as_json:
                print(cli_show.line(news), flush=True)
                return
            if news.job:
                _advance(
                    bar,
                    task,
                    tenths,
                    str(news.job["state"]),
                    news.job.get("current_step") or 0,
                    news.job.get("total_steps"),
                    cli_show.figures(news.job),
                )
            if news.text:
                bar.console.print(news.text, markup=False, highlight=False, soft_wrap=True)

        code = demonstration.run(wish, tell)
    raise typer.Exit(code)


@app.command()
def run(
    context: typer.Context,
    job: JobPath,
    data: Annotated[Path | None, typer.Option(help="The data set: a file or saved folder.")] = None,
    job_id: Annotated[str, typer.Option(help="Id of the job; else made from the file's content.")] = "",
    accept_changes: AcceptChanges = False,
    as_json: AsJson = False,
) -> None:
    """Run one job with no backend. Ctrl-C pauses it, and the same command goes on.

    With --json: one object a line, every metric and state, the last with the result.

    Example: training-agent run job.yaml --data train.jsonl
    """
    import anyio

    from agent import cli_jobfile, cli_show
    from agent.app import run_job
    from agent.cli_remote import checked
    from protocol.lifecycle import JobState

    settings = settings_of(context)
    file = cli_jobfile.read(job)
    dataset_path = file.dataset_path
    if data is not None:
        # Named by the owner at the keyboard, who may allow any folder.
        data = data.resolve()
        settings = msgspec.structs.replace(settings, datasets_dir=data.parent)
        dataset_path = str(data)
    name = checked(job_id or file.job_id or cli_jobfile.stable_id(job, file, dataset_path))
    log_to(settings, to_stderr=False)
    told = cli_show.Told()
    tenths = cli_show.Tenths()
    with cli_show.bar(to_stderr=True, quiet=as_json) as bar:
        task = bar.add_task("starting", total=None, figures="")

        def on_update(view: "JobView", point: "PointView | None") -> None:
            if as_json:
                for text in told.lines(view, point):
                    print(text, flush=True)
                return
            state = view.phase if view.state is JobState.PREPARING and view.phase else view.state
            figures = cli_show.figures(view.values)
            _advance(bar, task, tenths, state, view.step, view.total_steps or None, figures)

        running = partial(
            run_job,
            settings,
            file.config,
            job_id=name,
            dataset_path=dataset_path,
            name=file.name,
            accept_changes=accept_changes,
            on_update=on_update,
        )
        try:
            view = anyio.run(running)
        except* AgentError as group:
            raise leaf(group) from None
    if as_json:
        print(cli_show.line(cli_show.result(view)), flush=True)
    else:
        print(cli_show.outcome(view), file=sys.stdout if view.state is JobState.COMPLETED else sys.stderr)
    codes = {JobState.COMPLETED: Exit.OK, JobState.PAUSED: cli_show.EXIT_PAUSED}
    raise typer.Exit(codes.get(view.state, Exit.JOB_FAILED))


def _advance(
    bar: "Progress", task: "TaskID", tenths: "Tenths", state: str, step: int, total: int | None, figures: str
) -> None:
    bar.update(task, description=state, completed=step, total=total, figures=figures)
    line = tenths.line(state, step, total, figures) if bar.disable else None
    if line:
        bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


app.add_typer(checking)
app.add_typer(commands)
app.add_typer(branching)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; an error is one sentence on standard error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: app(words), debug="--debug" in words))
