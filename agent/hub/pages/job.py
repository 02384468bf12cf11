"""`/jobs/{id}`: one job, live, with its buttons."""

from nicegui import ui
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from agent.hub import logs
from agent.hub.errors import Refusal, StoreFailed
from agent.hub.feed import Watch
from agent.hub.hub import Hub
from agent.hub.model import Job
from agent.hub.pages import words
from agent.hub.pages.chart import LossChart
from agent.hub.pages.live import follow
from agent.hub.pages.login import logged_in
from agent.hub.pages.parts import frame, heading
from agent.hub.points import Dot, curve
from agent.hub.status import progress
from agent.hub.store import Db
from agent.hub.tables import find_job
from protocol.failures import FailureReason
from protocol.lifecycle import JobState, Want

TAIL = 300
"""Lines of the log that are shown."""

_FIGURES = (
    ("train_loss", "train loss"),
    ("eval_loss", "evaluation loss"),
    ("best_eval_loss", "best evaluation loss"),
    ("perplexity", "evaluation perplexity"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
    ("samples_per_second", "samples per second"),
    ("gpu_memory_allocated_gb", "GPU memory, GB"),
    ("gpu_utilization_percent", "GPU utilisation, %"),
)
_STARTABLE = (JobState.QUEUED, JobState.PREPARING, JobState.RUNNING)


def add(hub: Hub, open_to_all: bool) -> None:
    """Serve `/jobs/{id}`."""

    async def show(request: Request, job_id: str) -> Response | None:
        if not logged_in(request, open_to_all):
            return RedirectResponse("/login")
        job = await hub.store.read(lambda db: find_job(db, job_id))
        if job is None:
            with frame("No such job"):
                ui.label(f"There is no job {job_id} at this hub.")
            return None
        with frame(job.name or job.id):
            page = JobPage(hub, job)
        follow(hub.feed, job_id, page.update)
        return None

    ui.page("/jobs/{job_id}")(show)


class JobPage:
    """What is on the page, and how it follows the news."""

    def __init__(self, hub: Hub, job: Job) -> None:
        self._hub = hub
        self._id = job.id
        self._fresh = True
        self._colour = ""
        with ui.row().classes("w-full items-center gap-3"):
            with ui.column().classes("gap-0 grow"):
                ui.label(job.name or job.model_name).classes("text-2xl font-semibold")
                self._under = ui.label().classes("quiet text-sm")
            self._state = ui.badge().classes("text-sm").props("data-testid=state")
        with ui.row().classes("items-center gap-2"):
            self._pause = self._button("Pause", "pause", "pause")
            self._resume = self._button("Resume", "play_arrow", "resume")
            self._retry = self._button("Retry", "replay", "retry")
            self._accept = self._button("Accept changes", "rule", "retry", accept_changes=True)
            self._cancel = self._button("Cancel", "close", "cancel", "negative")
        with ui.column().classes("box p-4 w-full gap-1 border-red-500") as self._failure:
            self._sentence = ui.label().classes("font-medium text-negative").props("data-testid=failure")
            self._advice = ui.label().classes("text-sm")
        with ui.column().classes("box p-4 w-full gap-2"):
            self._bar = ui.linear_progress(0, show_value=False).props("rounded size=10px")
            self._steps = ui.label().classes("text-sm number").props("data-testid=steps")
            self._needs = ui.label().classes("text-sm quiet").props("data-testid=estimate")
            self._checked = ui.label().classes("text-sm").props("data-testid=resume_check")
        with ui.row().classes("w-full gap-3"):
            self._figures: dict[str, tuple[ui.column, ui.label]] = {}
            for name, label in _FIGURES:
                with ui.column().classes("box px-4 py-2 gap-0 min-w-32") as box:
                    ui.label(label).classes("quiet text-xs")
                    value = ui.label().classes("text-lg number").props(f"data-testid={name}")
                self._figures[name] = (box, value)
        with ui.column().classes("box p-4 w-full gap-1"):
            heading("Loss")
            self._chart = LossChart()
        self._notes = ui.column().classes("w-full gap-1")
        with ui.column().classes("box p-4 w-full gap-2"):
            heading("Log")
            self._log = ui.log(max_lines=TAIL).classes("w-full log").props("data-testid=log")
        self._draw(job, None)

    def _button(
        self, text: str, icon: str, action: str, colour: str = "primary", *, accept_changes: bool = False
    ) -> ui.button:
        async def press() -> None:
            try:
                _, told = await self._hub.control(self._id, action, accept_changes=accept_changes)
            except (Refusal, StoreFailed) as refused:
                ui.notify(str(refused), type="warning")
                return
            ui.notify(
                f"{text}: the agent was told."
                if told
                else f"{text}: noted; the agent is told when it connects."
            )

        return ui.button(text, icon=icon, color=colour, on_click=press).props(
            f"outline no-caps data-testid={'accept' if accept_changes else action}"
        )

    async def update(self, watch: Watch) -> None:
        """Bring the page up to date with what came since the last time."""
        dots, lines, missed = watch.take()
        again = self._fresh or missed
        self._fresh = False

        def op(db: Db) -> tuple[Job | None, list[Dot], list[str]]:
            job = find_job(db, self._id)
            if not again:
                return job, [], []
            return job, curve(db, self._id), logs.read(db, self._id, TAIL, -TAIL)[0]

        job, whole, tail = await self._hub.store.read(op)
        if job is None:
            return
        if again:
            self._chart.restart()
            self._log.clear()
        self._chart.add(whole if again else dots)
        for line in (tail if again else lines)[-TAIL:]:
            self._log.push(line or " ")
        self._draw(job, await self._hub.offline_since(job))

    def _draw(self, job: Job, offline_since: float | None) -> None:
        where = f"on {job.agent_id}" if job.agent_id else "no agent yet"
        if job.branched_from:
            where += f", branched from {job.facts.get('branched_from', job.branched_from)}"
        if offline_since is not None and job.live:
            where += f" (offline since {words.clock(offline_since)})"
        self._under.text = f"{job.id} - {job.model_name} - {job.method.upper()} - {where}"
        self._state.text = words.state(job)
        if self._colour != words.colour(job):
            self._colour = words.colour(job)
            self._state.props(f"color={self._colour}")
            self._bar.props(f"color={self._colour}")
        self._pause.set_visibility(job.state in _STARTABLE and job.want is not Want.PAUSE)
        self._resume.set_visibility(job.state is JobState.PAUSED or (job.live and job.want is Want.PAUSE))
        self._retry.set_visibility(job.state in (JobState.FAILED, JobState.CANCELLED))
        self._accept.set_visibility(
            job.failure is not None and job.failure.reason is FailureReason.CHECKPOINT and not job.live
        )
        self._cancel.set_visibility(job.live and job.want is not Want.CANCEL)
        self._failure.set_visibility(bool(job.error))
        self._sentence.text = job.error
        self._advice.text = job.failure.advice if job.failure else ""
        self._bar.value = progress(job) / 100
        self._steps.text = self._progress(job)
        self._needs.text = words.estimate(job.estimate) if job.estimate is not None else ""
        self._checked.text = job.resume_check["text"] if job.resume_check is not None else ""
        for name, (box, value) in self._figures.items():
            box.set_visibility(job.figures.get(name) is not None)
            value.text = words.figure(job.figures.get(name))
        self._draw_notes(job)

    def _progress(self, job: Job) -> str:
        parts = [f"{progress(job)} %"]
        parts.append(f"step {job.step} of {job.total_steps}" if job.total_steps else f"step {job.step}")
        parts.append(f"epoch {job.epoch:.2f}")
        if job.started_at is not None:
            parts.append(f"for {span_since(job, self._hub.clock())}")
        if job.status == "running" and job.figures.get("eta_seconds") is not None:
            parts.append(f"{words.span(job.figures['eta_seconds'])} left")
        if job.model_path:
            parts.append(f"model in {job.model_path}")
        return " - ".join(parts)

    def _draw_notes(self, job: Job) -> None:
        texts = [f"{words.clock(note.time)}  {note.text}" for note in job.notes[-5:]]
        if texts == [child.text for child in self._notes if isinstance(child, ui.label)]:
            return
        self._notes.clear()
        with self._notes:
            for text in texts:
                ui.label(text).classes("text-sm quiet")


def span_since(job: Job, now: float) -> str:
    """Return for how long a job has been at work."""
    return words.span((job.completed_at or now) - (job.started_at or now))
