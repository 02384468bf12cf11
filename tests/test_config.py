"""Settings: precedence, slips, secrets, and the documents made from them."""

import ast
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import config
from agent.config import NAMES, Secret, Settings, load
from agent.errors import BadSetting

ROOT = Path(__file__).parent.parent
HOME = {"HOME": "/home/owner"}

OTHER = {
    "BACKEND_URL": "https://backend.example/base",
    "API_KEY": "wak_other",
    "API_KEY_FILE": "",
    "AGENT_ID": "agent_other",
    "AGENT_HOME": "/srv/agent",
    "HOST": "::1",
    "PORT": "8111",
    "LOCAL_API": "no",
    "LOCAL_API_OPEN": "yes",
    "MODELS_DIR": "/srv/m",
    "DATASETS_DIR": "/srv/d",
    "CHECKPOINTS_DIR": "/srv/c",
    "LOGS_DIR": "/srv/l",
    "GPU_MEMORY_FRACTION": "0.5",
    "ENABLE_MIXED_PRECISION": "off",
    "MAX_CONCURRENT_JOBS": "3",
    "CHECKPOINT_INTERVAL_STEPS": "7",
    "METRICS_REPORT_INTERVAL_STEPS": "4",
    "GPU_MONITORING_INTERVAL_SECONDS": "2.5",
    "HEARTBEAT_INTERVAL_SECONDS": "9",
    "LOG_LEVEL": "debug",
    "LOG_JSON": "1",
    "ALLOW_PLAIN_HTTP": "true",
    "WARM_TRAINER": "true",
    "ALLOW_REMOTE_CODE": "a/b, c/d",
    "ALLOW_HUB": "false",
    "PASS_TO_TRAINER": "HF_TOKEN",
    "SHARE_LOGS": "false",
    "SHARE_HOSTNAME": "false",
    "STOP_GRACE_SECONDS": "30",
    "OUTBOX_MAX_MB": "64",
    "TRAINER_THREADS": "2",
    "DEVICES": "1,GPU-5ab3-77",
    "HOST_MEMORY_RESERVE_MB": "0",
    "STALL_FACTOR": "2.5",
    "STALL_MIN_SECONDS": "9",
    "VERIFY_RESUME": "3",
    "BACKGROUND_SAVES": "no",
    "COMPRESS_CHECKPOINTS": "yes",
    "BAD_KEY_SLEEP": "60",
    "BACKEND_TRANSPORT": "poll",
    "POLL_INTERVAL_SECONDS": "20",
    "DATASET_MAP": "u/private/a.jsonl.gz=chat.jsonl",
    "DATASET_HOSTS": "files.example.com",
    "DATASET_MAX_MB": "50",
}


def test_every_setting_is_taken_from_the_environment() -> None:
    assert set(OTHER) == set(NAMES)
    defaults, changed = load(HOME), load({**HOME, **OTHER})
    same = [name for name in NAMES if getattr(defaults, name.lower()) == getattr(changed, name.lower())]
    assert same == ["API_KEY_FILE"]  # the same source cannot give both it and API_KEY
    assert changed.devices == ("1", "GPU-5ab3-77")
    assert changed.allow_remote_code == ("a/b", "c/d")
    assert changed.log_level == "DEBUG"


def test_folders_lie_under_the_home_and_loading_makes_none(tmp_path: Path) -> None:
    settings = load({"AGENT_HOME": str(tmp_path / "home")})
    assert settings.models_dir == tmp_path / "home" / "models"
    assert settings.logs_dir == tmp_path / "home" / "logs"
    assert list(tmp_path.iterdir()) == []


