"""Who imports whom, as a machine sees it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "accelerate", "bitsandbytes", "numpy", "pandas")


@pytest.mark.parametrize(
    "module", ["agent.app", "agent.cli", "agent.net.websocket", "agent.desk", "agent.local.api"]
)
def test_the_agents_own_process_loads_nothing_of_the_training_stack(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        f"print(sorted(name for name in {HEAVY!r} if name in sys.modules))\n"
        "print(sorted(name for name in sys.modules if name.startswith(('agent.trainer', 'agent.hub'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_dialling_needs_neither_the_local_api_nor_http_nor_nvml() -> None:
    code = (
        "import sys, agent.net.websocket\n"
        "print(sorted(name for name in ('starlette', 'uvicorn', 'pynvml', 'nicegui', 'rich') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_contract_needs_only_msgspec() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import protocol.session, protocol.trainingconfig, protocol.worker, protocol.rest\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(name for name in new if name not in sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # typing_extensions is msgspec's, where it is there at all.
    assert set(ast.literal_eval(done.stdout)) - {"typing_extensions"} == {"msgspec", "protocol"}


def test_arrows_point_down() -> None:
    tool = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout
