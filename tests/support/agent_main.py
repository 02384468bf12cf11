"""The real agent with the shipped fake trainer: `python -m tests.support.agent_main`."""

import sys

import anyio

if __name__ == "__main__":
    from agent.app import run_agent
    from agent.config import load_for_program
    from agent.logs import set_up

    settings = load_for_program()
    set_up(settings.log_level, settings.agent_home / "agent.log")
    sys.exit(anyio.run(lambda: run_agent(settings, module="agent.trainer.fake")))