def test_the_home_is_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, environ, home in [
        ("linux", HOME, "/home/owner/.local/share/finetunelab-agent"),
        ("linux", {**HOME, "XDG_DATA_HOME": "/data"}, "/data/finetunelab-agent"),
        ("darwin", HOME, "/home/owner/Library/Application Support/finetunelab-agent"),
        ("win32", {**HOME, "LOCALAPPDATA": "/local"}, "/local/finetunelab-agent"),
    ]:
        monkeypatch.setattr(config.sys, "platform", platform)
        assert load(environ).agent_home == Path(home)


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("PORT=1\nHOST=127.0.0.2\nMAX_CONCURRENT_JOBS=2\nLOG_LEVEL=ERROR\n")
    environ = {**HOME, "PORT": "2", "HOST": "127.0.0.3", "LOG_LEVEL": " "}
    settings = load(environ, file, {"PORT": "3"})
    assert (settings.port, settings.host, settings.max_concurrent_jobs) == (3, "127.0.0.3", 2)
    assert settings.log_level == "ERROR", "an empty value in the environment counts as not set"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "eight", "PORT: 'eight' is not allowed; it takes a whole number from 0 to 65535"),
        ("PORT", "65536", "whole number from 0 to 65535"),
        ("MAX_CONCURRENT_JOBS", "0", "whole number from 1 to 16"),
        ("GPU_MEMORY_FRACTION", "0", "a number above 0 to 1"),
        ("GPU_MEMORY_FRACTION", "nan", "a number above 0 to 1"),
        ("STOP_GRACE_SECONDS", "inf", "a number from 1 to 86400"),
        ("ENABLE_MIXED_PRECISION", "perhaps", "true or false"),
        ("LOG_LEVEL", "LOUD", "DEBUG, INFO, WARNING, ERROR"),
        ("AGENT_ID", "agent_x", "`agent_` and 4 to 64"),
        ("DEVICES", "0,one", "names, with commas between"),
        ("PASS_TO_TRAINER", "A B", "names, with commas between"),
        ("PASS_TO_TRAINER", "API_KEY", "never given to a trainer"),
        ("BACKEND_URL", "ftp://a.example", "it takes an address such as https://"),
        ("BACKEND_URL", "app.finetunelab.ai", "it takes an address such as https://"),
        ("BACKEND_URL", "https://a.example/?key=1", "leave out what follows ?"),
        ("BACKEND_URL", "https://a.example:port", "is no address"),
        ("BACKEND_URL", "http://a.example", "unencrypted"),
        ("BACKEND_URL", "http://127.0.0.1.evil.example", "unencrypted"),
    ],
)
def test_a_bad_value_is_an_error_that_names_it(name: str, value: str, expected: str) -> None:
    with pytest.raises(BadSetting) as caught:
        load({**HOME, name: value})
    assert caught.value.name == name
    assert expected in str(caught.value)
    assert caught.value.exit_code == 3


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(BadSetting) as caught:
        load({**HOME, "BACKEND_URL": "https://me:hunter2@a.example"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:3000", "http://127.0.0.9:1", "http://[::1]:1/", "none"])
def test_plain_http_reaches_this_machine(url: str) -> None:
    assert load({**HOME, "BACKEND_URL": url}).backend_url in (url.rstrip("/"), "")


def test_plain_http_goes_further_only_where_the_owner_says_so() -> None:
    url = "http://lab-box.example:3000"
    assert load({**HOME, "BACKEND_URL": url, "ALLOW_PLAIN_HTTP": "true"}).backend_url == url
    with pytest.raises(BadSetting, match="unencrypted"):
        load({**HOME, "BACKEND_URL": url, "ALLOW_PLAIN_HTTP": "false"})


def test_an_open_local_api_is_refused_beyond_loopback() -> None:
    with pytest.raises(BadSetting, match="LOCAL_API_OPEN: true is refused"):
        load({**HOME, "HOST": "192.168.1.4", "LOCAL_API_OPEN": "true"})


def test_a_slip_in_a_name_is_an_error_in_the_file_and_a_warning_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("MAX_CONCURENT_JOBS=2\n")
    with pytest.raises(BadSetting) as caught:
        load(HOME, file)
    assert str(caught.value) == (
        f"MAX_CONCURENT_JOBS: is no setting of the agent; did you mean MAX_CONCURRENT_JOBS? ({file})"
    )
    warnings: list[str] = []
    load({**HOME, "MODEL_DIR": "x", "HOSTNAME": "box", "HF_TOKEN": "t"}, warn=warnings.append)
    assert warnings == ["MODEL_DIR in the environment is no setting of the agent; did you mean MODELS_DIR?"]


def test_a_name_that_is_nothing_like_ours_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("DATABASE_URL=postgres://x\nHF_TOKEN=hf_1\nPASS_TO_TRAINER=HF_TOKEN\n")
    warnings: list[str] = []
    settings = load(HOME, file, warn=warnings.append)
    assert len(warnings) == 1 and warnings[0].startswith(f"DATABASE_URL in {file}")
    assert settings.trainer_environment == {"HF_TOKEN": Secret("hf_1")}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="cannot read"):
        load(HOME, tmp_path / "none.env")
    (tmp_path / "bytes.env").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadSetting, match="cannot read"):
        load(HOME, tmp_path / "bytes.env")


