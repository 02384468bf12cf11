"""The real agent with the shipped fake trainer: `python -m tests.support.agent_main`."""

import sys

import anyio

if __name__ == "__main__":
    from agent.app import run_agent
    from agent.cli_start import log_to
    from agent.config import load_for_program

    settings = load_for_program()
    redactor = log_to(settings)
    sys.exit(anyio.run(lambda: run_agent(settings, module="agent.trainer.fake", redactor=redactor)))
