"""`python -m agent.hub`: the reference backend."""

import argparse
import asyncio
import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.hub.auth import Keys
from agent.hub.errors import CannotStart
from agent.hub.hub import Hub
from agent.hub.lock import only_one
from agent.hub.server import bind, serve
from agent.hub.store import Store

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training-agent hub", description="The reference backend.")
    parser.add_argument("--port", type=int, default=8400, help="0 = any free port")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the database and uploads lie")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--api-key", help="a key to accept; without it one is made and shown once")
    parser.add_argument("--no-page", action="store_true", help="serve no web page")
    parser.add_argument("--json", action="store_true", help="say where it listens as a line of JSON")
    return parser.parse_args(argv)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def _run(args: argparse.Namespace) -> None:
    listener = bind(args.host, args.port)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    store = Store(args.data_dir / "hub.sqlite3")
    try:
        keys = Keys(store, args.api_key)
        made = None if args.api_key else await keys.first()
        hub = Hub(store, keys, args.data_dir)
        if args.no_page:
            # A hub without a page does not load the page's libraries.
            from agent.hub.app import bare

            app = bare(hub)
        else:
            from agent.hub.pages import with_page

            app = with_page(hub, open_to_all=args.host in LOOPBACK)

        def ready() -> None:
            if args.json:
                _say(msgspec.json.encode({"url": url, "api_key": made, "page": not args.no_page}).decode())
                return
            _say(f"The hub listens on {url}")
            if made is not None:
                _say(f"Its API key, shown this once: {made}")

        # What was loaded so far lives as long as the process: no collection need look at it again.
        gc.collect()
        gc.freeze()
        await serve(app, hub, listener, ready).serve([listener])
    finally:
        store.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; return the exit code."""
    args = _arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("httpx", "websockets", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        os.umask(0o077)
        args.data_dir.mkdir(parents=True, exist_ok=True)
        with only_one(args.data_dir):
            asyncio.run(_run(args))
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return 3
    except OSError as error:
        sys.stderr.write(f"cannot use --data-dir {args.data_dir}: {error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