def test_the_file_in_the_home_goes_before_the_one_in_the_folder(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir()
    folder.mkdir()
    environ = {"AGENT_HOME": str(home)}
    assert config.find_dotenv(environ, {}, folder) is None
    (folder / ".env").touch()
    assert config.find_dotenv(environ, {}, folder) == folder / ".env"
    (home / ".env").touch()
    assert config.find_dotenv(environ, {}, folder) == home / ".env"


def test_a_dollar_in_a_key_stays(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("API_KEY=wak_${HOME}x\n")
    key = load(HOME, file).api_key
    assert key is not None and key.reveal() == "wak_${HOME}x"


def test_the_key_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("wak_filed\n")
    file.chmod(0o644)
    warnings: list[str] = []
    settings = load({**HOME, "API_KEY_FILE": str(file)}, warn=warnings.append)
    assert settings.api_key == Secret("wak_filed")
    assert "chmod 600" in warnings[0]
    with pytest.raises(BadSetting, match="given twice"):
        load({**HOME, "API_KEY_FILE": str(file), "API_KEY": "wak_b"})
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"API_KEY_FILE={file}\n")
    assert load({**HOME, "API_KEY": "wak_b"}, dotenv).api_key == Secret("wak_b")
    file.write_text("\n")
    with pytest.raises(BadSetting, match="is empty"):
        load({**HOME, "API_KEY_FILE": str(file)})
    with pytest.raises(BadSetting, match="API_KEY_FILE: cannot read"):
        load({**HOME, "API_KEY_FILE": str(tmp_path / "gone")})


def test_a_broken_key_is_refused_without_showing_it() -> None:
    for value in ("wak_a b", "wak_\u00e9t\u00e9", "wak_a\nb"):
        with pytest.raises(BadSetting) as caught:
            load({**HOME, "API_KEY": value})
        assert "wak_" not in str(caught.value)


def test_an_agent_with_a_backend_needs_a_key() -> None:
    with pytest.raises(BadSetting, match="API_KEY: is not set"):
        config.dialable(load(HOME))
    config.dialable(load({**HOME, "BACKEND_URL": "none"}))
    config.dialable(load({**HOME, "API_KEY": "wak_1"}))


def test_no_text_and_no_encoder_shows_a_secret() -> None:
    secret = Secret("wak_hidden")
    settings = load({**HOME, "API_KEY": "wak_hidden"})
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r:>40}",
        f"{secret:x}",
        repr(settings),
        f"{settings}",
    ]
    assert not [text for text in shown if "hidden" in text]
    attempts: list[Any] = [
        lambda: "key: " + secret,  # type: ignore[operator]
        lambda: "".join([secret]),  # type: ignore[list-item]
        lambda: msgspec.json.encode(secret),
        lambda: msgspec.msgpack.encode(settings),
        lambda: pickle.dumps(secret),
        lambda: pickle.dumps(settings),
        lambda: b"" + secret,  # type: ignore[operator]
    ]
    for attempt in attempts:
        with pytest.raises(TypeError):
            attempt()
    assert secret.reveal() == "wak_hidden"
    assert secret == Secret("wak_hidden") != Secret("wak_other")


def test_settings_are_frozen_and_closed() -> None:
    settings = load(HOME)
    with pytest.raises(AttributeError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(agent_home=Path(), nope=1)  # type: ignore[call-arg]


def test_the_example_is_the_one_the_code_prints() -> None:
    assert (ROOT / ".env.example").read_text() == config.example()


def test_the_example_with_every_line_uncommented_can_be_loaded(tmp_path: Path) -> None:
    lines = [line.removeprefix("# ") for line in config.example().splitlines()]
    settings_lines = [line for line in lines if line.split("=")[0] in NAMES]
    assert len(settings_lines) == len(NAMES)
    file = tmp_path / ".env"
    file.write_text("\n".join(line for line in settings_lines if "AGENT_HOME" not in line))
    assert load(HOME, file) == load(HOME)


def test_the_table_of_the_readme_is_the_one_the_code_prints() -> None:
    assert config.settings_table() in (ROOT / "README.md").read_text()


def test_only_config_reads_the_environment() -> None:
    readers = set()
    for path in [*ROOT.glob("agent/**/*.py"), *ROOT.glob("protocol/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                node.attr
                if isinstance(node, ast.Attribute)
                else node.id
                if isinstance(node, ast.Name)
                else ""
            )
            if name in ("environ", "environb", "getenv", "putenv") and not _is_argument(path, node):
                readers.add(str(path.relative_to(ROOT)))
    # A trainer's and a hub's processes are programs of their own, and boot.py sets a child's environment.
    others = {path for path in readers if path.startswith(("agent/trainer/", "agent/hub/", "agent/setup/"))}
    assert readers - others - {"agent/runtime/boot.py"} == {"agent/config.py"}


def _is_argument(path: Path, node: ast.AST) -> bool:
    """A name `environ` that is a parameter reads nothing."""
    return isinstance(node, ast.Name) and "import environ" not in path.read_text()
