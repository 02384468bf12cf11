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

_FIGURES = (
    ("gpu_utilization_percent", "GPU", " %"),
    ("cpu_percent", "CPU", " %"),
    ("memory_used_gb", "memory", " GB"),
)


def add(hub: Hub, open_to_all: bool) -> None:
    """Serve `/`."""

    async def overview(request: Request) -> Response | None:
        if not logged_in(request, open_to_all):
            return RedirectResponse("/login")
        with frame("Overview"):
            page = Overview(hub)
        page.draw(*await page.read())

        async def update(watch: Watch) -> None:
            watch.take()
            page.draw(*await page.read())

        follow(hub.feed, AGENTS, update)
        return None

    ui.page("/")(overview)


class Overview:
    """Both lists. An update touches what has changed and no more: it must cost a training machine nothing."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        heading("Agents")
        self._agents = ui.row().classes("w-full gap-3")
        heading("Jobs")
        self._jobs = ui.column().classes("box w-full gap-0 overflow-hidden")
        self._cards: dict[str, AgentCard] = {}
        self._rows: dict[str, JobRow] = {}
        self._drawn: tuple[list[str], list[str]] | None = None

    async def read(self) -> tuple[list[Agent], list[Job]]:
        def op(db: Db) -> tuple[list[Agent], list[Job]]:
            return list_agents(db), list_jobs(db, limit=SHOWN)[0]

        return await self._hub.store.read(op)

    def draw(self, agents: list[Agent], jobs: list[Job]) -> None:
        """Bring both lists up to date."""
        names = [agent.id for agent in agents], [job.id for job in jobs]
        if names != self._drawn:
            self._drawn = names
            self._build(agents, jobs)
        now = self._hub.clock()
        for agent in agents:
            self._cards[agent.id].update(agent, agent.id in self._hub.lines, now)
        for job in jobs:
            self._rows[job.id].update(job)

    def _build(self, agents: list[Agent], jobs: list[Job]) -> None:
        self._agents.clear()
        self._jobs.clear()
        with self._agents:
            self._cards = {agent.id: AgentCard(agent) for agent in agents}
            if not agents:
                with ui.column().classes("box p-4 w-full gap-1"):
                    ui.label("No agent has connected yet.")
                    ui.label(
                        "On the machine with the GPU: set BACKEND_URL to this address and API_KEY to this "
                        "hub's key, then run training-agent start."
                    ).classes("quiet text-sm")
        with self._jobs:
            self._rows = {job.id: JobRow(job) for job in jobs}
            if not jobs:
                ui.label("No job was submitted yet.").classes("p-4 quiet")


class AgentCard:
    """One agent."""

    def __init__(self, agent: Agent) -> None:
        with ui.column().classes("box p-4 gap-1 min-w-72"):
            with ui.row().classes("items-center gap-2"):
                self._light = ui.icon("circle", color="grey").classes("text-xs")
                self._name = ui.label().classes("font-medium")
                self._presence = ui.label().classes("quiet text-sm")
            self._hardware = ui.label().classes("text-sm")
            self._figures = ui.label().classes("quiet text-xs number")
        self._connected: bool | None = None

    def update(self, agent: Agent, connected: bool, now: float) -> None:
        if connected is not self._connected:
            self._connected = connected
            self._light.props(f"color={'positive' if connected else 'grey'}")
        self._name.text = agent.hostname or agent.id
        self._presence.text = words.presence(agent, connected, now)
        self._hardware.text = words.hardware(agent)
        figures = [
            f"{label} {words.figure(agent.figures[name], 3)}{unit}"
            for name, label, unit in _FIGURES
            if agent.figures.get(name) is not None
        ]
        self._figures.text = " - ".join([agent.id, agent.version or "", *figures])


class JobRow:
    """One job."""

    def __init__(self, job: Job) -> None:
        with (
            ui.link(target=f"/jobs/{job.id}").classes("no-underline text-inherit w-full"),
            ui.row().classes("job-row w-full items-center gap-4 px-4 py-3 no-wrap"),
        ):
            with ui.column().classes("gap-0 w-1/3 min-w-0"):
                ui.label(job.name or job.model_name).classes("font-medium ellipsis w-full")
                ui.label(job.id).classes("quiet text-xs ellipsis w-full")
            with ui.row().classes("w-56"):
                self._state = ui.badge().props("data-testid=state")
            with ui.column().classes("grow gap-1"):
                self._bar = ui.linear_progress(0, show_value=False).props("rounded")
                self._steps = ui.label().classes("quiet text-xs number")
            self._loss = ui.label().classes("number w-28 text-right")
        self._colour = ""

    def update(self, job: Job) -> None:
        colour = words.colour(job)
        if colour != self._colour:
            self._colour = colour
            self._state.props(f"color={colour}")
            self._bar.props(f"color={colour}")
        self._state.text = words.state(job)
        self._bar.value = progress(job) / 100
        steps = f"step {job.step} of {job.total_steps}" if job.total_steps else f"step {job.step}"
        self._steps.text = f"{progress(job)} % - {steps}"
        self._loss.text = f"loss {words.figure(job.figures.get('train_loss'))}"
