"""`/`: the agents and the jobs."""

from nicegui import ui
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from agent.hub.feed import AGENTS, Watch
from agent.hub.hub import Hub
from agent.hub.model import Agent, Job
from agent.hub.pages import words
from agent.hub.pages.live import follow
from agent.hub.pages.login import logged_in
from agent.hub.pages.parts import frame, heading
from agent.hub.status import progress
from agent.hub.store import Db
from agent.hub.tables import list_agents, list_jobs

SHOWN = 50


def add(hub: Hub, open_to_all: bool) -> None:
    """Serve `/`."""

    async def overview(request: Request) -> Response | None:
        if not logged_in(request, open_to_all):
            return RedirectResponse("/login")
        agents, jobs = await _read(hub)
        show_agents, show_jobs = ui.refreshable(_agents), ui.refreshable(_jobs)
        with frame("Overview"):
            heading("Agents")
            show_agents(hub, agents)
            heading("Jobs")
            show_jobs(jobs)

        async def update(watch: Watch) -> None:
            watch.take()
            agents, jobs = await _read(hub)
            show_agents.refresh(hub, agents)
            show_jobs.refresh(jobs)

        follow(hub.feed, AGENTS, update)
        return None

    ui.page("/")(overview)


def _agents(hub: Hub, agents: list[Agent]) -> None:
    with ui.row().classes("w-full gap-3"):
        for agent in agents:
            _agent(agent, agent.id in hub.lines, hub.clock())
        if not agents:
            with ui.column().classes("box p-4 w-full gap-1"):
                ui.label("No agent has connected yet.")
                ui.label(
                    "On the machine with the GPU: set BACKEND_URL to this address and API_KEY to this "
                    "hub's key, then run training-agent start."
                ).classes("quiet text-sm")


def _jobs(jobs: list[Job]) -> None:
    with ui.column().classes("box w-full gap-0 overflow-hidden"):
        for job in jobs:
            _job(job)
        if not jobs:
            ui.label("No job was submitted yet.").classes("p-4 quiet")


async def _read(hub: Hub) -> tuple[list[Agent], list[Job]]:
    def op(db: Db) -> tuple[list[Agent], list[Job]]:
        return list_agents(db), list_jobs(db, limit=SHOWN)[0]

    return await hub.store.read(op)


def _agent(agent: Agent, connected: bool, now: float) -> None:
    with ui.column().classes("box p-4 gap-1 min-w-72"):
        with ui.row().classes("items-center gap-2"):
            ui.icon("circle", color="positive" if connected else "grey").classes("text-xs")
            ui.label(agent.hostname or agent.id).classes("font-medium")
            ui.label(words.presence(agent, connected, now)).classes("quiet text-sm")
        ui.label(words.hardware(agent)).classes("text-sm")
        figures = [
            f"{label} {words.figure(agent.figures[name], 3)}{unit}"
            for name, label, unit in (
                ("gpu_utilization_percent", "GPU", " %"),
                ("cpu_percent", "CPU", " %"),
                ("memory_used_gb", "memory", " GB"),
            )
            if agent.figures.get(name) is not None
        ]
        ui.label(" - ".join([agent.id, agent.version or "", *figures])).classes("quiet text-xs number")


def _job(job: Job) -> None:
    with (
        ui.link(target=f"/jobs/{job.id}").classes("no-underline text-inherit w-full"),
        ui.row().classes("job-row w-full items-center gap-4 px-4 py-3 no-wrap"),
    ):
        with ui.column().classes("gap-0 w-1/3 min-w-0"):
            ui.label(job.name or job.model_name).classes("font-medium ellipsis w-full")
            ui.label(job.id).classes("quiet text-xs ellipsis w-full")
        with ui.row().classes("w-56"):
            ui.badge(words.state(job), color=words.colour(job)).props("data-testid=state")
        with ui.column().classes("grow gap-1"):
            ui.linear_progress(progress(job) / 100, show_value=False, color=words.colour(job)).props(
                "rounded"
            )
            steps = f"step {job.step} of {job.total_steps}" if job.total_steps else f"step {job.step}"
            ui.label(f"{progress(job)} % - {steps}").classes("quiet text-xs number")
        ui.label(f"loss {words.figure(job.figures.get('train_loss'))}").classes("number w-28 text-right")
