import ctypes
import os
import subprocess
import sys

from agent.runtime.environment import child_env, cut_own_environment, make_undumpable

OWNERS = {
    "PATH": "/bin",
    "HOME": "/home/o",
    "LC_ALL": "C.UTF-8",
    "CUDA_HOME": "/usr/local/cuda",
    "NVIDIA_DRIVER_CAPABILITIES": "compute",
    "HF_HOME": "/cache",
    "OMP_NUM_THREADS": "8",
    "https_proxy": "http://proxy:1",
    "API_KEY": "wak_1",
    "BACKEND_URL": "https://b",
    "HF_TOKEN": "hf_1",
    "WANDB_API_KEY": "w1",
    "AWS_SECRET_ACCESS_KEY": "a1",
    "NVIDIA_API_KEY": "nv1",
    "CUDA_VISIBLE_DEVICES": "0,1,2",
    "LD_LIBRARY_PATH": "/usr/lib/nvidia",
    "SOMETHING_ELSE": "1",
}


def test_no_secret_reaches_the_trainer_that_the_owner_did_not_list() -> None:
    env = child_env(OWNERS, devices="1", workspace="/w", passed=(), threads=None)
    assert not {"wak_1", "hf_1", "w1", "a1", "nv1", "https://b"} & set(env.values())
    assert "SOMETHING_ELSE" not in env
    listed = child_env(OWNERS, devices="1", workspace="/w", passed=("HF_TOKEN", "ABSENT"), threads=None)
    assert set(listed) - set(env) == {"HF_TOKEN"}
    assert listed["HF_TOKEN"] == "hf_1"


def test_the_trainer_has_what_it_needs_and_its_own_device_and_folder() -> None:
    env = child_env(OWNERS, devices="1", workspace="/w", passed=(), threads=2)
    kept = ("PATH", "HOME", "LC_ALL", "CUDA_HOME", "NVIDIA_DRIVER_CAPABILITIES", "HF_HOME", "https_proxy")
    assert {name: env[name] for name in kept} == {name: OWNERS[name] for name in kept}
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")
    assert env["TMPDIR"] == "/w"
    assert env["OMP_NUM_THREADS"] == "2"
    unset = child_env(OWNERS, devices="", workspace="/w", passed=(), threads=None)
    assert (unset["OMP_NUM_THREADS"], unset["CUDA_VISIBLE_DEVICES"]) == ("8", "")


def test_the_agent_cuts_its_own_environment() -> None:
    environ = dict(OWNERS)
    cut_own_environment(environ, keep=["SOMETHING_ELSE"])
    assert set(OWNERS) - set(environ) == {
        "API_KEY",
        "BACKEND_URL",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "NVIDIA_API_KEY",
    }


def test_the_agent_is_undumpable_and_its_children_are_not() -> None:
    show = "import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)"
    code = (
        f"{show}; import subprocess, sys; from agent.runtime.environment import make_undumpable;"
        f"make_undumpable(); {show};"
        f"subprocess.run([sys.executable, '-S', '-c', {show!r}], check=True)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["1", "0", "1"]


def test_nothing_of_this_process_was_changed() -> None:
    # Both act on what they are given, or on a process of their own.
    assert "PATH" in os.environ
    assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 1
    assert callable(make_undumpable)
